"""From a configuration to objects: model, adapter, clients' data, bench, algorithm."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedmezo.data.batches import Batches
from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.aggregate import weighting
from fedmezo.fl.algorithm import Algorithm
from fedmezo.fl.fedavg import Settings as GradientSettings
from fedmezo.fl.fedavg import fedavg
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import Lanes, ModelBench
from fedmezo.models.fetch import RECIPES, Say, silent
from fedmezo.models.load import Loaded, load_model
from fedmezo.runtime.pull import Downlink
from fedmezo.runtime.walkers import Client, MeteredBench, Walkers
from fedmezo.runtime.workers import Workers
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.deal import FederatedData, read_data
from fedmezo.zo.estimate import Estimator

__all__ = ["Built", "Tuned", "build", "build_downlink", "build_model", "load_base", "threads_of", "walkers_of"]

# Starts, not recommendations: tuned sgd took 0.1 to 0.3 on SmolLM2 (docs/results); adamw has not been tuned here.
FEDAVG_RATES = {"sgd": 0.05, "adamw": 5e-4}


@dataclass(frozen=True)
class Tuned:
    """A model with its trained parameters, without any data.

    Attributes:
      config: the resolved configuration (rate, mu and data.max_tokens are the numbers in force).
      loaded: the frozen base model.
      bench: the model with its trained parameters, untrained as yet.
    """

    config: Config
    loaded: Loaded
    bench: ModelBench

    @property
    def base_name(self) -> str:
        """What PEFT shall load as the base model: a folder as its full path, a fetched model as its hub id."""
        name = self.config.model.name
        path = Path(name).expanduser()
        if path.exists():
            return str(path.resolve())
        return RECIPES[name].hub if name in RECIPES else name


@dataclass(frozen=True)
class Built(Tuned):
    """Everything a run needs.

    Attributes:
      data: the clients' data.
      algorithm: the algorithm.
      notes: what was changed of the given configuration, in sentences.
    """

    data: FederatedData
    algorithm: Algorithm[Any]
    notes: tuple[str, ...] = ()


def load_base(config: Config, *, say: Say = silent) -> Loaded:
    """Returns the frozen base model of a configuration; sets the number of threads; `say` hears of slow stages."""
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    wanted = config.runtime.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    base = config.model
    quantize = None if base.quantize == "none" else base.quantize
    return load_model(base.name, revision=base.revision, dtype=base.dtype, device=device, quantize=quantize, say=say)


def build_model(config: Config, loaded: Loaded, *, data: FederatedData | None = None) -> Tuned:
    """Returns the model with untrained parameters, the same on every machine for the same configuration.

    Args:
      config: what to build.
      loaded: its base model.
      data: what to train on; without it the model can only be rebuilt, judged and written.
    """
    federation, settings = config.federation, config.adapter
    batches = (
        None
        if data is None
        else Batches(
            data.parts, batch_size=federation.batch_size, local_steps=federation.local_steps, seed=federation.seed
        )
    )
    adapter = make_adapter(
        loaded.model, kind=settings.kind, rank=settings.rank, alpha=settings.alpha, targets=settings.targets
    )
    lanes: Lanes = config.runtime.lanes if config.runtime.lanes is not None else "auto"
    bench = ModelBench(
        loaded, adapter, batches=batches, law=config.algorithm.law, seed=federation.seed, lanes=lanes,
        checkpointing=config.algorithm.gradient_checkpointing,
    )  # fmt: skip
    return Tuned(resolve(config, dim=bench.params.dim), loaded, bench)


def _fitted(config: Config, window: int) -> tuple[Config, tuple[str, ...]]:
    """Returns the configuration with data.max_tokens inside the model's window, and a sentence if that changed it."""
    wanted = config.data.max_tokens
    if wanted <= window:
        return config, ()
    fitted = config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": window})})
    return fitted, (f"data.max_tokens is {window} instead of {wanted}: this model takes no longer input.",)


def resolve(config: Config, *, dim: int) -> Config:
    """Returns the configuration with rate and mu as numbers.

    0.3 / sqrt(d) is a start for forward passes: SmolLM2 bears three times as much, the tiny model, whose loss is steep,
    half of it. A 16-bit forward pass needs mu about 1e-2: at 1e-3 the difference of two losses is mostly rounding.
    """
    algorithm = config.algorithm
    start = 0.3 / math.sqrt(dim)
    if algorithm.name == "fedavg":
        start = FEDAVG_RATES[algorithm.optimizer]
    rate = algorithm.rate if algorithm.rate is not None else start
    mu = algorithm.mu if algorithm.mu is not None else (1e-3 if config.model.dtype == "float32" else 1e-2)
    return config.model_copy(update={"algorithm": algorithm.model_copy(update={"rate": rate, "mu": mu})})


