"""What `analyze rank` shows: rows of numbers, a table for the terminal, and what they say about the paper's claims."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from fedmezo.theory.rank import RANK_LIMIT, RANK_WARNING, verdict

__all__ = ["ALL", "RankRow", "rank_table", "rank_words"]

ALL = "all"

_MATRICES = {
    "forward": "by forward passes",
    "hessian": "of the Hessian",
    "ggn": "of the Gauss-Newton matrix",
}
_FLAW = 0.2  # of a number, beyond which its cause is told
_TOLD = {"holds": "holds here", "fails": "does not hold here", "open": "is open here"}


@dataclass(frozen=True, slots=True)
class RankRow:
    """The curvature of the clients' mean loss in some of the trained parameters; NaN is what could not be had.

    Attributes:
      model: its name.
      adapter: "lora 8", the 8 being its rank, or "full".
      part: "all", or the layer whose diagonal block this is.
      method: "forward" (second differences), "hessian" or "ggn" (backpropagation; Gauss-Newton).
      after: rounds of training before.
      spread: the parameters are at their start + spread * z.
      loss: mean of the batches' losses there, nats.
      trace: of the matrix.
      frobenius2: trace of its square.
      norm: largest |eigenvalue|; "forward" gives tr(H^2) / tr(H) instead, at most that when no eigenvalue is negative.
      lambda_max: largest eigenvalue, from below.
      lambda_min: smallest eigenvalue, from above.
      rank: trace / norm.
      intervals: name of a number -> its 95 % interval.
      directions: samples of the trace.
      steps: Lanczos steps.
      mu: radius of the second differences.
      rounding: error of a sample by rounding, relative to the samples' spread.
      bend: what the fourth derivative adds, relative to the trace.
      batches: how many.
      tokens: in them.
      dim: scalars in the part.
      lora_rank: 0 for "full".
      note: in sentences; empty for nothing.
    """

    model: str
    adapter: str
    part: str
    method: str
    after: int
    spread: float
    loss: float
    trace: float
    frobenius2: float
    norm: float
    lambda_max: float
    lambda_min: float
    rank: float
    intervals: Mapping[str, tuple[float, float]]
    directions: int
    steps: int
    mu: float
    rounding: float
    bend: float
    batches: int
    tokens: int
    dim: int
    lora_rank: int
    note: str

    @property
    def least(self) -> float:
        """Lower bound tr(H^2) / |H|op^2 on the rank in absolute eigenvalues, by the cautious ends of both intervals."""
        low, high = (self.intervals.get(name, (math.nan, math.nan)) for name in ("frobenius2", "norm"))
        return low[0] / high[1] ** 2 if self.method != "forward" and high[1] > 0 else math.nan

    @property
    def place(self) -> str:
        """Where it was measured, in words."""
        moved = f"start + {self.spread:g} z" if self.spread else "start"
        return f"{moved}, {self.after} rounds" if self.after else moved


def rank_table(rows: Sequence[RankRow]) -> Table:
    """Returns a table for the terminal, one line per row, 80 columns wide; intervals are of 95 %."""
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for title in ("part", "method", "after", "trace", "norm", "lowest", "rank", "interval"):
        table.add_column(title, justify="left" if title in ("part", "method") else "right", no_wrap=True)
    for row in rows:
        span = row.intervals.get("rank")
        numbers = (row.trace, row.norm, row.lambda_min, row.rank)
        told = f"{_told(span[0])} to {_told(span[1])}" if span else "-"
        table.add_row(row.part.removeprefix("model."), row.method, str(row.after), *map(_told, numbers), told)
    return table


def rank_words(rows: Sequence[RankRow]) -> list[str]:
    """Returns what the rows of the whole model say about r <= 200 and about Conjecture 3.8, a sentence or two each.

    A claim holds or does not when the whole 95 % interval is on one side.
    """
    whole = [row for row in rows if row.part == ALL]
    words = [f"{row.place}, {_MATRICES[row.method]}: {_judged(row)}{_flawed(row)}" for row in whole]
    if any(row.rank > RANK_WARNING for row in rows):
        words.append(
            f"Warning: a rank is above {RANK_WARNING:g}. The method's rate falls with 1 / r, so expect slow training; "
            "compare a low-rank adapter with a smaller LoRA rank, or more directions per step."
        )
    if any(row.method == "forward" for row in rows):
        words.append(
            "Forward passes give tr(H)^2 / tr(H^2), at least the rank when no eigenvalue is negative; "
            "--method both adds the ends of the spectrum."
        )
    return words


def _judged(row: RankRow) -> str:
    span = row.intervals.get("rank")
    # The paper's H is above the Hessian and has no negative eigenvalue, so what is negative must not cancel.
    mixed = row.method == "hessian" and row.lambda_min < -_FLAW * row.norm and math.isfinite(row.least)
    over = f", above {RANK_LIMIT:g}" if row.least > RANK_LIMIT else ""
    also = f" Some eigenvalues are negative; in absolute ones, r is at least {_told(row.least)}{over}." if mixed else ""
    if not math.isfinite(row.rank) or span is None:
        return f"no rank. {row.note}{also}"
    limit = verdict(row.rank, span, limit=RANK_LIMIT)
    told = f"r = {_told(row.rank)} [{_told(span[0])}, {_told(span[1])}]; the paper's r <= {RANK_LIMIT:g} {_TOLD[limit]}"
    if row.lora_rank:
        proxy = verdict(row.rank, span, limit=row.lora_rank)
        told += f"; Conjecture 3.8, r <= the LoRA rank of {row.lora_rank}, {_TOLD[proxy]}"
    return f"{told}. {row.note}".rstrip() + also


def _flawed(row: RankRow) -> str:
    if row.method != "forward":
        return ""
    told = f" Rounding is {row.rounding:.1%} of a sample's spread, the bend {abs(row.bend):.1%} of the trace."
    if row.rounding > _FLAW:
        told += " Take a larger mu."
    return told + (" Take a smaller mu." if abs(row.bend) > _FLAW else "")


def _told(number: float) -> str:
    if not math.isfinite(number):
        return "-"
    if abs(number) >= 1e5 or 0 < abs(number) < 1e-3:
        return f"{number:.1e}"
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:.0f}"
