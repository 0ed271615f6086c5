"""What a run costs: peak memory of this process and wall-clock time."""

import resource
import sys
import time
from dataclasses import dataclass, field

__all__ = ["Stopwatch", "peak_rss_mb"]


def peak_rss_mb() -> float:
    """Returns the largest resident set of this process so far, in MB (10**6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@dataclass
class Stopwatch:
    """Seconds since it was made, or since the last lap."""

    began: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Returns the seconds since the last lap and starts the next."""
        now = time.perf_counter()
        passed, self.began = now - self.began, now
        return passed
