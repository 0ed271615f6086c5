"""Several algorithms under one equal budget: their losses, what they cost, and what may be said of the difference.

    from fedmezo.studies.compare import Terms, compare, read_arms

    arms = read_arms(["configs/demo.toml"], algorithms=["fedmezo", "fedavg"])
    terms = Terms(budget={"forwards": 2000}, seeds=(0, 1, 2), rate=1e-3, tune={"": (3e-4, 1e-3, 3e-3)})
    result = compare(arms, terms, out="runs/compare")
    print([entry["text"] for entry in result["verdicts"]])

At equal rates a zeroth-order step is about sqrt(d) times longer than a gradient step, so such a comparison says little
by itself; columns of equal and of tuned rates stand side by side.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fedmezo.channels import plain
from fedmezo.errors import ConfigError
from fedmezo.studies.compare.arms import arm_notes, read_arms, variant
from fedmezo.studies.compare.page import amount_text, write_page
from fedmezo.studies.compare.rows import aggregate, row_of
from fedmezo.studies.compare.runs import TUNING, Job, Launch, Onlooker, Outcome, execute, launch, refuse_foreign
from fedmezo.studies.compare.terms import Terms, parse_budget, parse_grids, parse_list, parse_seeds
from fedmezo.studies.compare.tune import Tuning, tune
from fedmezo.studies.compare.verdicts import verdicts
from fedmezo.studies.config import Config
from fedmezo.studies.files import DATA, JOURNAL
from fedmezo.studies.folder import writing

__all__ = ["Terms", "compare", "parse_budget", "parse_grids", "parse_list", "parse_seeds", "read_arms"]

RESULT = "compare.json"
_OVERSPENT, _UNSPENT = 1.1, 0.999


class _Study:
    """The jobs of one comparison, and the running of them."""

    def __init__(self, arms: Mapping[str, Config], terms: Terms, *, out: Path, launch: Launch, watch: Onlooker) -> None:
        self.arms, self.terms, self.out, self.launch, self.watch = arms, terms, out, launch, watch
        self.tuning_seed = terms.tuning_seed(arms)
        self.grids = {arm: grid for arm, config in arms.items() if (grid := terms.grid(arm, config))}
        self.asked = 0

    def jobs(self, column: str, rates: Mapping[str, float | None]) -> list[Job]:
        """Returns the reported runs of a column, seed by seed; runs at one rate are the same run in every column."""
        return [
            Job(arm, column, seed, self._config(arm, seed, rate), self._folder(arm, rate) / f"seed-{seed}")
            for seed in self.terms.seeds
            for arm, rate in rates.items()
        ]

    def tuning_job(self, arm: str, rate: float) -> Job:
        """Returns a run that serves to choose a rate."""
        seed = self.tuning_seed
        budget = self.terms.tune_budget or self.terms.budget
        config = variant(self.arms[arm], budget=budget, seed=seed, rate=rate, data_seed=seed)
        return Job(arm, TUNING, seed, config, self._folder(arm, None).with_name(TUNING) / f"rate-{rate:g}")

    def _config(self, arm: str, seed: int, rate: float | None) -> Config:
        return variant(self.arms[arm], budget=self.terms.budget, seed=seed, rate=rate)

    def _folder(self, arm: str, rate: float | None) -> Path:
        return self.out / _slug(arm) / ("configured" if rate is None else f"rate-{rate:g}")

    def planned(self) -> list[Job]:
        """Returns every run that is known before any of them has run; tuned runs are not."""
        grid = [self.tuning_job(arm, rate) for arm, rates in self.grids.items() for rate in rates]
        return [*self.fixed(), *grid]

    def fixed(self) -> list[Job]:
        """Returns the reported runs whose rate is not to be chosen."""
        if self.terms.rate is not None:
            return self.jobs("equal", dict.fromkeys(self.arms, self.terms.rate))
        return [] if self.grids else self.jobs("configured", dict.fromkeys(self.arms))

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Returns what became of the jobs."""
        self.asked += len(jobs)
        self.watch.planned(self.asked + self._later(jobs[0].column))
        return execute(jobs, at_once=self.terms.jobs, launch=self.launch, watch=self.watch)

    def _later(self, column: str) -> int:
        """Returns how many runs are to come after those of a column, as far as known."""
        fixed, tuned = len(self.fixed()), len(self.terms.seeds) * len(self.grids)
        return {TUNING: fixed + tuned, "tuned": 0}.get(column, tuned)

    def tune(self) -> list[Tuning]:
        """Returns the search for each arm's rate."""
        return tune(self.grids, lambda wanted: self.run([self.tuning_job(arm, rate) for arm, rate in wanted]))


