"""On what terms arms are compared: budget, seeds and rates, checked before any run begins."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmezo.errors import ConfigError
from fedmezo.studies.config import Config
from fedmezo.studies.keys import MAX_SEED
from fedmezo.studies.settings import ALGORITHMS, BUDGETS

__all__ = ["Budget", "Terms", "parse_budget", "parse_grids", "parse_list", "parse_seeds"]

Budget = Mapping[str, float]


@dataclass(frozen=True)
class Terms:
    """What all arms share.

    Attributes:
      budget: one of rounds, forwards, tokens, seconds, bytes -> its amount; every run ends when it is spent.
      seeds: `federation.seed` of the reported runs.
      rate: the rate all arms run at for the column of equal rates; None for no such column.
      tune: rates to choose from, by arm or by algorithm; "" is for all others; empty for no column of tuned rates.
      tune_budget: the budget of a tuning run; None for `budget`.
      jobs: runs at once.

    Raises:
      ConfigError: one of them is impossible.
    """

    budget: Budget
    seeds: tuple[int, ...] = (0, 1, 2)
    rate: float | None = None
    tune: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    tune_budget: Budget | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_budget(self.budget)
        _check_budget(self.tune_budget or self.budget)
        _check_seeds(self.seeds)
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise ConfigError(f"--rate: expected a number above 0, got {self.rate}.")
        for name, grid in self.tune.items():
            _check_grid(name, grid)
        if self.jobs < 1:
            raise ConfigError(f"--jobs: expected at least 1, got {self.jobs}.")

    @property
    def kind(self) -> str:
        """What the budget counts."""
        return next(iter(self.budget))

    @property
    def amount(self) -> float:
        """How much of it every run may spend."""
        return self.budget[self.kind]

    def grid(self, label: str, config: Config) -> tuple[float, ...]:
        """Returns the rates an arm chooses from, in order; empty when nothing is tuned."""
        names = (label, config.algorithm.name, "")
        return tuple(sorted(next((self.tune[name] for name in names if name in self.tune), ())))

    def check_arms(self, arms: Mapping[str, Config]) -> None:
        """Refuses grids that belong to no arm, arms without a grid, and fewer than two arms.

        Raises:
          ConfigError: as said.
        """
        if len(arms) < 2:
            raise ConfigError(
                f"compare needs at least two arms, got {len(arms)}; give more configurations, or one and --algorithms "
                f"with some of {', '.join(ALGORITHMS)}."
            )
        known = {*arms, *(config.algorithm.name for config in arms.values()), ""}
        for name in self.tune:
            if name not in known:
                raise ConfigError(f"--tune {name}=...: no arm is called so; arms are {', '.join(arms)}.")
        bare = [label for label, config in arms.items() if self.tune and not self.grid(label, config)]
        if bare:
            raise ConfigError(f"--tune: {', '.join(bare)} got no grid; give one for all as --tune 1e-3,1e-2.")

    def tuning_seed(self, arms: Mapping[str, Config]) -> int:
        """Returns the seed of the tuning runs and of their data: the first that no reported run uses."""
        used = {*self.seeds, *(config.data.seed for config in arms.values())}
        return next(seed for seed in range(len(used) + 1) if seed not in used)


def _check_budget(budget: Budget) -> None:
    if len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        got = ", ".join(budget) or "nothing"
        raise ConfigError(f"--budget: expected one of {', '.join(BUDGETS)}, got {got}.")
    ((name, amount),) = budget.items()
    if not (math.isfinite(amount) and amount > 0):
        raise ConfigError(f"--budget {name}: expected a number above 0, got {amount}.")


def _check_seeds(seeds: Sequence[int]) -> None:
    twice = [seed for seed, times in Counter(seeds).items() if times > 1]
    if not seeds or twice or not all(0 <= seed <= MAX_SEED for seed in seeds):
        got = f"{twice[0]} twice" if twice else ",".join(map(str, seeds)) or "none"
        raise ConfigError(f"--seeds: expected different whole numbers of at least 0, as in 0,1,2; got {got}.")


def _check_grid(name: str, grid: Sequence[float]) -> None:
    good = len(set(grid)) == len(grid) >= 2 and all(math.isfinite(rate) and rate > 0 for rate in grid)
    if not good:
        got = ",".join(f"{rate:g}" for rate in grid) or "none"
        raise ConfigError(f"--tune{name and f' {name}'}: expected at least two different rates above 0, got {got}.")


def parse_list(text: str) -> list[str]:
    """Returns the parts of a text with commas, without spaces; empty parts are left out."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str, *, kind: type[int] | type[float]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in parse_list(text))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option}: expected {what} with commas between them, got {text!r}.") from None


def parse_budget(text: str, *, option: str = "--budget") -> dict[str, float]:
    """Returns "forwards=2000" as {"forwards": 2000.0}.

    Raises:
      ConfigError: it is not of that form, or there is no such budget.
    """
    name, equals, amount = (part.strip() for part in text.partition("="))
    if not equals or name not in BUDGETS:
        raise ConfigError(f"{option}: expected {' | '.join(BUDGETS)} and an amount, as in forwards=2000; got {text!r}.")
    numbers = _numbers(option, amount, kind=float)
    if len(numbers) != 1:
        raise ConfigError(f"{option}: expected one number after {name}=, got {amount!r}.")
    _check_budget({name: numbers[0]})
    return {name: numbers[0]}


def parse_seeds(text: str) -> tuple[int, ...]:
    """Returns "0,1,2" as (0, 1, 2).

    Raises:
      ConfigError: not different whole numbers of at least 0.
    """
    seeds: tuple[int, ...] = _numbers("--seeds", text, kind=int)
    _check_seeds(seeds)
    return seeds


def parse_grids(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Returns ["1e-3,1e-2", "fedavg=1e-1,1"] as grids by name; "" is for all others.

    Raises:
      ConfigError: a grid is not numbers, too short, or given twice.
    """
    found: dict[str, tuple[float, ...]] = {}
    for text in texts:
        head, equals, tail = text.partition("=")
        name, listed = (head.strip(), tail) if equals else ("", text)
        if name in found:
            raise ConfigError(f"--tune: {name or 'the grid for all'} was given twice; give it once.")
        found[name] = _numbers("--tune", listed, kind=float)
        _check_grid(name, found[name])
    return found
