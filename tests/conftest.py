"""Shared fixtures: one thread for repeatable bits, and a cache apart from the user's."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)
