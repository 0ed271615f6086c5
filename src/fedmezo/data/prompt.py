"""From records to token rows: exact label masks over a template's prompts.

The border between prompt and answer is exact. The prompt is tokenised alone and never a label. The answer's
tokens are those that follow the prompt's when both are tokenised jointly; where the tokenizer would merge
across the border, the answer is tokenised alone and put behind the prompt. Nothing is padded.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedmezo.data.records import Record
from fedmezo.data.templates import Format, Tokenizer, resolve
from fedmezo.errors import DataError

__all__ = ["Encoded", "Example", "Objective", "Row", "encode"]

Objective = Literal["answer", "choices"]

CHUNK = 1024
DERIVED_CHOICES_LIMIT = 20
EMPTY_ANSWER = "empty answer"
EMPTY_PROMPT = "empty prompt"
LONG_PROMPT = "prompt longer than max_tokens"
LONG_CHOICES = "prompt and choices longer than max_tokens"


@dataclass(frozen=True, slots=True)
class Row:
    """One token sequence; ids[start:] are its labels, with 1 <= start < len(ids).

    Raises:
      DataError: there is no prompt token or no label token.
    """

    ids: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        """Checks the border."""
        if not 1 <= self.start < len(self.ids):
            raise DataError(f"Row: expected 1 <= start < {len(self.ids)} tokens, got start={self.start}.")


@dataclass(frozen=True, slots=True)
class Example:
    """One record as a loss can be taken of it.

    Attributes:
      rows: one row: the loss is over its label tokens. Several: one per choice, scored by the mean label
        log-probability.
      answer: index of the right row or option.
      options: with one row of one label token: the ids of all choices; the loss is over these tokens only.
      record: index of the record it came from.
      category: that record's category.
    """

    rows: tuple[Row, ...]
    answer: int = 0
    options: tuple[int, ...] = ()
    record: int = 0
    category: str = ""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the answer; all rows begin with them."""
        return self.rows[0].ids[: self.rows[0].start]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples in the records' order, the number of records left out, and that number by reason."""

    examples: tuple[Example, ...]
    dropped: int
    reasons: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Draft:
    record: int
    category: str
    prompt: str
    answers: tuple[str, ...]
    right: int


def encode(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    template: str,
    max_tokens: int,
    objective: Objective = "answer",
) -> Encoded:
    """Returns the records as token rows.

    An answer that does not fit is cut at its end, as the paper's code does. A record none of whose label
    tokens fit is left out and counted, and so is one whose choices do not all fit.

    Args:
      records: give training and evaluation records together when choices are derived from their outputs.
      tokenizer: a Hugging Face tokenizer, or anything that behaves like one; needs no padding token.
      template: "auto", "chat", "alpaca", "alpaca-input", "plain", "sst2", or a text containing {instruction} or
        {input}.
      max_tokens: longest row, prompt and answer together, >= 2.
      objective: "answer" predicts the output and its end; "choices" picks among candidates. A record without
        choices takes the distinct outputs of its category, at most 20.

    Raises:
      DataError: an unknown or unusable template, or choices that are missing, equal or lack the answer.
    """
    if max_tokens < 2:
        raise DataError(f"max_tokens: expected at least 2, one of prompt and one of answer, got {max_tokens}.")
    if objective not in get_args(Objective):
        raise DataError(f"Unknown objective '{objective}'; expected one of {', '.join(get_args(Objective))}.")
    form = resolve(template, tokenizer, records=records)
    reasons: Counter[str] = Counter()
    drafts = list(_drafts(records, form, objective=objective, reasons=reasons))
    build = _answer_example if objective == "answer" else _choices_example
    examples: list[Example] = []
    # Equal token ids share one int object: 8 bytes a token in place of 36.
    shared: dict[int, int] = {}
    for first in range(0, len(drafts), CHUNK):
        chunk = drafts[first : first + CHUNK]
        for draft, prompt, answers in _tokens(chunk, tokenizer, shared=shared):
            built = build(draft, form.prefix + prompt, answers, close=form.close, limit=max_tokens)
            if isinstance(built, Example):
                examples.append(built)
            else:
                reasons[built] += 1
    return Encoded(tuple(examples), reasons.total(), dict(reasons))


