"""Differential privacy of scalars: what a slope may tell of one example, or a round's slopes of one client.

    with_example_privacy(fedmezo(...), Noise(clip=0.1, sigma=1.2, secret=key), batch=8)     # each client, per example
    with_client_privacy(fedmezo(...), Noise(clip=50.0, sigma=3.0, secret=key), batch=8)     # each client, per client
    with_central_privacy(fedmezo(...), Noise(clip=50.0, sigma=1.0, secret=key), clients=100, cohort=10)   # the server

A slope is one number, so its noise is one number too, whatever the number of parameters (DP-ZO, arXiv:2401.04343;
DPZero, arXiv:2310.09639).

Noise and samples are named by a secret, the question and the place in it. The question is all that the answer depends
on: task, model, limits; for a server's sum the summands. So whoever asks again, after a crash say, hears the same
answer and learns nothing more; and another question gets noise of its own. The data have to be named in the secret.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Algorithm, Bench, Reply, Task
from fedmezo.fl.secret import Stream, drawn
from fedmezo.fl.share import limited
from fedmezo.fl.walk import Walker, walk_of, walks_by
from fedmezo.fl.whole import whole
from fedmezo.zo.coding import Coding, coded

__all__ = [
    "Noise",
    "noisy_sum",
    "question_of",
    "scaled",
    "with_central_privacy",
    "with_client_privacy",
    "with_example_privacy",
]

# Noisy sums are rounded to this share of the noise's deviation: the last bits of a float64 tell which sum it was
# (Mironov 2012), and no multiple of so coarse a unit does.
_GRAIN = 2.0**-12

S = TypeVar("S")


@dataclass(frozen=True)
class Noise:
    """The limit on what one unit can change, and the noise that hides it.

    Attributes:
      clip: the limit. Of an example: on its difference of losses, nats. Of a client: on the length of the vector of its
        slopes in a round. inf for none, which no noise can hide.
      sigma: deviation of the noise over the limit.
      secret: names noise and samples; whoever has it can take the noise off.

    Raises:
      RunError: a number is out of range, or there is noise without a limit.
    """

    clip: float
    sigma: float
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not (self.clip > 0 and 0 <= self.sigma < math.inf):
            raise RunError(f"Noise: expected clip > 0 and sigma >= 0, got {self.clip} and {self.sigma}.")
        if self.sigma and math.isinf(self.clip):
            raise RunError("Noise: no noise hides what has no limit; give a finite clip, or sigma = 0.")

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise."""
        return self.clip * self.sigma if self.sigma else 0.0


def question_of(task: Task, model: str, noise: Noise) -> bytes:
    """Returns 32 bytes that tell what is asked: a task, from a model (its digest), under these limits."""
    return hashlib.sha256(repr((task, model, noise.clip, noise.sigma)).encode()).digest()


def noisy_sum(values: Sequence[float], *, clip: float, deviation: float, normal: float) -> float:
    """Returns the sum of the values, each limited to [-clip, clip], plus noise; what is not finite counts as 0.

    Args:
      values: one per unit.
      clip: limit on each.
      deviation: standard deviation of the noise; 0 for none, then nothing is rounded either.
      normal: the standard normal number that the noise is made of.
    """
    total = math.fsum(max(-clip, min(clip, value)) for value in values if math.isfinite(value))
    return _rounded(total + deviation * normal, deviation)


def _rounded(value: float, deviation: float) -> float:
    if not deviation:
        return value
    unit = 2.0 ** math.floor(math.log2(_GRAIN * deviation))
    return round(value / unit) * unit


def scaled(slopes: Sequence[float], *, length: float) -> list[float]:
    """Returns the vector cut to `length` at most, its direction kept; what is not finite counts as 0."""
    finite = [slope if math.isfinite(slope) else 0.0 for slope in slopes]
    factor = min(1.0, length / (math.hypot(*finite) or 1.0))
    return finite if factor == 1 else [factor * slope for slope in finite]


def with_example_privacy(algorithm: Algorithm[S], noise: Noise, *, batch: int) -> Algorithm[S]:
    """Returns the algorithm whose clients answer with slopes that hide each single example.

    A step's batch is a Poisson sample of all the client's examples, `batch` in the mean. Of each example in it the
    difference of its two losses is limited to the clip; their sum gets noise, and is divided by `batch`, never by how
    many there were. With several directions an example has a difference along each, so the noise is larger by the root
    of their number. The client walks by the noisy slopes, so a later step tells no more of an earlier one's examples. A
    reply holds nothing else of the data: its loss is nan, its examples the expected number.

    Laws: without limit and noise, on a sample of one example, this is the algorithm itself, to the bit.

    Args:
      algorithm: one of walks; what it makes of slopes is its own matter.
      noise: limit on an example's difference, nats, and noise.
      batch: expected number of examples in a sample.
    """
    return replace(algorithm, client=lambda tasks, bench: _by_examples(tasks, bench, noise, batch=batch))


def _by_examples(tasks: Sequence[Task], bench: Bench, noise: Noise, *, batch: int) -> list[Reply]:
    """Returns the replies to tasks, one per client."""
    model = bench.params.digest()
    streams = {task.client: Stream(noise.secret, question_of(task, model, noise)) for task in tasks}

    def advance(going: Sequence[Walker], step: int, bench: Bench) -> None:
        looks = []
        for walker in going:
            draw = streams[walker.task.client].name("sample", step)
            looks.append([replace(point, draw=draw) for point in walker.points(step)])
        seen = iter(bench.each([point for some in looks for point in some]))
        for walker, some in zip(going, looks, strict=True):
            task, losses = walker.task, [next(seen) for _ in some]
            stream, many = streams[task.client], math.sqrt(task.directions)
            sums = [
                noisy_sum(
                    [above - below for above, below in zip(*pair, strict=True)],
                    clip=noise.clip,
                    deviation=many * noise.deviation,
                    normal=stream.normal(step, at),
                )
                for at, pair in enumerate(_pairs(losses, task))
            ]
            walker.follow_([coded(walker.slope(total / batch, 0.0), task.coding) for total in sums])

    return [_bare(reply, examples=batch * task.steps)
            for task, reply in zip(tasks, walks_by(tasks, bench, advance=advance), strict=True)]  # fmt: skip


