"""Splitting records over clients, and setting evaluation records apart; every draw is named by the seed.

Source: the three splitters of Table 3 of arXiv:2402.05926, by the rules of its code.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedmezo.errors import DataError
from fedmezo.zo.noise import derive_seed

__all__ = [
    "Parts",
    "SplitKind",
    "SplitReport",
    "holdout",
    "holdout_clients",
    "shuffled",
    "split",
    "split_iid",
    "split_lda",
    "split_meta",
    "split_report",
]

Parts = tuple[tuple[int, ...], ...]
SplitKind = Literal["iid", "lda", "meta"]

LDA_ATTEMPTS = 1000


def shuffled(count: int, *parts: int | str) -> NDArray[np.int64]:
    """Returns the permutation of 0..count-1 named by `parts`.

    Raw PCG64 words are sorted, because numpy keeps bit streams across versions but not `permutation`.
    """
    words = np.random.PCG64(derive_seed(*parts)).random_raw(count)
    return np.argsort(words, kind="stable")


def split(kind: str, labels: Sequence[str], *, clients: int, seed: int, alpha: float = 0.5) -> Parts:
    """Returns the record indices of each client: a disjoint cover of all records, no client without any.

    Args:
      kind: "iid", "lda" or "meta".
      labels: category of each record.
      clients: number of clients, >= 1.
      seed: names the split.
      alpha: concentration of "lda", > 0; small is uneven. The others ignore it.

    Raises:
      DataError: an unknown kind, or a split that would leave a client empty.
    """
    if kind == "iid":
        return split_iid(labels, clients=clients, seed=seed)
    if kind == "lda":
        return split_lda(labels, clients=clients, seed=seed, alpha=alpha)
    if kind == "meta":
        return split_meta(labels, clients=clients, seed=seed)
    raise DataError(f"Unknown split '{kind}'; expected one of {', '.join(get_args(SplitKind))}.")


def split_iid(labels: Sequence[str], *, clients: int, seed: int) -> Parts:
    """Returns a random split into parts whose sizes differ by one at most.

    Raises:
      DataError: there are fewer records than clients.
    """
    _check(labels, clients=clients)
    return tuple(_indices(part) for part in np.array_split(shuffled(len(labels), "split-iid", seed), clients))


def split_lda(labels: Sequence[str], *, clients: int, seed: int, alpha: float = 0.5) -> Parts:
    """Returns a split in which every category is shared out by its own Dirichlet(alpha) draw.

    Cuts are floored cumulative shares of the category's shuffled records. All draws are made afresh until
    every client has a record; sizes are not balanced. Each client's records are shuffled.

    Raises:
      DataError: alpha is not positive, there are fewer records than clients, or no draw gives every
        client a record.
    """
    _check(labels, clients=clients)
    if not 0 < alpha < float("inf"):
        raise DataError(f"alpha: expected a positive number for the lda split, got {alpha}.")
    groups = _groups(labels)
    cuts = _lda_cuts([len(group) for group in groups.values()], clients=clients, seed=seed, alpha=alpha)
    pieces: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for (label, group), cut in zip(groups.items(), cuts, strict=True):
        order = group[shuffled(len(group), "split-lda", seed, "category", label)]
        for client, piece in enumerate(np.split(order, cut)):
            pieces[client].append(piece)
    parts = [np.concatenate(own) for own in pieces]
    return tuple(_indices(p[shuffled(len(p), "split-lda", seed, "client", c)]) for c, p in enumerate(parts))


def split_meta(labels: Sequence[str], *, clients: int, seed: int) -> Parts:
    """Returns a split by category: categories are shuffled, the j-th goes whole to client j mod clients.

    Raises:
      DataError: there are fewer categories than clients.
    """
    _check(labels, clients=clients)
    groups = list(_groups(labels).values())
    if len(groups) < clients:
        raise DataError(
            f"The meta split gives each client whole categories, but there are {len(groups)} categories for "
            f"{clients} clients; use at most {len(groups)} clients, or the lda or iid split."
        )
    order = shuffled(len(groups), "split-meta", seed)
    return tuple(_indices(np.concatenate([groups[j] for j in order[client::clients]])) for client in range(clients))


def holdout(count: int, *, examples: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (training, evaluation) indices; draw this set, common to all clients, before the split.

    Both are in ascending order and together cover 0..count-1 once.

    Raises:
      DataError: `examples` is negative, or leaves nothing to train on.
    """
    if not 0 <= examples < count:
        raise DataError(f"Cannot set {examples} of {count} records apart for evaluation; expected 0 to {count - 1}.")
    order = shuffled(count, "holdout", seed)
    return _indices(np.sort(order[examples:])), _indices(np.sort(order[:examples]))


