"""Examples from rows as Hugging Face's trainers take them: tokenised, text, prompt and completion, or messages.

Labels are what follows a prompt: a row of ours is token ids and the place where its labels begin. Labels masked with
-100 in between make one example per unbroken stretch of labels, each with everything before it as its prompt: the loss
over a data set is that of the masked rows, token by token. What comes after the last label changes no loss and is left
out; so is padding.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedmezo.data.prompt import Encoded, Example, Row
from fedmezo.data.templates import opening
from fedmezo.errors import DataError

__all__ = ["Reading", "encode_rows", "is_conversation"]

IGNORED = -100  # the label of a token that is not predicted
NO_LABEL = "no label token within max_length"

Pair = tuple[Sequence[int], int]  # token ids, and where their labels begin
Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """How rows are read; the names and defaults are those of TRL's SFTConfig.

    Attributes:
      max_length: longest row in tokens; a longer one is cut at its end.
      text_field: column of whole texts.
      completion_only: loss over the completion alone; None: yes where there is a prompt.
      assistant_only: loss over the assistant's turns alone, for messages.
    """

    max_length: int = 1024
    text_field: str = "text"
    completion_only: bool | None = None
    assistant_only: bool = False


def encode_rows(rows: Iterable[Columns], tokenizer: Any, *, reading: Reading) -> Encoded:
    """Returns the rows as examples; those without a label token are left out and counted.

    Args:
      rows: all with the columns of the first: "input_ids" (with "labels" and "attention_mask" if there are any),
        "messages", "prompt" and "completion", or `reading.text_field`.
      tokenizer: a Hugging Face tokenizer; not needed for tokenised rows.
      reading: how.

    Raises:
      DataError: no rows, none of these columns, labels that are not the row's tokens, or an unusable chat template.
    """
    table = list(rows)
    if not table:
        raise DataError("The data set has no rows; give one with at least one.")
    read = _reader(table[0], tokenizer, reading)
    reasons: Counter[str] = Counter()
    examples = []
    # Equal token ids share one int object: 8 bytes a token in place of 36.
    shared: dict[int, int] = {}
    for index, row in enumerate(table):
        for ids, start in read(row, f"row {index}"):
            kept = tuple(shared.setdefault(token, token) for token in ids[: reading.max_length])
            if max(start, 1) < len(kept):
                examples.append(Example((Row(kept, max(start, 1)),), record=index))
            else:
                reasons[NO_LABEL] += 1
    if not examples:
        raise DataError(f"None of the {len(table)} rows has a label token within {reading.max_length} tokens.")
    return Encoded(tuple(examples), reasons.total(), dict(reasons))


def is_conversation(*tables: Sequence[Columns] | None) -> bool:
    """Returns whether the first of the tables that is there holds messages."""
    row = next((table[0] for table in tables if table is not None), {})
    return "messages" in row or not isinstance(row.get("prompt", ""), str)


def _reader(row: Columns, tokenizer: Any, reading: Reading) -> Callable[[Columns, str], Iterable[Pair]]:
    if "input_ids" in row:
        return _tokenised
    pair = "prompt" in row and "completion" in row
    read = _messages if "messages" in row else _completion if pair else _text if reading.text_field in row else None
    if read is None:
        raise DataError(
            f"Expected a column input_ids, messages, {reading.text_field}, or prompt and completion; got "
            f"{', '.join(map(str, row)) or 'none'}."
        )
    if tokenizer is None:
        raise DataError("These rows are text, so a tokenizer is needed; give processing_class.")
    return partial(read, tokenizer=tokenizer, reading=reading)


def _tokenised(row: Columns, where: str) -> Iterator[Pair]:
    """Yields one pair per unbroken stretch of labels."""
    ids = _whole(row["input_ids"])
    labels = _whole(row["labels"]) if row.get("labels") is not None else ids
    mask = _whole(row["attention_mask"]) if row.get("attention_mask") is not None else [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise DataError(f"{where}: {len(ids)} input_ids, {len(labels)} labels and {len(mask)} of attention_mask.")
    first, last = (mask.index(1), len(mask) - mask[::-1].index(1)) if 1 in mask else (0, 0)
    if 0 in mask[first:last]:
        raise DataError(f"{where}: attention_mask hides tokens in the middle; only padding can be hidden.")
    if row.get("labels") is None:
        labels = [IGNORED] * first + ids[first:last] + [IGNORED] * (len(ids) - last)
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        # A causal model predicts a token from those before it, so the first one is never predicted.
        if label != IGNORED and (label != token or not first <= at < last):
            raise DataError(f"{where}: label {label} at token {at} is not the token there ({token}) nor {IGNORED}.")
    known = {at for at in range(first + 1, last) if labels[at] != IGNORED}
    for at in sorted(known):
        if at - 1 not in known:
            yield ids[first : next(end for end in range(at, last + 1) if end not in known)], at - first


def _whole(values: Iterable[Any]) -> list[int]:
    return [int(value) for value in values]


def _text(row: Columns, where: str, *, tokenizer: Any, reading: Reading) -> Iterator[Pair]:
    """Yields a whole text and its end; every token but the first is a label."""
    text = _string(row[reading.text_field], where, reading.text_field)
    yield [*opening(tokenizer), *_ids(tokenizer, _closed(tokenizer, text))], 0


def _completion(row: Columns, where: str, *, tokenizer: Any, reading: Reading) -> Iterator[Pair]:
    """Yields a prompt with its completion, of text or of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        before, front = prompt, opening(tokenizer)
        whole = _closed(tokenizer, prompt + _string(completion, where, "completion"))
    else:
        before, front = _chat(tokenizer, prompt, where=where, ask=True), ()
        whole = _chat(tokenizer, [*prompt, *completion], where=where)
    ids, start = _joint(tokenizer, before, whole, where=where)
    yield [*front, *ids], 0 if reading.completion_only is False else len(front) + start


