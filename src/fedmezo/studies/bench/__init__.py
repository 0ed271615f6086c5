"""Benchmarks as ratios: against two plain inference forwards and against the widespread in-place scheme.

Everything that is divided by something else is measured in one interleaved run with it, so that a busy machine slows
both alike. See `rows.Row` for what a row says and `inplace` for the scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmezo.studies.bench.options import KINDS, BenchOptions, Kind, read_list
from fedmezo.studies.bench.rows import Row, as_result

__all__ = ["KINDS", "BenchOptions", "Kind", "bench", "read_list"]

Say = Callable[[str], None]


def bench(asked: BenchOptions, *, say: Say) -> dict[str, Any]:
    """Returns machine, settings, rows, notes on what is not available, and sentences on limits that were not kept.

    Args:
      asked: what to measure.
      say: receives a line per case.

    Raises:
      ModelError: the model cannot be had.
      RunError: memory cannot be measured here.
    """
    from fedmezo.studies.bench.memory import broken
    from fedmezo.studies.bench.timing import threads_of

    with threads_of(asked.threads):
        rows = [row for kind in asked.kinds for row in _rows(kind, asked, say)]
        clock = "wall clock" if asked.device.startswith("cuda") else "CPU seconds of the process"
        settings = {name: value for name, value in asdict(asked).items() if value is not None} | {"clock": clock}
        settings["model"] = _model_name(asked)
        return as_result(rows, settings=settings, failed=broken(rows))


def _model_name(asked: BenchOptions) -> str:
    if asked.shape is not None:
        return f"random {asked.shape}"
    return Path(asked.model).name if Path(asked.model).exists() else asked.model  # results hold no path


def _rows(kind: Kind, asked: BenchOptions, say: Say) -> Iterator[Row]:
    from fedmezo.studies.bench.memory import memory_rows
    from fedmezo.studies.bench.noise import noise_rows
    from fedmezo.studies.bench.replay import replay_rows
    from fedmezo.studies.bench.simulate import simulate_rows
    from fedmezo.studies.bench.step import step_rows

    known: dict[Kind, Callable[..., Iterator[Row]]] = {
        "noise": noise_rows,
        "step": step_rows,
        "simulate": simulate_rows,
        "replay": replay_rows,
        "memory": memory_rows,
    }
    return known[kind](asked, say=say)
