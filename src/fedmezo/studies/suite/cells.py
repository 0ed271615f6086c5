"""From a study to its cells: one cell is one combination of levels with one seed, named by a hash of its settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from fedmezo.errors import ConfigError
from fedmezo.studies.suite.study import Changes, Grid, Resize, Study

__all__ = ["Cell", "cells_of", "matches", "missing_variables", "nested"]

_VARIABLE = re.compile(r"\$\{?([A-Z][A-Z0-9_]*)\}?")


@dataclass(frozen=True)
class Cell:
    """One thing to run.

    Attributes:
      study: name of the study.
      grid: name of the grid.
      scale: tiny, small or paper.
      kind: what it does.
      levels: factor -> level.
      seed: paired: all cells of a grid with one seed share data, batches and directions as far as they can.
      settings: section -> key -> value.
    """

    study: str
    grid: str
    scale: str
    kind: str
    levels: Mapping[str, str]
    seed: int
    settings: Mapping[str, Mapping[str, Any]] = field(repr=False, hash=False)

    @property
    def key(self) -> str:
        """Sixteen hex digits that name what is run: kind, settings and seed, whatever study asks for it."""
        told = json.dumps([self.kind, self.settings, self.seed], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The cell for people."""
        return ", ".join([self.grid, *(f"{name} {level}" for name, level in self.levels.items()), f"seed {self.seed}"])


def cells_of(
    study: Study,
    scale: str,
    *,
    seeds: int | None = None,
    grids: Sequence[str] = (),
    only: Mapping[str, Sequence[str]] | None = None,
) -> list[Cell]:
    """Returns the cells of a study at a scale, seed by seed, so that a run that is stopped has whole pairs.

    Args:
      study: whose.
      scale: of its scales.
      seeds: paired seeds of every grid; None for what the study says.
      grids: these grids; all of them when empty.
      only: factor -> the levels that are wanted; grids without that factor have no cell then.

    Raises:
      ConfigError: the scale is not offered, or a grid or level that does not exist is asked for.
    """
    sized = study.scale(scale)
    found = []
    for name, grid in study.grids.items():
        resize = sized.grids.get(name, Resize())
        if resize.run and (not grids or name in grids):
            many = seeds or resize.seeds or grid.seeds or sized.seeds or study.seeds
            found += [cell for seed in range(many) for cell in _of_grid(study, scale, name=name, seed=seed)]
    _check_asked(study, grids, only or {})
    wanted = {factor: list(levels) for factor, levels in (only or {}).items()}
    return sorted((cell for cell in found if matches(cell.levels, wanted)), key=lambda cell: cell.seed)


def _check_asked(study: Study, grids: Sequence[str], only: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError for a grid, a factor or a level that the study has not."""
    for name in grids:
        if name not in study.grids:
            raise ConfigError(f"Study {study.name} has no grid {name!r}; it has {', '.join(study.grids)}.")
    listed = [study.grids[name] for name in grids or study.grids]
    for factor, levels in only.items():
        known = [level for grid in listed for level in grid.factors.get(factor, ())]
        for level in levels:
            if level not in known:
                there = f"levels {', '.join(dict.fromkeys(known))}" if known else f"no factor {factor}"
                raise ConfigError(f"Study {study.name} has no level {factor}={level}; it has {there}.")


def _of_grid(study: Study, scale: str, *, name: str, seed: int) -> Iterator[Cell]:
    grid, sized = study.grids[name], study.scale(scale)
    resize = sized.grids.get(name, Resize())
    kept = {factor: _kept(grid, factor, resize=resize) for factor in grid.factors}
    shared = (study.common.get(scale, {}), study.base, sized.set, grid.set, resize.set)
    for combination in product(*kept.values()):
        levels = dict(zip(kept, combination, strict=True))
        if any(matches(levels, skipped) for skipped in grid.skip):
            continue
        own = [grid.factors[factor][level] for factor, level in levels.items()]
        own += [resize.levels.get(factor, {}).get(level, {}) for factor, level in levels.items()]
        yield Cell(study.name, name, scale, grid.kind, levels, seed, nested(*shared, *own))


def _kept(grid: Grid, factor: str, *, resize: Resize) -> list[str]:
    wanted = resize.only.get(factor)
    if wanted is None:
        return list(grid.factors[factor])
    named = [_text(level) for level in wanted]
    odd = [level for level in named if level not in grid.factors[factor]]
    if odd:
        raise ConfigError(f"Factor {factor} has no level {odd[0]!r}; it has {', '.join(grid.factors[factor])}.")
    return named


def _text(level: object) -> str:
    return f"{level:g}" if isinstance(level, float) else str(level)


def matches(levels: Mapping[str, str], wanted: Mapping[str, Any]) -> bool:
    """Returns whether a cell has the levels that are wanted: one or a list of them per factor.

    A factor that the cell has not is no match.
    """
    for factor, level in wanted.items():
        listed = level if isinstance(level, list) else [level]
        if levels.get(factor, "") not in [_text(one) for one in listed]:
            return False
    return True


def nested(*layers: Changes) -> dict[str, dict[str, Any]]:
    """Returns settings as section -> key -> value; later layers win.

    Args:
      layers: tables of sections, or "section.key" -> value, or both.

    Raises:
      ConfigError: a key without a section.
    """
    found: dict[str, dict[str, Any]] = {}
    for section, key, value in (item for layer in layers for item in _flat(layer)):
        held = found.setdefault(section, {})
        for rival in _RIVALS.get(f"{section}.{key}", ()):
            held.pop(rival, None)
        held[key] = value
    return found


def _flat(layer: Changes) -> Iterator[tuple[str, str, Any]]:
    for name, value in layer.items():
        section, dot, key = name.partition(".")
        if dot:
            yield section, key, value
        elif isinstance(value, Mapping):
            yield from ((section, inner, part) for inner, part in value.items())
        else:
            raise ConfigError(f"A study's settings are section.key = value, got {name!r}.")


# Of two keys that exclude each other, the later one replaces the other.
_RIVALS = {"data.path": ("name",), "data.name": ("path", "preset"), "data.eval_path": ("eval_examples",)}


def missing_variables(cell: Cell) -> list[str]:
    """Returns the environment variables that a cell's settings name and that are not set."""
    texts = [value for section in cell.settings.values() for value in section.values() if isinstance(value, str)]
    named = {name for text in texts for name in _VARIABLE.findall(text)}
    return sorted(name for name in named if not os.environ.get(name))
