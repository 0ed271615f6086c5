"""How unlike the clients are: gradients and losses from forward passes, and the labels they hold."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedmezo.data.prompt import Example
from fedmezo.errors import ConfigError
from fedmezo.studies.build import Built, build
from fedmezo.studies.config import Config
from fedmezo.studies.constants import Say, measure_built
from fedmezo.studies.measured import ClientRow, Interval
from fedmezo.studies.moments import spearman
from fedmezo.studies.sampling import SamplingOptions, exact_config

__all__ = ["ClientSignals", "Heterogeneity", "distances", "measure_heterogeneity"]

_FEW = 0.5  # answers that are more than this share of the examples are free text, not labels


@dataclass(frozen=True)
class ClientSignals:
    """One client at the start.

    Attributes:
      client: who.
      examples: training examples.
      loss: nats.
      gradient2: |grad f_i|^2.
      apart2: |grad f_i - grad f|^2; noise may make it negative.
      cosine: of grad f_i with grad f; noise may take it past 1, and None where a square came out negative.
      total_variation: distance of its label shares from everyone's, in [0, 1); None without labels.
      jensen_shannon: divergence of the two, in bits, in [0, 1); None without labels.
      intervals: 95 %, by name; the label distances are exact and have none.
    """

    client: int
    examples: int
    loss: float
    gradient2: float
    apart2: float
    cosine: float | None
    total_variation: float | None
    jensen_shannon: float | None
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def signals(self) -> dict[str, float | None]:
        """Returns every signal by name."""
        return {name: value for name, value in asdict(self).items() if name not in ("client", "intervals")}


@dataclass(frozen=True)
class Heterogeneity:
    """What was found.

    Attributes:
      clients: one per client, at the start.
      gradient2: |grad f|^2 at the start.
      apart2: |grad f_i - grad f|^2 at the start, mean over clients.
      c_h: fitted over the points, as sigma_h2 (Assumption 6).
      sigma_h2: likewise.
      intervals: 95 % of these four.
      points: how many the fit is over.
      labels: what the label distances go by: a field of the records, "answers", or "nothing".
      correlations: rank correlation of every two signals over clients; None for fewer than three clients or a signal
        that does not vary.
      forwards: forward passes it took.
    """

    clients: tuple[ClientSignals, ...]
    gradient2: float
    apart2: float
    c_h: float
    sigma_h2: float
    intervals: Mapping[str, Interval]
    points: int
    labels: str
    correlations: Mapping[str, Mapping[str, float | None]]
    forwards: int

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return asdict(self)


def measure_heterogeneity(
    config: Config, *, asked: SamplingOptions | None = None, say: Say = lambda _: None
) -> Heterogeneity:  # fmt: skip
    """Returns how unlike the clients of a configuration are, measured with forward passes in float32.

    Args:
      config: whose model, adapter, clients' data and batch size.
      asked: how exactly; clients are told at the start, Assumption 6 is fitted over all points.
      say: hears of every point begun.

    Raises:
      ConfigError: a single client.
    """
    if config.federation.clients < 2:
        raise ConfigError("A single client has nobody to differ from; set federation.clients to at least 2.")
    built = build(exact_config(config))
    measured = measure_built(built, asked=asked, say=say)
    labels, histograms = _histograms(built)
    apart = distances(histograms)
    whole = measured.rows[0]
    start = [row for row in measured.clients if row.point == whole.point]
    sizes = built.data.sizes
    clients = tuple(_signals(row, sizes[row.client], apart[row.client]) for row in start)
    return Heterogeneity(
        clients,
        whole.gradient2,
        whole.apart2,
        measured.constants.c_h,
        measured.constants.sigma_h2,
        {
            **{name: whole.intervals[name] for name in ("gradient2", "apart2")},
            **{name: measured.intervals[name] for name in ("c_h", "sigma_h2")},
        },
        len(measured.rows),
        labels,
        _correlations(clients),
        measured.forwards,
    )


def distances(histograms: Sequence[Mapping[str, int]]) -> list[tuple[float, float] | tuple[None, None]]:
    """Returns each client's total variation distance and Jensen-Shannon divergence (bits) from the whole.

    The whole's shares are those of all records together. Both are the same whatever the labels are called. None where
    there are no labels.

    Source: Lin, Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37 (1991).
    """
    total = Counter[str]()
    for histogram in histograms:
        total.update(histogram)
    if not total.total():
        return [(None, None)] * len(histograms)
    whole = [many / total.total() for many in total.values()]
    found: list[tuple[float, float] | tuple[None, None]] = []
    for histogram in histograms:
        size = sum(histogram.values())
        own = [histogram.get(label, 0) / size for label in total]
        middle = [(one + other) / 2 for one, other in zip(own, whole, strict=True)]
        variation = sum(abs(one - other) for one, other in zip(own, whole, strict=True)) / 2
        found.append((variation, max(0.0, (_divergence(own, middle) + _divergence(whole, middle)) / 2)))
    return found


def _divergence(shares: Sequence[float], base: Sequence[float]) -> float:
    return math.fsum(share * math.log2(share / under) for share, under in zip(shares, base, strict=True) if share)


def _histograms(built: Built) -> tuple[str, Sequence[Mapping[str, int]]]:
    """Returns what the labels are, and each client's numbers of them; answers where all records share one label."""
    split, field_name = built.data.split, built.config.split.field
    if len({label for histogram in split.histograms for label in histogram}) > 1:
        return field_name, split.histograms
    counts = [Counter(_answer(example) for example in part) for part in built.data.parts]
    distinct = len({label for count in counts for label in count})
    if distinct > _FEW * sum(map(len, built.data.parts)):
        return "nothing", [{} for _ in counts]
    return "answers", counts


def _answer(example: Example) -> str:
    if example.options:
        return str(example.options[example.answer])
    right = example.rows[example.answer]
    return str(right.ids[right.start :])


def _signals(row: ClientRow, examples: int, apart: tuple[float | None, float | None]) -> ClientSignals:
    variation, divergence = apart
    known = {name: row.intervals[name] for name in ("loss", "gradient2", "apart2", "cosine")}
    return ClientSignals(
        row.client, examples, row.loss, row.gradient2, row.apart2, row.cosine, variation, divergence, known
    )


def _correlations(clients: Sequence[ClientSignals]) -> dict[str, dict[str, float | None]]:
    columns = {name: [client.signals()[name] for client in clients] for name in clients[0].signals()}
    return {
        one: {other: _correlation(columns[one], columns[other]) for other in columns if other != one} for one in columns
    }


def _correlation(some: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    pairs = [(one, other) for one, other in zip(some, others, strict=True) if one is not None and other is not None]
    return spearman([one for one, _ in pairs], [other for _, other in pairs]) if pairs else None
