"""The noise contract in plain torch: any device, no compiler; the reference the fast backends are held to.

Every tensor is flat and contiguous, of float32, bfloat16 or float16; arithmetic is in float32. What is written to a
master copy (`target`) rounds stochastically when it is a half, what is written to a lane rounds to nearest even.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fedmezo.zo.noise import (
    GAUSSIAN_CHUNK,
    GAUSSIAN_DOMAIN,
    RADEMACHER_CHUNK,
    RADEMACHER_DOMAIN,
    ROUNDING_DOMAIN,
    Law,
    table,
)

_MASK = 0xFFFFFFFF
_SPAN = 1 << 16  # entries made at a time: bounds the int64 scratch to a few megabytes


@cache
def _table_on(device: torch.device) -> Tensor:
    return torch.from_numpy(table().copy()).to(device)


def philox(block: Tensor, tensor: int, domain: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the four 32-bit words of Philox4x32-10 for each counter, as int64 tensors like `block`."""
    words = (block, torch.zeros_like(block), torch.full_like(block, tensor), torch.full_like(block, domain))
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps both 32-bit halves right after masking.
        low_lane, high_lane = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = (
            ((high_lane >> 32) & _MASK) ^ words[1] ^ key0,
            high_lane & _MASK,
            ((low_lane >> 32) & _MASK) ^ words[3] ^ key1,
            low_lane & _MASK,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return words


def halfwords(seed: int, tensor: int, start: int, size: int, domain: int, device: torch.device) -> Tensor:
    """Returns the 16-bit numbers behind entries [start, start + size), int64 of shape (size,)."""
    first, last = start // GAUSSIAN_CHUNK, (start + size + GAUSSIAN_CHUNK - 1) // GAUSSIAN_CHUNK
    block = torch.arange(first * 64, last * 64, dtype=torch.int64, device=device)
    words = torch.stack(philox(block, tensor, domain, seed))
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=1)
    entries = halves.view(8, last - first, 64).transpose(0, 1).reshape(-1)
    return entries.narrow(0, start - first * GAUSSIAN_CHUNK, size)


def _signs(seed: int, tensor: int, start: int, size: int, device: torch.device) -> Tensor:
    first, last = start // RADEMACHER_CHUNK, (start + size + RADEMACHER_CHUNK - 1) // RADEMACHER_CHUNK
    block = torch.arange(first * 16, last * 16, dtype=torch.int64, device=device)
    words = torch.stack(philox(block, tensor, RADEMACHER_DOMAIN, seed)).view(4, last - first, 16)
    shifts = torch.arange(32, dtype=torch.int64, device=device).view(1, 32, 1, 1)
    bits = (words.permute(1, 0, 2).unsqueeze(1) >> shifts) & 1
    return (1 - 2 * bits.reshape(-1)).narrow(0, start - first * RADEMACHER_CHUNK, size)


def entries(seed: int, tensor: int, *, start: int, size: int, law: Law, device: torch.device) -> Tensor:
    """Returns entries [start, start + size) of z(seed) for tensor id `tensor`, float32 on `device`."""
    if law == "rademacher":
        return _signs(seed, tensor, start, size, device).to(torch.float32)
    index = halfwords(seed, tensor, start, size, GAUSSIAN_DOMAIN, device)
    return _table_on(device)[index].to(torch.float32) / 1024


def _spans(size: int) -> list[tuple[int, int]]:
    return [(start, min(_SPAN, size - start)) for start in range(0, size, _SPAN)]


