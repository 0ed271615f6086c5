"""Measured constants as records: what was found at which point and client, how sure it is, and the file they lie in."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedmezo.channels import plain
from fedmezo.errors import ConfigError
from fedmezo.theory.constants import Constants

__all__ = ["ClientRow", "Interval", "Measured", "PointRow", "load_measured"]

Interval = tuple[float, float]
FORMAT = 1


@dataclass(frozen=True)
class PointRow:
    """The clients' mean loss at one point.

    Attributes:
      point: which.
      loss: nats.
      gradient2: |grad f|^2.
      batch2: mean over clients of E|grad F_i|^2.
      apart2: mean over clients of |grad f_i - grad f|^2.
      trace: of the Hessian of f.
      norm: tr(H^2) / tr(H) with tr(H^2) from a spread that the batches add to, so that it errs upwards; |H|_F, at least
        |H|op, where the trace is so small or negative that H is taken as indefinite.
      rank: trace / norm, or 1 in that second case.
      along: g'Hg for g = grad f: how the loss bends in the direction of descent.
      stretch: mean over clients and batches of E e'He for the estimate e = z z'grad F_i: how it bends along the steps.
      intervals: 95 %, by name.
    """

    point: str
    loss: float
    gradient2: float
    batch2: float
    apart2: float
    trace: float
    norm: float
    rank: float
    along: float
    stretch: float
    intervals: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientRow:
    """One client at one point.

    Attributes:
      point: which.
      client: who.
      loss: nats.
      gradient2: |grad f_i|^2.
      batch2: E|grad F_i|^2.
      apart2: |grad f_i - grad f|^2.
      cosine: of grad f_i with grad f; None where noise makes a square negative.
      intervals: 95 %, by name.
    """

    point: str
    client: int
    loss: float
    gradient2: float
    batch2: float
    apart2: float
    cosine: float | None
    intervals: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
      constants: fitted; smoothness and effective_rank are the largest over the points.
      covering: the lowest lines above all points in the place of the fitted ones. Noise lies above too.
      intervals: 95 % of the fitted constants, over directions and batches; not over points.
      rows: one per point.
      clients: one per point and client.
      of: what it was measured on and how: clients, batch_size, directions, mu and more.
      forwards: forward passes it took.
      seconds: wall clock it took.
    """

    constants: Constants
    covering: Constants
    intervals: Mapping[str, Interval]
    rows: tuple[PointRow, ...]
    clients: tuple[ClientRow, ...]
    of: Mapping[str, Any] = field(default_factory=dict)
    forwards: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, as `save` writes it."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Writes everything as JSON.

        Raises:
          ConfigError: the file cannot be written.
        """
        try:
            path.write_text(json.dumps(plain(self.as_dict()), allow_nan=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def load_measured(path: Path) -> Measured:
    """Returns what `Measured.save` or `fedmezo analyze constants --json` wrote.

    Raises:
      ConfigError: the file is not there, or holds something else.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.pop("format") != FORMAT:
            raise ValueError
        fitted, covering = (Constants(**told.pop(name)) for name in ("constants", "covering"))
        rows = tuple(PointRow(**_row(row)) for row in told.pop("rows"))
        clients = tuple(ClientRow(**_row(row)) for row in told.pop("clients"))
        return Measured(fitted, covering, _intervals(told.pop("intervals")), rows, clients, **told)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} does not hold constants; write it with `fedmezo analyze constants`.") from None


def _row(told: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: math.nan if value is None and name != "cosine" else value for name, value in told.items()}
    return numbers | {"intervals": _intervals(told["intervals"])}


def _intervals(told: Mapping[str, Sequence[float | None]]) -> dict[str, Interval]:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return {name: (number(pair[0]), number(pair[1])) for name, pair in told.items()}
