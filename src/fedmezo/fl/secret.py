"""Random numbers that only who has a secret can tell: the same name gives the same number, on every machine.

Everything else that is random in a run has a name that everyone knows. Noise that shall hide something, and samples
that nobody shall know, are named by a secret too: HMAC-SHA256 of (secret, question, place), and SHAKE-256 of that.
"""

import hashlib
import hmac
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from fedmezo.errors import RunError

__all__ = ["Stream", "drawn"]

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Stream:
    """Random numbers by name, the same ones for the same secret and question."""

    secret: bytes = field(repr=False)
    question: bytes

    def name(self, *place: str | int) -> bytes:
        """Returns 32 bytes that nobody without the secret can tell from random ones.

        Raises:
          RunError: the secret is empty.
        """
        if not self.secret:
            raise RunError("Private numbers need a secret, and there is none; give one.")
        return hmac.digest(self.secret, self.question + repr(place).encode(), "sha256")

    def normal(self, *place: str | int) -> float:
        """Returns a standard normal number; 53 bits of a tail and a sign, so up to 8.3 deviations."""
        bits = int.from_bytes(self.name("noise", *place)[:8], "little")
        tail = ((bits >> 11) + 0.5) * 2.0**-54
        return _NORMAL.inv_cdf(tail) * (1 if bits & 1 else -1)


def drawn(seed: bytes, count: int, *, rate: float) -> list[int]:
    """Returns which of `count` units are in a Poisson sample: each with probability `rate`, within 2**-53 of it.

    Args:
      seed: the draw's name.
      count: number of units.
      rate: the probability; above 1 counts as 1.
    """
    if rate >= 1:
        return list(range(count))
    bits = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), "<u8")
    places: list[int] = np.flatnonzero(bits < np.uint64(rate * 2**64)).tolist()
    return places