def _messages(row: Columns, where: str, *, tokenizer: Any, reading: Reading) -> Iterator[Pair]:
    """Yields a conversation: all of it, or one pair per turn of the assistant."""
    turns = list(row["messages"])
    if not reading.assistant_only:
        yield _ids(tokenizer, _chat(tokenizer, turns, where=where)), 0
        return
    for at, turn in enumerate(turns):
        if turn.get("role") == "assistant":
            before = _chat(tokenizer, turns[:at], where=where, ask=True)
            yield _joint(tokenizer, before, _chat(tokenizer, turns[: at + 1], where=where), where=where)


def _joint(tokenizer: Any, before: str, whole: str, *, where: str) -> Pair:
    """Returns the tokens of `whole`, and how many belong to `before`; the border is never inside a token."""
    if not whole.startswith(before):
        raise DataError(f"{where}: the chat template changes what came before an answer, so no border can be drawn.")
    prompt, joint = _ids(tokenizer, before), _ids(tokenizer, whole)
    if joint[: len(prompt)] == prompt:
        return joint, len(prompt)
    return [*prompt, *_ids(tokenizer, whole[len(before) :])], len(prompt)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer([text], add_special_tokens=False)["input_ids"][0])


def _closed(tokenizer: Any, text: str) -> str:
    end = getattr(tokenizer, "eos_token", None) or ""
    return text if end and text.endswith(end) else text + end


def _string(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: column '{column}' is {type(value).__name__}, expected text.")
    return value


def _chat(tokenizer: Any, turns: Sequence[Any], *, where: str, ask: bool = False) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where} is a conversation, and this tokenizer has no chat template; give text instead.")
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask))
    # A chat template is a program of the model's author and may raise anything.
    except Exception as error:
        raise DataError(f"{where}: the tokenizer's chat template cannot write this conversation ({error}).") from error
