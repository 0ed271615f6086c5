"""Writing TOML: the values of a configuration as text, and as commented lines for a new file."""

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from fedmezo.studies.keys import Section, note_of

__all__ = ["key_lines", "toml", "value_text"]

_WIDTH = 100


def toml(value: Any) -> str:
    """Returns a value as TOML text: strings, booleans, numbers, lists and inline tables."""
    if isinstance(value, bool | str):
        # TOML's basic strings are JSON's, but for DEL, which must be escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return repr(value)


def value_text(section: Section, name: str) -> str | None:
    """Returns a key's value as TOML; None for a value TOML cannot say, which is what leaving the key out means."""
    value = getattr(section, name)
    if value is None:
        value = note_of(type(section), name, "word") or None
    return None if value is None else toml(value)


def key_lines(section: Section) -> list[str]:
    """Returns every key of a section under its description; a key without a value is an example behind a "#"."""
    lines = []
    for name, field in type(section).model_fields.items():
        text = value_text(section, name)
        lines += ["", *textwrap.wrap(f"{field.description}", _WIDTH, initial_indent="# ", subsequent_indent="# ")]
        example = f"# {name} = {toml(note_of(type(section), name, 'example'))}  # an example; not set by default"
        lines.append(example if text is None else f"{name} = {text}")
    return lines[1:]
