"""A benchmark in the terminal: a table per benchmark, and below it what could not be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedmezo.studies.page import DASH, number

__all__ = ["bench_table"]

_LEGEND = "Ratios: this / two plain inference forwards, this / the in-place scheme; below 1 is cheaper."


def bench_table(result: Mapping[str, Any]) -> RenderableType:
    """Returns the machine, one table per benchmark, and the notes."""
    parts: list[RenderableType] = [Text(_machine(result)), Text(_LEGEND)]
    for group, rows in groupby(result["rows"], key=lambda row: row["name"].partition(":")[0]):
        parts += [Text(f"\n{group.capitalize()}", style="bold"), _table(list(rows))]
    parts += [Text(f"- {note}") for note in result["notes"]]
    return Group(*parts)


def _machine(result: Mapping[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    where = machine["gpu"] if settings["device"].startswith("cuda") else machine["cpu"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    cores = f"{machine['threads']} of {machine['cores']} cores"
    return f"{settings['model']} on {where}, {cores}, {settings['clock']}; {versions}"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns one line per row; tokens and clients are left out where they say the same in all rows."""
    told = [column for column in ("tokens", "clients") if len({row[column] for row in rows}) > 1]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for head in ("dtype", *told, "value", "2 forwards", "in-place"):
        justify = "left" if head == "dtype" else "right"
        table.add_column(head, justify=justify, header_style="bold", no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        name = row["name"].partition(": ")[2]
        value = DASH if row["value"] is None else f"{number(row['value'], 3)} {row['unit']}"
        ratios = (number(row["ratio_two_forwards"], 3), number(row["ratio_inplace"], 3))
        table.add_row(Text(name), row["dtype"], *(str(row[column]) for column in told), value, *ratios)
    return table
