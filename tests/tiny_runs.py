"""Whole runs that take a second: the built-in model, sixty short records in a file, two local steps."""

import json
from pathlib import Path

from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.watch import NullWatch

CATEGORIES = ("red", "green", "blue", "grey")
THINGS = ("lamp", "chair", "horse", "apple", "river", "cloud", "stone", "bread", "glove", "train")
FILES = {"export": False, "report": False, "tensorboard": False}


def write_records(folder: Path, *, count: int = 60) -> Path:
    """Writes records of four categories, as many of each."""
    rows = [
        {
            "instruction": "Which colour?",
            "input": f"{THINGS[n % len(THINGS)]} {n}",
            "output": CATEGORIES[n % 4],
            "category": CATEGORIES[n % 4],
        }
        for n in range(count)
    ]
    path = folder / f"records-{count}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(records: Path, **sections) -> dict:
    """Returns the settings of a small run, with some sections changed."""
    basis = {
        "model": {"name": "builtin:tiny"},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {
            "path": str(records),
            "template": "{instruction} {input} is",
            "max_tokens": 32,
            "eval_examples": 8,
        },
        "split": {},
        "federation": {"clients": 3, "rounds": 4, "local_steps": 2, "batch_size": 2, "seed": 1},
        "algorithm": {},
        "eval": {"every": 2, "examples": 8},
        "output": FILES,
        "runtime": {"threads": 1},
    }
    return {name: basis.get(name, {}) | sections.get(name, {}) for name in {**basis, **sections}}


def small(records: Path, **sections) -> Config:
    return parse_config(asked(records, **sections))


class StopError(Exception):
    """A run that dies."""


class StopAfter(NullWatch):
    """Dies when a round has been reported; -1 dies before the first."""

    def __init__(self, round_number: int) -> None:
        self.round_number = round_number

    def start(self, info) -> None:
        if self.round_number < 0:
            raise StopError

    def round(self, report) -> None:
        if report.round == self.round_number:
            raise StopError


class Notes(NullWatch):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.info, self.notes, self.reports = {}, [], []

    def start(self, info) -> None:
        self.info = dict(info)

    def note(self, text) -> None:
        self.notes.append(text)

    def round(self, report) -> None:
        self.reports.append(report)
