"""Attention within segments: many sequences laid end to end in one [1, T] forward, none sees another.

Registered with transformers under one name, for any model that looks its attention up there. Outside a `packed` scope
it is the ordinary SDPA attention, so generation with a cache works as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fedmezo.errors import ModelError
from fedmezo.models.linear import padded, product, rounded

__all__ = ["NAME", "Segments", "packed", "register"]

NAME = "fedmezo_segments"

_SHORT = 512  # tokens up to which the scores of a group of heads may exist at once: 3 MB for three heads

_TOGETHER = 64  # tokens up to which the scores of all groups of heads are made at once
_WORTH = 64  # tokens of equal sequences below which setting out takes longer

# What a model may pass along that changes attention in a way the segments do not compute.
_FOREIGN = ("softcap", "s_aux", "position_bias", "cache")


@dataclass(slots=True)
class Segments:
    """The lengths of the sequences in one packed forward, and what the model's attention said on the way.

    Attributes:
      lengths: tokens of each sequence, in order.
      calls: attention layers that went through here.
      local: the shortest attention window a layer asked for; sequences must not be longer. None: no layer has one.
      plain: attend as the model itself would, to the bit; for comparisons.
    """

    lengths: tuple[int, ...]
    calls: int = 0
    local: int | None = None
    plain: bool = False

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yields (first token, sequences, tokens of each) for neighbours of equal length."""
        start = 0
        for length, group in groupby(self.lengths):
            count = sum(1 for _ in group)
            yield start, count, length
            start += count * length

    def note_local(self, size: object) -> None:
        """Remembers a layer's attention window."""
        if isinstance(size, int):
            self.local = size if self.local is None else min(self.local, size)


_ACTIVE: ContextVar[Segments | None] = ContextVar("fedmezo_segments", default=None)


@contextmanager
def packed(lengths: Sequence[int], *, plain: bool = False) -> Iterator[Segments]:
    """Lends a scope in which attention stays within sequences of these lengths; `plain` as in `Segments`."""
    segments = Segments(tuple(lengths), plain=plain)
    token = _ACTIVE.set(segments)
    try:
        yield segments
    finally:
        _ACTIVE.reset(token)


@cache
def register() -> None:
    """Makes the attention known to transformers, once per process."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> Any:
    segments = _ACTIVE.get()
    if segments is None:
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(*args, **kwargs)
    segments.note_local(kwargs.get("local_size"))
    return None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns attention [1, T, heads, width] within each segment; query [1, heads, T, width], key and value grouped."""
    segments = _ACTIVE.get()
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[return-value, no-any-return]
    _require_plain(module, attention_mask, kwargs)
    segments.calls += 1
    segments.note_local(kwargs.get("sliding_window"))
    out = torch.empty((query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
    for start, count, length in segments.runs():
        q, k, v = (_cut(part, start, count, length) for part in (query, key, value))
        seen = _attend(q, k, v, scale=kwargs.get("scaling"), plain=segments.plain)
        end = start + count * length
        out[start:end].view(count, length, *out.shape[1:]).copy_(seen.transpose(1, 2))
    return out[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, plain: bool) -> Tensor:
    """Returns causal attention [count, heads, length, width]; k and v may have fewer heads than q."""
    short = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] <= _SHORT
    # Several threads share torch's own attention well, and these small products badly.
    if short and not plain and q.shape[0] * q.shape[2] >= _WORTH and torch.get_num_threads() == 1:
        return _attend_short(q, k, v, scale=q.shape[3] ** -0.5 if scale is None else scale)
    return nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


def _attend_short(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Returns the same with all scores of a group of heads at once: half the time of torch's for short bfloat16.

    Scores are float32: rounded to bfloat16 they add a third to the noise of a slope.
    """
    count, heads, length, width = q.shape
    groups, repeats = k.shape[1], heads // k.shape[1]
    # Padded keys lie after every real query, so the causal mask hides them; few lengths mean few compiled kernels.
    size = rounded(length)
    q, k, v = (padded(part, size) for part in (q, k, v))
    q = q.reshape(count * groups, repeats * size, width).float()
    k, v, mask = k.reshape(len(q), size, width).float(), v.reshape(len(q), size, -1), _causal(size, repeats)
    if size <= _TOGETHER or torch.is_grad_enabled():
        scores = torch.baddbmm(mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=scale)
        seen = torch.bmm(scores.softmax(-1).to(v.dtype), v)
    else:
        # One group of heads after the other, while its scores are near the processor.
        each = zip(q.mul_(scale), k, v, strict=True)
        seen = torch.stack([product(a, b).add_(mask).softmax(-1).to(c.dtype) @ c for a, b, c in each])
    return seen.view(count, heads, size, -1)[:, :, :length]


@lru_cache(maxsize=8)
def _causal(size: int, repeats: int) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.full((size, size), -torch.inf).triu(1).repeat(repeats, 1)


def _cut(part: Tensor, start: int, count: int, length: int) -> Tensor:
    """Returns `count` sequences of `length` tokens as a batch, [count, heads, length, width]."""
    heads, width = part.shape[1], part.shape[3]
    return part[0].narrow(1, start, count * length).reshape(heads, count, length, width).transpose(0, 1)


def _require_plain(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if mask is not None or foreign or not causal:
        raise ModelError(
            f"{type(module).__name__} uses attention that cannot be packed ({', '.join(foreign) or 'mask'})."
        )
