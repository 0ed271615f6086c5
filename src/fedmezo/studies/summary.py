"""The result of a run, from its journal."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmezo.fl.spending import SPENT
from fedmezo.runtime.journal import LOOK, Journal
from fedmezo.runtime.meter import peak_rss_mb
from fedmezo.runtime.pace import Look
from fedmezo.runtime.simulate import START
from fedmezo.studies.build import Built

__all__ = ["Summary", "spent_of", "summarise"]


@dataclass(frozen=True)
class Summary:
    """The result of a run; `as_dict` is what `--json` prints.

    Attributes:
      run_dir: the run's folder.
      rounds: complete rounds.
      clients: clients of the federation.
      dim: trained scalars d.
      mu: perturbation scale.
      rate: learning rate of the first round.
      eval: {"start": metrics, "end": metrics} on the common evaluation set.
      bytes: wire bytes: up_per_client_round, down_per_client_round, up_total, down_total.
      forwards: forward passes of the walks (one per point), evaluation not counted.
      looks: forward passes on the batches that are judged again and again; not in `forwards`.
      taken_back: rounds that were walked and taken back after a surge; not in `rounds` or `forwards`.
      tokens: tokens those passes read.
      seconds: wall clock of the walks.
      peak_rss_mb: largest resident set of this process.
      skipped_steps: directions skipped because a loss was not finite.
      digest: sha256 of the trained parameters.
      privacy: of a private run: the epsilon that any unit has spent at most (None: without bound), its budget, delta,
        sigma and unit; else None.
    """

    run_dir: str
    rounds: int
    clients: int
    dim: int
    mu: float
    rate: float
    eval: Mapping[str, Mapping[str, float]]
    bytes: Mapping[str, float]
    forwards: int
    looks: int
    taken_back: int
    tokens: int
    seconds: float
    peak_rss_mb: float
    skipped_steps: int
    digest: str
    privacy: Mapping[str, object] | None = None

    def as_dict(self) -> dict[str, object]:
        """Returns the fields as plain values."""
        return asdict(self)


def summarise(built: Built, journal: Journal, *, folder: Path) -> Summary:
    """Returns the summary of a run as far as its journal goes."""
    total, seconds = _totals(journal)
    looks = [detail for _, kind, detail in journal.events() if kind == LOOK]
    look = Look.from_json(looks[-1]) if looks else None
    walks = max(total["walks"], 1)
    judged = [(number, metrics) for number, split, metrics in journal.evaluations() if split == "eval"]
    return Summary(
        run_dir=str(folder),
        rounds=total["rounds"],
        clients=built.config.federation.clients,
        dim=built.bench.params.dim,
        mu=float(built.config.algorithm.mu or 0),
        rate=float(built.config.algorithm.rate or 0),
        eval={
            "start": dict(next((m for n, m in judged if n == START), {})),
            "end": dict(judged[-1][1]) if judged else {},
        },
        bytes={
            "up_per_client_round": total["up"] / walks,
            "down_per_client_round": total["down"] / walks,
            "up_total": total["up"],
            "down_total": total["down"],
        },
        forwards=total["forwards"],
        looks=look.forwards if look else 0,
        taken_back=look.undone if look else 0,
        tokens=total["tokens"],
        seconds=seconds,
        peak_rss_mb=peak_rss_mb(),
        skipped_steps=total["skipped"],
        digest=built.bench.params.digest(),
        privacy=spent_of(journal),
    )


def spent_of(journal: Journal) -> dict[str, object] | None:
    """Returns what the last round says of the privacy spent; None where none is kept."""
    told = [detail for _, kind, detail in journal.events() if kind == SPENT]
    return dict(json.loads(told[-1])) if told else None


def _totals(journal: Journal) -> tuple[Counter[str], float]:
    """Returns sums over a run, and its seconds; read one round at a time."""
    seconds = 0.0
    total: Counter[str] = Counter(rounds=0, walks=0, up=0, down=0, skipped=0, forwards=0, tokens=0)
    for done in journal.rounds():
        seconds += done.seconds
        total.update(rounds=1, forwards=done.forwards, tokens=done.tokens)
        for entry in done.entries:
            total.update(up=entry.bytes_up, down=entry.bytes_down, skipped=entry.reply.skipped, walks=entry.walks)
    return total, seconds
