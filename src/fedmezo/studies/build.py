"""From a configuration to objects: model, adapter, clients' data, bench, algorithm."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedmezo.data.batches import Batches
from fedmezo.data.prompt import Example
from fedmezo.data.tasks import PYTHON
from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Algorithm
from fedmezo.models.bench import Lanes, ModelBench
from fedmezo.models.fetch import RECIPES, Say, silent
from fedmezo.models.load import Loaded, load_model
from fedmezo.runtime.pull import Downlink
from fedmezo.runtime.secure import InTheClear
from fedmezo.runtime.walkers import Client, Here, MeteredBench, Walkers, checksum
from fedmezo.runtime.workers import Workers
from fedmezo.studies.config import Config, changed, parse_config
from fedmezo.studies.deal import FederatedData, read_data
from fedmezo.studies.descent import build_algorithm, resolve
from fedmezo.studies.origin import origin_of
from fedmezo.studies.privacy import private_numbers
from fedmezo.studies.secret import key_for, new_secret
from fedmezo.studies.window_table import chosen_mu, lost_in_rounding

__all__ = [
    "Built", "Tuned", "build", "build_downlink", "build_model", "device_of", "load_base", "threads_of", "walkers_of",
]  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """A model with its trained parameters, without any data.

    Attributes:
      config: the resolved configuration (rate, mu and data.max_tokens are the numbers in force).
      loaded: the frozen base model.
      bench: the model with its trained parameters, untrained as yet.
      origin: what is to be said of where training starts, in sentences.
    """

    config: Config
    loaded: Loaded
    bench: ModelBench
    origin: tuple[str, ...] = field(default=(), kw_only=True)

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
      secret: what names the noise of a private run.
      mark: checksum of the untrained parameters.
    """

    data: FederatedData
    algorithm: Algorithm[Any]
    notes: tuple[str, ...] = ()
    secret: bytes = field(default=b"", repr=False)
    mark: tuple[int, ...] = ()

    def method(self, sizes: Mapping[int, int]) -> Algorithm[Any]:
        """Returns the algorithm for clients with so many training examples each."""
        key = key_for(self.secret, "run", self.data.digest())
        return build_algorithm(self.config, sizes, params=self.bench.params, secret=key)


def device_of(wanted: str) -> str:
    """Returns the torch device that runtime.device means on this machine."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def load_base(config: Config, *, say: Say = silent) -> Loaded:
    """Returns the frozen base model of a configuration; sets the number of threads; `say` hears of slow stages."""
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    device = device_of(config.runtime.device)
    base = config.model
    quantize = None if base.quantize == "none" else base.quantize
    return load_model(base.name, revision=base.revision, dtype=base.dtype, device=device, quantize=quantize, say=say)


def build_model(config: Config, loaded: Loaded, *, parts: Mapping[int, Sequence[Example]] | None = None) -> Tuned:
    """Returns the model with untrained parameters, the same on every machine for the same configuration.

    Args:
      config: what to build.
      loaded: its base model.
      parts: client -> what it trains on; without it the model can only be rebuilt, judged and written.
    """
    federation = config.federation
    batches = (
        None
        if parts is None
        else Batches(parts, batch_size=federation.batch_size, local_steps=federation.local_steps, seed=federation.seed)
    )
    config, adapter, start, origin = origin_of(config, loaded)
    lanes: Lanes = config.runtime.lanes if config.runtime.lanes is not None else "auto"
    bench = ModelBench(
        loaded, adapter, params=start, batches=batches, law=config.algorithm.law, seed=federation.seed, lanes=lanes,
        checkpointing=config.algorithm.gradient_checkpointing,
    )  # fmt: skip
    return Tuned(resolve(config, dim=bench.params.dim), loaded, bench, origin=origin)


def _fitted(config: Config, window: int) -> tuple[Config, tuple[str, ...]]:
    """Returns the configuration with data.max_tokens inside the model's window, and a sentence if that changed it."""
    wanted = config.data.max_tokens
    if wanted <= window:
        return config, ()
    fitted = config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": window})})
    return fitted, (f"data.max_tokens is {window} instead of {wanted}: this model takes no longer input.",)


def build_downlink(config: Config, *, dim: int) -> Downlink:
    """Returns how clients of a run get the model."""
    federation = config.federation
    pull = "pairs" if config.rounds_weights and federation.pull == "auto" else federation.pull
    return Downlink(dim, pull, federation.sums_coding, federation.bandwidth)


def build(
    config: Config,
    *,
    loaded: Loaded | None = None,
    data: FederatedData | None = None,
    measure: bool = True,
    secret: bytes | None = None,
) -> Built:
    """Returns everything a run of `config` needs; the slow part is loading the model, unless it is given.

    Where algorithm.mu is left to the program, 48 forward passes at most tell whether the customary one is usable.

    Args:
      config: what to build.
      loaded: its base model.
      data: the clients' data, in place of what the configuration names.
      measure: whether to take these passes; False for who takes no step. A private run takes none.
      secret: what names the noise of a private run; None for a new one.
    """
    base = loaded if loaded is not None else load_base(config)
    fitted, notes = _fitted(config, base.window)
    if data is None:
        data = read_data(fitted, base.tokenizer)
    else:
        fitted = changed(fitted, {"data": {"name": f"{PYTHON}data", "path": None}})
    fitted = private_numbers(fitted, data.sizes)
    tuned = build_model(fitted, base, parts=dict(enumerate(data.parts)))
    notes += tuned.origin + lost_in_rounding(config)
    if measure and config.privacy.mode == "none" and config.algorithm.mu is None and config.algorithm.name != "fedavg":
        mu, told = chosen_mu(tuned.config, tuned.bench)
        algorithm = tuned.config.algorithm.model_copy(update={"mu": mu})
        tuned, notes = replace(tuned, config=tuned.config.model_copy(update={"algorithm": algorithm})), notes + told
    known = new_secret(config.privacy) if secret is None else secret
    key = key_for(known, "run", data.digest())
    method = build_algorithm(tuned.config, data.sizes, params=tuned.bench.params, secret=key)
    return Built(tuned.config, base, tuned.bench, data, method, notes, known, checksum(tuned.bench.params))


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
    if config.network.secure:
        plain = config.model_copy(update={"network": config.network.model_copy(update={"secure": False})})
        with walkers_of(replace(built, config=plain)) as walkers:
            yield InTheClear(walkers or Here(built.algorithm.client, built.bench))
        return
    if config.runtime.workers == 1:
        yield None
        return
    runtime = config.runtime.model_copy(update={"threads": threads_of(config)})
    told = config.model_copy(update={"runtime": runtime}).model_dump_json()
    recipe = partial(_own_bench, told, built.loaded.fingerprint, built.data.digest(), built.secret.hex())
    with Workers(recipe, runtime.workers) as workers:
        yield workers


def _own_bench(told: str, fingerprint: str, digest: str, secret: str, place: int) -> tuple[Client, MeteredBench]:
    """Returns the client and the bench of the worker at `place`, made from the configuration that the server runs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    built = build(parse_config(json.loads(told)), secret=bytes.fromhex(secret))
    if (built.loaded.fingerprint, built.data.digest()) != (fingerprint, digest):
        raise RunError("The model or the data on the disk has changed since this run was started; start it again.")
    return built.algorithm.client, built.bench
