"""The verdicts: every claim of a study, judged by its rule from the records of a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from fedmezo.studies.page import DASH, number
from fedmezo.studies.suite.records import Record
from fedmezo.studies.suite.rules import Test, answers_of
from fedmezo.studies.suite.statistics import Effect, Word, effect_of, summed_up
from fedmezo.studies.suite.study import Claim, Study

__all__ = ["Verdict", "effect_text", "judge", "reason_of"]


@dataclass(frozen=True)
class Verdict:
    """What the records of a scale say of a claim.

    Attributes:
      claim: what is claimed.
      scale: of the records.
      word: the verdict.
      effect: of all tests together: the mean over the tests of each seed, then over seeds.
      tests: one by one.
      reason: why it is not testable, one sentence; else empty.
    """

    claim: Claim
    scale: str
    word: Word
    effect: Effect
    tests: tuple[Test, ...]
    reason: str = ""

    @property
    def tested(self) -> bool:
        """Whether any of its tests has a value."""
        return any(test.effect.seeds for test in self.tests)

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return asdict(self) | {"claim": self.claim.model_dump()}


def judge(study: Study, records: Sequence[Record], *, scale: str) -> list[Verdict]:
    """Returns the verdict on every claim of a study, in the study's order.

    Raises:
      ConfigError: a claim names a rule or a measure that does not exist.
    """
    measures = study.scale(scale).measures
    sized = [c.model_copy(update={"measure": measures.get(c.id, c.measure)}) for c in study.claims]
    return [_judged(claim, records, scale=scale) for claim in sized]


def _judged(claim: Claim, records: Sequence[Record], *, scale: str) -> Verdict:
    tests = answers_of(claim, records)
    word = summed_up([test.answer for test in tests])
    reason = reason_of(claim, tests) if word == "not testable at this scale" else ""
    return Verdict(claim, scale, word, _pooled(tests), tuple(tests), reason)


def _pooled(tests: Sequence[Test]) -> Effect:
    """Returns the effect of the seeds that every test has; of all seeds there are when no seed is in every test."""
    seen = [test.per_seed for test in tests if test.per_seed]
    shared = set.intersection(*(set(values) for values in seen)) if seen else set()
    if shared:
        return effect_of([fmean(values[seed] for values in seen) for seed in sorted(shared)])
    return effect_of([value for values in seen for value in values.values()])


def reason_of(claim: Claim, tests: Sequence[Test]) -> str:
    """Returns why more than half of the tests are open, in one sentence."""
    if not tests:
        return "There is no record of these cells at this scale."
    if not any(test.effect.seeds for test in tests):
        return "What is measured has no value in these cells, or does not vary over them."
    few = sum(test.effect.seeds < claim.fewest for test in tests)
    if 2 * few > len(tests):
        return f"{few} of {len(tests)} tests have fewer than {claim.fewest} seeds."
    undecided = sum(test.answer == "open" for test in tests)
    return f"In {undecided} of {len(tests)} tests the interval is too wide to say."


def effect_text(effect: Effect) -> str:
    """Returns "mean (low to high)", with a real minus sign; a dash without any value."""
    if not effect.seeds or not math.isfinite(effect.mean):
        return DASH
    ends = f" ({number(effect.low, 3)} to {number(effect.high, 3)})" if math.isfinite(effect.low) else ""
    return f"{number(effect.mean, 3)}{ends}".replace("-", "\N{MINUS SIGN}")


def counted(tests: Sequence[Test]) -> Mapping[str, int]:
    """Returns how many tests were answered yes, no and open."""
    return {answer: sum(test.answer == answer for test in tests) for answer in ("yes", "no", "open")}
