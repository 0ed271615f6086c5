"""Who gets which data: records are read, encoded, held back for evaluation and dealt to the clients."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from string import Template

from fedmezo.data.choose import check_labels, draw_labels, few_per_label, label_of, most_per_label
from fedmezo.data.imbalance import SplitReport, split_report
from fedmezo.data.prompt import Encoded, Example, encode
from fedmezo.data.split import Parts, holdout, holdout_clients, shuffled, split
from fedmezo.data.tasks import DataSource, Record, load_records
from fedmezo.data.templates import Tokenizer
from fedmezo.errors import ConfigError, DataError
from fedmezo.models.read import quiet
from fedmezo.studies.config import Config

__all__ = ["SEEN", "FederatedData", "read_data", "read_own"]

CLIENT_EVAL_SHARE = 0.1
LONG_INPUT = "input longer than data.max_input"
FEW = "label with fewer than data.min_per_category usable records"
SEEN = "prompt also in an evaluation set"


@dataclass(frozen=True)
class FederatedData:
    """The clients' data as token rows.

    Attributes:
      parts: training examples of each client.
      evaluation: split name -> examples; "eval" is common to all, "client/<i>" belongs to one.
      split: how unlike the clients are.
      dropped: why records were left out, with counts; those that nobody asked for are not counted.
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


@dataclass(frozen=True, slots=True)
class _Read:
    """Records, those of their examples that the configuration asks for, and why others cannot be used."""

    records: Sequence[Record]
    examples: tuple[Example, ...]
    dropped: Mapping[str, int]

    def labels(self, config: Config) -> list[str]:
        """The examples' labels."""
        return [label_of(self.records[example.record], config.split.field) for example in self.examples]


def read_data(config: Config, tokenizer: Tokenizer) -> FederatedData:
    """Returns the clients' data: records are encoded, the evaluation set is set apart, the rest is dealt.

    No client trains on a prompt that an evaluation set holds: examples with one are dropped and counted.

    Raises:
      ConfigError: keys that contradict each other.
      DataError: nothing usable, a label that does not exist, or too little for so many clients.
    """
    settings = config.data
    if settings.eval_path is not None and config.eval.per_client:
        raise ConfigError("eval.per_client judges by examples the clients hold back; leave data.eval_path out.")
    read = _read(config, tokenizer)
    common, free, judged = _set_apart(config, read, tokenizer)
    rest = _without(free.examples, _prompts([common]))
    if not rest:
        raise DataError("Every training prompt is also in the evaluation set; give other data for one of them.")
    dealt, report = _deal(config, _Read(free.records, rest, {}).labels(config))
    own = CLIENT_EVAL_SHARE if config.eval.per_client else 0
    kept, local = holdout_clients(dealt, per_client=own, seed=settings.seed)
    apart = {f"client/{client}": tuple(rest[i] for i in part) for client, part in enumerate(local) if part}
    prompts = _prompts(apart.values())
    parts = tuple(_without((rest[i] for i in part), prompts) for part in kept)
    _check_parts(parts)
    seen = len(free.examples) - len(rest) + sum(map(len, kept)) - sum(map(len, parts))
    evaluation = {name: _some(found, config.eval.examples, name) for name, found in [("eval", common), *apart.items()]}
    dropped = {reason: many for reason, many in {**read.dropped, SEEN: seen}.items() if many}
    return FederatedData(parts, evaluation, report, dropped, tuple(judged))


def read_own(config: Config, tokenizer: Tokenizer) -> tuple[Example, ...]:
    """Returns all examples of data.path or data.name, for a client that shares them with nobody.

    Raises:
      ConfigError, DataError: as `read_data`.
    """
    return _read(config, tokenizer).examples


def _read(config: Config, tokenizer: Tokenizer) -> _Read:
    """Returns what data.path or data.name holds, as far as the configuration asks for it."""
    settings = config.data
    found = _of_categories(config, load_records(_source(config, settings.path)), tokenizer)
    records = _short(config, found)
    encoded = _encode(config, records, tokenizer)
    read = _Read(records, encoded.examples, {})
    labels = read.labels(config)
    free = [index for index, label in enumerate(labels) if label not in settings.eval_categories]
    few = set(few_per_label(labels, free, fewest=settings.min_per_category))
    kept = [index for index in free if index not in few]
    if not kept:
        raise DataError(
            f"No label has the {settings.min_per_category} usable records that data.min_per_category asks for and is "
            "free to train on; look at it and at data.eval_categories."
        )
    if settings.per_category is not None:
        kept = list(most_per_label(labels, kept, most=settings.per_category, seed=settings.seed))
    left_out = set(free).difference(kept)
    examples = tuple(example for index, example in enumerate(encoded.examples) if index not in left_out)
    return _Read(records, examples, {LONG_INPUT: len(found) - len(records), **encoded.reasons, FEW: len(few)})


