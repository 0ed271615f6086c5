"""Writing YAML: the front matter of a model card, and text of a stranger's made harmless for it and for Markdown."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["code", "harmless", "yaml_lines"]

_LONGEST = 200


def harmless(text: object) -> str:
    """Returns a text as one line without anything that is no printable character, cut short."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def code(text: object) -> str:
    """Returns a text as Markdown code, in which no letter means anything."""
    return f"`{harmless(text).replace('`', chr(39)) or ' '}`"


def yaml_lines(values: Mapping[str, Any], *, indent: str = "") -> list[str]:
    """Returns a mapping of plain values as lines of YAML; texts are quoted, and numbers must be finite."""
    lines: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *yaml_lines(value, indent=f"{indent}  ")]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            lines += [f"{indent}{name}:", *_items(value, indent=indent)]
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


def _items(values: Sequence[Any], *, indent: str) -> list[str]:
    lines: list[str] = []
    for value in values:
        if isinstance(value, Mapping):
            first, *rest = yaml_lines(value, indent=f"{indent}  ")
            lines += [f"{indent}- {first.strip()}", *rest]
        else:
            lines.append(f"{indent}- {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"YAML of a model card holds finite numbers only, got {value}.")
        digits, exponent, power = repr(value).partition("e")
        return digits + ("" if not exponent or "." in digits else ".0") + exponent + power
    return json.dumps(harmless(value), ensure_ascii=False)
