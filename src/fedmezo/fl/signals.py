"""What a round's replies say about how unlike its clients are: one number per client, from messages alone.

A client whose every loss was not finite says nothing: it is left out of every signal.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Reply
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import walk_delta
from fedmezo.zo.seedsum import DenseDelta, Update, Walk

__all__ = [
    "SMALL", "Values", "distances", "gradient_gaps", "heard", "losses", "parts_of", "scalar_distances",
    "squared_gradients",
]  # fmt: skip

Values = Mapping[int, float]
Part = Walk | DenseDelta
# Losses and slopes are float32; what differs by less is alike.
SMALL = 1e-6


def heard(replies: Sequence[Reply]) -> list[Reply]:
    """Returns the replies with a finite loss, in client order."""
    return sorted((reply for reply in replies if math.isfinite(reply.loss)), key=lambda reply: reply.client)


def losses(replies: Sequence[Reply]) -> dict[int, float]:
    """Returns each client's mean training loss in this round, nats.

    Source: the round-wise and five-round signals of section 5.4 of arXiv:2402.05926. The paper's code takes the losses
    on the upper side of each direction only; ours are means of both sides.
    """
    return {reply.client: reply.loss for reply in heard(replies)}


def squared_gradients(replies: Sequence[Reply]) -> dict[int, float]:
    """Returns the mean squared slope of each client, an unbiased estimate of |grad F_i|^2 along its walk.

    E (g . z)^2 = |g|^2 for entries of unit variance, so the mean is the least-squares estimate of |g|^2; its relative
    error is about sqrt(2 / slopes). It holds the noise of the batches, and says how long a client's gradient is, not
    where it points.
    """
    found = {reply.client: [s * s for s in reply.slopes if math.isfinite(s)] for reply in heard(replies)}
    return {client: fmean(squares) for client, squares in found.items() if squares}


def gradient_gaps(replies: Sequence[Reply], walks: Mapping[int, Walk]) -> dict[int, float]:
    """Returns an estimate of |grad f_i - grad f|^2 of each client that shares a direction with another.

    For two clients that took slopes along the same z, E (s_i - s_j)^2 = |grad f_i - grad f_j|^2; the mean over pairs is
    the least-squares estimate, and the mean over j is a constant apart from N / (N - 1) |grad f_i - grad f|^2. Slopes a
    client took along one z are averaged first. Unbiased up to batches, and to the steps between the two looks; a gap
    may come out negative.

    Args:
      replies: of one round.
      walks: client -> its walk, which names the directions.
    """
    seen: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for reply in heard(replies):
        for seed, slope in zip(walks[reply.client].seeds, reply.slopes, strict=True):
            if math.isfinite(slope):
                seen[seed][reply.client].append(slope)
    sums: dict[int, list[float]] = defaultdict(list)
    pairs: dict[int, int] = defaultdict(int)
    squares = [0.0]
    for by_client in seen.values():
        means = {client: fmean(slopes) for client, slopes in by_client.items()}
        centre = fmean(means.values())
        spread = math.fsum((mean - centre) ** 2 for mean in means.values())
        squares += [mean * mean for mean in means.values()]
        for client, mean in means.items() if len(means) > 1 else ():
            sums[client].append(len(means) * (mean - centre) ** 2 + spread)
            pairs[client] += len(means) - 1
    apart = {client: math.fsum(sums[client]) / pairs[client] for client in sorted(sums)}
    if not apart or max(apart.values()) <= SMALL**2 * fmean(squares):
        return dict.fromkeys(apart, 0.0)
    half, share = fmean(apart.values()) / 2, (len(apart) - 1) / len(apart)
    return {client: share * (mean - half) for client, mean in apart.items()}


def scalar_distances(walks: Sequence[Walk], *, dim: int) -> list[float]:
    """Returns |u_i - mean u| of every walk u_i, from coefficients alone.

    Directions of different names count as orthogonal, each with |z|^2 = d; equal names are one direction. Off by a
    relative sqrt(1 / (2 d)) or so for the length of one sum, and by up to n / (2 d) because n coefficients of a walk
    are slopes along the very directions they multiply: nothing when d is a million, much when d is thirty.

    Args:
      walks: what each client walked.
      dim: number d of trained scalars.
    """
    totals = [dict(walk.total()) for walk in walks]
    gathered: dict[int, list[float]] = defaultdict(list)
    for total in totals:
        for seed, coefficient in total.items():
            gathered[seed].append(coefficient)
    mean = {seed: math.fsum(terms) / len(walks) for seed, terms in gathered.items()}
    length = math.fsum(m * m for m in mean.values())
    found = []
    for total in totals:
        own = math.fsum(c * c for c in total.values())
        square = math.fsum([own, length, *(-2 * c * mean[seed] for seed, c in total.items())])
        found.append(math.sqrt(dim * square) if square > SMALL**2 * own else 0.0)
    return found


def distances(parts: Sequence[Part], params: Params | None, *, law: Law) -> list[float]:
    """Returns the distance of every update u_i from their mean: the sum over tensors of |u_i - mean u|, not squared.

    Walks are written out tensor by tensor, so memory is the clients' number times the largest tensor.

    Args:
      parts: what each client added to its parameters, as a walk or written out.
      params: names and shapes of what is trained; None will do when every part is written out.
      law: the directions' law.

    Raises:
      RunError: a walk, and no `params` to write it out on.

    Source: the update-difference signal of the paper's code.
    """
    found = [0.0] * len(parts)
    for written in _by_tensor(parts, params, law=law):
        mean = np.sum(written, axis=0) / len(written)
        for at, own in enumerate(written):
            # numpy sums on one thread: the same bits whatever the number of threads.
            gap, size = (float(np.sqrt(np.square(part).sum())) for part in (own - mean, own))
            found[at] += gap if gap > SMALL * size else 0.0
    return found


def _by_tensor(parts: Sequence[Part], params: Params | None, *, law: Law) -> Iterator[list[NDArray[np.float64]]]:
    dense = [part.tensors for part in parts if isinstance(part, DenseDelta)]
    if len(dense) < len(parts) and params is None:
        raise RunError("Exact distances of walks need the parameters' shapes: give `params`, or set exact to false.")
    for name in params.names if params is not None else sorted(dense[0]) if dense else ():
        yield [_tensor(part, name, params, law=law).detach().cpu().double().numpy() for part in parts]


def _tensor(part: Part, name: str, params: Params | None, *, law: Law) -> Tensor:
    if isinstance(part, DenseDelta):
        return part.tensors[name]
    assert params is not None
    return walk_delta(Params({name: params[name]}), part, law=law).tensors[name]


def parts_of(replies: Sequence[Reply], update: Update) -> dict[int, Part]:
    """Returns client -> what it added, for the clients with a finite loss; an update's parts are in client order."""
    good = {reply.client for reply in heard(replies)}
    clients = sorted(reply.client for reply in replies)
    return {client: part for client, part in zip(clients, update.parts, strict=True) if client in good}
