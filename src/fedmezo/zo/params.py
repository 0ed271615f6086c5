"""The trainable parameters as one ordered, named vector of float32 masters."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedmezo.errors import ModelError
from fedmezo.zo.noise import NOISE_VERSION, tensor_id

__all__ = ["Params"]


@dataclass(frozen=True)
class Params:
    """The d trainable scalars, as named tensors in name order.

    The mapping is frozen, the tensors are not: functions whose name ends in an underscore write to them, all others
    only read.

    Attributes:
      tensors: name -> float32 contiguous tensor.

    Raises:
      ModelError: a tensor is not float32 and contiguous, or two names share a tensor id.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Orders the tensors by name and checks them."""
        ordered = dict(sorted(self.tensors.items()))
        seen: dict[int, str] = {}
        for name, tensor in ordered.items():
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ModelError(
                    f"Trainable tensor '{name}' must be contiguous float32, got {tensor.dtype}; "
                    "load the model in float32."
                )
            other = seen.setdefault(tensor_id(name), name)
            if other != name:
                raise ModelError(f"Parameter names '{other}' and '{name}' share a tensor id; rename one of them.")
        object.__setattr__(self, "tensors", MappingProxyType(ordered))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) in name order."""
        return iter(self.tensors.items())

    def __getitem__(self, name: str) -> Tensor:
        """Returns one tensor."""
        return self.tensors[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(self.tensors)

    @property
    def dim(self) -> int:
        """The number d of trainable scalars."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def layout(self) -> str:
        """Returns the sha256 of (names, shapes, noise version): what two machines must share to exchange scalars."""
        text = [f"noise {NOISE_VERSION}"] + [f"{name} {tuple(tensor.shape)}" for name, tensor in self]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()

    def digest(self) -> str:
        """Returns the sha256 of the values, little-endian float32 in name order."""
        state = hashlib.sha256()
        for _, tensor in self:
            state.update(tensor.detach().cpu().view(-1).numpy().view(np.uint8).data)
        return state.hexdigest()

    def clone(self) -> Self:
        """Returns an independent copy."""
        return type(self)({name: tensor.detach().clone() for name, tensor in self})

    def copy_(self, other: "Params") -> None:
        """Writes the values of `other`, bit for bit; the layouts must be equal."""
        if other.names != self.names:
            raise ModelError(f"Cannot copy {len(other.names)} tensors over {len(self.names)} with other names.")
        with torch.no_grad():
            for name, tensor in self:
                tensor.copy_(other[name])
