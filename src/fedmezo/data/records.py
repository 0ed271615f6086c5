"""Records, and where they come from: plain values that every other data module imports."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction with its answer; text is never None.

    Attributes:
      instruction: what to do.
      input: what to do it on; empty when there is nothing.
      output: the right answer.
      category: label by which splitters tell clients' data apart; empty when unknown.
      choices: candidate answers of a classification record, the right one among them; empty otherwise.
    """

    instruction: str
    input: str = ""
    output: str = ""
    category: str = ""
    choices: tuple[str, ...] = ()


FIELDS = tuple(one.name for one in fields(Record))


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where records come from; give exactly one of `path` and `name`.

    Attributes:
      path: a local file, or a folder of files.
      name: a preset's name, a hub id ("owner/name" or "owner/name:config"), "builtin:skills", or
        "builtin:skills/<category>[,<category>]".
      columns: our field to the source's column; overrides the preset's.
      preset: how the columns are read; without one it is told from the columns.
      split: the hub's split; local files have none.
      limit: keep a seeded sample of this many records, in their order; for the built-in corpus the
        number made. None keeps all.
      choices: candidate answers for records that name none.
      none_input: a record without an input (none given, or null) has the text "None" there, which repeats the
        prompts of the paper's code for GSM8K; an empty text stays one.
      seed: of the sample and of the built-in corpus.
    """

    path: str | None = None
    name: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    preset: str | None = None
    split: str = "train"
    limit: int | None = None
    choices: tuple[str, ...] = ()
    none_input: bool = False
    seed: int = 0
