"""Noise v1: the direction z(seed) as a pure function of (seed, tensor name, index).

Random bits are Philox4x32-10 (Salmon et al., SC 2011) with key = the 64-bit seed and counter = (block, 0, tensor id,
domain). Gaussian entries use 16 bits each and index a table of 65,536 standard normal quantiles, scaled to unit
variance and rounded to multiples of 2**-10, so an entry is a 13-bit integer over 1024. Rademacher entries use one bit
each in another domain. A coefficient rounded to 11 significant bits times an entry is exact in float32 (24 bits),
hence every backend, with or without fused multiply-add, gives the same bits.

    Gaussian    chunk = 512 entries = 64 counters x 8 halfwords; entry e: counter 64*(e>>9) + (e&63),
                halfword (e>>6)&7 (word = halfword>>1, low half first)
    Rademacher  chunk = 2048 entries = 16 counters x 4 words x 32 bits; entry e: counter 16*(e>>11) + (e&15),
                word (e>>4)&3, bit (e>>6)&31; a set bit means -1
    rounding    the 16 bits that round entry e of a half-precision parameter; laid out as the Gaussian bits
"""

import hashlib
import math
from functools import cache, lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmezo.errors import NoiseError

__all__ = ["NOISE_VERSION", "Law", "derive_seed", "noise", "round_coefficient", "table", "tensor_id", "uniform"]

NOISE_VERSION = 1
Law = Literal["gaussian", "rademacher"]

GAUSSIAN_CHUNK = 512
RADEMACHER_CHUNK = 2048
GAUSSIAN_DOMAIN, RADEMACHER_DOMAIN, UNIFORM_DOMAIN, ROUNDING_DOMAIN = 0, 1, 2, 3
COEFFICIENT_BITS = 11
_TABLE_SHA256 = "05f1e8cceb31b20204c975ca8636c7236262a20eee37f10a6466ff91901fc330"


@cache
def table() -> NDArray[np.int16]:
    """Returns the Gaussian law: 65,536 ascending int16 values, each 1024 times an entry of z.

    Entry i is the mid-quantile (i + 1/2) / 65536 of N(0, 1), scaled to unit variance over the table, then rounded.

    Raises:
      NoiseError: this machine's arithmetic gives another table than the contract's.
    """
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)])
    upper /= math.sqrt(math.fsum(upper * upper) / upper.size)
    half = np.rint(upper * 1024).astype(np.int16)
    values = np.concatenate([-half[::-1], half])
    if hashlib.sha256(values.astype("<i2").tobytes()).hexdigest() != _TABLE_SHA256:
        raise NoiseError(
            "The normal table differs from noise v1 on this machine; please report its libm and Python version."
        )
    values.setflags(write=False)
    return values


@lru_cache(maxsize=4096)
def tensor_id(name: str) -> int:
    """Returns the 32-bit id of a parameter, a hash of its qualified name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def derive_seed(*parts: int | str) -> int:
    """Returns the 64-bit seed named by `parts`; hashing, unlike arithmetic on seeds, cannot make two names collide."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def round_coefficient(value: float) -> float:
    """Returns `value` rounded to 11 significant bits, so that its product with an entry of z is exact in float32."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, COEFFICIENT_BITS)), exponent - COEFFICIENT_BITS)


def noise(seed: int, name: str, *, size: int, start: int = 0, law: Law = "gaussian") -> Tensor:
    """Returns entries [start, start + size) of z(seed) for one parameter, float32 on the CPU.

    Args:
      seed: the direction's name, 0 <= seed < 2**64.
      name: the parameter's qualified name.
      size: number of entries.
      start: first entry, in the parameter's flattened order.
      law: "gaussian" (unit variance) or "rademacher" (+1 or -1).
    """
    from fedmezo.zo.kernels import torch_ops

    return torch_ops.entries(seed, tensor_id(name), start=start, size=size, law=law, device=torch.device("cpu"))


def uniform(seed: int, name: str, *, size: int) -> Tensor:
    """Returns `size` float32 values uniform on a grid of 65,536 points in (-1, 1), a domain apart from z."""
    from fedmezo.zo.kernels import torch_ops

    index = torch_ops.halfwords(seed, tensor_id(name), 0, size, UNIFORM_DOMAIN, torch.device("cpu"))
    return (2 * index.to(torch.float32) - 65535) / 65536