def _pairs(losses: Sequence[Sequence[float]], task: Task) -> list[tuple[Sequence[float], Sequence[float]]]:
    """Returns the losses on either side of each direction, example by example."""
    if task.estimator == "two-point":
        return list(zip(losses[::2], losses[1::2], strict=True))
    return [(above, losses[-1]) for above in losses[:-1]]


def _bare(reply: Reply, *, examples: int) -> Reply:
    """Returns the reply without anything of the data but its slopes."""
    return replace(reply, loss=math.nan, examples=examples)


def with_client_privacy(algorithm: Algorithm[S], noise: Noise, *, batch: int) -> Algorithm[S]:
    """Returns the algorithm whose clients answer with slopes that hide all of their data.

    The vector of a round's slopes is cut to the clip, and each number gets noise. It takes very many clients for their
    mean to be more than noise.

    Args:
      algorithm: one of walks, whose replies are scalars.
      noise: limit on the length of the vector, and noise.
      batch: examples per step, for the number in a reply.
    """

    def client(tasks: Sequence[Task], bench: Bench) -> list[Reply]:
        model = bench.params.digest()
        replies = []
        for task, reply in zip(tasks, algorithm.client(tasks, bench), strict=True):
            stream = Stream(noise.secret, question_of(task, model, noise))
            slopes = [
                _rounded(slope + noise.deviation * stream.normal(at), noise.deviation)
                for at, slope in enumerate(scaled(reply.slopes, length=noise.clip))
            ]
            replies.append(_bare(replace(reply, slopes=_coded(slopes, task.coding)), examples=batch * task.steps))
        return replies

    return replace(algorithm, client=client)


def _coded(slopes: Sequence[float], coding: Coding) -> tuple[float, ...]:
    return tuple(coded(float(np.float32(slope)), coding) for slope in slopes)


def with_central_privacy(algorithm: Algorithm[S], noise: Noise, *, clients: int, cohort: int) -> Algorithm[S]:
    """Returns the algorithm whose server hides each single client from whoever gets the model.

    A round's cohort is a Poisson sample of the clients, `cohort` in the mean. Each client's walk, as coefficients over
    its rate, is cut to the clip by the client and again by the server; the sum gets noise, coordinate by coordinate,
    and is divided by `cohort`, never by how many there were. That is the walk of all (`whole.py`). Of the single
    replies nothing is kept. The server is trusted: it sees them.

    Should nobody be drawn, the first client is asked all the same and its answer thrown away: noise has to be walked.

    Args:
      algorithm: one of walks with shared directions, that asks all the clients it is offered.
      noise: limit on the length of the vector, and noise.
      clients: clients of the federation; one that is away is as if not drawn.
      cohort: expected number of clients in a sample.
    """
    rate = cohort / clients

    def chosen(round_: int, client: int) -> bool:
        return bool(drawn(Stream(noise.secret, b"cohort").name(round_, client), 1, rate=rate))

    def plan(state: S, there: Sequence[int]) -> Sequence[Task]:
        number = inner.plan(state, there[:1])[0].round
        return inner.plan(state, [client for client in there if chosen(number, client)] or there[:1])

    def client(tasks: Sequence[Task], bench: Bench) -> list[Reply]:
        return [
            replace(reply, slopes=_coded(scaled(reply.slopes, length=noise.clip), reply.coding), loss=math.nan)
            for reply in inner.client(tasks, bench)
        ]

    def gather(tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[Sequence[Task], Sequence[Reply]]:
        asked = {task.client: task for task in tasks}
        counted = sorted((r for r in replies if chosen(r.round, r.client)), key=lambda reply: reply.client)
        pairs = [(asked[reply.client], reply) for reply in counted]
        struck = [replace(reply, slopes=(), loss=math.nan, delta=None) for reply in replies]
        task, reply = whole(tasks[0], _sum(pairs, tasks[0], noise, cohort=cohort))
        return [*tasks, task], [*struck, reply]

    inner = limited(algorithm, clip=noise.clip)
    return replace(inner, plan=plan, client=client, gather=gather)


def _sum(pairs: Sequence[tuple[Task, Reply]], task: Task, noise: Noise, *, cohort: int) -> list[float]:
    """Returns the coefficients of the walk of all: the noisy sum of the clients', over the expected number."""
    unit = task.rate / task.directions
    parts = [
        scaled([c / unit if unit else 0.0 for c in walk_of(one, reply.slopes).coefficients], length=noise.clip)
        for one, reply in pairs
    ]
    # The summands are in the question: the same round with another client missing must not get the same noise.
    told = repr((task.round, task.seed, [(one.client, part) for (one, _), part in zip(pairs, parts, strict=True)]))
    stream = Stream(noise.secret, hashlib.sha256(told.encode()).digest())
    sums = [math.fsum(part[at] for part in parts) for at in range(task.slopes)]
    return [
        unit * _rounded(total + noise.deviation * stream.normal(at), noise.deviation) / cohort
        for at, total in enumerate(sums)
    ]