def holdout_clients(parts: Sequence[Sequence[int]], *, per_client: float, seed: int) -> tuple[Parts, Parts]:
    """Returns (training, evaluation) parts: each client's own evaluation set, drawn after the split.

    So a client is evaluated on what it trains on. Every client keeps at least one record to train on.

    Args:
      parts: record indices per client, none empty.
      per_client: a share of the client's records, rounded down, when below 1; otherwise a number of records.
      seed: names the draw.

    Raises:
      DataError: `per_client` is negative, or neither below 1 nor whole.
    """
    if per_client < 0 or (per_client >= 1 and per_client != int(per_client)):
        raise DataError(f"Evaluation records per client: expected a share below 1 or a whole number, got {per_client}.")
    train: list[tuple[int, ...]] = []
    test: list[tuple[int, ...]] = []
    for client, part in enumerate(parts):
        wanted = int(per_client if per_client >= 1 else per_client * len(part))
        own = np.asarray(part, dtype=np.int64)[shuffled(len(part), "holdout", seed, "client", client)]
        kept = min(wanted, max(len(part) - 1, 0))
        train.append(_indices(own[kept:]))
        test.append(_indices(own[:kept]))
    return tuple(train), tuple(test)


@dataclass(frozen=True, slots=True)
class SplitReport:
    """How uneven a split is.

    Attributes:
      sizes: records per client.
      histograms: per client, the number of records of each of its categories.
      distances: per client, the total variation distance, in [0, 1), of its category shares from all
        records'.
    """

    sizes: tuple[int, ...]
    histograms: tuple[Mapping[str, int], ...]
    distances: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for JSON."""
        return {
            "sizes": list(self.sizes),
            "histograms": [dict(histogram) for histogram in self.histograms],
            "distances": list(self.distances),
        }


def split_report(parts: Sequence[Sequence[int]], labels: Sequence[str]) -> SplitReport:
    """Returns the report of a split; the shares of all records are those of the records in `parts`.

    Raises:
      DataError: a client has no record.
    """
    counts = [Counter(labels[index] for index in part) for part in parts]
    for client, part in enumerate(parts):
        if not part:
            raise DataError(f"Client {client} has no record; split again with fewer clients.")
    total = Counter[str]()
    for count in counts:
        total.update(count)
    size = total.total()
    distances = tuple(
        sum(abs(count[label] / count.total() - total[label] / size) for label in total) / 2 for count in counts
    )
    ordered = tuple(dict(sorted(count.items())) for count in counts)
    return SplitReport(tuple(len(part) for part in parts), ordered, distances)


def _check(labels: Sequence[str], *, clients: int) -> None:
    if clients < 1:
        raise DataError(f"clients: expected at least 1, got {clients}.")
    if len(labels) < clients:
        raise DataError(
            f"Cannot give {clients} clients a record each from {len(labels)}; use fewer clients or more data."
        )


def _indices(values: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(values.tolist())


def _groups(labels: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Record indices by category, categories in alphabetical order so that only the seed decides."""
    groups: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for index, label in enumerate(labels):
        groups[label].append(index)
    return {label: np.array(indices, dtype=np.int64) for label, indices in groups.items()}


def _lda_cuts(counts: Sequence[int], *, clients: int, seed: int, alpha: float) -> NDArray[np.int64]:
    """Cuts per category, (categories, clients - 1); only they decide sizes, so only they are redrawn."""
    generator = np.random.Generator(np.random.PCG64(derive_seed("split-lda", seed)))
    totals = np.array(counts, dtype=np.int64)[:, None]
    for _ in range(LDA_ATTEMPTS):
        shares = generator.dirichlet(np.full(clients, alpha), size=len(counts))
        # A tiny alpha can underflow every gamma draw of a row to 0/0.
        if not np.isfinite(shares).all():
            continue
        cuts = np.minimum(np.floor(np.cumsum(shares, axis=1)[:, :-1] * totals).astype(np.int64), totals)
        edges = np.concatenate([np.zeros_like(totals), cuts, totals], axis=1)
        if np.diff(edges, axis=1).sum(axis=0).min() >= 1:
            return cuts
    raise DataError(
        f"The lda split with alpha={alpha} left one of {clients} clients without a record in each of "
        f"{LDA_ATTEMPTS} draws over {len(counts)} categories and {int(totals.sum())} records; "
        "raise alpha, use fewer clients, or the iid split."
    )
