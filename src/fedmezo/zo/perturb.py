"""The only module that writes trainable weights.

Every function takes tensors of float32, bfloat16 or float16 on any device. CPU tensors go through numba, CUDA tensors
through Triton, when these are installed, all others through plain torch. All give the same bits; `check_backend` proves
it once per process. Arithmetic is in float32; a 16-bit weight takes a step by stochastic rounding, since rounding to
nearest would swallow most of it, with random bits named by the step's own seed, so that every machine rounds alike.
"""

import importlib
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import util
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmezo.errors import NoiseError
from fedmezo.zo.kernels import torch_ops
from fedmezo.zo.lazy import LazyParams
from fedmezo.zo.noise import Law, derive_seed, round_coefficient, table, tensor_id
from fedmezo.zo.params import Params
from fedmezo.zo.seedsum import DenseDelta, SeedSum, Update, Walk

__all__ = [
    "add_sum_", "apply_", "check_backend", "lane_", "lanes_", "row_", "settle_", "step_", "visit_", "walk_delta",
]  # fmt: skip


@cache
def check_backend(name: str, device: str = "cpu") -> ModuleType:
    """Returns a backend after checking it against noise v1: the table on all 65,536 inputs, then one block of each law.

    Args:
      name: "numba", "triton" or "torch".
      device: where it shall work.

    Raises:
      NoiseError: the backend is wrong on this machine; nothing has been written.
    """
    if name == "torch":
        return torch_ops
    module = importlib.import_module(f"fedmezo.zo.kernels.{name}_ops")
    where = {} if name == "numba" else {"device": torch.device(device)}
    good = bool(np.array_equal(np.asarray(module.lookup(**where)) * 1024, table().astype(np.float32)))
    for law in ("gaussian", "rademacher"):
        seed, tensor = 0x0123456789ABCDEF, 0x89ABCDEF
        fast = module.entries(seed, tensor, size=4100, law=law, **where).cpu()
        good &= torch.equal(fast, torch_ops.entries(seed, tensor, start=0, size=4100, law=law, device=fast.device))
    if not good:
        raise NoiseError(
            f"The compiled noise backend ({name}) differs from noise v1 here; set FEDMEZO_NOISE=torch and report this."
        )
    return module


@cache
def _choose(device: str, wanted: str) -> ModuleType:
    fast = {"cpu": "numba", "cuda": "triton"}.get(device.split(":")[0])
    if fast is None or wanted == "torch" or not util.find_spec(fast):
        return torch_ops
    try:
        return check_backend(fast, device)
    except NoiseError:
        raise
    except Exception as error:  # a compiler may be missing or refuse in any way; plain torch gives the same bits
        reason = str(error).split("\n")[0]
        warnings.warn(f"The noise runs in plain torch, for {fast} does not work here: {reason}", stacklevel=2)
        return torch_ops


def _backend(tensor: Tensor) -> ModuleType:
    return _choose(str(tensor.device), os.environ.get("FEDMEZO_NOISE", ""))


def step_(params: Params, seed: int, *, coefficient: float, law: Law) -> None:
    """Adds coefficient * z(seed) to `params` in place, one float32 rounding per scalar.

    Lazy parameters take the step when they are next looked at, with the same bits.

    Args:
      params: the d trainable scalars.
      seed: the direction's name.
      coefficient: rounded to 11 significant bits before use.
      law: the direction's law.
    """
    exact = round_coefficient(coefficient)
    if not exact:
        return  # -0.0 + 0 * z would be +0.0: another bit
    if isinstance(params, LazyParams):
        params.steps.append((seed, exact))
        return
    with torch.no_grad():
        for name, tensor in params:
            key = {"tensor": tensor_id(name), "seed": seed, "law": law}
            _backend(tensor).step_(tensor.detach().view(-1), coefficient=exact, **key)


def lane_(out: Tensor, source: Tensor, *, name: str, seed: int, offset: float, law: Law, start: int = 0) -> None:
    """Writes source + offset * z(seed)[name] to `out`; `offset` is rounded to 11 significant bits.

    `source` may be a part of the parameter; `start` is then the number of its entries before that part.
    """
    key = {"tensor": tensor_id(name), "seed": seed, "law": law, "offset": round_coefficient(offset), "start": start}
    with torch.no_grad():
        _backend(source).lane_(out.detach().view(-1), source.detach().view(-1), **key)


def lanes_(
    plus: Tensor, minus: Tensor, source: Tensor, *, name: str, seed: int, offset: float, law: Law, start: int = 0
) -> None:
    """Writes source + offset * z(seed)[name] to `plus`, source - offset * z(seed)[name] to `minus`; one noise pass.

    `start` is as in `lane_`.
    """
    key = {"tensor": tensor_id(name), "seed": seed, "law": law, "offset": round_coefficient(offset), "start": start}
    with torch.no_grad():
        flat = (plus.detach().view(-1), minus.detach().view(-1), source.detach().view(-1))
        _backend(source).lanes_(*flat, **key)


