"""What a run will cost, before it is started: from arithmetic, and a short probe on the real model and data."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from fedmezo.data.prompt import Example
from fedmezo.fl.algorithm import Point, Reply, Task
from fedmezo.runtime.meter import peak_rss_mb
from fedmezo.runtime.records import Entry, Round
from fedmezo.runtime.wire import encode_reply, encode_task
from fedmezo.studies.build import Built, build, build_downlink, threads_of
from fedmezo.studies.config import Config
from fedmezo.studies.descent import build_lookout, cost_of, step_passes
from fedmezo.studies.forecast import advise, check_fit, forecast, setting_of
from fedmezo.studies.measured import Measured
from fedmezo.studies.privacy import forecast as forecast_privacy
from fedmezo.studies.window import window_of
from fedmezo.studies.window_table import window_words
from fedmezo.zo.params import Params
from fedmezo.zo.seedsum import DenseDelta

__all__ = ["plan"]

_PROBE_STEPS = 2
_TWO_POINT_STEPS_TO_SEE = 300


def plan(config: Config, *, measured: Measured | None = None) -> dict[str, object]:
    """Returns forwards, looks, tokens, bytes, memory_mb, seconds and advice for a run of `config`.

    Bytes are those of real messages of this run's shape. Seconds come from two timed steps of the first cohort and a
    timed part of one evaluation. With measured constants there is "theory" too, and advice about rate and steps.

    Raises:
      ConfigError: the constants are of another run.
    """
    built = build(config)
    theory = {} if measured is None else _theory(built, measured)
    lookout = build_lookout(built.config, built.bench)
    advice = [*cost_of(lookout, built.config), *_about_mu(built, config), *_advice(built), *theory.pop("advice", [])]
    federation, algorithm = built.config.federation, built.config.algorithm
    kept = built.config.privacy.mode != "none"
    private = {"privacy": forecast_privacy(built.config, built.data.sizes)} if kept else {}
    tasks = list(built.algorithm.plan(built.algorithm.init(), range(federation.clients)))
    walks = federation.rounds * len(tasks)
    points = federation.local_steps * step_passes(built.config)
    tokens = round(walks * points * federation.batch_size * _mean_length(built))
    return {
        "clients": federation.clients,
        "cohort": len(tasks),
        "rounds": federation.rounds,
        "dim": built.bench.params.dim,
        "rate": algorithm.rate,
        "mu": algorithm.mu,
        "forwards": walks * points,
        "looks": 0 if lookout is None else lookout.pace.passes(len(lookout.places)),
        "tokens": tokens,
        "bytes": _bytes(built),
        "memory_mb": {**_memory(built), "peak_rss_now": round(peak_rss_mb())},
        "seconds": _seconds(built, tasks),
        "examples": {"train": sum(built.data.sizes.values()), "eval": len(built.data.evaluation["eval"])},
        "dropped": dict(built.data.dropped),
        "split": built.data.split.as_dict(),
        "advice": advice,
        **private,
        **theory,
    }


def _theory(built: Built, measured: Measured) -> dict[str, Any]:
    check_fit(measured, built.config, dim=built.bench.params.dim)
    if built.config.algorithm.name == "fedavg":
        return {"advice": ["The theory is of forward passes; it says nothing about fedavg."]}
    setting = setting_of(built.config)
    return {"theory": forecast(measured, setting), "advice": advise(measured, setting)}


def _mean_length(built: Built) -> float:
    def length(example: Example) -> int:
        return sum(len(row.ids) for row in example.rows)

    return fmean(length(example) for part in built.data.parts for example in part)


def _bytes(built: Built) -> dict[str, float]:
    """Returns the wire bytes of the whole run: its rounds are planned and answered with slopes of 1, nothing moves."""
    dim, state = built.bench.params.dim, built.algorithm.init()
    downlink, up, down, walks = build_downlink(built.config, dim=dim), 0, 0, 0
    for number in range(built.config.federation.rounds):
        tasks = built.algorithm.plan(state, range(built.config.federation.clients))
        replies = [_reply(task, built) for task in tasks]
        offers = downlink.offers(tasks, built.algorithm.sums(state))
        for task, reply, offer in zip(tasks, replies, offers, strict=True):
            down += len(encode_task(task)) + offer.bytes
            up += len(encode_reply(replace(reply, delta=None))) + (0 if reply.delta is None else _written(reply.delta))
        walked = len(tasks)
        tasks, replies = built.algorithm.gather(tasks, replies)
        state, update = built.algorithm.aggregate(state, tasks, replies)
        entries = zip(tasks, replies, update.weights, strict=True)
        done = tuple(Entry(task, reply, weight, 0, 0) for task, reply, weight in entries)
        downlink.remember(Round(number, done, loss=0, rate=0, slowed=1, seconds=0, forwards=0, tokens=0))
        walks += walked
    return {
        "up_per_client_round": round(up / walks, 1),
        "down_per_client_round": round(down / walks, 1),
        "up_total": up,
        "down_total": down,
        "dense_up_per_client_round": 4 * dim,
    }


def _reply(task: Task, built: Built) -> Reply:
    slopes = (1.0,) * task.slopes
    delta = DenseDelta(dict(built.bench.params)) if task.dense or task.method != "walk" else None
    # Unequal losses, so that rates that go by them differ, as they will.
    return Reply(task.round, task.client, 1, 1 + task.client / 1024, slopes, delta, task.coding)


def _written(delta: DenseDelta) -> int:
    """Returns the wire bytes of a delta, without writing it out."""
    heads = sum(3 + len(name.encode()) + 8 * tensor.dim() for name, tensor in delta.tensors.items())
    return 4 + heads + 4 * sum(tensor.numel() for tensor in delta.tensors.values())


def _memory(built: Built) -> dict[str, int]:
    """Returns megabytes of all processes together: workers have a model each, and copies, and the server a model."""
    weights = sum(p.numel() * p.element_size() for p in built.loaded.model.parameters())
    # Training all parameters walks on the model's own weights; their bits lie in a temporary file meanwhile.
    copies = 4 * built.bench.params.dim * (1 + built.bench.capacity) if built.bench.adapter.kind == "lora" else 0
    workers = built.config.runtime.workers
    processes = 1 if workers == 1 else 1 + workers
    return {
        "processes": processes,
        "weights": processes * round(weights / 1e6),
        "trained_copies": workers * round(copies / 1e6),
    }


def _seconds(built: Built, tasks: list[Task]) -> dict[str, float]:
    """Times two steps of one worker's share (after one to warm up) and up to 32 evaluation examples."""
    federation, workers = built.config.federation, built.config.runtime.workers
    cohort = federation.cohort or federation.clients
    share = math.ceil(cohort / workers)
    tasks = tasks[: min(share, built.bench.capacity)]
    with _threads(threads_of(built.config)), built.bench.open(len(tasks)) as copies:
        times = []
        for step in range(1 + _PROBE_STEPS):
            began = time.perf_counter()
            _probe(built, tasks, copies, step=step)
            times.append(time.perf_counter() - began)
    one = fmean(times[1:]) / len(tasks)
    pairs = 1 if tasks[0].method != "walk" else step_passes(built.config) / 2
    train = one * share * federation.local_steps * pairs * federation.rounds
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


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _probe(built: Built, tasks: Sequence[Task], copies: Sequence[Params], *, step: int) -> None:
    """Does what one step costs: a pair of losses, or a gradient, per task."""
    points = [
        Point(params, 1, sign * task.mu, task.client, 0, min(step, task.steps - 1))
        for task, params in zip(tasks, copies, strict=True)
        for sign in ((1, -1) if task.method == "walk" else (0,))
    ]
    if tasks[0].method == "walk":
        built.bench.losses(points)
    else:
        for point in points:
            built.bench.gradient(point)


