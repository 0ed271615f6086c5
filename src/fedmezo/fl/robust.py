"""Robust aggregation in scalar space: what a minority of clients sends bends a round only so far, whatever it is.

Where clients share directions (`Task.shared`), a round is a table of coefficients, a row per client and a column per
direction, and `with_robust_mean` combines each column by itself. Where they do not, and for backpropagation, a walk can
only be judged as a whole: by its length (`norm_bounded`) or by its distances from the others (`krum`).

A client without a single finite number counts as absent: the round has the bits it would have without it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.aggregate import Pairs, Weighting, cut
from fedmezo.fl.algorithm import Algorithm, Reply, Task
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import whole
from fedmezo.zo.seedsum import DenseDelta, Walk

__all__ = [
    "Coordinate", "assumed", "combined", "finite_only", "krum", "lengths", "norm_bounded",
    "squared_distances", "with_believed_losses", "with_robust_mean",
]  # fmt: skip

Coordinate = Literal["median", "trimmed-mean", "sign-vote"]
_LARGEST = 1e30  # no coefficient of a run that goes anywhere; what is larger would not fit a float32 slope
_UNBELIEVABLE = 5.0  # median deviations; of normal losses one in a thousand is that far off

S = TypeVar("S")
Table = NDArray[np.float64]
Part = Walk | DenseDelta


def assumed(share: float, count: int) -> int:
    """Returns how many of `count` replies a rule takes for adversaries': the share, rounded up, and always a minority.

    Raises:
      ConfigError: the share is not in [0, 0.5).
    """
    if not 0 <= share < 0.5:
        raise ConfigError(f"robust.share: expected 0 <= share < 0.5, got {share}.")
    # 0.2 * 15 is a little above 3 in floating point.
    return max(0, min(math.ceil(share * count - 1e-9), (count - 1) // 2))


def combined(rule: Coordinate, table: Table, *, share: float) -> Table:
    """Returns one number per column of a table (clients, columns), bent little by a minority of its rows.

    median: the middle value; of an even number the mean of the middle two. trimmed-mean: the mean without the f lowest
    and the f highest, f = `assumed` of all rows, fewer in a column with holes. sign-vote: the sign that most have,
    times the median absolute value; 0 where the votes are even.

    Args:
      rule: how.
      table: float64; nan is a hole, which is left out. A column of holes gives 0.
      share: the assumed share of adversaries; of use to trimmed-mean only.

    Source: coordinate-wise median and trimmed mean of Yin et al., arXiv:1803.01498; the vote of Bernstein et al.,
    arXiv:1810.05291.
    """
    trim = assumed(share, len(table))
    columns = [column[~np.isnan(column)] for column in table.T]
    return np.array([_one(rule, np.sort(column), trim) if len(column) else 0.0 for column in columns])


def _one(rule: Coordinate, ordered: Table, trim: int) -> float:
    if rule == "median":
        return float(np.median(ordered))
    if rule == "sign-vote":
        return float(np.sign(np.sign(ordered).sum()) * np.median(np.abs(ordered)))
    cut = min(trim, (len(ordered) - 1) // 2)
    kept = ordered[cut : len(ordered) - cut]
    return math.fsum(kept) / len(kept)


def with_robust_mean(algorithm: Algorithm[S], rule: Coordinate, *, share: float = 0.2) -> Algorithm[S]:
    """Returns the algorithm with a rule in place of the clients' weighted mean, direction by direction.

    What is combined are coefficients: rate, clip and momentum are in them, so clients may have rates of their own. A
    client's skipped steps are left out of their columns. Weights of clients play no part. The round's loss is combined
    by the same rule. A round in which nobody has a finite slope stays as it is.

    Laws: equal replies give their own walk; the order of clients is of no account; a client with nan only is as absent.

    Args:
      algorithm: one whose tasks are `shared`.
      rule: median | trimmed-mean | sign-vote.
      share: as in `combined`.

    Raises:
      RunError: in `gather`, when the walks of a round are not along the same directions.
    """
    assumed(share, 0)

    def gather(tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[Sequence[Task], Sequence[Reply]]:
        tasks, replies = algorithm.gather(tasks, replies)
        asked = {task.client: task for task in tasks}
        heard = [(asked[reply.client], reply) for reply in replies if reply.client in asked and _finite(reply)]
        if not heard:
            return tasks, replies
        table, losses = _table(heard), np.array([[reply.loss] for _, reply in heard])
        loss = _one_loss(rule, losses, share=share)
        task, reply = whole(heard[0][0], combined(rule, table, share=share).tolist(), loss=loss)
        return [*tasks, task], [*replies, reply]

    return replace(algorithm, gather=gather)


def _table(heard: Pairs) -> Table:
    """Returns the coefficients (clients, directions) of a round, nan where a step was skipped.

    Raises:
      RunError: the directions differ.
    """
    walks = [walk_of(task, reply.slopes) for task, reply in heard]
    for (task, _), walk in zip(heard, walks, strict=True):
        if walk.seeds != walks[0].seeds:
            raise RunError(
                f"Round {task.round}: client {task.client} walked along other directions than client "
                f"{heard[0][0].client}, so their steps cannot be compared; set algorithm.shared = true."
            )
    limited = [[max(-_LARGEST, min(_LARGEST, c)) for c in walk.coefficients] for walk in walks]
    skipped = np.isnan([reply.slopes for _, reply in heard])
    return np.where(skipped, math.nan, np.array(limited))


def _one_loss(rule: Coordinate, losses: Table, *, share: float) -> float:
    finite = np.where(np.isfinite(losses), losses, math.nan)
    return math.nan if np.isnan(finite).all() else float(combined(rule, finite, share=share)[0])


def with_believed_losses(algorithm: Algorithm[S]) -> Algorithm[S]:
    """Returns the algorithm with a limit on the losses that clients claim: five median deviations from their median.

    The guard goes by the mean of these losses: a client that claims any would have the run rolled back for ever. What
    is beyond is kept as if it were the limit; a loss that is infinite, as unknown.
    """

    def gather(tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[Sequence[Task], Sequence[Reply]]:
        tasks, replies = algorithm.gather(tasks, replies)
        known = [reply.loss for reply in replies if math.isfinite(reply.loss)]
        if not known:
            return tasks, replies
        middle = median(known)
        reach = _UNBELIEVABLE * median(abs(loss - middle) for loss in known)
        return tasks, [_believed(reply, middle - reach, middle + reach) for reply in replies]

    return replace(algorithm, gather=gather)


def _believed(reply: Reply, lowest: float, highest: float) -> Reply:
    loss = min(max(reply.loss, lowest), highest) if math.isfinite(reply.loss) else math.nan
    return reply if loss == reply.loss or math.isnan(reply.loss) else replace(reply, loss=loss)


def finite_only(weights: Weighting) -> Weighting:
    """Returns the weighting in which a change of the parameters with a nan or an infinity in it counts nothing."""
    return _among(weights, lambda pairs: [place for place, (_, reply) in enumerate(pairs) if _has_numbers(reply)])


def norm_bounded(weights: Weighting, *, bound: float = 1.0) -> Weighting:
    """Returns the weighting with a limit on lengths: a longer walk counts as `bound` times the median length.

    Args:
      weights: the weighting; those of walks that are not too long stay as they are.
      bound: multiple of the median length of those heard, > 0.

    Source: norm bounding of Sun et al., arXiv:1911.07963, with a bound that follows the round.
    """

    def bounded(pairs: Pairs) -> list[float]:
        return cut(weights(pairs), lengths([_part(task, reply) for task, reply in pairs]), medians=bound)

    return _among(bounded, _heard)


def krum(weights: Weighting, *, share: float = 0.2, single: bool = False) -> Weighting:
    """Returns the weighting among the n - f replies that are nearest to their neighbours; the others count nothing.

    A reply's score is the sum of its squared distances from the n - f - 2 nearest others, f = `assumed`; it tells
    something when n >= 2 f + 3. Distances go by coefficients: with fresh directions all walks are orthogonal, so a
    score knows their lengths only; with shared directions, or a small pool, it knows where they point. Changes of the
    parameters are compared as they are.

    Args:
      weights: how those that are kept are weighted among themselves.
      share: the assumed share of adversaries.
      single: keep the one with the lowest score (Krum) instead of n - f (multi-Krum); the lowest client of equals.

    Source: Blanchard et al., NIPS 2017 (arXiv:1703.02757).
    """
    assumed(share, 0)

    def nearest(pairs: Pairs) -> list[int]:
        heard = _heard(pairs)
        count, bad = len(heard), assumed(share, len(heard))
        apart = squared_distances([_part(*pairs[place]) for place in heard])
        near = np.sort(apart, axis=1)[:, 1 : 1 + max(1, count - bad - 2)].sum(axis=1)
        ranked = sorted(zip(near.tolist(), heard, strict=True))
        return sorted(place for _, place in ranked[: 1 if single else count - bad])

    return _among(weights, nearest)


def _among(weights: Weighting, keep: Callable[[Pairs], list[int]]) -> Weighting:
    """Returns the weighting of those at the places that `keep` names, as if the others, who get 0, were absent."""

    def chosen(pairs: Pairs) -> list[float]:
        places = keep(pairs)
        found = weights([pairs[place] for place in places]) if places else []
        by_place = dict(zip(places, found, strict=True))
        return [by_place.get(place, 0.0) for place in range(len(pairs))]

    return chosen


def _finite(reply: Reply) -> bool:
    return any(map(math.isfinite, reply.slopes))


def _has_numbers(reply: Reply) -> bool:
    return reply.delta is None or all(bool(part.isfinite().all()) for part in reply.delta.tensors.values())


def _heard(pairs: Pairs) -> list[int]:
    """Returns the places of replies that say anything: a finite slope, or a change that is finite throughout."""
    return [
        place for place, (task, reply) in enumerate(pairs)
        if _has_numbers(reply) and (task.method != "walk" or _finite(reply))
    ]  # fmt: skip


def _part(task: Task, reply: Reply) -> Part:
    return reply.delta or walk_of(task, reply.slopes)


def lengths(parts: Sequence[Part]) -> list[float]:
    """Returns the length of each change: of a walk over |z|, its directions counted as orthogonal."""
    return [
        math.hypot(*part.total().coefficients) if isinstance(part, Walk) else math.sqrt(_products([part])[0, 0])
        for part in parts
    ]


def squared_distances(parts: Sequence[Part]) -> Table:
    """Returns |u_i - u_j|^2 of all pairs, (n, n): of walks over |z|^2, directions orthogonal but for equal names.

    That is off by a relative sqrt(2 / d) or so, for d trained scalars. A round has walks only, or changes only.
    """
    walks = [part for part in parts if isinstance(part, Walk)]
    inner = _crossed(walks) if walks else _products([part for part in parts if isinstance(part, DenseDelta)])
    own = np.diag(inner)
    return np.maximum(own[:, None] + own[None, :] - 2 * inner, 0.0)


def _crossed(walks: Sequence[Walk]) -> Table:
    """Returns the inner products of walks over |z|^2."""
    found, by_seed = np.zeros((len(walks), len(walks))), dict[int, tuple[list[int], list[float]]]()
    for place, walk in enumerate(walks):
        for seed, coefficient in walk.total():
            places, coefficients = by_seed.setdefault(seed, ([], []))
            places.append(place)
            coefficients.append(coefficient)
    for places, coefficients in by_seed.values():
        found[np.ix_(places, places)] += np.outer(coefficients, coefficients)
    return found


def _products(deltas: Sequence[DenseDelta]) -> Table:
    """Returns the inner products of changes, tensor by tensor, in float64."""
    found = np.zeros((len(deltas), len(deltas)))
    for name in deltas[0].tensors if deltas else ():
        flat = [delta.tensors[name].detach().cpu().double().reshape(-1).numpy() for delta in deltas]
        # einsum sums on one thread: the same bits whatever the number of threads.
        found += np.array([[float(np.einsum("i,i->", a, b)) for b in flat] for a in flat])
    return found
