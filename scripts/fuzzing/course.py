"""What is tried on whom, and what came of it."""

import gc
import hashlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.mutation import Mend, as_is, edited

__all__ = ["Course", "Target", "mutate", "name_of", "same"]

Check = Callable[[bytes], bool]
_MEMORY, _MEMORY_PER_BYTE = 64 << 20, 1024
_SECONDS_PER_BYTE = 5e-6
_QUICK = 0.01  # seconds that are not looked at twice


@dataclass(frozen=True)
class Target:
    """Something that takes bytes from strangers.

    Attributes:
      name: what it is called.
      seeds: valid inputs.
      open: an empty folder -> the check: input -> whether it was taken in. It raises when the law is broken: what is
        refused is refused with the documented error, and what is taken in is a valid value.
      share: of all inputs of a campaign, in parts of no fixed sum.
      mend: what puts checksums right after an edit.
      seconds: what one input may take, beside 5 microseconds a byte.
      most: bytes of an input.
      dear: whether an input takes milliseconds, so that a chunk has fewer.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    open: Callable[[Path], Check]
    share: float
    mend: Mend = as_is
    seconds: float = 0.2
    most: int = 1 << 16
    dear: bool = False


@dataclass
class Course:
    """Tries inputs on one target and keeps count.

    Attributes:
      target: who is tried.
      check: its opened check.
      inputs: how many were tried.
      taken: how many were taken in.
      slowest: most seconds an input took, and its bytes.
      found: what was wrong -> the shortest input that showed it.
      saved: when it was written down, by the clock of `time.perf_counter`.
    """

    target: Target
    check: Check
    inputs: int = 0
    taken: int = 0
    slowest: tuple[float, int] = (0.0, 0)
    found: dict[str, bytes] = field(default_factory=dict)
    saved: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _memory: int = field(default_factory=lambda: _peak())

    def warm_(self) -> None:
        """Takes the valid inputs, uncounted: what is compiled or imported at a first use is nobody's slowness."""
        for seed in self.target.seeds():
            self.check(seed)
        self._memory, self._began = _peak(), time.perf_counter()

    def try_(self, data: bytes) -> None:
        """Tries one input."""
        self.inputs += 1
        began = time.thread_time()
        try:
            self.taken += self.check(data)
        except Exception as error:
            self._note(_what(error), data)
        spent, size = time.thread_time() - began, len(data)
        if spent > self.slowest[0]:
            self._slow(data, spent)
        peak = _peak()
        if peak - self._memory > _MEMORY + _MEMORY_PER_BYTE * size:
            self._note("more memory than 64 MiB and 1 KiB a byte", data)
        self._memory = peak

    def _slow(self, data: bytes, spent: float) -> None:
        """Notes the slowest input, by the best of three: the collector's work is not its own."""
        for _ in range(2 if spent > _QUICK else 0):
            gc.collect()
            began = time.thread_time()
            try:
                self.check(data)
            except Exception as error:
                self._note(_what(error), data)
            spent = min(spent, time.thread_time() - began)
        if spent > self.slowest[0]:
            self.slowest = spent, len(data)
        if spent > self.target.seconds + _SECONDS_PER_BYTE * len(data):
            self._note(f"more time than {self.target.seconds:g} s and 5 us a byte", data)

    def _note(self, what: str, data: bytes) -> None:
        if what not in self.found or len(data) < len(self.found[what]):
            self.found[what] = data

    def row(self) -> dict[str, Any]:
        """Returns what to record."""
        return {
            "target": self.target.name,
            "inputs": self.inputs,
            "taken": self.taken,
            "seconds": round(time.perf_counter() - self._began, 1),
            "crashes": len(self.found),
            "slowest_ms": round(self.slowest[0] * 1e3, 2),
            "slowest_bytes": self.slowest[1],
            "memory_mb": round(_peak() / 1e6),
            "found": sorted(self.found),
        }


def mutate(course: Course, inputs: int, *, seed: int) -> None:
    """Tries edited seeds, without looking at what they reach; the same seed gives the same inputs."""
    target, rng = course.target, Random(seed)
    seeds = list(target.seeds())
    for _ in range(inputs):
        data = edited(rng.choice(seeds), rng, others=seeds, most=target.most)
        course.try_(target.mend(data, rng))


def same(got: object, wanted: object) -> None:
    """Does nothing when the two are equal; otherwise a law is broken."""
    if got != wanted:
        raise AssertionError(f"{str(got)[:70]} instead of {str(wanted)[:70]}")


def _what(error: Exception) -> str:
    """Returns what was raised and where, so that one fault counts once."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "fedmezo" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _peak() -> int:
    """Returns the most memory this process ever had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def name_of(data: bytes) -> str:
    """Returns a file name for an input."""
    return hashlib.sha256(data).hexdigest()[:16]
