"""The trainable parameters as one ordered, named vector of masters: float32, or 16 bits when they are a whole model."""

import hashlib
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fedmezo.errors import ModelError, RunError
from fedmezo.zo.noise import NOISE_VERSION, tensor_id

__all__ = ["Params", "Saved", "kept"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Params:
    """The d trainable scalars, as named tensors in name order.

    The mapping is frozen, the tensors are not: functions whose name ends in an underscore write to them, all others
    only read.

    Attributes:
      tensors: name -> contiguous tensor of float32, bfloat16 or float16.

    Raises:
      ModelError: a tensor is of another type or not contiguous, or two names share a tensor id.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Orders the tensors by name and checks them."""
        ordered = dict(sorted(self.tensors.items()))
        seen: dict[int, str] = {}
        for name, tensor in ordered.items():
            if tensor.dtype not in _DTYPES or not tensor.is_contiguous():
                raise ModelError(
                    f"Trainable tensor '{name}' must be contiguous float32, bfloat16 or float16, got {tensor.dtype}; "
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

    @property
    def nbytes(self) -> int:
        """The memory they take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def layout(self) -> str:
        """Returns the sha256 of (names, shapes, noise version): what two machines must share to exchange scalars.

        Types count when they are not float32.
        """
        text = [f"noise {NOISE_VERSION}"]
        for name, tensor in self.tensors.items():
            kind = "" if tensor.dtype == torch.float32 else f" {tensor.dtype}"
            text.append(f"{name} {tuple(tensor.shape)}{kind}")
        return hashlib.sha256("\n".join(text).encode()).hexdigest()

    def digest(self) -> str:
        """Returns the sha256 of the values, little-endian in name order."""
        state = hashlib.sha256()
        for _, tensor in self:
            state.update(_bytes(tensor.detach().cpu()))
        return state.hexdigest()

    def clone(self) -> "Params":
        """Returns an independent copy."""
        return Params({name: tensor.detach().clone() for name, tensor in self})

    def copy_(self, other: "Params") -> None:
        """Writes the values of `other`, bit for bit; the layouts must be equal."""
        if other.names != self.names:
            raise ModelError(f"Cannot copy {len(other.names)} tensors over {len(self.names)} with other names.")
        with torch.no_grad():
            for name, tensor in self:
                tensor.copy_(other[name])


class Saved:
    """The bits of some parameters in a temporary file, which goes when this does, or is closed.

    Raises:
      RunError: the file cannot be written.
    """

    def __init__(self, params: Params) -> None:
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            self.close = weakref.finalize(self, self._file.close)
            for _, tensor in params:
                self._file.write(_bytes(tensor.detach().cpu()))
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"Cannot keep the weights in a temporary file ({error.strerror}): {params.nbytes // 10**6} MB of room "
                "are needed in the folder for temporary files; set TMPDIR to a larger one."
            ) from error

    def restore_(self, params: Params) -> None:
        """Gives `params`, of the same layout, the bits that were saved.

        Raises:
          RunError: the file was cut short.
        """
        self._file.seek(0)
        for _, tensor in params:
            # A CPU tensor's own memory is read into, without a copy.
            host = tensor.detach().cpu()
            if self._file.readinto(_bytes(host)) != host.nbytes:
                raise RunError("The temporary file that keeps the weights was cut short; start the run again.")
            tensor.detach().copy_(host)


@contextmanager
def kept(params: Params) -> Iterator[None]:
    """Lends a scope after which `params` has the bits it had before, kept in a temporary file meanwhile.

    Raises:
      RunError: the file cannot be written, or was cut short.
    """
    saved = Saved(params)
    try:
        yield
    finally:
        saved.restore_(params)
        saved.close()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
