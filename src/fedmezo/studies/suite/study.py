"""A study as its TOML file says it: base settings, grids of cells, claims with their rules, figures."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedmezo.errors import ConfigError

__all__ = [
    "SCALES", "Changes", "Claim", "Figure", "Grid", "Resize", "Scale", "Slope", "Study", "load_studies", "load_study",
]  # fmt: skip

SCALES = ("tiny", "small", "paper")
COMMON = "scales.toml"
Changes = dict[str, Any]
Level = str | int | float
Selection = dict[str, Level | list[Level]]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Grid(_Table):
    """One grid of cells: the product of its factors' levels.

    Attributes:
      kind: what a cell does; a name of `kinds.KINDS`.
      factors: factor -> level -> settings; or {key, values} for a factor that is one setting.
      set: settings of all its cells.
      skip: combinations of levels that are left out.
      seeds: paired seeds; None for the study's.
    """

    kind: str
    factors: dict[str, dict[str, Any]]
    set: Changes = {}
    skip: list[Selection] = []
    seeds: Annotated[int, Field(ge=1)] | None = None

    @field_validator("factors")
    @classmethod
    def _levels(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Writes the short form out: {key = "algorithm.mu", values = [1e-3]} becomes one level per value."""
        return {name: dict(_written_out(name, levels)) for name, levels in given.items()}


def _written_out(name: str, levels: Mapping[str, Any]) -> Iterator[tuple[str, Changes]]:
    if set(levels) == {"key", "values"}:
        for value in levels["values"]:
            yield _label(value), {levels["key"]: value}
        return
    for level, settings in levels.items():
        if not isinstance(settings, dict):
            raise ValueError(f"factor {name}: level {level} must be a table of settings, or the factor {{key, values}}")
        yield level, settings


