"""What a cell does, by name: every kind takes (settings, seed) and returns points and values for its record."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from fedmezo import __version__
from fedmezo.errors import ConfigError, FedMeZOError
from fedmezo.studies.suite.cells import Cell
from fedmezo.studies.suite.records import Record

__all__ = ["KINDS", "Found", "Settings", "perform", "probe_settings"]

Settings = Mapping[str, Mapping[str, Any]]
Found = tuple[list[dict[str, float]], dict[str, Any]]
Kind = Callable[[Settings, int], Found]

_PACKAGE = "fedmezo.studies.suite"
# Heavy modules are imported by the process that does the cell, and only then.
KINDS: Mapping[str, str] = {
    "run": "kind_run:tune",
    "storage": "kind_storage:store",
    "signal": "kind_probe:signal",
    "curvature": "kind_probe:curvature",
    "heterogeneity": "kind_probe:heterogeneity",
    "constants": "kind_probe:constants",
    "memory": "kind_probe:memory",
    "quadratic": "kind_quadratic:descend",
    "gradient": "kind_gradient:follow",
    "estimator": "kind_quadratic:estimate",
}


def perform(cell: Cell) -> Record:
    """Returns the record of a cell; what goes wrong in a way that the package knows becomes its error."""
    began = _spent()
    base = Record(cell.key, cell.study, cell.grid, cell.scale, cell.kind, dict(cell.levels), cell.seed)
    points: list[dict[str, float]] = []
    values: dict[str, Any] = {}
    error = ""
    try:
        points, values = _kind(cell.kind)(cell.settings, cell.seed)
    except FedMeZOError as told:
        error = str(told)
    return _with(base, points=points, values=values, cpu=round(_spent() - began, 2), error=error)


def _with(base: Record, **more: Any) -> Record:
    return Record(**(base.__dict__ | more | {"package": __version__}))


def _spent() -> float:
    """Returns the CPU seconds of this process and of the children it has waited for."""
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + child.ru_utime + child.ru_stime


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ConfigError(f"A grid's kind is one of {', '.join(KINDS)}, got {name!r}.")
    module, _, function = KINDS[name].partition(":")
    found: Kind = getattr(import_module(f"{_PACKAGE}.{module}"), function)
    return found


def probe_settings(settings: Settings, **defaults: Any) -> dict[str, Any]:
    """Returns the settings of section `probe`, which are a kind's own, over their defaults.

    Raises:
      ConfigError: one that the kind does not know.
    """
    given = dict(settings.get("probe", {}))
    odd = [name for name in given if name not in defaults]
    if odd:
        raise ConfigError(f"Unknown setting probe.{odd[0]}; this kind knows {', '.join(defaults)}.")
    return defaults | given
