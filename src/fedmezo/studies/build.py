"""From a configuration to objects: model, adapter, clients' data, bench, algorithm."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch

from fedmezo.data.batches import Batches
from fedmezo.data.prompt import Encoded, Example, encode
from fedmezo.data.split import SplitReport, holdout, holdout_clients, shuffled, split, split_report
from fedmezo.data.tasks import DataSource, Record, load_records
from fedmezo.data.templates import Tokenizer
from fedmezo.errors import ConfigError, DataError
from fedmezo.fl.aggregate import weighting
from fedmezo.fl.algorithm import Algorithm
from fedmezo.fl.fedmezo import Settings, State, fedmezo
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import Lanes, ModelBench
from fedmezo.models.fetch import RECIPES, Say, silent
from fedmezo.models.load import Loaded, load_model
from fedmezo.models.read import quiet
from fedmezo.studies.config import Config
from fedmezo.zo.estimate import Estimator

__all__ = ["Built", "FederatedData", "Tuned", "build", "build_model", "load_base", "read_data"]

CLIENT_EVAL_SHARE = 0.1


@dataclass(frozen=True)
class FederatedData:
    """The clients' data as token rows.

    Attributes:
      parts: training examples of each client.
      evaluation: split name -> examples; "eval" is common to all, "client/<i>" belongs to one.
      split: how unlike the clients are.
      dropped: why records were left out, with counts.
      records: the evaluation's records, by `Example.record`.
    """

    parts: tuple[tuple[Example, ...], ...]
    evaluation: Mapping[str, tuple[Example, ...]]
    split: SplitReport
    dropped: Mapping[str, int]
    records: tuple[Record, ...]

    @property
    def sizes(self) -> dict[int, int]:
        """Training examples of each client."""
        return {client: len(part) for client, part in enumerate(self.parts)}

    def digest(self) -> str:
        """Returns the sha256, in hex, of every client's training tokens in order: of all that batches are made of."""
        state = hashlib.sha256()
        for part in self.parts:
            for example in part:
                rows = [(row.ids, row.start) for row in example.rows]
                state.update(repr((rows, example.answer, example.options)).encode())
            state.update(b"next client")
        return state.hexdigest()


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
    algorithm: Algorithm[State]
    notes: tuple[str, ...] = ()


def read_data(config: Config, tokenizer: Tokenizer) -> FederatedData:
    """Returns the clients' data: records are encoded, the evaluation set is set apart, the rest is dealt.

    Raises:
      DataError: nothing usable, or too little for so many clients.
    """
    settings = config.data
    if settings.eval_path is not None and config.eval.per_client:
        raise ConfigError("eval.per_client judges by examples the clients hold back; leave data.eval_path out.")
    records, encoded = _read(config, settings.path, tokenizer)
    examples = encoded.examples
    if settings.eval_path is not None:
        judged, apart = _read(config, settings.eval_path, tokenizer)
        common, rest = apart.examples, tuple(range(len(examples)))
    else:
        rest, kept = holdout(len(examples), examples=_held_out(config, len(examples)), seed=settings.seed)
        common, judged = tuple(examples[i] for i in kept), records
    labels = [_label(config, records[examples[i].record]) for i in rest]
    dealt = split(
        config.split.kind, labels, clients=config.federation.clients, seed=settings.seed, alpha=config.split.alpha
    )
    report = split_report(dealt, labels)
    own = CLIENT_EVAL_SHARE if config.eval.per_client else 0
    train, local = holdout_clients(dealt, per_client=own, seed=settings.seed)
    kept_back = {"eval": common} | {
        f"client/{client}": tuple(examples[rest[i]] for i in part) for client, part in enumerate(local) if part
    }
    evaluation = {name: _some(found, config.eval.examples, name) for name, found in kept_back.items()}
    parts = tuple(tuple(examples[rest[i]] for i in part) for part in train)
    return FederatedData(parts, evaluation, report, dict(encoded.reasons), tuple(judged))


def _read(config: Config, path: str | None, tokenizer: Tokenizer) -> tuple[list[Record], Encoded]:
    records = load_records(_source(config, path))
    return records, _encode(config, records, tokenizer)


def _source(config: Config, path: str | None) -> DataSource:
    settings = config.data
    return DataSource(
        path=None if path is None else _expand(path),
        name=settings.name if path is None else None,
        columns=settings.columns,
        preset=settings.preset,
        split=settings.split,
        limit=settings.limit,
        choices=tuple(settings.choices),
        seed=settings.seed,
    )


