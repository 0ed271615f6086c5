"""Shared fixtures: one thread for repeatable bits, and a cache apart from the user's."""

import pytest
import torch
from hypothesis import settings

# No test is timed: the first call of a compiled kernel takes as long as its compilation.
settings.register_profile("untimed", parent=settings(), deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)
