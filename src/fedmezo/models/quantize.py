"""Frozen weights in 8 or 4 bits, made numbers again layer by layer while a forward pass runs.

Only weights are quantised, never activations: a loss then is as smooth a function of the trained parameters as without,
so a slope has no more rounding noise than the arithmetic has (`fedmezo analyze noise`). Activations in 8 bits would be
faster, and drown the slope. Each layer's weights are written to scratch that the next layer reuses and multiplied as
ever: plain torch on any device, the same codes on every machine, and no backward kernels.

int8: one float32 scale per output. int4: groups of 32 weights of a row share a float16 scale and a float16 minimum,
5 bits per weight; this is the grid of GGUF's Q4_1, so a copy that came in it loses nothing.
Embeddings, norms and the output embeddings stay as they are.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedmezo.errors import ModelError
from fedmezo.models.linear import linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FORMATS", "Format", "format_of", "quantize_", "require_unquantised"]

Format = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = ("int8", "int4")
_GROUP = 32
_CHUNK = 1 << 22  # weights in scratch at once: 16 MB in float32
_DEVICES = ("cpu", "cuda")
_local = threading.local()  # scratch of each thread


def quantize_(model: PreTrainedModel, kind: str) -> int:
    """Replaces the model's linear layers by quantised ones, in place, and returns how many.

    Left alone are the output embeddings and any weight that several modules share.

    Args:
      model: frozen, on the CPU.
      kind: one of `FORMATS`.

    Raises:
      ModelError: no such format, no layer to quantise, or weights that the format cannot hold.
    """
    check(kind)
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    head = model.get_output_embeddings()
    wanted = [
        path
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head and uses[id(module.weight)] == 1
    ]
    if not wanted:
        raise ModelError(f"{type(model).__name__} has no linear layer to quantise; load it without quantize.")
    for path in wanted:
        module: Any = model.get_submodule(path)
        weight = module.weight.detach()
        parts = _PACK[kind](path, (weight.T if isinstance(module, Conv1D) else weight).float())
        new = (QuantizedConv1D if isinstance(module, Conv1D) else QuantizedLinear)(module, parts)
        model.set_submodule(path, new.eval().requires_grad_(requires_grad=False))
    for tensor in model.parameters():
        if id(tensor) in uses:
            tensor.data = tensor.data.clone()  # one tensor inside a mapped file would hold all of it in memory
    _give_back()
    return len(wanted)


def _give_back() -> None:
    """Hands freed memory to the system: glibc would keep the old weights' 100 to 500 MB for later."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def check(kind: str, device: str = "cpu") -> None:
    """Raises ModelError when `kind` is no format, or the device is one where quantised weights are not supported."""
    if kind not in FORMATS:
        raise ModelError(f"model quantize: expected one of {', '.join(FORMATS)}, or None, got {kind!r}.")
    if torch.device(device).type not in _DEVICES:
        raise ModelError(f"model quantize: {kind} weights need device cpu or cuda, got {device!r}; leave quantize out.")


def format_of(model: nn.Module) -> Format | None:
    """Returns the format of a model's quantised weights; None when it has none."""
    found = next((module for module in model.modules() if isinstance(module, _Quantized)), None)
    return found.kind if found is not None else None


def require_unquantised(model: nn.Module, *, what: str) -> None:
    """Raises ModelError when the model is quantised; `what` begins the sentence, as in "Training all parameters"."""
    kind = format_of(model)
    if kind is not None:
        raise ModelError(f"{what} needs the weights themselves, but this model holds {kind} codes; leave quantize out.")


