"""The rules that turn records into tests; a claim in a study's file names one and gives its arguments.

    lower       b, a, margin           m(a) - m(b), paired by seed, is below 0 by at least the margin
    alike       a, b, margin           m(a) - m(b), paired by seed, is smaller than the margin
    ordered     factor, levels, margin each level is lower than the next one: `lower` for every neighbouring pair
    within      of, least, most, over  m(of), or m(of) / m(over) paired by seed, is in [least, most]; with `each`
                                       and levels one test for each of these levels of that factor
    exponent    x, least, most         m ~ x^p over the levels of a seed: p is in [least, most]
    correlated  x, least, sign         rank correlation of x and m over the cells of a seed is at least `least`
    always      of                     m is 1 in every run (m: surged, broken, ...); `never` is the opposite
    tuned       a, b, rates, margin    as `lower`, or as `ask` says (alike, no_worse), each arm at the rate that was
                                       best on the other seeds
    no_worse    b, a, margin           m(a) - m(b), paired by seed, is not above the margin
    threshold   x, rates, sizes, least, most, beside
                                       the largest rate that did not surge, over the levels of sizes, ~ x^p: p is in
                                       [least, most]; x is read from the grid `beside`, if that is given
    best        x, sizes, tasks, beside, least
                                       over the tasks, rank correlation of x, read from the grid `beside`, with the
                                       level of sizes at which m is lowest, is at least `least`
    foretold    x, least, most         the line m = a + b x through a seed's smaller x, taken at its largest x, over m
                                       there, is in [least, most]

Every rule gives one test for each combination of the levels of the claim's `by`; with fewer seeds than the claim asks
for it is open. A margin is given outright (margin), or as a share of how far the loss of b falls over the run, mean
over seeds (share); then it is 0.002 nats at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from fedmezo.errors import ConfigError
from fedmezo.studies.suite.cells import matches
from fedmezo.studies.suite.measures import measure
from fedmezo.studies.suite.records import Record
from fedmezo.studies.suite.statistics import (
    Answer,
    Effect,
    alike,
    effect_of,
    foretold,
    lower,
    no_worse,
    ranked,
    slope_of,
    trend,
    within,
)
from fedmezo.studies.suite.study import Claim

__all__ = ["RULES", "Test", "answers_of"]

Wanted = Mapping[str, Any]
BySeed = dict[int, float]
Decide = Callable[[Effect], Answer]
_LEAST_MARGIN = 0.002  # nats
_ASKED: Mapping[str, Callable[..., Answer]] = {"lower": lower, "alike": alike, "no_worse": no_worse}


@dataclass(frozen=True)
class Test:
    """One question with its answer.

    Attributes:
      label: which levels it is about.
      effect: what was found.
      answer: yes, no or open.
      per_seed: seed -> value, for the pooled effect of the claim.
    """

    __test__ = False  # not a test of pytest's

    label: str
    effect: Effect
    answer: Answer
    per_seed: Mapping[int, float]


@dataclass(frozen=True)
class _Case:
    """What a rule works on: a claim, the records of one combination of its `by`, and all records of its study."""

    claim: Claim
    records: Sequence[Record]
    everything: Sequence[Record]

    @property
    def given(self) -> Mapping[str, Any]:
        return self.claim.given

    def seeds(self) -> dict[int, list[Record]]:
        """Returns the records with the levels of the argument `of`, by seed."""
        found: dict[int, list[Record]] = {}
        for record in self.records:
            if matches(record.levels, self.given.get("of", {})):
                found.setdefault(record.seed, []).append(record)
        return dict(sorted(found.items()))

    def mean(self, wanted: Wanted, *, name: str = "") -> BySeed:
        """Returns seed -> mean of a measure over the cells with the wanted levels; nan where one of them is."""
        found: dict[int, list[float]] = {}
        for record in self.records:
            if matches(record.levels, wanted):
                found.setdefault(record.seed, []).append(measure(record, name or self.claim.measure))
        return {seed: sum(values) / len(values) for seed, values in sorted(found.items())}

    def crossed(self, wanted: Wanted, *, name: str = "") -> BySeed:
        """Returns seed -> a measure at the level of `rates` at which the claim's own is lowest over all other seeds.

        A seed that lacks a rate which another has does not count.
        """
        table: dict[str, dict[int, Record]] = {}
        for record in self.records:
            if matches(record.levels, wanted):
                table.setdefault(record.levels.get(self.given["rates"], ""), {})[record.seed] = record
        found = {}
        whole = sorted(set.intersection(*map(set, table.values()))) if table else []
        for seed in whole:
            others = [at for at in whole if at != seed]
            rest = {rate: [measure(row[at], self.claim.measure) for at in others] for rate, row in table.items()}
            means = {rate: sum(v) / len(v) for rate, v in rest.items() if v and all(map(math.isfinite, v))}
            if means:
                found[seed] = measure(table[min(means, key=lambda r: means[r])][seed], name or self.claim.measure)
        return found

    def x(self, record: Record, *, factor: str) -> float:
        """Returns x of a record, or of the record of the grid `beside` with its seed and its level of one factor."""
        grid, x = self.given.get("beside"), self.given["x"]
        if grid is None:
            return measure(record, x)
        wanted = {factor: record.levels.get(factor, "")}
        same = [r for r in self.everything if r.grid == grid and r.seed == record.seed and matches(r.levels, wanted)]
        return measure(same[0], x) if same else math.nan

    def test(self, values: BySeed, decide: Decide, *, label: str = "") -> Test:
        """Returns the test of one value per seed; open with fewer seeds than the claim asks for."""
        known = {seed: value for seed, value in values.items() if math.isfinite(value)}
        effect = effect_of(list(known.values()))
        return Test(label, effect, decide(effect) if effect.seeds >= self.claim.fewest else "open", known)

    def ranged(self, values: BySeed, *, label: str = "") -> Test:
        """Returns the test whether a value is in [least, most]."""
        least, most = self.given.get("least", -math.inf), self.given.get("most", math.inf)
        return self.test(values, partial(within, least=least, most=most), label=label)


def answers_of(claim: Claim, records: Sequence[Record]) -> list[Test]:
    """Returns the tests of a claim, one for each combination of the levels of `by`.

    Args:
      claim: what is claimed.
      records: of its study; those of other grids, or outside of `only`, do not count.

    Raises:
      ConfigError: a rule that does not exist, or that lacks an argument.
    """
    if claim.rule not in RULES:
        raise ConfigError(f"Claim {claim.id}: a rule is one of {', '.join(RULES)}, got {claim.rule!r}.")
    counted = [r for r in records if r.grid == claim.grid and matches(r.levels, claim.only)]
    groups: dict[str, list[Record]] = {}
    for record in counted:
        groups.setdefault(", ".join(record.levels.get(factor, "") for factor in claim.by), []).append(record)
    found = []
    for label, listed in groups.items():
        try:
            tests = list(RULES[claim.rule](_Case(claim, listed, records)))
        except KeyError as missing:
            raise ConfigError(f"Claim {claim.id}: rule {claim.rule} needs the argument {missing}.") from None
        found += [replace(test, label=": ".join(filter(None, (label, test.label)))) for test in tests]
    return found


def _differ(
    case: _Case, decide: Callable[..., Answer], *, of: Callable[..., BySeed], a: Wanted, b: Wanted, label: str = ""
) -> Test:
    """Returns the test of m(a) - m(b) against the claim's margin."""
    some, others = of(a), of(b)
    margin = _margin(case, of(b, name="drop")) if "share" in case.given else float(case.given["margin"])
    less = {seed: some[seed] - others[seed] for seed in some if seed in others}
    return case.test(less, partial(decide, margin=margin), label=label)


