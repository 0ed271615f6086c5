"""The noise contract in plain torch: any device, no compiler; the reference the fast backends are held to."""

from functools import cache

import torch
from torch import Tensor

from fedmezo.zo.noise import (
    GAUSSIAN_CHUNK,
    GAUSSIAN_DOMAIN,
    RADEMACHER_CHUNK,
    RADEMACHER_DOMAIN,
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


def step_(target: Tensor, *, tensor: int, seed: int, coefficient: float, law: Law) -> None:
    """Adds coefficient * z(seed) to the flat float32 `target` in place; one rounding per entry."""
    for start, size in _spans(target.numel()):
        z = entries(seed, tensor, start=start, size=size, law=law, device=target.device)
        target.narrow(0, start, size).add_(z.mul_(coefficient))


def lane_(out: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0) -> None:
    """Writes source + offset * z(seed)[start:] to `out`, both flat float32."""
    for at, size in _spans(source.numel()):
        z = entries(seed, tensor, start=start + at, size=size, law=law, device=source.device)
        torch.add(source.narrow(0, at, size), z.mul_(offset), out=out.narrow(0, at, size))


def lanes_(
    plus: Tensor, minus: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0
) -> None:
    """Writes source + offset * z(seed)[start:] to `plus` and source - offset * z(seed)[start:] to `minus`."""
    for at, size in _spans(source.numel()):
        z = entries(seed, tensor, start=start + at, size=size, law=law, device=source.device).mul_(offset)
        span = source.narrow(0, at, size)
        torch.add(span, z, out=plus.narrow(0, at, size))
        torch.sub(span, z, out=minus.narrow(0, at, size))


def walks_(
    target: Tensor,
    *,
    tensor: int,
    seeds: list[list[int]],
    coefficients: list[list[float]],
    weights: list[float],
    law: Law,
) -> None:
    """Adds the weighted sum of walks to `target`: walks sum in float64, round to float32, then average in float64."""
    for start, size in _spans(target.numel()):
        total = torch.zeros(size, dtype=torch.float64, device=target.device)
        for weight, walk_seeds, walk_coefficients in zip(weights, seeds, coefficients, strict=True):
            walk = torch.zeros_like(total)
            for seed, coefficient in zip(walk_seeds, walk_coefficients, strict=True):
                z = entries(seed, tensor, start=start, size=size, law=law, device=target.device)
                walk.add_(z.to(torch.float64).mul_(coefficient))
            total.add_(walk.to(torch.float32).to(torch.float64).mul_(weight))
        span = target.narrow(0, start, size)
        span.copy_(span.to(torch.float64).add_(total))