def build_algorithm(config: Config, sizes: Mapping[int, int]) -> Algorithm[Any]:
    """Returns the algorithm of a resolved configuration."""
    algorithm, federation = config.algorithm, config.federation
    if algorithm.rate is None or algorithm.mu is None:
        raise ConfigError("algorithm.rate and algorithm.mu must be numbers here; resolve the configuration first.")
    taking_part: dict[str, Any] = {
        "seed": federation.seed,
        "cohort": federation.cohort if federation.cohort is not None else federation.clients,
        "weights": weighting(federation.weighting, sizes),
    }
    if algorithm.name == "fedavg":
        return fedavg(_gradient_settings(config), **taking_part)
    settings = _walk_settings(config)
    if algorithm.name == "fedmezo":
        return fedmezo(settings, **taking_part)
    pool = Pool(
        algorithm.pool,
        pro=algorithm.name == "fedkseed-pro",
        temperature=algorithm.temperature,
        importance=algorithm.importance,
        score_clip=algorithm.score_clip,
        score_prior=algorithm.score_prior,
    )
    return fedkseed(settings, pool, **taking_part)


def _walk_settings(config: Config) -> Settings:
    algorithm, federation = config.algorithm, config.federation
    forward: Estimator = "forward-half" if algorithm.paper_eq2_scale else "forward"
    return Settings(
        rate=float(algorithm.rate or 0),
        mu=float(algorithm.mu or 0),
        steps=federation.local_steps,
        directions=algorithm.directions,
        clip=algorithm.clip_multiple,
        decay=algorithm.decay,
        rounds=federation.rounds,
        law=algorithm.law,
        estimator="two-point" if algorithm.estimator == "two-point" else forward,
        dense=federation.transport == "dense",
        coding=algorithm.coding,
        normalise=algorithm.normalise,
        momentum=algorithm.momentum,
    )


def _gradient_settings(config: Config) -> GradientSettings:
    algorithm, federation = config.algorithm, config.federation
    return GradientSettings(
        rate=float(algorithm.rate or 0),
        steps=federation.local_steps,
        optimizer=algorithm.optimizer,
        momentum=algorithm.momentum,
        weight_decay=algorithm.weight_decay,
        decay=algorithm.decay,
        rounds=federation.rounds,
    )


def build_downlink(config: Config, *, dim: int) -> Downlink:
    """Returns how clients of a run get the model."""
    federation = config.federation
    pull = "pairs" if config.rounds_weights and federation.pull == "auto" else federation.pull
    return Downlink(dim, pull, federation.sums_coding, federation.bandwidth)


def build(config: Config, *, loaded: Loaded | None = None) -> Built:
    """Returns everything a run of `config` needs; the slow part is loading the model, unless it is given."""
    base = loaded if loaded is not None else load_base(config)
    fitted, notes = _fitted(config, base.window)
    data = read_data(fitted, base.tokenizer)
    tuned = build_model(fitted, base, data=data)
    return Built(tuned.config, base, tuned.bench, data, build_algorithm(tuned.config, data.sizes), notes)


def threads_of(config: Config) -> int | None:
    """Returns the CPU threads of a process that walks; None leaves the choice to torch."""
    runtime = config.runtime
    if runtime.threads is not None or runtime.workers == 1:
        return runtime.threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // runtime.workers)


@contextmanager
def walkers_of(built: Built) -> Iterator[Walkers | None]:
    """Lends the processes that walk for a run, while they begin to load their models; None for this process alone."""
    config = built.config
    if config.runtime.workers == 1:
        yield None
        return
    runtime = config.runtime.model_copy(update={"threads": threads_of(config)})
    told = config.model_copy(update={"runtime": runtime}).model_dump_json()
    with Workers(partial(_own_bench, told, built.loaded.fingerprint, built.data.digest()), runtime.workers) as workers:
        yield workers


def _own_bench(told: str, fingerprint: str, digest: str, place: int) -> tuple[Client, MeteredBench]:
    """Returns the client and the bench of the worker at `place`, made from the configuration that the server runs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    built = build(parse_config(json.loads(told)))
    if (built.loaded.fingerprint, built.data.digest()) != (fingerprint, digest):
        raise RunError("The model or the data on the disk has changed since this run was started; start it again.")
    return built.algorithm.client, built.bench