def stochastic(source: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a float32 tensor in a half dtype, each value up or down with odds by nearness; infinities and nan stay.

    Args:
      source: float32.
      bits: random integers in [0, 65536), like `source`: a value goes up when its cut off bits plus these carry.
      dtype: torch.bfloat16 or torch.float16.
    """
    raw, bits = source.view(torch.int32), bits.to(torch.int32)
    if dtype == torch.bfloat16:
        kept = (raw >> 16) | source.isnan().to(torch.int32) * 0x0040
        return torch.where(source.isfinite(), (raw + bits) >> 16, kept).to(torch.int16).view(dtype)
    bits, size = bits >> 3, source.abs()
    normal = ((raw + bits) & ~0x1FFF).view(torch.float32)
    tiny = torch.floor(size * 2.0**24 + bits.to(torch.float32) * 2.0**-13) * 2.0**-24
    small = torch.where(size >= 2.0**-14, normal, torch.copysign(tiny, source))
    return torch.where(size < 65504, small, source).to(dtype)


def stochastic_(target: Tensor, source: Tensor, *, tensor: int, seed: int, start: int = 0) -> None:
    """Writes the float32 `source` to `target`, a half rounded with the rounding bits [start:] of `seed`."""
    for at, size in _spans(target.numel()):
        part = source.narrow(0, at, size)
        if target.dtype != torch.float32:
            bits = halfwords(seed, tensor, start + at, size, ROUNDING_DOMAIN, target.device)
            part = stochastic(part, bits, target.dtype)
        target.narrow(0, at, size).copy_(part)


def step_(target: Tensor, *, tensor: int, seed: int, coefficient: float, law: Law, start: int = 0) -> None:
    """Adds coefficient * z(seed)[start:] to `target` in place: one float32 rounding, then one to a half `target`."""
    for at, size in _spans(target.numel()):
        z = entries(seed, tensor, start=start + at, size=size, law=law, device=target.device)
        span = target.narrow(0, at, size)
        stochastic_(span, span.to(torch.float32) + z.mul_(coefficient), tensor=tensor, seed=seed, start=start + at)


def lane_(out: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0) -> None:
    """Writes source + offset * z(seed)[start:] to `out`."""
    for at, size in _spans(source.numel()):
        z = entries(seed, tensor, start=start + at, size=size, law=law, device=source.device)
        out.narrow(0, at, size).copy_(source.narrow(0, at, size).to(torch.float32) + z.mul_(offset))


def lanes_(
    plus: Tensor, minus: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0
) -> None:
    """Writes source + offset * z(seed)[start:] to `plus` and source - offset * z(seed)[start:] to `minus`."""
    for at, size in _spans(source.numel()):
        z = entries(seed, tensor, start=start + at, size=size, law=law, device=source.device).mul_(offset)
        span = source.narrow(0, at, size).to(torch.float32)
        plus.narrow(0, at, size).copy_(span + z)
        minus.narrow(0, at, size).copy_(span - z)


def visit_(
    plus: Tensor,
    minus: Tensor,
    target: Tensor,
    *,
    tensor: int,
    steps: Sequence[tuple[int, float]],
    seed: int,
    offset: float,
    law: Law,
    start: int = 0,
) -> None:
    """Lets `target` take `steps`, pairs (seed, coefficient), in order, then writes the lanes `plus` and `minus`."""
    for taken, coefficient in steps:
        step_(target, tensor=tensor, seed=taken, coefficient=coefficient, law=law, start=start)
    lanes_(plus, minus, target, tensor=tensor, seed=seed, offset=offset, law=law, start=start)


def walks_(
    target: Tensor,
    *,
    tensor: int,
    seeds: Sequence[Sequence[int]],
    coefficients: Sequence[Sequence[float]],
    weights: Sequence[float],
    law: Law,
    rounding: int = 0,
) -> None:
    """Adds the weighted sum of walks to `target`: walks sum in float64, round to float32, then average in float64.

    The new `target` rounds to float32 once; a half `target` then takes it with the rounding bits of seed `rounding`.
    """
    for start, size in _spans(target.numel()):
        total = torch.zeros(size, dtype=torch.float64, device=target.device)
        for weight, walk_seeds, walk_coefficients in zip(weights, seeds, coefficients, strict=True):
            walk = torch.zeros_like(total)
            for seed, coefficient in zip(walk_seeds, walk_coefficients, strict=True):
                z = entries(seed, tensor, start=start, size=size, law=law, device=target.device)
                walk.add_(z.to(torch.float64).mul_(coefficient))
            total.add_(walk.to(torch.float32).to(torch.float64).mul_(weight))
        span = target.narrow(0, start, size)
        source = total.add_(span.to(torch.float64)).to(torch.float32)
        stochastic_(span, source, tensor=tensor, seed=rounding, start=start)