def _short(config: Config, records: Sequence[Record]) -> list[Record]:
    """Returns the records whose input is not longer than data.max_input; there may be none."""
    most = config.data.max_input
    return [record for record in records if most is None or len(record.input) <= most]


def _of_categories(config: Config, records: list[Record], tokenizer: Tokenizer) -> list[Record]:
    """Returns the records of data.categories, drawn if it is a number, and those of data.eval_categories."""
    settings, field = config.data, config.split.field
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(label_of(record, field), []).append(record)
    check_labels(settings.eval_categories, groups, key="data.eval_categories")
    wanted = settings.categories
    if wanted is None:
        return records
    if isinstance(wanted, tuple):
        check_labels(wanted, groups, key="data.categories")
        chosen = frozenset(wanted)
    else:

        def usable(label: str) -> bool:
            examples = _encoded(config, _short(config, groups[label]), tokenizer).examples
            return len(examples) >= settings.min_per_category

        free = groups.keys() - set(settings.eval_categories)
        chosen = draw_labels(free, number=wanted, seed=settings.seed, usable=usable)
    return [record for record in records if label_of(record, field) in chosen.union(settings.eval_categories)]


def _set_apart(
    config: Config, read: _Read, tokenizer: Tokenizer
) -> tuple[tuple[Example, ...], _Read, Sequence[Record]]:
    """Returns the common evaluation examples, what is free to train on, and the records the former are of."""
    settings, everything = config.data, read.examples
    if settings.eval_path is not None:
        records = _short(config, load_records(_source(config, settings.eval_path)))
        return _encode(config, records, tokenizer).examples, read, records
    if settings.eval_categories:
        labels = read.labels(config)
        held = [index for index, label in enumerate(labels) if label in settings.eval_categories]
        rest = [index for index, label in enumerate(labels) if label not in settings.eval_categories]
        if not held:
            raise DataError("No record of data.eval_categories can be used; look at data.max_tokens.")
        wanted = len(held) if settings.eval_examples is None else min(settings.eval_examples, len(held))
        kept = sorted(held[k] for k in shuffled(len(held), "holdout", settings.seed)[:wanted].tolist())
    else:
        size = _held_out(config, len(everything))
        rest, kept = map(list, holdout(len(everything), examples=size, seed=settings.seed))
    free = _Read(read.records, tuple(everything[i] for i in rest), read.dropped)
    return tuple(everything[i] for i in kept), free, read.records


def _prompts(judged: Iterable[Sequence[Example]]) -> frozenset[tuple[int, ...]]:
    return frozenset(example.prompt for some in judged for example in some)


def _without(examples: Iterable[Example], prompts: Set[tuple[int, ...]]) -> tuple[Example, ...]:
    """Returns the examples with none of these prompts, in their order."""
    return tuple(example for example in examples if example.prompt not in prompts)


def _deal(config: Config, labels: Sequence[str]) -> tuple[Parts, SplitReport]:
    settings = config.split
    dealt = split(
        settings.kind,
        labels,
        clients=config.federation.clients,
        seed=config.data.seed,
        alpha=settings.alpha,
        balanced=settings.balanced,
        min_examples=settings.min_examples,
    )
    return dealt, split_report(dealt, labels)


def _check_parts(parts: Sequence[Sequence[Example]]) -> None:
    for client, part in enumerate(parts):
        if not part:
            raise DataError(
                f"Client {client} has no training prompt that is not also in an evaluation set; use fewer clients, "
                "more data, or leave eval.per_client out."
            )


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
        none_input="none-input" in settings.compat,
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
    if not records:
        raise DataError(f"No input has at most {settings.max_input} characters; raise data.max_input.")
    encoded = _encoded(config, records, tokenizer)
    if not encoded.examples:
        reasons = ", ".join(f"{many} with {reason}" for reason, many in encoded.reasons.items())
        raise DataError(
            f"None of the {len(records)} records can be used ({reasons}); look at data.max_tokens "
            f"(now {settings.max_tokens}), data.template and data.columns."
        )
    return encoded


def _encoded(config: Config, records: Sequence[Record], tokenizer: Tokenizer) -> Encoded:
    settings = config.data
    # Else transformers warns of every text beyond the model's window; those are dropped and counted here.
    with quiet():
        return encode(
            records, tokenizer, template=settings.template, max_tokens=settings.max_tokens, objective=settings.objective
        )


def _held_out(config: Config, count: int) -> int:
    if count < 2:
        raise DataError("Only 1 record can be used; at least 2 are needed, one to train on and one to judge by.")
    wanted = config.data.eval_examples
    return min(wanted if wanted is not None else max(1, round(count * config.data.eval_fraction)), count - 1)


def _some(examples: Sequence[Example], limit: int, name: str) -> tuple[Example, ...]:
    if len(examples) <= limit:
        return tuple(examples)
    order = shuffled(len(examples), "evaluate", name)
    return tuple(examples[i] for i in sorted(int(k) for k in order[:limit]))