def _expand(path: str) -> str:
    """Returns `path` with environment variables and ~ filled in."""
    try:
        return os.path.expanduser(Template(path).substitute(os.environ))
    except KeyError as missing:
        raise DataError(f"{path}: set the environment variable {missing.args[0]} to the folder of your data.") from None
    except ValueError:
        raise DataError(f"{path}: a $ must be followed by the name of an environment variable.") from None


def _encode(config: Config, records: Sequence[Record], tokenizer: Tokenizer) -> Encoded:
    settings = config.data
    # Else transformers warns of every text beyond the model's window; those are dropped and counted here.
    with quiet():
        encoded = encode(
            records, tokenizer, template=settings.template, max_tokens=settings.max_tokens, objective=settings.objective
        )
    if not encoded.examples:
        reasons = ", ".join(f"{many} with {reason}" for reason, many in encoded.reasons.items())
        raise DataError(
            f"None of the {len(records)} records can be used ({reasons}); look at data.max_tokens "
            f"(now {settings.max_tokens}), data.template and data.columns."
        )
    return encoded


def _held_out(config: Config, count: int) -> int:
    if count < 2:
        raise DataError("Only 1 record can be used; at least 2 are needed, one to train on and one to judge by.")
    wanted = config.data.eval_examples
    return min(wanted if wanted is not None else max(1, round(count * config.data.eval_fraction)), count - 1)


def _label(config: Config, record: Record) -> str:
    value = getattr(record, config.split.field, None)
    if value is None:
        raise ConfigError(f"split.field: expected a field of a record such as category, got '{config.split.field}'.")
    return str(value)


def _some(examples: Sequence[Example], limit: int, name: str) -> tuple[Example, ...]:
    if len(examples) <= limit:
        return tuple(examples)
    order = shuffled(len(examples), "evaluate", name)
    return tuple(examples[i] for i in sorted(int(k) for k in order[:limit]))


def load_base(config: Config, *, say: Say = silent) -> Loaded:
    """Returns the frozen base model of a configuration; sets the number of threads; `say` hears of slow stages."""
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    wanted = config.runtime.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    return load_model(
        config.model.name, revision=config.model.revision, dtype=config.model.dtype, device=device, say=say
    )


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
    bench = ModelBench(loaded, adapter, batches=batches, law=config.algorithm.law, seed=federation.seed, lanes=lanes)
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

    0.3 / sqrt(d) is a start: SmolLM2 bears three times as much, the tiny model, whose loss is steep, half of it. A
    16-bit forward pass needs mu about 1e-2: at 1e-3 the difference of two losses is mostly rounding.
    """
    algorithm = config.algorithm
    rate = algorithm.rate if algorithm.rate is not None else 0.3 / math.sqrt(dim)
    mu = algorithm.mu if algorithm.mu is not None else (1e-3 if config.model.dtype == "float32" else 1e-2)
    return config.model_copy(update={"algorithm": algorithm.model_copy(update={"rate": rate, "mu": mu})})


def build_algorithm(config: Config, sizes: Mapping[int, int]) -> Algorithm[State]:
    """Returns the algorithm of a resolved configuration."""
    algorithm, federation = config.algorithm, config.federation
    if algorithm.rate is None or algorithm.mu is None:
        raise ConfigError("algorithm.rate and algorithm.mu must be numbers here; resolve the configuration first.")
    forward: Estimator = "forward-half" if algorithm.paper_eq2_scale else "forward"
    settings = Settings(
        rate=algorithm.rate,
        mu=algorithm.mu,
        steps=federation.local_steps,
        directions=algorithm.directions,
        clip=algorithm.clip_multiple,
        decay=algorithm.decay,
        rounds=federation.rounds,
        law=algorithm.law,
        estimator="two-point" if algorithm.estimator == "two-point" else forward,
        dense=federation.transport == "dense",
    )
    cohort = federation.cohort if federation.cohort is not None else federation.clients
    return fedmezo(settings, seed=federation.seed, cohort=cohort, weights=weighting(federation.weighting, sizes))


def build(config: Config, *, loaded: Loaded | None = None) -> Built:
    """Returns everything a run of `config` needs; the slow part is loading the model, unless it is given."""
    base = loaded if loaded is not None else load_base(config)
    fitted, notes = _fitted(config, base.window)
    data = read_data(fitted, base.tokenizer)
    tuned = build_model(fitted, base, data=data)
    return Built(tuned.config, base, tuned.bench, data, build_algorithm(tuned.config, data.sizes), notes)
