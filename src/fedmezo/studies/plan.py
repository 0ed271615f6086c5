"""What a run will cost, before it is started: from arithmetic, and a short probe on the real model and data."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from fedmezo.data.prompt import Example
from fedmezo.fl.algorithm import Point, Reply, Task
from fedmezo.fl.fedmezo import State
from fedmezo.runtime.meter import peak_rss_mb
from fedmezo.runtime.wire import News, encode_reply, encode_task
from fedmezo.studies.build import Built, build
from fedmezo.studies.config import Config
from fedmezo.zo.seedsum import DenseDelta

__all__ = ["plan"]

_PROBE_STEPS = 2
_TWO_POINT_STEPS_TO_SEE = 300


def plan(config: Config) -> dict[str, object]:
    """Returns forwards, tokens, bytes, memory_mb, seconds and advice for a run of `config`.

    Bytes are those of real messages of this run's shape. Seconds come from two timed steps of the first cohort and a
    timed part of one evaluation.
    """
    built = build(config)
    federation, algorithm = built.config.federation, built.config.algorithm
    tasks = list(built.algorithm.plan(State(), range(federation.clients)))
    walks = federation.rounds * len(tasks)
    points = 2 * federation.local_steps * algorithm.directions
    tokens = round(walks * points * federation.batch_size * _mean_length(built))
    return {
        "clients": federation.clients,
        "cohort": len(tasks),
        "rounds": federation.rounds,
        "dim": built.bench.params.dim,
        "rate": algorithm.rate,
        "mu": algorithm.mu,
        "forwards": walks * points,
        "tokens": tokens,
        "bytes": _bytes(built),
        "memory_mb": {**_memory(built), "peak_rss_now": round(peak_rss_mb())},
        "seconds": _seconds(built, tasks),
        "examples": {"train": sum(built.data.sizes.values()), "eval": len(built.data.evaluation["eval"])},
        "dropped": dict(built.data.dropped),
        "split": built.data.split.as_dict(),
        "advice": _advice(built),
    }


def _mean_length(built: Built) -> float:
    def length(example: Example) -> int:
        return sum(len(row.ids) for row in example.rows)

    return fmean(length(example) for part in built.data.parts for example in part)


def _bytes(built: Built) -> dict[str, float]:
    """Returns the wire bytes of the whole run, from the sizes of real messages and the cohorts it will draw."""
    federation = built.config.federation
    cohorts = [built.algorithm.plan(State(round=n), range(federation.clients)) for n in range(federation.rounds)]
    tasks = cohorts[0]
    task, slopes = tasks[0], (1.0,) * (tasks[0].steps * tasks[0].directions)
    dense = 4 * built.bench.params.dim
    news = News(tuple(tasks), (slopes,) * len(tasks), (1 / len(tasks),) * len(tasks))
    bare, told = (len(encode_task(replace(task, round=1), list(some))) for some in ((), (news,)))
    delta = DenseDelta(dict(built.bench.params)) if task.dense else None
    up = len(encode_reply(Reply(0, task.client, 1, 1.0, slopes, delta)))
    walks = federation.rounds * len(tasks)
    down = walks * bare + (walks * dense if task.dense else _missed(cohorts) * (told - bare))
    return {
        "up_per_client_round": up,
        "down_per_client_round": round(down / walks, 1),
        "up_total": up * walks,
        "down_total": down,
        "dense_up_per_client_round": dense,
    }


def _missed(cohorts: Sequence[Sequence[Task]]) -> int:
    """Returns how often a client has to be told of an earlier round, its own last one included."""
    seen: dict[int, int] = {}
    missed = 0
    for number, tasks in enumerate(cohorts):
        for task in tasks:
            missed += number - seen.get(task.client, 0)
            seen[task.client] = number
    return missed


def _memory(built: Built) -> dict[str, int]:
    weights = sum(p.numel() * p.element_size() for p in built.loaded.model.parameters())
    copies = 4 * built.bench.params.dim * (1 + built.bench.capacity)
    return {"weights": round(weights / 1e6), "trained_copies": round(copies / 1e6)}


def _seconds(built: Built, tasks: list[Task]) -> dict[str, float]:
    """Times two steps of the cohort (after one to warm up) and up to 32 evaluation examples."""
    tasks = tasks[: built.bench.capacity]
    with built.bench.open(len(tasks)) as copies:
        times = []
        for step in range(1 + _PROBE_STEPS):
            points = [
                Point(params, 1, sign * task.mu, task.client, 0, min(step, task.steps - 1))
                for task, params in zip(tasks, copies, strict=True)
                for sign in (1, -1)
            ]
            began = time.perf_counter()
            built.bench.losses(points)
            times.append(time.perf_counter() - began)
    federation = built.config.federation
    cohort = federation.cohort or federation.clients
    one = fmean(times[1:]) / len(tasks)
    train = one * cohort * federation.local_steps * built.config.algorithm.directions * federation.rounds
    some = built.data.evaluation["eval"][:32]
    began = time.perf_counter()
    built.bench.evaluate(some)
    judged = (time.perf_counter() - began) / len(some) * sum(map(len, built.data.evaluation.values()))
    evaluations = 1 + math.ceil(federation.rounds / built.config.eval.every)
    return {
        "per_client_step": round(one, 4),
        "train": round(train, 1),
        "evaluation": round(judged * evaluations, 1),
        "total": round(train + judged * evaluations, 1),
    }


def _advice(built: Built) -> list[str]:
    """Returns one sentence per thing worth changing; empty when nothing is."""
    algorithm, federation, dim = built.config.algorithm, built.config.federation, built.bench.params.dim
    rate, mu = float(algorithm.rate or 0), float(algorithm.mu or 0)
    safe = 0.3 / math.sqrt(dim)
    advice = list(built.notes)
    if rate > 4 * safe and algorithm.clip == "none":
        advice.append(
            f"rate {rate:g} is over four times 0.3/sqrt(d) = {safe:.2g} and nothing clips the slopes: expect a surge."
        )
    if rate < safe / 30:
        advice.append(f"rate {rate:g} is far below 0.3/sqrt(d) = {safe:.2g}: progress will hardly show.")
    if built.config.model.dtype != "float32" and mu < 5e-3:
        advice.append(f"mu {mu:g} with a {built.config.model.dtype} model measures mostly rounding; use about 1e-2.")
    if built.config.model.dtype == "float32" and not 1e-5 <= mu <= 1e-2:
        advice.append(f"mu {mu:g} is outside the usable window 1e-5 to 1e-2 of a float32 model.")
    steps = federation.rounds * federation.local_steps * (federation.cohort or federation.clients)
    if steps < _TWO_POINT_STEPS_TO_SEE:
        advice.append(
            f"{steps} client steps in all are few for forward-only training; some hundred are needed to see progress."
        )
    short = [client for client, size in built.data.sizes.items() if size < federation.batch_size]
    if short:
        advice.append(
            f"{len(short)} clients hold fewer examples than a batch; they will see them several times a step."
        )
    if built.data.dropped:
        advice.append(f"{sum(built.data.dropped.values())} records were dropped: {built.data.dropped}.")
    return advice