def _advice(built: Built) -> list[str]:
    """Returns one sentence per thing worth changing; empty when nothing is."""
    algorithm, federation, dim = built.config.algorithm, built.config.federation, built.bench.params.dim
    rate = float(algorithm.rate or 0)
    safe = 0.3 / math.sqrt(dim)
    advice = list(built.notes)
    if algorithm.name == "fedavg":
        return advice + _about_data(built)
    if rate > 4 * safe and algorithm.clip == "none":
        advice.append(
            f"rate {rate:g} is over four times 0.3/sqrt(d) = {safe:.2g} and nothing clips the slopes: expect a surge."
        )
    if rate < safe / 30:
        advice.append(f"rate {rate:g} is far below 0.3/sqrt(d) = {safe:.2g}: progress will hardly show.")
    steps = federation.rounds * federation.local_steps * (federation.cohort or federation.clients)
    if steps < _TWO_POINT_STEPS_TO_SEE:
        advice.append(
            f"{steps} client steps in all are few for forward-only training; some hundred are needed to see progress."
        )
    return advice + _about_data(built)


def _about_mu(built: Built, config: Config) -> list[str]:
    """Returns what was measured of a mu the user chose, where it is not usable; "auto" has told of itself."""
    mu = config.algorithm.mu
    if mu is None or config.algorithm.name == "fedavg":
        return []
    window = window_of(built.config, built.bench)
    return [] if window.holds(mu) else [window_words(window, dtype=config.model.dtype, asked=mu)]


def _about_data(built: Built) -> list[str]:
    """Returns what is worth knowing about the clients' data."""
    advice = []
    federation = built.config.federation
    short = [client for client, size in built.data.sizes.items() if size < federation.batch_size]
    if short:
        advice.append(
            f"{len(short)} clients hold fewer examples than a batch; they will see them several times a step."
        )
    if built.data.dropped:
        advice.append(f"{sum(built.data.dropped.values())} records were dropped: {built.data.dropped}.")
    return advice
