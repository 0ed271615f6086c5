"""An adapter that somebody has tuned before, as the place where training starts: found, read, and named by its numbers.

PEFT folders with safetensors only: pickled weights are neither read nor downloaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmezo.errors import ModelError
from fedmezo.models.adapters import SETTINGS, WEIGHTS, Adapter, load_adapter
from fedmezo.zo.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Start", "base_named_in", "digest_of", "find_adapter", "read_start"]

_PICKLED = "adapter_model.bin"


@dataclass(frozen=True, eq=False)
class Start:
    """Where training starts.

    Attributes:
      name: how to find the adapter again: its folder, or the hub id with its commit.
      adapter: rank, scales and targets.
      params: its matrices, float32.
      base: the base model its settings name; empty for none.
    """

    name: str
    adapter: Adapter
    params: Params
    base: str

    @property
    def rank(self) -> int:
        """The rank of its matrices, where no pattern says otherwise."""
        return int(self.adapter.config.r) if self.adapter.config is not None else 0

    @property
    def alpha(self) -> float:
        """Its LoRA alpha, where no pattern says otherwise."""
        return float(self.adapter.config.lora_alpha) if self.adapter.config is not None else 0.0

    @property
    def targets(self) -> tuple[str, ...] | None:
        """The names of its target modules; None where a pattern gives them."""
        found = None if self.adapter.config is None else self.adapter.config.target_modules
        return None if found is None or isinstance(found, str) else tuple(sorted(found))


def read_start(name: str, model: PreTrainedModel) -> Start:
    """Returns the adapter called `name`, for `model`.

    Args:
      name: a PEFT folder, or a hub id: owner/name, or owner/name@revision.
      model: the frozen base model; not touched.

    Raises:
      ModelError: there is none, it holds pickled weights only, or it is for another model or of another kind.
    """
    folder, found = find_adapter(name)
    adapter, params = load_adapter(folder, model)
    return Start(found, adapter, params, base_named_in(folder))


def digest_of(adapter: Adapter, params: Params) -> str:
    """Returns the sha256, in hex, of all that a LoRA adapter computes with: numbers, names, shapes and scales."""
    scales = sorted((site.module, site.a, site.b, float(site.scale)) for site in adapter.sites)
    return hashlib.sha256((params.digest() + json.dumps(scales)).encode()).hexdigest()


def base_named_in(folder: Path) -> str:
    """Returns the base model that an adapter's settings name; empty for none."""
    try:
        told = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / SETTINGS} cannot be read: {error}.") from error
    base = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    return base if isinstance(base, str) else ""


def find_adapter(name: str) -> tuple[Path, str]:
    """Returns the folder of an adapter on this machine, downloaded if need be, and the name that finds it again.

    Raises:
      ModelError: there is none.
    """
    path = Path(name).expanduser()
    if path.exists():
        _check_folder(path)
        return path, name
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ModelError(f"There is no adapter folder {name!r}; give a PEFT folder, or a hub id such as owner/name.")
    folder = _downloaded(name)
    _check_folder(folder)
    return folder, f"{name.partition('@')[0]}@{folder.name}"


def _check_folder(path: Path) -> None:
    if (path / SETTINGS).is_file() and not (path / WEIGHTS).is_file() and (path / _PICKLED).is_file():
        raise ModelError(f"{path} holds pickled weights, which can run code; save the adapter as {WEIGHTS}.")
    if not (path / SETTINGS).is_file() or not (path / WEIGHTS).is_file():
        raise ModelError(f"{path} is no PEFT adapter folder: it needs {SETTINGS} and {WEIGHTS}.")


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[SETTINGS, WEIGHTS]))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither an adapter folder nor a hub id.") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"Adapter {repository!r} has no revision {revision!r} on the Hugging Face hub.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"Adapter {repository!r} is not on the hub, or is private.") from error
    except OSError as error:
        raise ModelError(f"Cannot get adapter {name!r}: the hub cannot be reached and left no copy here.") from error
