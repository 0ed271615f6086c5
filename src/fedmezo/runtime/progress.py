"""What one round did, for people and plots."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmezo.runtime.records import Round, by_client

__all__ = ["RoundReport", "report_of"]


@dataclass(frozen=True)
class RoundReport:
    """What one round did, for people and plots.

    Attributes:
      round: its number, from 0.
      rounds: how many the run will have.
      loss: mean training loss over the cohort, nats.
      rate: mean learning rate over the cohort.
      clip: limit on |slope| in force; inf for none, 0 in the first round (each walk limits itself).
      bytes_up: wire bytes sent by the cohort.
      bytes_down: wire bytes sent to the cohort.
      seconds: wall clock, without evaluation.
      forwards: forward passes of the walks, one per point.
      tokens: tokens those passes read.
      skipped: slopes skipped because a loss was not finite.
      evaluations: split -> metrics, when this round was evaluated.
      events: (kind, detail) of guards and monitors.
      clients: client -> its loss, rate and bytes.
      epsilon: the privacy that any unit has spent so far at most; None where none is kept.
    """

    round: int
    rounds: int
    loss: float
    rate: float
    clip: float
    bytes_up: int
    bytes_down: int
    seconds: float
    forwards: int
    tokens: int
    skipped: int
    evaluations: Mapping[str, Mapping[str, float]]
    events: tuple[tuple[str, str], ...]
    clients: Mapping[int, Mapping[str, float]]
    epsilon: float | None = None


def report_of(done: Round, rounds: int) -> RoundReport:
    """Returns the report of a finished round of a run of `rounds`."""
    clients = {
        entry.task.client: {
            "loss": entry.reply.loss,
            "rate": entry.task.rate,
            "bytes_up": float(entry.bytes_up),
            "bytes_down": float(entry.bytes_down),
        }
        for entry in by_client(done)
    }
    return RoundReport(
        round=done.round,
        rounds=rounds,
        loss=done.loss,
        rate=done.rate,
        clip=done.entries[0].task.clip,
        bytes_up=sum(entry.bytes_up for entry in done.entries),
        bytes_down=sum(entry.bytes_down for entry in done.entries),
        seconds=done.seconds,
        forwards=done.forwards,
        tokens=done.tokens,
        skipped=sum(entry.reply.skipped for entry in done.entries),
        evaluations=done.evaluations,
        events=done.news,
        clients=clients,
        epsilon=done.epsilon,
    )
