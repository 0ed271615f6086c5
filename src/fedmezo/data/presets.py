"""Presets: how the columns of well-known data sets become records, by name or told from the columns.

Source: Table 3 of arXiv:2402.05926 for Alpaca, Dolly, GSM8K and CodeAlpaca.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedmezo.data.readers import Row
from fedmezo.data.records import Record
from fedmezo.errors import DataError

__all__ = ["PRESETS", "Preset", "detect", "find_preset", "nearest"]

Columns = Mapping[str, tuple[str, ...]]

SENTIMENTS = ("terrible", "great")
LANGUAGE_NAME_LIMIT = 40


def _as_is(record: Record) -> Record | None:
    return record


def _one_row(row: Row, _stem: str) -> Iterable[Row]:
    return (row,)


@dataclass(frozen=True, slots=True)
class Preset:
    """How one data set's rows become records.

    Attributes:
      columns: our field to the columns it may stand in; the first one with a value is taken.
      hub: the hub id, with ":config" when it needs one; empty when no hub copy has these columns.
      signature: columns that, all present, tell the preset; empty for never.
      exact: the signature must be all there is.
      unfold: a row and its file's stem to the rows it stands for.
      edit: a record to the one meant, or None to leave it out.
    """

    columns: Columns
    hub: str = ""
    signature: frozenset[str] = frozenset()
    exact: bool = False
    unfold: Callable[[Row, str], Iterable[Row]] = _one_row
    edit: Callable[[Record], Record | None] = _as_is


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " did you mean 'x'?" for the name closest to `name`, or the list of all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(names)}."


def find_preset(name: str) -> Preset:
    """Returns the preset called `name`; case and the difference between "-", " " and "_" do not matter.

    Raises:
      DataError: there is none of that name.
    """
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key not in PRESETS:
        raise DataError(f"Unknown preset '{name}'; {nearest(key, PRESETS)}")
    return PRESETS[key]


def detect(rows: Sequence[Row]) -> Preset:
    """Returns the preset whose signature the rows' columns show, or alpaca's, the default."""
    columns = rows[0].keys()
    for preset in PRESETS.values():
        matches = columns == preset.signature if preset.exact else columns >= preset.signature
        if preset.signature and matches:
            return preset
    return PRESETS["alpaca"]


def _gsm8k(record: Record) -> Record:
    return dataclasses.replace(record, output=record.output.replace("####", "The answer is"))


def _code_alpaca(record: Record) -> Record | None:
    language = record.category
    if len(language) > LANGUAGE_NAME_LIMIT or "\n" in language:
        raise DataError(
            f"Preset 'code_alpaca' expects a language's name in the input column, got {language[:60]!r}; "
            "use preset 'alpaca' for a file without language labels."
        )
    return None if language == "X86-64 Assembly" else record


def _sst2(record: Record) -> Record:
    if record.output not in {"0", "1"}:
        raise DataError(f"Preset 'sst2' expects the label 0 or 1, got {record.output!r}; map the columns.")
    word = SENTIMENTS[int(record.output)]
    question = f"Is this review {SENTIMENTS[1]} or {SENTIMENTS[0]}? Answer with one word."
    instruction = record.instruction or question
    return dataclasses.replace(
        record, instruction=instruction, output=word, category=record.category or word, choices=SENTIMENTS
    )


def _with_answer(record: Record) -> Record | None:
    return record if record.output.strip() else None


def _first(value: object) -> object:
    if isinstance(value, list | tuple):
        return value[0] if value else None
    return value


def _instances(row: Row, stem: str) -> Iterable[Row]:
    """One row per instance of a task object; rows that are instances already pass unchanged."""
    instances = row.get("Instances")
    if not isinstance(instances, list):
        return (row,)
    task = row.get("task") or stem
    shared = {
        "definition": _first(row.get("Definition")),
        "task": task,
        "category": _first(row.get("Categories")) or task,
    }
    return [
        {**shared, "input": instance.get("input"), "output": _first(instance.get("output"))}
        for instance in instances
        if isinstance(instance, dict)
    ]


PRESETS: dict[str, Preset] = {
    "alpaca": Preset(
        columns={
            "instruction": ("instruction",),
            "input": ("input",),
            "output": ("output", "response"),
            "category": ("category",),
            "choices": ("choices",),
        },
        hub="tatsu-lab/alpaca",
    ),
    "dolly": Preset(
        columns={
            "instruction": ("instruction",),
            "input": ("context",),
            "output": ("response",),
            "category": ("category",),
        },
        hub="databricks/databricks-dolly-15k",
        signature=frozenset({"instruction", "context", "response"}),
    ),
    "gsm8k": Preset(
        columns={"instruction": ("question",), "output": ("answer",)},
        hub="openai/gsm8k:main",
        signature=frozenset({"question", "answer"}),
        exact=True,
        edit=_gsm8k,
    ),
    "code_alpaca": Preset(
        columns={
            "instruction": ("instruction",),
            "input": ("input",),
            "output": ("output",),
            "category": ("input",),
        },
        edit=_code_alpaca,
    ),
    "sst2": Preset(
        columns={"input": ("sentence",), "output": ("label",)},
        hub="stanfordnlp/sst2",
        signature=frozenset({"sentence", "label"}),
        exact=True,
        edit=_sst2,
    ),
    "mbxp": Preset(
        columns={
            "instruction": ("prompt", "description"),
            "output": ("canonical_solution",),
            "category": ("language",),
        },
        hub="mxeval/mbxp",
        signature=frozenset({"prompt", "canonical_solution", "language"}),
        edit=_with_answer,
    ),
    "natural_instructions": Preset(
        columns={
            "instruction": ("definition",),
            "input": ("input", "inputs"),
            "output": ("output", "targets"),
            "category": ("task", "task_name", "category"),
        },
        hub="Muennighoff/natural-instructions",
        signature=frozenset({"Definition", "Instances"}),
        unfold=_instances,
    ),
}
