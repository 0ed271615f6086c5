"""A diagnosis: every symptom looked for, the gravest first, and the facts on top."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from fedmezo.studies.doctor import clients, course, network, privacy, steps, upkeep
from fedmezo.studies.doctor.finding import SEVERITIES, Diagnosis, Finding
from fedmezo.studies.doctor.vitals import Vitals, read

__all__ = ["diagnose"]

_SYMPTOMS: tuple[Callable[[Vitals], Iterator[Finding]], ...] = (
    steps.skipped,
    course.diverging,
    steps.idle,
    course.reach,
    course.progress,
    course.growing_slopes,
    upkeep.judging,
    steps.mu,
    steps.pace,
    steps.clipping,
    clients.outliers,
    clients.heavy,
    clients.small,
    clients.absent,
    network.silent,
    network.turned_away,
    privacy.exposed,
    privacy.spent,
    upkeep.traffic,
    upkeep.tempo,
    upkeep.health,
)
# One cause, one line: what is left out when its cause is told.
_EXPLAINS = {
    "out-of-reach": ("rate-low", "unseen"),
    "diverging": ("unseen", "surges", "growing-slopes", "best-earlier", "overfitting", "clipped"),
    "turned": ("level", "best-earlier"),
}


def diagnose(folder: Path | str) -> Diagnosis:
    """Returns what is wrong with a run, and what is well, from its journal alone; no model is loaded.

    A run in progress is fine, and so is one that died.

    Args:
      folder: the run's folder.

    Raises:
      ConfigError: the folder holds no run.
      JournalError: the file is no journal, or its first record is damaged.
    """
    run = read(Path(folder))
    looked_for = _SYMPTOMS if run.pulses else (upkeep.health,)
    found = [finding for symptom in looked_for for finding in symptom(run)]
    kinds = {finding.kind for finding in found}
    hidden = {kind for cause, effects in _EXPLAINS.items() if cause in kinds for kind in effects}
    found = [finding for finding in found if finding.kind not in hidden]
    return Diagnosis(tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))), _facts(run))


def _facts(run: Vitals) -> dict[str, Any]:
    pulses = run.pulses
    visits = [visit for pulse in pulses for visit in pulse.visits]
    digests = [(pulse.round + 1, pulse.digest) for pulse in pulses if pulse.digest is not None]
    forwards, seconds = sum(pulse.forwards for pulse in pulses), sum(pulse.seconds for pulse in pulses)
    return {
        "run_dir": str(run.folder),
        "algorithm": run.setting("algorithm.name"),
        "rounds": len(pulses),
        "planned": run.planned,
        "finished": run.finished,
        "clients": run.setting("federation.clients", len(run.clients)),
        "cohort": fmean(len(pulse.visits) for pulse in pulses) if pulses else 0,
        "steps": run.steps,
        "rate": pulses[0].rate if pulses else None,
        "rate_now": pulses[-1].rate if pulses else None,
        "mu": pulses[-1].mu if pulses and run.walks else None,
        "dtype": run.setting("model.dtype"),
        "dim": run.dim or None,
        "train": {"start": run.losses[0][1], "end": run.losses[-1][1]} if run.losses else {},
        "eval": {"start": run.judged[0][1], "end": run.judged[-1][1]} if run.judged else {},
        "bytes": {
            "up_per_client_round": sum(visit.up for visit in visits) / max(len(visits), 1),
            "down_per_client_round": sum(visit.down for visit in visits) / max(len(visits), 1),
        },
        "seconds": seconds,
        "seconds_per_forward": seconds / forwards if forwards else None,
        "digest": {"round": digests[-1][0], "sha256": digests[-1][1]} if digests else {},
        **({"privacy": told} if (told := privacy.spent_in(run)) else {}),
        **_scatter(run),
    }


def _scatter(run: Vitals) -> dict[str, float]:
    """Returns how a client's loss scatters from batch to batch, and how the clients differ."""
    seen = course.course_of(run)
    return {"noise_within": seen.noise, "noise_between": seen.between} if seen is not None else {}
