"""Splitting records over clients, and setting evaluation records apart; every draw is named by the seed.

Source: the three splitters of Table 3 of arXiv:2402.05926, by the rules of its code; the balanced Dirichlet split and
one client per label are those of FedKSeed (arXiv:2312.06353), by the rules of its code.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedmezo.errors import DataError
from fedmezo.zo.noise import derive_seed

__all__ = [
    "Parts",
    "SplitKind",
    "holdout",
    "holdout_clients",
    "shuffled",
    "split",
    "split_iid",
    "split_lda",
    "split_meta",
    "split_natural",
]

Parts = tuple[tuple[int, ...], ...]
SplitKind = Literal["iid", "lda", "meta", "natural"]

LDA_ATTEMPTS = 1000


def shuffled(count: int, *parts: int | str) -> NDArray[np.int64]:
    """Returns the permutation of 0..count-1 named by `parts`.

    Raw PCG64 words are sorted, because numpy keeps bit streams across versions but not `permutation`.
    """
    words = np.random.PCG64(derive_seed(*parts)).random_raw(count)
    return np.argsort(words, kind="stable")


def split(
    kind: str,
    labels: Sequence[str],
    *,
    clients: int,
    seed: int,
    alpha: float = 0.5,
    balanced: bool = False,
    min_examples: int = 1,
) -> Parts:
    """Returns the record indices of each client: a disjoint cover of all records, no client without any.

    Args:
      kind: "iid", "lda", "meta" or "natural".
      labels: category of each record.
      clients: number of clients, >= 1.
      seed: names the split.
      alpha: concentration of "lda", > 0; small is uneven. The others ignore it and what follows.
      balanced: of "lda", see `split_lda`.
      min_examples: of "lda", see `split_lda`.

    Raises:
      DataError: an unknown kind, or a split that would leave a client empty.
    """
    if kind == "iid":
        return split_iid(labels, clients=clients, seed=seed)
    if kind == "lda":
        return split_lda(labels, clients=clients, seed=seed, alpha=alpha, balanced=balanced, min_examples=min_examples)
    if kind == "meta":
        return split_meta(labels, clients=clients, seed=seed)
    if kind == "natural":
        return split_natural(labels, clients=clients)
    raise DataError(f"Unknown split '{kind}'; expected one of {', '.join(get_args(SplitKind))}.")


def split_iid(labels: Sequence[str], *, clients: int, seed: int) -> Parts:
    """Returns a random split into parts whose sizes differ by one at most.

    Raises:
      DataError: there are fewer records than clients.
    """
    _check(labels, clients=clients)
    return tuple(_indices(part) for part in np.array_split(shuffled(len(labels), "split-iid", seed), clients))


def split_lda(
    labels: Sequence[str],
    *,
    clients: int,
    seed: int,
    alpha: float = 0.5,
    balanced: bool = False,
    min_examples: int = 1,
) -> Parts:
    """Returns a split in which every category is shared out by its own Dirichlet(alpha) draw.

    Cuts are floored cumulative shares of the category's shuffled records. All draws are made afresh until
    every client has `min_examples` records. Each client's records are shuffled.

    Args:
      labels: category of each record.
      clients: number of clients, >= 1.
      seed: names the split.
      alpha: concentration, > 0; small is uneven.
      balanced: categories are shared out in alphabetical order, and a client that holds the mean number of records
        or more gets none of the next ones, as in FedKSeed's code. Without it sizes are not balanced.
      min_examples: the smallest client's size, >= 1; 10 in FedKSeed's code.

    Raises:
      DataError: alpha is not positive, there are too few records for so many clients, or no draw gives every
        client enough.
    """
    _check(labels, clients=clients, least=min_examples)
    if not 0 < alpha < float("inf"):
        raise DataError(f"alpha: expected a positive number for the lda split, got {alpha}.")
    groups = _groups(labels)
    counts = [len(group) for group in groups.values()]
    cuts = _lda_cuts(counts, clients=clients, seed=seed, alpha=alpha, balanced=balanced, least=min_examples)
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


def split_natural(labels: Sequence[str], *, clients: int) -> Parts:
    """Returns a split in which each label is one client: the j-th in alphabetical order is client j.

    Raises:
      DataError: there are not as many clients as labels.
    """
    groups = _groups(labels)
    if len(groups) != clients:
        raise DataError(
            f"The natural split makes each label a client of its own, and there are {len(groups)} labels for "
            f"{clients} clients; set federation.clients = {len(groups)}."
        )
    return tuple(_indices(group) for group in groups.values())


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


def _check(labels: Sequence[str], *, clients: int, least: int = 1) -> None:
    for name, value in (("clients", clients), ("min_examples", least)):
        if value < 1:
            raise DataError(f"{name}: expected at least 1, got {value}.")
    if len(labels) < clients * least:
        each = "a record" if least == 1 else f"{least} records"
        raise DataError(
            f"Cannot give {clients} clients {each} each from {len(labels)}; use fewer clients or more data."
        )


def _indices(values: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(values.tolist())


def _groups(labels: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Record indices by category, categories in alphabetical order so that only the seed decides."""
    groups: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for index, label in enumerate(labels):
        groups[label].append(index)
    return {label: np.array(indices, dtype=np.int64) for label, indices in groups.items()}


def _lda_cuts(
    counts: Sequence[int], *, clients: int, seed: int, alpha: float, balanced: bool, least: int
) -> NDArray[np.int64]:
    """Cuts per category, (categories, clients - 1); only they decide sizes, so only they are redrawn."""
    generator = np.random.Generator(np.random.PCG64(derive_seed("split-lda", seed)))
    totals = np.array(counts, dtype=np.int64)[:, None]
    for _ in range(LDA_ATTEMPTS):
        shares = generator.dirichlet(np.full(clients, alpha), size=len(counts))
        upto = _balanced(shares, totals) if balanced else np.cumsum(shares, axis=1)
        # A tiny alpha can underflow every gamma draw of a row to 0/0.
        if not np.isfinite(upto).all():
            continue
        edges = _edges(upto, totals)
        if np.diff(edges, axis=1).sum(axis=0).min() >= least:
            return edges[:, 1:-1]
    raise DataError(
        f"The lda split with alpha={alpha} left one of {clients} clients "
        f"{'without a record' if least == 1 else f'with fewer than {least} records'} in each of "
        f"{LDA_ATTEMPTS} draws over {len(counts)} categories and {int(totals.sum())} records; "
        "raise alpha, use fewer clients, or the iid split."
    )


def _edges(upto: NDArray[np.float64], totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each client's piece of each category begins and ends, (categories, clients + 1), by cumulative shares."""
    cuts = np.minimum(np.floor(upto[:, :-1] * totals).astype(np.int64), totals)
    return np.concatenate([np.zeros_like(totals), cuts, totals], axis=1)


def _balanced(shares: NDArray[np.float64], totals: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cumulative shares in which a client that holds the mean number of records gets none; nan if none is left."""
    clients = shares.shape[1]
    held = np.zeros(clients, dtype=np.int64)
    rows = np.full_like(shares, np.nan)
    for index, (share, total) in enumerate(zip(shares, totals, strict=True)):
        upto = np.cumsum(np.where(held * clients < totals.sum(), share, 0.0))
        if not upto[-1] > 0:
            break
        rows[index] = upto / upto[-1]
        held += np.diff(_edges(rows[index : index + 1], total[None]), axis=1)[0]
    return rows
