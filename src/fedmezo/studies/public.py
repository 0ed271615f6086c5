"""What of a run strangers may be told: settings and public names, never a path, a record or a secret."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmezo.data.presets import PRESETS
from fedmezo.models.fetch import RECIPES
from fedmezo.studies.config import Config

__all__ = ["base_id", "dataset_id", "public_settings", "start_id"]

_NAMED = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)  # what a hub takes for a name
_BUILTIN, _PYTHON, _HUB = "builtin:", "python:", "hub:"
# Keys that say how a run goes, and nothing of whose data and which machine.
_TOLD: Mapping[str, tuple[str, ...]] = {
    "model": ("dtype", "quantize"),
    "adapter": ("kind", "rank", "alpha"),
    "split": ("kind", "alpha", "balanced"),
    "federation": (
        "clients", "cohort", "rounds", "local_steps", "batch_size", "weighting", "transport", "pull", "sums_coding",
    ),
    "robust": ("rule", "share", "bound"),
    "personal": ("signal", "alpha", "mode"),
    "privacy": ("mode", "clip", "sigma", "epsilon", "delta"),
    "eval": ("every", "metrics"),
    "guard": ("on_surge", "batches"),
}  # fmt: skip


def base_id(name: str, source: str) -> str | None:
    """Returns the hub id of a base model; None for a built-in one, a local folder or file, or an object in memory.

    Args:
      name: model.name.
      source: where it came from, `Loaded.source`.
    """
    if name in RECIPES:
        return RECIPES[name].hub
    known = source.startswith(_HUB) or name in {recipe.hub for recipe in RECIPES.values()}
    return name if known and _NAMED.fullmatch(name) else None


def dataset_id(config: Config) -> str | None:
    """Returns the hub id of the data set; None for local files, built-in data and objects in memory."""
    name = config.data.name
    if name is None or name.startswith((_BUILTIN, _PYTHON)):
        return None
    hub = (PRESETS[name].hub if name in PRESETS else name).partition(":")[0]
    return hub if _NAMED.fullmatch(hub) and not Path(hub).exists() else None


def start_id(config: Config) -> str | None:
    """Returns the hub id of the adapter that the run starts from; None for a local folder, or where there is none."""
    start = config.adapter.start or ""
    name, _, commit = start.partition("@")
    pinned = _NAMED.fullmatch(name) and re.fullmatch("[0-9a-f]{7,64}", commit) and not Path(start).exists()
    return name if pinned else None


def public_settings(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the settings that may be told, as plain values by section and key."""
    whole = config.model_dump(mode="json")
    told = {section: {key: whole[section][key] for key in keys} for section, keys in _TOLD.items()}
    return {**told, "algorithm": whole["algorithm"]}
