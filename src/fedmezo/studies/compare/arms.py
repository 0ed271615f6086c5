"""The arms of a comparison: read from files, turned into single runs, and what must be said of their differences."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmezo.errors import ConfigError
from fedmezo.studies.compare.terms import Budget, Terms
from fedmezo.studies.config import Config, changed, load_config
from fedmezo.studies.descent import walk_passes
from fedmezo.studies.settings import ALGORITHMS
from fedmezo.studies.tomltext import toml

__all__ = ["ENDLESS", "arm_notes", "read_arms", "variant"]

# Only the budget shall end a run; no budget that a person waits for lasts so long.
ENDLESS = 1_000_000
# An arm judged on other data or another model answers another question; how often it is judged does not matter.
_JUDGED_BY: Mapping[str, tuple[str, ...]] = {"data": (), "split": (), "model": (), "eval": ("every",)}
_KEPT = {"dir": None, "export": False, "report": False, "tensorboard": False}


def read_arms(
    paths: Sequence[Path | str], *, algorithms: Sequence[str] = (), settings: Sequence[str] = ()
) -> dict[str, Config]:
    """Returns the arms by label: one per file, or one file (or the defaults) with each algorithm.

    Args:
      paths: TOML files; a label is the file's stem, with its folder where stems are alike.
      algorithms: names of algorithms; goes with one file at most.
      settings: `section.key=value`, laid over every arm.

    Raises:
      ConfigError: two arms are the same, a name is unknown, or as `load_config`.
    """
    if not algorithms:
        _refuse_twins([str(Path(path)) for path in paths])
        return {label: load_config(path, settings) for label, path in zip(_labels(paths), paths, strict=True)}
    if len(paths) > 1:
        raise ConfigError(f"--algorithms goes with one configuration, got {len(paths)}; leave it out, or the others.")
    _refuse_twins(algorithms)
    for name in algorithms:
        if name not in ALGORITHMS:
            raise ConfigError(f"--algorithms: expected some of {', '.join(ALGORITHMS)}, got {name!r}.")
    path = paths[0] if paths else None
    return {name: load_config(path, [*settings, f"algorithm.name={toml(name)}"]) for name in algorithms}


def _refuse_twins(names: Sequence[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ConfigError(f"Two arms are called {twice[0]}; give every arm once.")


def _labels(paths: Sequence[Path | str]) -> list[str]:
    """Returns the shortest ends of the paths that tell them apart, without the suffix."""
    full = [Path(path).absolute().with_suffix("").parts for path in paths]
    deep = 1
    while len({parts[-deep:] for parts in full}) < len(full) and deep < max(map(len, full)):
        deep += 1
    labels = ["/".join(parts[-deep:]) for parts in full]
    _refuse_twins(labels)
    return labels


def variant(
    config: Config, *, budget: Budget, seed: int, rate: float | None = None, data_seed: int | None = None
) -> Config:
    """Returns one run's configuration: an arm's, with only its budget to end it.

    A budget of rounds or forwards tells how many rounds there will be, so that all else is as in a run alone. No other
    budget does; then what goes by the number of rounds is left out: decay, the adaptation of a rate, judged batches.

    Args:
      config: the arm's.
      budget: what the run may spend.
      seed: `federation.seed`.
      rate: `algorithm.rate`; None for the arm's own.
      data_seed: `data.seed`; None for the arm's own.
    """
    blind = _blind(budget)
    changes: dict[str, dict[str, Any]] = {
        "federation": {"seed": seed, "budget": dict(budget), "rounds": _rounds(config, budget)},
        "algorithm": ({} if rate is None else {"rate": rate})
        | ({"decay": "constant", "adapt": False} if blind else {}),
        "guard": {"batches": 0} if blind and config.guard.batches is None else {},
        "data": {} if data_seed is None else {"seed": data_seed},
        "output": _KEPT,
    }
    return changed(config, changes)


def _blind(budget: Budget) -> bool:
    """Whether only the run itself will tell how many rounds the budget is enough for."""
    return not {"rounds", "forwards"} & set(budget)


def _rounds(config: Config, budget: Budget) -> int:
    if "rounds" in budget:
        return math.ceil(budget["rounds"])
    one = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": 1})})
    return ENDLESS if _blind(budget) else min(ENDLESS, math.ceil(budget["forwards"] / walk_passes(one)))


def arm_notes(arms: Mapping[str, Config], terms: Terms) -> list[str]:
    """Returns what a reader must know of the terms, in sentences."""
    return [*_changed(arms, terms), *_unlike(arms), *_rates(arms, terms), *_shared(arms, terms)]


def _changed(arms: Mapping[str, Config], terms: Terms) -> Iterator[str]:
    blind = [next(iter(each)) for each in (terms.budget, terms.tune_budget or terms.budget) if _blind(each)]
    if blind:
        yield from _left_out(arms, terms, kind=blind[0])
    own = [label for label, config in arms.items() if config.federation.budget not in ({}, dict(terms.budget))]
    if own:
        yield f"The comparison's budget takes the place of federation.budget in {', '.join(own)}."


def _left_out(arms: Mapping[str, Config], terms: Terms, *, kind: str) -> Iterator[str]:
    """Yields what arms do without, because a budget of this kind does not tell the number of rounds."""
    why = f"the number of rounds, which a budget of {kind} does not tell"
    decays = [label for label, config in arms.items() if config.algorithm.decay not in (None, "constant")]
    if decays:
        told = "algorithm.decay is constant here instead of what"
        yield f"{told} {', '.join(decays)} asked for: a decay goes by {why}."
    if adapted := _adapted(arms, terms):
        yield (
            f"Rates are constant here, where a run of {', '.join(adapted)} alone would adapt and then decay them: both "
            f"go by {why}. Give the budget in rounds or forwards, or add --tune."
        )
    judged = [label for label, config in arms.items() if config.guard.batches is None and _walks(config)]
    if judged:
        yield (
            f"Only the training loss of {', '.join(judged)} is watched for surges: how many batches a guard judges "
            f"goes by {why}."
        )


def _walks(config: Config) -> bool:
    return config.algorithm.name != "fedavg"


def _adapted(arms: Mapping[str, Config], terms: Terms) -> list[str]:
    """Returns the arms whose runs alone, at the rates of this comparison, would adapt them."""
    given = terms.rate is not None or bool(terms.tune)
    return [
        label
        for label, config in arms.items()
        if _walks(config)
        and (config.algorithm.adapt or (config.algorithm.adapt is None and config.algorithm.rate is None and not given))
    ]


def _unlike(arms: Mapping[str, Config]) -> Iterator[str]:
    keys = [
        f"{section}.{key}"
        for section, free in _JUDGED_BY.items()
        for key in type(getattr(next(iter(arms.values())), section)).model_fields
        if key not in free and len({_text_of(config, section, key) for config in arms.values()}) > 1
    ]
    if keys:
        yield f"The arms are not judged alike, so their losses cannot be compared: they differ in {', '.join(keys)}."
    if len({config.runtime.model_dump_json() for config in arms.values()}) > 1:
        yield "The arms differ in [runtime], so seconds and memory are those of different settings."


def _text_of(config: Config, section: str, key: str) -> str:
    return repr(getattr(getattr(config, section), key))


def _rates(arms: Mapping[str, Config], terms: Terms) -> Iterator[str]:
    own = {config.algorithm.rate for config in arms.values()}
    if terms.tune:
        return
    if terms.rate is not None or (len(own) == 1 and None not in own):
        yield (
            "All arms ran at one rate. A rate that suits one algorithm need not suit another: nothing here says which "
            "is better with rates of their own; add --tune with a grid."
        )
    else:
        yield "Every arm ran at the rate of its configuration, tuned or not; add --tune to choose them alike."


def _shared(arms: Mapping[str, Config], terms: Terms) -> Iterator[str]:
    if terms.jobs > 1:
        yield f"{terms.jobs} runs went on at once, so seconds are those of a machine that was shared."
    if any(config.runtime.device != "cpu" for config in arms.values()):
        yield "Peak memory is the process' own on the host; the memory of a GPU is not in it."
    adapted = _adapted(arms, terms)
    if adapted and not _blind(terms.budget):
        yield (
            f"The rates of {', '.join(adapted)} are adapted; the forward passes that takes come on top of the budget, "
            "as those that notice a surge do."
        )
    names = {config.algorithm.name for config in arms.values()}
    if terms.kind == "tokens" and "fedavg" in names and len(names) > 1:
        yield "Tokens are what forward passes read, so this budget does not charge fedavg for its backward passes."
    fixed = [label for label, config in arms.items() if config.data.eval_path is not None]
    if terms.tune and fixed:
        yield (
            f"{', '.join(fixed)}: data.eval_path is one fixed file, so the rates were chosen on the same evaluation "
            "examples that are reported."
        )
