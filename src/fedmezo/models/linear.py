"""Products with a weight matrix on the CPU, by the faster of the two libraries that torch brings along.

torch hands float32 products to MKL, which runs at less than half the speed of oneDNN on processors that are not its
maker's (`fedmezo bench step`). Both are deterministic and differ by rounding only. The choice follows from the
processor, never from a measurement, so that one machine always computes the same bits.

oneDNN compiles a kernel per shape and keeps it, 0.6 MB each: a run over inputs of every length would gather a gigabyte
of them. So the number of rows is rounded up to one of a few sizes, for 16-bit products too, which torch gives to oneDNN
itself.
"""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["adapter_type", "add_adapters_", "fast_forward", "linear", "onednn_pays", "padded", "product", "rounded"]

_FEW = 8  # fewer rows are bound by memory, and MKL needs less time to set out
_BATCHED = 1 << 20  # multiplications by A in one lane, below which one batched product beats a product per lane
_THIN = 32  # LoRA rank up to which 16-bit products are made in float32: no slower, and no compiled kernel per shape
_SMALL = 1 << 15  # weights with fewer entries take no time worth the detour


@cache
def onednn_pays() -> bool:
    """Returns whether float32 products go to oneDNN here; FEDMEZO_LINEAR = onednn or mkl overrides the rule."""
    wanted = os.environ.get("FEDMEZO_LINEAR", "")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if wanted in ("onednn", "mkl"):
        return wanted == "onednn"
    info = Path("/proc/cpuinfo")
    maker = info.read_text() if info.is_file() else ""
    foreign = "vendor_id" in maker and "GenuineIntel" not in maker
    return foreign and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x W^T + b, [..., out], for x [..., in] and W [out, in]; the gradient reaches x, W and b as usual."""
    rows = x.numel() // max(1, x.shape[-1])
    learns = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if weight.device.type != "cpu" or rows < _FEW or weight.numel() < _SMALL or learns or x.dtype != weight.dtype:
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Frozen.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return product(x, weight, bias)


def adapter_type(x: Tensor, rank: int) -> torch.dtype:
    """Returns the type of LoRA's products on `x`: its own, or float32 for thin adapters on a CPU."""
    return torch.float32 if x.device.type == "cpu" and rank <= _THIN else x.dtype


def add_adapters_(total: Tensor, x: Tensor, a: Tensor, b: Tensor, *, scale: float) -> None:
    """Adds scale * B (A x) to `total`, each lane's A and B to that lane's rows; no gradient passes.

    Args:
      total: [lanes * rows, out], in lane order.
      x: [lanes * rows, in], of the type of `total`.
      a: [lanes, r, in], of `adapter_type`.
      b: [lanes, out, r].
      scale: LoRA's scaling.
    """
    lanes, rank, width = a.shape
    rows = len(x) // lanes
    if (lanes == 1 and a.dtype == x.dtype) or (
        x.dtype == torch.float32 and rows * rank * width >= _BATCHED and onednn_pays()
    ):
        for lane in range(lanes):
            mine = slice(lane * rows, (lane + 1) * rows)
            total[mine].add_(linear(linear(x[mine], a[lane]), b[lane]), alpha=scale)
        return
    wide = x.view(lanes, rows, width)
    if x.device.type == "cpu" and x.dtype != torch.float32 and a.dtype == x.dtype:
        out = torch.bmm(torch.bmm(padded(wide, rounded(rows)), a.transpose(1, 2)), b.transpose(1, 2))
        total.view(lanes, rows, -1).add_(out[:, :rows], alpha=scale)
        return
    inner = torch.bmm(wide.to(a.dtype), a.transpose(1, 2))
    sums = total.to(a.dtype).view(lanes, rows, -1).baddbmm_(inner, b.transpose(1, 2), alpha=scale)
    if sums.dtype != total.dtype:
        total.copy_(sums.view(total.shape))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x W^T + b on the CPU by the library that suits, without a gradient; shapes as for `linear`."""
    flat = x.reshape(-1, x.shape[-1])
    rows = len(flat)
    size = rounded(rows)
    flat = padded(flat, size)
    if weight.dtype == torch.float32 and onednn_pays():
        out = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    else:
        out = functional.linear(flat, weight, bias)
    return out[:rows].view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def padded(x: Tensor, size: int) -> Tensor:
    """Returns x [..., rows, width] with rows of zeros up to `size`; x itself if it has as many."""
    rows = x.shape[-2]
    if rows == size:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return functional.pad(x, (0, 0, 0, size - rows))
    out = x.new_empty((*x.shape[:-2], size, x.shape[-1]))
    out[..., :rows, :] = x
    out[..., rows:, :] = 0
    return out


def rounded(rows: int) -> int:
    """Returns the next of the few numbers of rows that products are made with."""
    step = 8 if rows <= 64 else 16 if rows <= 256 else 32 if rows <= 512 else 64
    return -(-rows // step) * step


class _Frozen(torch.autograd.Function):
    """The product with a frozen weight, differentiable in x: backpropagation gets the same library as the walks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the product."""
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Returns the gradient of x."""
        (weight,) = ctx.saved_tensors
        return product(grads[0], weight.T), None, None


def fast_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Returns what can stand in for the forward of a linear module; None for any other module or special weights."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, "weight", None)
    if type(module) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter:
        return None
    return partial(_conv_forward if isinstance(module, Conv1D) else _linear_forward, module)


def _linear_forward(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def _conv_forward(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight.T, module.bias)
