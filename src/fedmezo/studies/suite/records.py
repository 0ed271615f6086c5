"""Raw records: one JSON line per cell that was run, one file per study and scale, kept in the order of the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedmezo.channels import plain
from fedmezo.errors import ConfigError
from fedmezo.studies.folder import writing
from fedmezo.studies.suite.cells import Cell

__all__ = ["Record", "Store", "Values", "adopt"]

Values = Mapping[str, Any]
_DIGITS = 8


@dataclass(frozen=True)
class Record:
    """What came out of a cell.

    Attributes:
      key: the cell's.
      study: the study it was run for.
      grid: its grid.
      scale: its scale.
      kind: what was done.
      levels: factor -> level.
      seed: paired seed.
      points: evaluations: what was spent by then (rounds, forwards, tokens, seconds, bytes), and metrics (loss, ...).
      values: diagnostics by name.
      cpu: CPU seconds it took.
      package: version of fedmezo.
      error: why there is no result; empty for none.
    """

    key: str
    study: str
    grid: str
    scale: str
    kind: str
    levels: Mapping[str, str]
    seed: int
    points: Sequence[Values] = ()
    values: Values = field(default_factory=dict)
    cpu: float = 0.0
    package: str = ""
    error: str = ""

    def to_json(self) -> str:
        """Returns one line; numbers have eight digits, those that are not finite are null."""
        return json.dumps(plain(_short(asdict(self))), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Returns the record of a line.

        Raises:
          ValueError: it is none.
        """
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(str(error)) from None


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _short(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


class Store:
    """The records of a folder: `SCALE/STUDY.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, study: str, scale: str) -> Path:
        """Returns where the records of a study at a scale are."""
        return self.folder / scale / f"{study}.jsonl"

    def of(self, study: str, scale: str) -> list[Record]:
        """Returns the newest record of each cell of a study, in the order of the file; none without a file.

        Raises:
          ConfigError: a line that is not the last is no record.
        """
        found: dict[tuple[str, str, str], Record] = {}
        for record in self._lines(self.path(study, scale)):
            found[record.grid, json.dumps(record.levels, sort_keys=True), record.key] = record
        return list(found.values())

    def by_key(self, scale: str) -> dict[str, Record]:
        """Returns every record without an error at a scale, whatever study it was run for, by its cell's key."""
        paths = sorted((self.folder / scale).glob("*.jsonl"))
        return {record.key: record for path in paths for record in self._lines(path) if not record.error}

    def append(self, record: Record) -> None:
        """Adds a record at the end of its file."""
        path = self.path(record.study, record.scale)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
            with path.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + record.to_json() + "\n")

    def current(self, cells: Sequence[Cell]) -> list[Record]:
        """Returns the records of these cells, as far as there are any; what was run for other settings is not used."""
        if not cells:
            return []
        known = self.by_key(cells[0].scale)
        failed = {record.key: record for record in self.of(cells[0].study, cells[0].scale) if record.error}
        found = [(cell, known.get(cell.key) or failed.get(cell.key)) for cell in cells]
        return [adopt(record, cell) for cell, record in found if record is not None]

    @staticmethod
    def _lines(path: Path) -> Iterator[Record]:
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield Record.from_json(line)
            except ValueError:
                # A process that died while writing leaves half a line; whatever comes after begins on a new one.
                if number < len(lines) and not _half(line):
                    raise ConfigError(f"{path}, line {number}, is no record; take the line out.") from None


def _half(line: str) -> bool:
    return line.startswith("{") and not line.endswith("}")


def adopt(record: Record, cell: Cell) -> Record:
    """Returns a record as that of a cell with the same key, which another study may have run."""
    told = asdict(record) | {"study": cell.study, "grid": cell.grid, "levels": dict(cell.levels)}
    return Record(**told)
