"""Medians of functions that take turns, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

__all__ = ["interleaved", "marginal", "median", "threads_of"]

Samples = Mapping[str, Sequence[float]]
Clock = Callable[[], float]


def interleaved(
    works: Mapping[str, Callable[[], object]], *, repeats: int, device: str, clock: Clock | None = None
) -> Samples:
    """Returns seconds by name, one sample per repeat; every repeat calls each function once, in turn.

    A first turn warms up and is not counted. Seconds are CPU seconds of this process (all its threads), or on CUDA wall
    clock between two synchronisations.

    Args:
      works: what to time.
      repeats: samples per function, at least 1.
      device: where the work is done.
      clock: another clock; for tests.
    """
    now = clock or _clock(device)
    samples: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = now()
            work()
            passed = now() - began
            if repeat:
                samples[name].append(passed)
    return samples


def _clock(device: str) -> Clock:
    if not device.startswith("cuda"):
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def median(samples: Sequence[float]) -> float:
    """Returns the median."""
    return statistics.median(samples)


def marginal(few: Sequence[float], many: Sequence[float], *, more: int) -> float | None:
    """Returns what one step more costs: the median of (many - few) / more, turn by turn; None when it is not positive.

    Args:
      few: seconds of a short round, by turn.
      many: seconds of a longer round, by turn.
      more: how many steps the longer round has more.
    """
    found = median([(long - short) / more for short, long in zip(few, many, strict=True)])
    return found if found > 0 else None


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Lends a scope in which torch, and our noise with it, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