def visit_(
    outs: Sequence[Tensor], params: Params, *, name: str, rows: slice, seed: int, offset: float, law: Law
) -> None:
    """Writes some rows of a parameter in one or two lanes; lazy rows take the steps they owe on the way.

    Args:
      outs: where the lane params + offset * z(seed) goes, and perhaps its mirror image.
      params: what to look at; only lazy ones are written.
      name: the parameter.
      rows: which rows; of lazy parameters a whole block.
      seed: the direction's name.
      offset: rounded to 11 significant bits.
      law: the direction's law.
    """
    whole = params.tensors[name].detach()
    source, start = whole[rows].view(-1), rows.start * (whole.numel() // len(whole))
    key = {"tensor": tensor_id(name), "seed": seed, "offset": round_coefficient(offset), "law": law, "start": start}
    owed = params.owed(name, rows.start) if isinstance(params, LazyParams) else []
    flat = [out.view(-1) for out in outs]
    with torch.no_grad():
        if owed and len(outs) == 2:
            _backend(source).visit_(*flat, source, steps=owed, **key)
            params.paid(name, rows.start)  # type: ignore[attr-defined]
            return
        if owed:
            settle_(params, name, rows)  # type: ignore[arg-type]
        _write_(flat, source, key)


def row_(outs: Sequence[Tensor], params: Params, *, name: str, row: int, seed: int, offset: float, law: Law) -> None:
    """Writes one row of a matrix in one or two lanes, after the steps it owes; `params` stays as it is."""
    whole = params.tensors[name].detach()
    source, start = whole[row], row * whole.shape[1]
    key = {"tensor": tensor_id(name), "seed": seed, "offset": round_coefficient(offset), "law": law, "start": start}
    with torch.no_grad():
        if isinstance(params, LazyParams) and params.owed(name, row):
            source = source.clone()
            _take_(source, params.owed(name, row), tensor=tensor_id(name), law=law, start=start)
        _write_(outs, source, key)


def settle_(params: LazyParams, name: str, rows: slice) -> None:
    """Makes one block of rows take the steps it owes."""
    whole = params.tensors[name].detach()
    start = rows.start * (whole.numel() // len(whole))
    with torch.no_grad():
        _take_(whole[rows].view(-1), params.owed(name, rows.start), tensor=tensor_id(name), law=params.law, start=start)
    params.paid(name, rows.start)


def _take_(flat: Tensor, steps: Sequence[tuple[int, float]], *, tensor: int, law: Law, start: int) -> None:
    for seed, coefficient in steps:
        _backend(flat).step_(flat, tensor=tensor, seed=seed, coefficient=coefficient, law=law, start=start)


def _write_(outs: Sequence[Tensor], source: Tensor, key: Mapping[str, Any]) -> None:
    if not key["offset"]:
        for out in outs:
            out.copy_(source)
    elif len(outs) == 2:
        _backend(source).lanes_(outs[0], outs[1], source, **key)
    else:
        _backend(source).lane_(outs[0], source, **key)


def walk_delta(params: Params, walk: Walk, *, law: Law) -> DenseDelta:
    """Returns a walk written out: the float64 sum of its steps, rounded to float32 once; shapes as in `params`."""
    tensors = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in params.tensors.items()}
    apply_(Params(tensors), Update((walk,), (1.0,)), law=law)
    return DenseDelta(tensors)


def apply_(params: Params, update: Update, *, law: Law) -> None:
    """Adds one round's update to `params` in place, with one rounding per scalar.

    Args:
      params: the model's trainable scalars.
      update: weighted walks, or weighted dense deltas; scalar and dense forms of the same walks give the same bits.
      law: the directions' law.
    """
    if not all(update.weights):  # what counts nothing must not turn a -0 into 0
        counting = [(part, weight) for part, weight in zip(update.parts, update.weights, strict=True) if weight]
        if not counting:
            return
        parts, weights = zip(*counting, strict=True)
        update = Update(parts, weights, update.round)
    walks = [part for part in update.parts if isinstance(part, Walk)]
    # Noise is most of the work, and a coefficient of 0 adds +-0 to a sum that began with +0: no bit.
    terms = [[(s, c) for s, c in zip(walk.seeds, walk.coefficients, strict=True) if c] for walk in walks]
    with torch.no_grad():
        for name, tensor in params:
            flat = tensor.detach().view(-1)
            if len(walks) == len(update.parts):
                _backend(tensor).walks_(
                    flat,
                    tensor=tensor_id(name),
                    seeds=[[seed for seed, _ in walk] for walk in terms],
                    coefficients=[[round_coefficient(c) for _, c in walk] for walk in terms],
                    weights=list(update.weights),
                    law=law,
                    rounding=_rounding(update),
                )
            else:
                _add_dense_(flat, name, update, law)


def add_sum_(params: Params, total: SeedSum, *, law: Law) -> None:
    """Adds a sum of named directions to `params` in place.

    Coefficients are float32 and used whole: c z has at most 37 significant bits, exact in float64, in which the terms
    are added in seed order; the sum rounds to float32 once and the model once.

    Raises:
      ValueError: a coefficient is not a float32 number.
    """
    if any(c != float(np.float32(c)) for c in total.coefficients):
        raise ValueError("Coefficients of a sum must be float32 numbers; round them first.")
    with torch.no_grad():
        for name, tensor in params:
            key = {"tensor": tensor_id(name), "weights": [1.0], "law": law}
            terms = {"seeds": [list(total.seeds)], "coefficients": [list(total.coefficients)]}
            _backend(tensor).walks_(tensor.detach().view(-1), **terms, **key)


def _add_dense_(flat: Tensor, name: str, update: Update, law: Law) -> None:
    total = torch.zeros_like(flat, dtype=torch.float64)
    for part, weight in zip(update.parts, update.weights, strict=True):
        if isinstance(part, Walk):
            part = walk_delta(Params({name: flat}), part, law=law)
        total.add_(part.tensors[name].to(flat.device).view(-1).to(torch.float64).mul_(weight))
    moved = flat.to(torch.float64).add_(total)
    if flat.dtype == torch.float32:
        flat.copy_(moved)
    else:
        moved32 = moved.to(torch.float32)
        _backend(flat).stochastic_(flat, moved32, tensor=tensor_id(name), seed=_rounding(update))


def _rounding(update: Update) -> int:
    return derive_seed("rounding", update.round)
