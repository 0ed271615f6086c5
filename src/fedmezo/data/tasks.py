"""Loading records: from local files, the hub, or the built-in corpus."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fedmezo.data.presets import PRESETS, Columns, Preset, detect, find_preset, nearest
from fedmezo.data.readers import SUFFIXES, Row, data_files, read_rows, stem
from fedmezo.data.records import FIELDS, DataSource, Record
from fedmezo.data.split import shuffled
from fedmezo.errors import DataError

__all__ = ["PYTHON", "DataSource", "Record", "load_records"]

BUILTIN = "builtin:"
PYTHON = "python:"  # data that a program gave as objects, so that only it can give them again
BUILTIN_COUNT = 2000


def load_records(spec: DataSource) -> list[Record]:
    """Returns the records `spec` names, in their source's order.

    A name is looked up as the built-in corpus, then a preset, then a local path, then a hub id. Records
    of a folder that say no category get their file's stem. Missing values become empty text.

    Raises:
      DataError: nothing is found, a column is missing, or content is unusable; the message says which.
    """
    _check(spec)
    if spec.name is not None and spec.name.startswith(BUILTIN):
        records = _builtin(spec)
    elif (path := _local(spec)) is not None:
        records = _from_files(path, spec)
    else:
        records = _from_hub(spec)
    if not records:
        raise DataError(f"The preset's rules leave no record of '{spec.path or spec.name}'; check the preset.")
    if spec.limit is not None and spec.limit < len(records):
        kept = sorted(shuffled(len(records), "sample", spec.seed)[: spec.limit].tolist())
        records = [records[index] for index in kept]
    if spec.choices:
        records = [r if r.choices else dataclasses.replace(r, choices=tuple(spec.choices)) for r in records]
    return records


def _check(spec: DataSource) -> None:
    if (spec.path is None) == (spec.name is None):
        raise DataError(
            f"Expected either a path or a name of data, got path={spec.path!r} and name={spec.name!r}; "
            "to read a local file by a preset's rules, give preset."
        )
    if spec.limit is not None and spec.limit < 1:
        raise DataError(f"limit: expected at least 1 record, got {spec.limit}.")
    if spec.name is not None and spec.name.startswith(PYTHON):
        raise DataError(
            f"'{spec.name}' was given by a Python program and is written nowhere: go on there, with ZOTrainer or "
            "fedmezo.resume(DIR, built=...), or judge an exported adapter on data of a file with --config."
        )
    for field in spec.columns:
        if field not in FIELDS:
            raise DataError(f"Unknown field '{field}' in the column map; {nearest(field, FIELDS)}")


def _local(spec: DataSource) -> Path | None:
    if spec.path is not None:
        return Path(spec.path).expanduser()
    name = spec.name or ""
    path = Path(name).expanduser()
    return path if name not in PRESETS and (path.exists() or name.endswith(tuple(SUFFIXES))) else None


def _from_files(path: Path, spec: DataSource) -> list[Record]:
    preset = None if spec.preset is None else find_preset(spec.preset)
    records: list[Record] = []
    for file in data_files(path):
        rows = read_rows(file)
        found = _convert(rows, spec, preset=preset, source=str(file), name=stem(file))
        if path.is_dir():
            found = [r if r.category else dataclasses.replace(r, category=stem(file)) for r in found]
        records += found
    return records


def _from_hub(spec: DataSource) -> list[Record]:
    name = spec.name or ""
    preset = None if spec.preset is None else find_preset(spec.preset)
    hub = name
    if name in PRESETS:
        preset = preset or PRESETS[name]
        hub = PRESETS[name].hub
    if not hub:
        raise DataError(f"'{name}' has no hub copy; fetch its file and give its path with preset '{name}'.")
    rows = _hub_rows(hub, split=spec.split)
    if not rows:
        raise DataError(f"The hub data set '{hub}' has no rows in split '{spec.split}'; name another split.")
    return _convert(rows, spec, preset=preset, source=hub, name=hub)


def _hub_rows(hub: str, *, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"The hub's '{hub}' needs the package 'datasets'; install it or give a path.") from error
    identity, _, config = hub.partition(":")
    try:
        return list(datasets.load_dataset(identity, config or None, split=split))
    # The hub's client raises errors of a dozen packages; to the user they are one: no data.
    except Exception as error:
        raise DataError(
            f"No data set '{hub}', split '{split}', could be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            f"check name and network, or give a local path. As a preset, {nearest(hub, PRESETS)}"
        ) from error


def _builtin(spec: DataSource) -> list[Record]:
    corpus, _, wanted = (spec.name or "").removeprefix(BUILTIN).partition("/")
    if corpus != "skills":
        raise DataError(f"Unknown built-in corpus '{spec.name}'; known is '{BUILTIN}skills'.")
    from fedmezo.data.skills import skills

    categories = tuple(part.strip() for part in wanted.split(",") if part.strip()) or None
    return skills(count=spec.limit or BUILTIN_COUNT, seed=spec.seed, categories=categories)


def _convert(rows: Sequence[Row], spec: DataSource, *, preset: Preset | None, source: str, name: str) -> list[Record]:
    if preset is None:
        # A map that names the answer speaks for itself; a preset's rules might not fit the column it names.
        preset = PRESETS["alpaca"] if "output" in spec.columns else detect(rows)
    flat = [part for row in rows for part in preset.unfold(row, name)]
    found = list(dict.fromkeys(column for row in flat for column in row))
    chosen = _columns(preset.columns, spec.columns, found=found, source=source)
    read: Iterable[Record] = (
        _record(row, chosen, where=f"{source}, record {n}") for n, row in enumerate(flat, start=1)
    )
    if spec.none_input:
        read = map(partial(_with_none, columns=chosen.get("input", ())), flat, read)
    return [edited for record in read if (edited := preset.edit(record)) is not None]


def _with_none(row: Row, record: Record, *, columns: Sequence[str]) -> Record:
    """The record with "None" as its input if the row has none; an empty text is one."""
    given = any(row.get(column) is not None for column in columns)
    return record if given else dataclasses.replace(record, input="None")


def _columns(default: Columns, given: Mapping[str, str], *, found: Sequence[str], source: str) -> Columns:
    """The columns to read per field: the given ones, and the default ones the given map leaves free."""
    present = ", ".join(found)
    for field, column in given.items():
        if column not in found:
            raise DataError(f"{source}: no column '{column}' for '{field}'; columns found: {present}.")
    free = {
        field: tuple(column for column in names if column in found and column not in given.values())
        for field, names in default.items()
    }
    chosen = {field: names for field, names in free.items() if names} | {f: (c,) for f, c in given.items()}
    for wanted in (("output",), ("instruction", "input")):
        if not any(field in chosen for field in wanted):
            raise DataError(
                f"{source}: no column for '{wanted[0]}'; columns found: {present}. "
                f"Name it in the column map, or give a preset."
            )
    return chosen


def _record(row: Row, columns: Columns, *, where: str) -> Record:
    texts = {"instruction": ""} | {
        field: _value(row, names, where=where) for field, names in columns.items() if field != "choices"
    }
    return Record(**texts, choices=_choices(row, columns.get("choices", ()), where=where))


def _value(row: Row, names: Sequence[str], *, where: str) -> str:
    for column in names:
        if text := _text(row.get(column), where=where, column=column):
            return text
    return ""


def _text(value: object, *, where: str, column: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    raise DataError(f"{where}: column '{column}' is {type(value).__name__}, expected text; map another.")


def _choices(row: Row, names: Sequence[str], *, where: str) -> tuple[str, ...]:
    for column in names:
        value = row.get(column)
        parts = value.split("|") if isinstance(value, str) else value
        if isinstance(parts, list | tuple):
            return tuple(_text(part, where=where, column=column).strip() for part in parts)
        if value is not None:
            raise DataError(f"{where}: column '{column}' is {value!r}, expected a list or text parted by '|'.")
    return ()