class _Quantized(nn.Module):
    """What a quantised layer has: `codes`, [out, in] or packed, `scales`, for int4 `lows`, and the layer's own bias."""

    codes: Tensor
    scales: Tensor
    lows: Tensor | None
    bias: Any
    in_features: int
    out_features: int

    def __init__(self, module: nn.Linear | Conv1D, parts: dict[str, Tensor]) -> None:
        nn.Module.__init__(self)  # never nn.Linear's, which would make weights
        self.out_features, self.in_features = _shape(module)
        self.dtype = module.weight.dtype
        for name in ("codes", "scales", "lows"):
            part = parts.get(name)
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))
        self.register_parameter("bias", module.bias)

    @property
    def kind(self) -> Format:
        """The format of the codes."""
        return "int8" if self.lows is None else "int4"

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Returns the weights as numbers, [out, in], in memory of their own."""
        out = torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.codes.device)
        for first, last in self._chunks():
            out[first:last] = self._rows(first, last, dtype)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Returns x W^T + b, computed in x's type; the gradient reaches x."""
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return out
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        spans = list(self._chunks())
        parts = [
            linear(x, self._rows(first, last, x.dtype), None if self.bias is None else self.bias[first:last])
            for first, last in spans
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        rows = max(1, _CHUNK // self.in_features)
        for first in range(0, self.out_features, rows):
            yield first, min(first + rows, self.out_features)

    def _rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Returns rows [first, last) of the weights in scratch, valid until the next call."""
        wide = _UNPACK[self.kind](self, first, last)[:, : self.in_features]
        if dtype == torch.float32:
            return wide if wide.is_contiguous() else wide.contiguous()
        return _scratch(tuple(wide.shape), dtype=dtype, device=wide.device).copy_(wide)


class QuantizedLinear(_Quantized, nn.Linear):
    """A linear layer with quantised weights."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights as numbers, made anew at every look, [out, in]."""
        return self.matrix(self.dtype)


class QuantizedConv1D(_Quantized, Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight lies the other way round."""

    def __init__(self, module: Conv1D, parts: dict[str, Tensor]) -> None:
        super().__init__(module, parts)
        self.nf, self.nx = self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights as numbers, made anew at every look, [in, out]."""
        return self.matrix(self.dtype).T


class _Product(torch.autograd.Function):
    """The product, differentiable in x: the weights are made numbers again on the way back, for scratch is reused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Quantized) -> Tensor:
        """Returns the product."""
        ctx.layer = layer
        out = layer._product(x)
        # Adapters are added in place, which autograd allows to nothing that is a view from in here.
        return out.clone() if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of x."""
        layer, (grad,) = ctx.layer, grads
        total = grad.new_zeros((*grad.shape[:-1], layer.in_features))
        for first, last in layer._chunks():
            total += grad[..., first:last] @ layer._rows(first, last, grad.dtype)
        return total, None


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _scratch(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    held: dict[Any, Tensor] = _local.__dict__
    size, key = torch.Size(shape).numel(), f"{dtype} {device}"
    if key not in held or held[key].numel() < size:
        # Ordinary memory, for inference tensors may not be written outside inference mode.
        with torch.inference_mode(mode=False):
            held[key] = torch.empty(size, dtype=dtype, device=device)
    return held[key][:size].view(shape)


def _pack_int8(path: str, weight: Tensor) -> dict[str, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    _require_finite(path, scales, limit="a float32 number")
    return {"codes": _codes(weight, scales).clamp_(-127, 127).to(torch.int8), "scales": scales}


def _unpack_int8(layer: _Quantized, first: int, last: int) -> Tensor:
    codes = layer.codes[first:last]
    wide = _scratch(tuple(codes.shape), dtype=torch.float32, device=codes.device)
    return wide.copy_(codes).mul_(layer.scales[first:last])


def _pack_int4(path: str, weight: Tensor) -> dict[str, Tensor]:
    # A group that is not full is filled with copies of its last weight, which leave its range as it is.
    missing = -weight.shape[1] % _GROUP
    full = functional.pad(weight[None], (0, missing), mode="replicate")[0] if missing else weight
    groups = full.reshape(len(weight), -1, _GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    lows, scales = low.half(), ((high - low) / 15).half()
    _require_finite(path, lows, scales, limit="65504")
    codes = _codes(groups - lows.float(), scales.float()).clamp_(0, 15).to(torch.uint8)
    half = _GROUP // 2
    packed = codes[..., :half] | (codes[..., half:] << 4)
    return {"codes": packed, "scales": scales, "lows": lows}


def _unpack_int4(layer: _Quantized, first: int, last: int) -> Tensor:
    codes, scales, lows = (part[first:last] for part in (layer.codes, layer.scales, layer.lows))  # type: ignore[index]
    rows, groups, half = codes.shape
    wide = _scratch((rows, groups, _GROUP), dtype=torch.float32, device=codes.device)
    wide[..., :half].copy_(codes & 15)
    wide[..., half:].copy_(codes >> 4)
    return wide.mul_(scales.float()).add_(lows.float()).view(rows, -1)


def _codes(values: Tensor, scales: Tensor) -> Tensor:
    return (values / torch.where(scales > 0, scales, 1)).round_()


def _require_finite(path: str, *parts: Tensor, limit: str) -> None:
    if not all(bool(part.isfinite().all()) for part in parts):
        raise ModelError(f"'{path}' has weights beyond {limit}, so it cannot be quantised; load the model unquantised.")


_PACK = {"int8": _pack_int8, "int4": _pack_int4}
_UNPACK = {"int8": _unpack_int8, "int4": _unpack_int4}
