"""The only module that writes trainable weights.

Every function takes any float32 tensors on any device; CPU tensors go through the compiled backend when numba is
installed, all others through plain torch. Both give the same bits; `check_backend` proves it once per process.
"""

import os
from functools import cache
from importlib import util
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fedmezo.errors import NoiseError
from fedmezo.zo.kernels import torch_ops
from fedmezo.zo.noise import Law, round_coefficient, table, tensor_id
from fedmezo.zo.params import Params
from fedmezo.zo.seedsum import DenseDelta, SeedSum, Update, Walk

__all__ = ["add_sum_", "apply_", "check_backend", "lane_", "lanes_", "step_", "walk_delta"]


@cache
def check_backend(name: str) -> None:
    """Checks a backend against noise v1: the table on all 65,536 inputs, then one block of each law.

    Raises:
      NoiseError: the backend is wrong on this machine; nothing has been written.
    """
    if name == "torch":
        return
    from fedmezo.zo.kernels import numba_ops

    good = bool(np.array_equal(numba_ops.lookup() * 1024, table().astype(np.float32)))
    for law in ("gaussian", "rademacher"):
        seed, tensor = 0x0123456789ABCDEF, 0x89ABCDEF
        fast = numba_ops.entries(seed, tensor, size=4100, law=law)
        good &= torch.equal(fast, torch_ops.entries(seed, tensor, start=0, size=4100, law=law, device=fast.device))
    if not good:
        raise NoiseError(
            "The compiled noise backend differs from noise v1 here; set FEDMEZO_NOISE=torch and report this."
        )


def _backend(tensor: Tensor) -> ModuleType:
    wanted = os.environ.get("FEDMEZO_NOISE", "")
    if tensor.device.type != "cpu" or wanted == "torch" or not util.find_spec("numba"):
        return torch_ops
    from fedmezo.zo.kernels import numba_ops

    check_backend("numba")
    return numba_ops


def step_(params: Params, seed: int, *, coefficient: float, law: Law) -> None:
    """Adds coefficient * z(seed) to `params` in place, one float32 rounding per scalar.

    Args:
      params: the d trainable scalars.
      seed: the direction's name.
      coefficient: rounded to 11 significant bits before use.
      law: the direction's law.
    """
    exact = round_coefficient(coefficient)
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


def walk_delta(params: Params, walk: Walk, *, law: Law) -> DenseDelta:
    """Returns a walk written out: the float64 sum of its steps, rounded to float32 once; shapes as in `params`."""
    tensors = {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in params}
    apply_(Params(tensors), Update((walk,), (1.0,)), law=law)
    return DenseDelta(tensors)


def apply_(params: Params, update: Update, *, law: Law) -> None:
    """Adds one round's update to `params` in place, with one float32 rounding per scalar.

    Args:
      params: the model's trainable scalars.
      update: weighted walks, or weighted dense deltas; scalar and dense forms of the same walks give the same bits.
      law: the directions' law.
    """
    walks = [part for part in update.parts if isinstance(part, Walk)]
    with torch.no_grad():
        for name, tensor in params:
            flat = tensor.detach().view(-1)
            if len(walks) == len(update.parts):
                _backend(tensor).walks_(
                    flat,
                    tensor=tensor_id(name),
                    seeds=[list(walk.seeds) for walk in walks],
                    coefficients=[[round_coefficient(c) for c in walk.coefficients] for walk in walks],
                    weights=list(update.weights),
                    law=law,
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
    flat.copy_(flat.to(torch.float64).add_(total))
