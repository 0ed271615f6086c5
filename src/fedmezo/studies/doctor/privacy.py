"""What a private run has spent, and what makes its noise no secret."""

import json
from collections.abc import Iterator
from typing import Any

from fedmezo.fl.spending import SPENT
from fedmezo.studies.doctor.finding import Finding, Severity
from fedmezo.studies.doctor.vitals import Vitals
from fedmezo.studies.page import privacy_words

__all__ = ["exposed", "spent", "spent_in"]


def spent_in(run: Vitals) -> dict[str, Any]:
    """Returns what the last round says of the privacy spent; empty where none is kept."""
    told = [detail for _, kind, detail in run.events if kind == SPENT]
    return dict(json.loads(told[-1])) if told else {}


def spent(run: Vitals) -> Iterator[Finding]:
    """Yields the epsilon of a private run."""
    told = spent_in(run)
    if told:
        severity: Severity = "note" if told["epsilon"] is not None else "warning"
        advice = "" if told["epsilon"] is not None else "privacy.sigma is 0: limits alone hide nothing."
        yield Finding("privacy", severity, f"Spent: {privacy_words(told)}.", advice, numbers=told)


def exposed(run: Vitals) -> Iterator[Finding]:
    """Yields why a private run's noise hides less than its epsilon says: a seed that is known, a delta too large."""
    if not spent_in(run):
        return
    if (seed := run.setting("privacy.noise_seed")) is not None:
        yield Finding(
            "noise-known",
            "warning",
            f"The noise is made from privacy.noise_seed = {seed}, so whoever has the configuration can take it off.",
            "Leave that key out of a run whose data are to be hidden.",
        )
    examples = [int(size) for size in (run.summary.get("split") or {}).get("sizes") or ()]
    # An example is one of its client's; whoever knows the client knows among how many it is.
    units = min(examples, default=0) if run.setting("privacy.mode") == "example" else run.setting("federation.clients")
    delta = float(run.setting("privacy.delta", 0.0))
    if units and delta > 1 / units:
        yield Finding(
            "delta-large",
            "warning",
            f"privacy.delta is {delta:g}, more than one over the {units} units: one of them may be given away whole.",
            f"Set it far below {1 / units:.1g}.",
            numbers={"delta": delta, "units": units},
        )