def _drafts(
    records: Sequence[Record], form: Format, *, objective: Objective, reasons: Counter[str]
) -> Iterator[_Draft]:
    choices_of = _choices_by_category(records) if objective == "choices" else None
    for index, record in enumerate(records):
        if not record.output.strip():
            reasons[EMPTY_ANSWER] += 1
            continue
        prompt, lead = form.render(record)
        if choices_of is None:
            yield _Draft(index, record.category, prompt, (lead + record.output,), 0)
            continue
        choices, right = _candidates(record, choices_of, index=index)
        space = lead or ("" if prompt[-1:].isspace() else " ")
        yield _Draft(index, record.category, prompt, tuple(space + choice for choice in choices), right)


def _choices_by_category(records: Sequence[Record]) -> Callable[[str], tuple[str, ...]]:
    outputs: dict[str, set[str]] = {}
    for record in records:
        if not record.choices and (output := record.output.strip()):
            outputs.setdefault(record.category, set()).add(output)

    def choices_of(category: str) -> tuple[str, ...]:
        found = outputs[category]
        if not 2 <= len(found) <= DERIVED_CHOICES_LIMIT:
            raise DataError(
                f"Records of category '{category}' name no choices and have {len(found)} distinct outputs; "
                f"expected 2 to {DERIVED_CHOICES_LIMIT}. Name the choices, or use objective 'answer'."
            )
        return tuple(sorted(found))

    return choices_of


def _candidates(
    record: Record, choices_of: Callable[[str], tuple[str, ...]], *, index: int
) -> tuple[tuple[str, ...], int]:
    choices = tuple(choice.strip() for choice in record.choices) or choices_of(record.category)
    if len(set(choices)) != len(choices) or len(choices) < 2 or "" in choices:
        raise DataError(f"Record {index}: expected two or more different choices, got {list(choices)}.")
    answer = record.output.strip()
    if answer not in choices:
        raise DataError(f"Record {index}: the answer {answer[:60]!r} is not one of its choices {list(choices)}.")
    return choices, choices.index(answer)


def _tokens(
    drafts: Sequence[_Draft], tokenizer: Tokenizer, *, shared: dict[int, int]
) -> Iterator[tuple[_Draft, tuple[int, ...], tuple[tuple[int, ...], ...]]]:
    """Each draft with its prompt's tokens and each answer's."""

    def ids(texts: list[str]) -> list[tuple[int, ...]]:
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [tuple(map(shared.setdefault, row, row)) for row in found]

    prompts = ids([draft.prompt for draft in drafts])
    joint = iter(ids([draft.prompt + answer for draft in drafts for answer in draft.answers]))
    for draft, prompt in zip(drafts, prompts, strict=True):
        answers = []
        for answer in draft.answers:
            row = next(joint)
            answers.append(row[len(prompt) :] if row[: len(prompt)] == prompt else ids([answer])[0])
        yield draft, prompt, tuple(answers)


def _fault(prompt: tuple[int, ...], *, limit: int) -> str:
    """The reason to leave out a record with this prompt, or nothing."""
    if not prompt:
        return EMPTY_PROMPT
    return LONG_PROMPT if len(prompt) >= limit else ""


def _answer_example(
    draft: _Draft,
    prompt: tuple[int, ...],
    answers: tuple[tuple[int, ...], ...],
    *,
    close: tuple[int, ...],
    limit: int,
) -> Example | str:
    """The example, or the reason to leave the record out."""
    fault = _fault(prompt, limit=limit) or ("" if answers[0] else EMPTY_ANSWER)
    if fault:
        return fault
    row = Row((prompt + answers[0] + close)[:limit], len(prompt))
    return Example((row,), record=draft.record, category=draft.category)


def _choices_example(
    draft: _Draft,
    prompt: tuple[int, ...],
    answers: tuple[tuple[int, ...], ...],
    *,
    close: tuple[int, ...],
    limit: int,
) -> Example | str:
    """The example, or the reason to leave the record out."""
    if not all(answers) or len(set(answers)) != len(answers):
        raise DataError(
            f"Record {draft.record}: this tokenizer cannot tell the choices {list(draft.answers)} apart; reword them."
        )
    fault = _fault(prompt, limit=limit) or (LONG_CHOICES if len(prompt) + max(map(len, answers)) > limit else "")
    if fault:
        return fault
    options: tuple[int, ...] = ()
    kept = answers
    if all(len(answer) == 1 for answer in answers):
        options = tuple(answer[0] for answer in answers)
        kept = (answers[draft.right],)
    rows = tuple(Row(prompt + answer, len(prompt)) for answer in kept)
    return Example(rows, answer=draft.right, options=options, record=draft.record, category=draft.category)