def _margin(case: _Case, falls: BySeed) -> float:
    """Returns the smallest difference that matters, as a share of how far the loss of b falls."""
    fall = effect_of(list(falls.values())).mean
    return max(_LEAST_MARGIN, case.given["share"] * abs(fall)) if math.isfinite(fall) else _LEAST_MARGIN


def _compared(case: _Case, decide: Callable[..., Answer]) -> Iterator[Test]:
    yield _differ(case, decide, of=case.mean, a=case.given["a"], b=case.given["b"])


def _tuned(case: _Case) -> Iterator[Test]:
    decide = _ASKED[case.given.get("ask", "lower")]
    yield _differ(case, decide, of=case.crossed, a=case.given["a"], b=case.given["b"])


def _ordered(case: _Case) -> Iterator[Test]:
    factor = case.given["factor"]
    for one, other in pairwise(case.given["levels"]):
        label = f"{one} under {other}"
        yield _differ(case, lower, of=case.mean, a={factor: one}, b={factor: other}, label=label)


def _within(case: _Case) -> Iterator[Test]:
    given = case.given
    for level in given.get("levels", [""]):
        own = {given["each"]: level} if level != "" else {}
        values = case.mean({**given.get("of", {}), **own})
        if "over" in given:
            below = case.mean(given["over"], name=given.get("over_measure", ""))
            values = {seed: values[seed] / below[seed] for seed in values if below.get(seed)}
        yield case.ranged(values, label=str(level))


