"""Prompt templates: the text before an answer, and the tokens that open a row and close an answer.

Source: the "alpaca" template has the structure of Stanford Alpaca's, with sentences of our own; "alpaca-input" is its
form for records with an input, used for all of them; "sst2" is the template of MeZO (arXiv:2305.17333).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedmezo.data.presets import nearest
from fedmezo.data.records import Record
from fedmezo.errors import DataError

__all__ = ["TEMPLATES", "Format", "Tokenizer", "opening", "resolve"]

TEMPLATES = ("auto", "chat", "alpaca", "alpaca-input", "plain", "sst2")

WITH_INPUT = (
    "You are given an instruction and an input that goes with it. Write a response that carries out the "
    "instruction.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "You are given an instruction. Write a response that carries it out.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
PROBE = "fedmezo-probe"


class Tokenizer(Protocol):
    """What is asked of a tokenizer; Hugging Face's have it."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Returns at least "input_ids": one list of token ids per text."""


@dataclass(frozen=True, slots=True)
class Format:
    """A template made ready for one tokenizer.

    Attributes:
      render: a record to its prompt and the spaces with which its answer starts.
      prefix: tokens that open every row, such as a beginning-of-text token.
      close: tokens that end a generated answer; empty when the template's answers are single words.
    """

    render: Callable[[Record], tuple[str, str]]
    prefix: tuple[int, ...] = ()
    close: tuple[int, ...] = ()


def resolve(template: str, tokenizer: Tokenizer, *, records: Sequence[Record]) -> Format:
    """Returns the template called `template`, or the one written in it, for this tokenizer and these records.

    Spaces that end a prompt go to the answer's front: most vocabularies keep a space with the word after it.

    Raises:
      DataError: an unknown name, a text without a place to fill in, a text that would lose the records'
        input, or a chat template that is missing or fails.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        template = "chat" if has_chat else "alpaca"
    if template == "chat":
        if not has_chat:
            raise DataError("This tokenizer has no chat template; use template 'alpaca', 'plain' or your own text.")
        return _chat(tokenizer)
    if template not in TEMPLATES:
        _check_own(template, records=records)
    eos = tokenizer.eos_token_id
    return Format(
        lambda record: _split_lead(_named(template, record) if template in TEMPLATES else _fill(template, record)),
        prefix=opening(tokenizer),
        close=() if eos is None or template == "sst2" else (eos,),
    )


def _request(record: Record) -> tuple[str, str]:
    """The record's instruction and input; a record with only an input has that as its instruction."""
    if not record.instruction.strip():
        return record.input, ""
    return record.instruction, record.input if record.input.strip() else ""


def _named(template: str, record: Record) -> str:
    if template == "alpaca-input":
        return WITH_INPUT.format(instruction=record.instruction, input=record.input)
    instruction, given = _request(record)
    if template == "sst2":
        return f"{given or instruction} It was "
    if template == "plain":
        return f"{instruction}\n{given} " if given else f"{instruction} "
    return (WITH_INPUT if given else WITHOUT_INPUT).format(instruction=instruction, input=given)


def _fill(text: str, record: Record) -> str:
    # One pass: braces inside a record's own text stay as they are.
    return re.sub(r"\{(instruction|input)\}", lambda match: getattr(record, match[1]), text)


def _split_lead(prompt: str) -> tuple[str, str]:
    bare = prompt.rstrip(" ")
    return bare, prompt[len(bare) :]


def _check_own(template: str, *, records: Sequence[Record]) -> None:
    if "{instruction}" not in template and "{input}" not in template:
        raise DataError(
            f"Unknown template '{template}', and a text of your own needs {{instruction}} or {{input}}; "
            f"{nearest(template, TEMPLATES)}"
        )
    if "{output}" in template:
        raise DataError("A template ends where the answer starts; take {output} out of it.")
    lost = 0 if "{input}" in template else sum(bool(record.input.strip()) for record in records)
    if lost:
        raise DataError(f"The template would lose the input of {lost} of {len(records)} records; add {{input}} to it.")


def _ids(tokenizer: Tokenizer, text: str, *, special: bool) -> tuple[int, ...]:
    return tuple(tokenizer([text], add_special_tokens=special)["input_ids"][0])


def opening(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens this tokenizer puts in front of a text; those it may put behind are ours to place."""
    bare, full = (_ids(tokenizer, "a", special=special) for special in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return ()


def _chat(tokenizer: Any) -> Format:
    def text(messages: list[dict[str, str]], *, ask: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))

    def prompt(content: str) -> str:
        return text([{"role": "user", "content": content}], ask=True)

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        opening, whole = prompt("a"), text(turns, ask=False)
    # A chat template is a program of the model's author and may raise anything.
    except Exception as error:
        raise DataError(
            f"The tokenizer's chat template cannot write a user's message and an answer ({error}); "
            "use template 'alpaca', 'plain' or your own text."
        ) from error
    before, _, after = whole.rpartition(PROBE)
    lead = before.removeprefix(opening)
    if not before.startswith(opening) or lead.strip():
        lead = ""

    def render(record: Record) -> tuple[str, str]:
        return prompt("\n\n".join(filter(None, _request(record)))), lead

    return Format(render, close=_end_of_turn(tokenizer, after.strip()))


def _end_of_turn(tokenizer: Tokenizer, suffix: str) -> tuple[int, ...]:
    """The token with which the chat template ends an answer, or the end-of-text token."""
    ids = _ids(tokenizer, suffix, special=False) if suffix else ()
    special = set(getattr(tokenizer, "all_special_ids", ()))
    marks = ids if len(ids) == 1 else tuple(token for token in ids if token in special)
    if marks:
        return marks[:1]
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
