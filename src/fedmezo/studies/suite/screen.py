"""What `study list` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedmezo.studies.suite.cells import cells_of
from fedmezo.studies.suite.records import Store
from fedmezo.studies.suite.study import Study

__all__ = ["listing", "listing_table"]


def listing(studies: Mapping[str, Study], store: Store) -> list[dict[str, Any]]:
    """Returns one row per study and scale: name, title, scale, claims, cells, records, estimated CPU minutes."""
    found = []
    for name, study in studies.items():
        for scale, sized in study.scales.items():
            cells = cells_of(study, scale)
            there = sum(not record.error for record in store.current(cells))
            found.append(
                {"name": name, "title": study.title, "scale": scale, "claims": len(study.claims), "cells": len(cells),
                 "records": there, "minutes": sized.minutes}
            )  # fmt: skip
    return found


def listing_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the rows for the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("study", "scale", "claims", "cells", "records", "CPU min"):
        table.add_column(title, justify="left" if title in ("study", "scale") else "right", no_wrap=True)
    for row in rows:
        numbers = (row["claims"], row["cells"], row["records"], f"{row['minutes']:g}" if row["minutes"] else "?")
        table.add_row(row["name"], row["scale"], *map(str, numbers))
    return table
