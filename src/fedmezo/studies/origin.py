"""Where training starts: an adapter of our own making, or one that somebody has tuned before (adapter.start)."""

from pathlib import Path
from typing import Any

from fedmezo.errors import ConfigError, ModelError
from fedmezo.models.adapters import Adapter, make_adapter
from fedmezo.models.load import Loaded
from fedmezo.models.starts import Start, digest_of, read_start
from fedmezo.studies.config import Config
from fedmezo.zo.params import Params

__all__ = ["from_folder", "from_model", "origin_of"]

_SHOWN = 12  # digits of a digest that people compare


def origin_of(config: Config, loaded: Loaded) -> tuple[Config, Adapter, Params | None, tuple[str, ...]]:
    """Returns the configuration with rank, alpha and targets in force, the adapter, its values and what to say of it.

    The values are None where the adapter begins at its own start. An adapter to start from is named in the
    configuration by the digest of its numbers, so that nobody goes on from another one.

    Raises:
      ConfigError: the configuration contradicts the adapter to start from.
      ModelError: there is no such adapter, it is for another model, or its numbers are not those of the digest.
    """
    wanted = config.adapter
    if wanted.start is None:
        rank, alpha = wanted.rank or 0, wanted.alpha or 0
        made = make_adapter(loaded.model, kind=wanted.kind, rank=rank, alpha=alpha, targets=wanted.targets)
        return config, made, None, ()
    start = read_start(wanted.start, loaded.model)
    _refuse_contradictions(config, start)
    digest = digest_of(start.adapter, start.params)
    if wanted.start_digest is not None and not digest.startswith(wanted.start_digest):
        raise ModelError(
            f"adapter.start: the adapter in '{wanted.start}' is not the one that is wanted: digest {digest[:_SHOWN]}, "
            f"not {wanted.start_digest[:_SHOWN]}; restore that one, or begin another run."
        )
    alpha = int(start.alpha) if start.alpha == int(start.alpha) and start.alpha >= 1 else None
    told: dict[str, Any] = {"start": start.name, "start_digest": digest, "rank": start.rank, "alpha": alpha}
    told["targets"] = start.targets or wanted.targets
    resolved = config.model_copy(update={"adapter": wanted.model_copy(update=told)})
    return resolved, start.adapter, start.params, _sentences(config, start, digest)


def from_folder(config: Config, folder: Path) -> Config:
    """Returns the configuration of a run that starts from an exported adapter, whatever it started from itself."""
    told = {"kind": "lora", "preset": None, "start": str(folder), "start_digest": None}
    told |= {"rank": None, "alpha": None, "targets": None}
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=told)})


def from_model(config: Config, folder: Path) -> Config:
    """Returns the configuration with a merged model's folder as the base model, which holds what was tuned already."""
    wanted = config.adapter
    told = {"start": None, "start_digest": None, "rank": wanted.rank or 8, "alpha": wanted.alpha or 16}
    model = config.model.model_copy(update={"name": str(folder), "revision": None})
    return config.model_copy(update={"model": model, "adapter": wanted.model_copy(update=told)})


def _refuse_contradictions(config: Config, start: Start) -> None:
    wanted = config.adapter
    asked: list[tuple[str, Any, Any]] = [("rank", wanted.rank, start.rank), ("alpha", wanted.alpha, start.alpha)]
    if wanted.targets is not None and start.targets is not None:
        asked.append(("targets", sorted(set(wanted.targets)), list(start.targets)))
    for key, ours, theirs in asked:
        if ours is not None and ours != theirs:
            told = f"{theirs:g}" if isinstance(theirs, int | float) else theirs
            raise ConfigError(
                f"adapter.{key} = {ours} contradicts adapter.start: the adapter in '{wanted.start}' has {told}; leave "
                f"adapter.{key} out."
            )


def _sentences(config: Config, start: Start, digest: str) -> tuple[str, ...]:
    said = f"The run starts from the adapter in '{config.adapter.start}': rank {start.rank}, alpha {start.alpha:g}"
    said = f"{said}, digest {digest[:_SHOWN]}."
    ours, theirs = Path(config.model.name).name.lower(), Path(start.base).name.lower()
    return (said,) if not theirs else (said, *_about_base(config, start.base, same=ours in theirs or theirs in ours))


def _about_base(config: Config, named: str, *, same: bool) -> tuple[str, ...]:
    if same:
        return ()
    return (f"That adapter was made for the base model '{named}', and this run tunes '{config.model.name}'.",)
