"""Shared fixtures: threads for repeatable bits, small data, and a network whose waits are short."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No test is timed: the first call of a compiled kernel takes as long as its compilation.
settings.register_profile("untimed", parent=settings(), deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="module", autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A run sets the threads it is configured with; the next module finds those of the session."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads take several times as long on models this small when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["mkl", "onednn"])
def both_libraries(request, monkeypatch) -> Iterator[None]:
    """Models this small would not meet the library that large ones are computed with."""
    from fedmezo.models.linear import onednn_pays

    monkeypatch.setenv("FEDMEZO_LINEAR", request.param)
    monkeypatch.setattr("fedmezo.models.linear._SMALL", 1)
    monkeypatch.setattr("fedmezo.models.linear._FEW", 1)
    onednn_pays.cache_clear()
    yield
    onednn_pays.cache_clear()


@pytest.fixture
def no_waiting(monkeypatch) -> None:
    """A server that looks for answers as often as it can."""
    from fedmezo.runtime import distant

    for name, seconds in {"_POLL": 0.0005, "_GREET": 0.0, "_PAUSE": 0.002}.items():
        monkeypatch.setattr(distant, name, seconds)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """A file of sixty short records, the module's own."""
    from tiny_runs import write_records

    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def data(records) -> Path:
    """The same file, for tests that speak of data."""
    return records