def _label(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Resize(_Table):
    """What a scale changes of one grid.

    Attributes:
      set: settings of all its cells.
      levels: factor -> level -> settings, on top of the level's own.
      only: factor -> the levels that are run.
      seeds: paired seeds.
      run: whether the grid is run at all.
    """

    set: Changes = {}
    levels: dict[str, dict[str, Changes]] = {}
    only: dict[str, list[Level]] = {}
    seeds: Annotated[int, Field(ge=1)] | None = None
    run: bool = True


class Scale(_Table):
    """What a scale changes of a study.

    Attributes:
      set: settings of all grids.
      seeds: paired seeds.
      minutes: estimated CPU minutes of all cells and seeds together; 0 for not estimated.
      grids: grid -> what it changes there.
      measures: claim -> its measure at this scale, where that names an amount that another scale has not.
      note: one sentence for the page, such as what stands in for what.
    """

    set: Changes = {}
    seeds: Annotated[int, Field(ge=1)] | None = None
    minutes: float = 0.0
    grids: dict[str, Resize] = {}
    measures: dict[str, str] = {}
    note: str = ""


class Claim(_Table):
    """One claim of the paper, in our words, and the rule that judges it.

    Attributes:
      id: short name, unique in the study.
      where: figure, table or section.
      text: what is claimed.
      rule: a name of `rules.RULES`.
      grid: whose records are read.
      measure: a measure; see `measures.py`.
      by: factors; one test for each combination of their levels.
      only: levels that count.
      given: arguments of the rule, such as the two selections and the margin.
      fewest: paired seeds that a test needs to be decided.
      meaning: what the effect's number is, with its unit.
    """

    id: str
    where: str
    text: str
    rule: str
    grid: str
    measure: str
    by: list[str] = []
    only: Selection = {}
    given: dict[str, Any] = {}
    fewest: Annotated[int, Field(ge=2)] = 3
    meaning: str = ""


class Figure(_Table):
    """One figure: curves against a budget, or a measure against the levels of a factor.

    Attributes:
      title: what it shows; the unit is added by the measure.
      grid: whose records are drawn.
      kind: curves | levels.
      lines: factors whose level combinations are the lines.
      panels: factors whose level combinations are a chart each.
      only: levels that are drawn.
      x: of curves a budget (rounds, forwards, bytes, ...), of levels a factor.
      measure: of levels.
      log: axes with a log scale, of "x" and "y".
    """

    title: str
    grid: str
    kind: Literal["curves", "levels"] = "curves"
    lines: list[str] = []
    panels: list[str] = []
    only: Selection = {}
    x: str = "rounds"
    measure: str = "end"
    log: list[Literal["x", "y"]] = []


class Slope(_Table):
    """A table of straight lines: memory against parameters.

    Attributes:
      title: what it shows.
      grid: whose records are read; its models differ in size.
      by: factors; one line for each combination of their levels.
      weights: a measure, MB of the model's weights.
      measure: what is fitted, MB.
      weight_bytes: scale -> bytes of a parameter; 4 for scales that are not named.
      ahead: model -> its parameters in millions, for which the line is drawn out.
    """

    title: str
    grid: str
    by: list[str] = []
    weights: str
    measure: str
    weight_bytes: dict[str, int] = {}
    ahead: dict[str, float] = {}


class Study(_Table):
    """One study; see the package.

    Attributes:
      name: the file's stem.
      order: place in lists.
      title: for people.
      question: what is asked.
      about: how it is asked, in a few sentences.
      base: settings of all cells.
      common: scale -> settings of all studies at that scale, from scales.toml.
      seeds: paired seeds, numbered from 0.
      grids: by name.
      scales: by name; a scale that is missing is not offered.
      claims: judged.
      figures: drawn.
      slopes: tables of straight lines.
    """

    name: str
    order: int = 0
    title: str
    question: str
    about: str = ""
    base: Changes = {}
    common: dict[str, Changes] = {}
    seeds: Annotated[int, Field(ge=1)] = 3
    grids: dict[str, Grid]
    scales: dict[str, Scale] = {}
    claims: list[Claim] = []
    figures: list[Figure] = []
    slopes: list[Slope] = []

    def scale(self, name: str) -> Scale:
        """Returns what a scale changes.

        Raises:
          ConfigError: the study does not offer it.
        """
        if name not in self.scales:
            offered = ", ".join(self.scales) or "none"
            raise ConfigError(f"Study {self.name} has no scale {name!r}; it has {offered}.")
        return self.scales[name]


def load_study(path: Path) -> Study:
    """Returns the study of a TOML file; scales.toml beside it holds what all studies share at a scale.

    Raises:
      ConfigError: not there, not TOML, an unknown key, or a claim or figure of a grid that does not exist.
    """
    common = path.with_name(COMMON)
    given = {"name": path.stem, "common": _read(common) if common.exists() else {}, **_read(path)}
    try:
        study = Study.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first['msg']}.") from None
    _check_names(study, path)
    return study


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no study {path}; `fedmezo study list` tells which there are.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def _check_names(study: Study, path: Path) -> None:
    odd = [name for name in study.scales if name not in SCALES]
    named = [*(claim.grid for claim in study.claims), *(one.grid for one in (*study.figures, *study.slopes))]
    odd += [grid for grid in named if grid not in study.grids]
    for scale in study.scales.values():
        odd += [name for name in scale.grids if name not in study.grids]
    ids = [claim.id for claim in study.claims]
    odd += [name for scale in study.scales.values() for name in scale.measures if name not in ids]
    if odd:
        raise ConfigError(f"{path}: there is no grid, scale or claim called {odd[0]!r}.")
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{path}: two claims have the same id.")


def load_studies(folder: Path) -> dict[str, Study]:
    """Returns the studies of a folder by name, in their order.

    Raises:
      ConfigError: the folder holds none, or as `load_study`.
    """
    paths = [path for path in folder.glob("*.toml") if path.name != COMMON] if folder.is_dir() else []
    if not paths:
        raise ConfigError(f"{folder} holds no study; give the folder that holds the studies' TOML files as --studies.")
    found = sorted(map(load_study, paths), key=lambda study: (study.order, study.name))
    return {study.name: study for study in found}
