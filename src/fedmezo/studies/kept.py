"""What a client keeps on its disk between starts: the trained parameters, and which rounds they have behind them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedmezo.studies.folder import aside, writing
from fedmezo.zo.params import Params

__all__ = ["Held", "keep", "kept"]

_FILE = "model.safetensors"


@dataclass(frozen=True)
class Held:
    """What a client's model is.

    Attributes:
      run: the run it belongs to.
      instance: tells this client from another one with its number, also after a restart.
      rounds: rounds the model has behind it.
      exact: whether it has the server's bits; else it was made of a pool's sums.
    """

    run: str
    instance: str
    rounds: int = 0
    exact: bool = True


_FIELDS: dict[str, Callable[[Any], Any]] = {"run": str, "instance": str, "rounds": int, "exact": bool}


def _digest(params: Params, held: Held) -> str:
    """Returns what shows that a bit of the parameters, or of what is said of them, has changed."""
    return hashlib.sha256((params.digest() + json.dumps(asdict(held), sort_keys=True)).encode()).hexdigest()


def keep(folder: Path, params: Params, held: Held) -> None:
    """Writes the parameters, whole or not at all.

    Raises:
      ConfigError: the folder cannot be written.
      RunError: the disk is full or fails.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        note = json.dumps({**asdict(held), "digest": _digest(params, held)})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in params}
        with aside(folder) as new:
            save_file(tensors, new / _FILE, metadata={"held": note})


def kept(folder: Path, params: Params, *, wanted: Held) -> Held | None:
    """Gives `params` the bits that were kept for the run of `wanted`, and returns what they are.

    When there are none, or a single bit of them has changed, `params` keeps its own and None is returned.
    """
    before = params.clone()
    try:
        with safe_open(folder / _FILE, framework="pt") as file:
            told = json.loads((file.metadata() or {})["held"])
            digest, held = told["digest"], Held(**{name: kind(told[name]) for name, kind in _FIELDS.items()})
            if held.run != wanted.run or set(file.keys()) != set(params.names):
                return None
            params.copy_(Params({name: file.get_tensor(name) for name in params.names}))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError):
        params.copy_(before)
        return None
    if _digest(params, held) != digest:
        params.copy_(before)
        return None
    return held