def _exponent(case: _Case) -> Iterator[Test]:
    name, x = case.claim.measure, case.given["x"]
    seeds = case.seeds().items()
    yield case.ranged(
        {seed: slope_of([measure(r, x) for r in some], [measure(r, name) for r in some]) for seed, some in seeds}
    )


def _correlated(case: _Case) -> Iterator[Test]:
    name, x, sign = case.claim.measure, case.given["x"], case.given.get("sign", 1)
    seeds = case.seeds().items()
    values = {
        seed: sign * ranked([measure(r, x) for r in some], [measure(r, name) for r in some]) for seed, some in seeds
    }
    yield case.test(values, partial(trend, least=case.given["least"]))


def _all(case: _Case, wanted: float) -> Iterator[Test]:
    values = case.mean(case.given.get("of", {}))

    def decide(_: Effect) -> Answer:
        shares = {value for value in values.values() if math.isfinite(value)}
        return "yes" if shares == {wanted} else "no" if shares == {1.0 - wanted} else "open"

    yield case.test(values, decide)


def _threshold(case: _Case) -> Iterator[Test]:
    given, values = case.given, {}
    for seed, listed in case.seeds().items():
        calm: dict[str, tuple[float, float]] = {}
        for record in listed:
            rate, size = measure(record, f"level:{given['rates']}"), record.levels[given["sizes"]]
            if not measure(record, "surged") and rate > calm.get(size, (0.0, 0.0))[0]:
                calm[size] = (rate, case.x(record, factor=given["sizes"]))
        values[seed] = slope_of([x for _, x in calm.values()], [rate for rate, _ in calm.values()])
    yield case.ranged(values)


def _best(case: _Case) -> Iterator[Test]:
    given, values = case.given, {}
    for seed, listed in case.seeds().items():
        lowest: dict[str, tuple[float, Record]] = {}
        for record in listed:
            task, found = record.levels[given["tasks"]], measure(record, case.claim.measure)
            if found < lowest.get(task, (math.inf, record))[0]:
                lowest[task] = (found, record)
        winners = [record for _, record in lowest.values()]
        sizes = [measure(record, f"level:{given['sizes']}") for record in winners]
        values[seed] = ranked([case.x(record, factor=given["tasks"]) for record in winners], sizes)
    yield case.test(values, partial(trend, least=given["least"]))


def _foretold(case: _Case) -> Iterator[Test]:
    values = {}
    for seed, listed in case.seeds().items():
        values[seed] = foretold([(measure(r, case.given["x"]), measure(r, case.claim.measure)) for r in listed])
    yield case.ranged(values)


RULES: Mapping[str, Callable[[_Case], Iterator[Test]]] = {
    "lower": partial(_compared, decide=lower),
    "alike": partial(_compared, decide=alike),
    "no_worse": partial(_compared, decide=no_worse),
    "tuned": _tuned,
    "ordered": _ordered,
    "within": _within,
    "exponent": _exponent,
    "correlated": _correlated,
    "always": partial(_all, wanted=1.0),
    "never": partial(_all, wanted=0.0),
    "threshold": _threshold,
    "best": _best,
    "foretold": _foretold,
}