def compare(
    arms: Mapping[str, Config],
    terms: Terms,
    *,
    out: Path | str,
    watch: Onlooker | None = None,
    launch: Launch = launch,
) -> dict[str, Any]:
    """Runs every arm with every seed until the budget is spent, and returns what came out as plain values.

    Interrupted, it goes on where it was when called again: finished runs are read, unfinished ones resumed. A run that
    fails is a row with its error.

    Args:
      arms: label -> configuration; `read_arms` makes them.
      terms: budget, seeds and rates.
      out: folder of the comparison; a new one, or one that an earlier call made.
      watch: is told of the runs.
      launch: starts the process of a run.

    Returns:
      rows (one per arm, column and seed), arms (means over the seeds), tuning (every rate tried), verdicts, notes,
      budget, seeds, out, page (None when plotly is not installed). Written to out/compare.json, too.

    Raises:
      ConfigError: the terms do not fit the arms, or `out` holds something else.
    """
    watch = watch or Onlooker()
    terms.check_arms(arms)
    folder = _new_folder(Path(out), arms)
    study = _Study(arms, terms, out=folder, launch=launch, watch=watch)
    refuse_foreign(study.planned())
    asked = {"budget": dict(terms.budget), "seeds": list(terms.seeds), "out": str(folder)}
    _write(folder, {**asked, "complete": False})
    notes = arm_notes(arms, terms)
    for note in notes:
        watch.note(note)
    # The rates first: whatever a machine's first run costs more, as compiling, is then in no reported number.
    searches = study.tune()
    fixed = study.fixed()
    outcomes = study.run(fixed) if fixed else []
    chosen: dict[str, float | None] = {search.arm: search.rate for search in searches if search.rate is not None}
    outcomes += study.run(study.jobs("tuned", chosen)) if chosen else []
    found = list(chain(*(search.notes() for search in searches), _spending(outcomes, terms), _data(outcomes)))
    rows = [row_of(outcome) for outcome in outcomes]
    result = {
        **asked,
        "complete": True,
        "rows": rows,
        "arms": aggregate(rows),
        "tuning": [point for search in searches for point in search.points()],
        "verdicts": verdicts(rows, budget=terms.kind),
        "notes": [*notes, *found],
        "page": None,
    }
    try:
        result["page"] = str(write_page(result, arms=arms, terms=terms, out=folder))
    except ConfigError as missing:
        watch.note(str(missing))
    _write(folder, result)
    return dict(plain(result))


def _new_folder(out: Path, arms: Mapping[str, Config]) -> Path:
    """Returns the comparison's folder, made if need be.

    Raises:
      ConfigError: it holds something else, or two arms would share a folder in it.
    """
    slugs = [_slug(arm) for arm in arms]
    if len(set(slugs)) < len(slugs):
        raise ConfigError(f"Two arms would have the same folder in {out}: {', '.join(sorted(slugs))}; rename one file.")
    if (out / JOURNAL).exists():
        raise ConfigError(f"{out} is the folder of a run; choose another --out.")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RESULT).exists()):
        raise ConfigError(f"{out} holds something else than a comparison; choose another --out.")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def _slug(arm: str) -> str:
    """Returns a label as the name of a folder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in arm).lstrip(".") or "arm"


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    half = folder / f".{RESULT}.half"
    with writing(folder):
        half.write_text(json.dumps(plain(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(half, folder / RESULT)


def _spending(outcomes: Sequence[Outcome], terms: Terms) -> Iterator[str]:
    """Yields which arms spent more or less than the budget; rounds are never cut short."""
    spent: dict[str, list[float]] = {}
    for row in map(row_of, outcomes):
        if row["error"] is None and row[terms.kind] is not None:
            spent.setdefault(row["arm"], []).append(row[terms.kind] / terms.amount)
    for arm, shares in spent.items():
        if max(shares) > _OVERSPENT:
            yield (
                f"{arm} spent up to {max(shares):.3g} times the budget of {amount_text(terms.budget)}, because a round "
                "is never cut short: its results are those of a larger budget."
            )
        if min(shares) < _UNSPENT:
            yield f"{arm} ended with {min(shares):.0%} of the budget of {amount_text(terms.budget)} spent."


def _data(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yields whether runs that should have had the same training data had not, as when a file changed in between."""
    found: dict[str, set[str]] = {}
    for outcome in outcomes:
        path = outcome.job.folder / DATA
        if not outcome.error and path.exists():
            found.setdefault(outcome.job.arm, set()).add(path.read_text(encoding="utf-8").strip())
    changed = [arm for arm, digests in found.items() if len(digests) > 1]
    if changed:
        yield f"The training data changed between the runs of {', '.join(changed)}; remove these runs and start anew."
