"""Runs of what a program built: with data, an algorithm or a model that no configuration names.

built = replace(build(config), algorithm=mine)
run(built, out="runs/mine")
resume("runs/mine", built=built_again)
"""

from pathlib import Path

from fedmezo.errors import ConfigError, JournalError
from fedmezo.runtime.journal import Journal
from fedmezo.runtime.line import Line
from fedmezo.runtime.walkers import checksum
from fedmezo.studies.build import Built
from fedmezo.studies.config import Config
from fedmezo.studies.connect import NETWORK
from fedmezo.studies.folder import base_of

__all__ = ["PYTHON", "check_same", "check_untrained", "refuse_elsewhere"]

PYTHON = "python"  # the kind of a run's header
# What may change between two starts of a run, because no bit of its walks follows from it. A model is its weights,
# whatever it is called.
_FREE = ("eval", "network", "output", "runtime")
_FREE_KEYS = {("federation", "rounds"), ("model", "name"), ("model", "revision")}


def check_untrained(built: Built) -> None:
    """Raises ConfigError when `built` has been trained already: a run begins with the untrained parameters."""
    if checksum(built.bench.params) != built.mark:
        raise ConfigError("What was built has been trained since; build it again, for every run and every resume.")


def check_same(built: Built, journal: Journal) -> None:
    """Checks that `built` is what a run began with; its algorithm has no name, so that is the caller's word.

    Raises:
      ConfigError: a key of the configuration differs, or `built` is trained already.
      JournalError: the base model, or what is trained of it, is another.
    """
    check_untrained(built)
    config, _ = base_of(journal, built.loaded)
    if key := _changed(config, built.config):
        raise ConfigError(f"{journal.path.parent} was begun with another {key}; give that one, or start a new run.")
    if built.bench.params.layout() != journal.header.layout:
        raise JournalError(f"{journal.path.parent} trains other parameters than these; build the same adapter.")


def _changed(before: Config, now: Config) -> str:
    """Returns the first key that differs and matters; "" when none does. More rounds are no difference."""
    old, new = (config.model_dump(mode="json", exclude=set(_FREE)) for config in (before, now))
    for section, values in new.items():
        for name, value in values.items():
            if (section, name) not in _FREE_KEYS and old[section][name] != value:
                return f"{section}.{name} ({old[section][name]}, not {value})"
    return ""


def refuse_elsewhere(journal: Journal, folder: Path, *, line: Line | None, built: Built | None) -> None:
    """Raises ConfigError when a run cannot be gone on with from here."""
    kind = journal.header.kind
    if line is None and kind == NETWORK:
        raise ConfigError(
            f"The clients of {folder} are on other machines; go on with `fedmezo server --resume {folder}`."
        )
    if built is None and kind == PYTHON:
        raise ConfigError(
            f"{folder} was begun by a Python program with objects of its own; go on there, with ZOTrainer or "
            "fedmezo.resume(DIR, built=...)."
        )
