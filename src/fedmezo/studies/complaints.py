"""What pydantic found wrong with a configuration, as one plain sentence per problem."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedmezo.studies.keys import note_of

__all__ = ["sentences"]

Sections = Mapping[str, type[BaseModel]]
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a table of texts"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_SHOWN = 60


def sentences(problems: Sequence[Any], sections: Sections) -> list[str]:
    """Returns one sentence per key that is wrong: dotted key, what was expected, what was got.

    Args:
      problems: `ValidationError.errors()`.
      sections: the sections by name.
    """
    found: dict[tuple[object, ...], str] = {}
    for problem in problems:
        found.setdefault(tuple(problem["loc"][:2]), _sentence(problem, sections))
    return list(found.values())


def _sentence(problem: Mapping[str, Any], sections: Sections) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return _unknown(problem, path, sections)
    if problem["type"] == "value_error":
        return _with_section(path, str(problem["ctx"]["error"]))
    if len(path) < 2:
        where = f"[{path[0]}]" if path else "The configuration"
        return f"{where}: expected a table of keys, got {_shown(problem['input'])}."
    section, key = path[:2]
    return f"{section}.{key}: expected {_expected(sections[section], key)}, got {_shown(problem['input'])}."


def _with_section(path: Sequence[str], sentence: str) -> str:
    """Returns a sentence of a validator, which names its key unless it speaks of names alone."""
    return f"[{path[0]}]: {sentence}" if sentence.startswith("'") else sentence


def _unknown(problem: Mapping[str, Any], path: Sequence[str], sections: Sections) -> str:
    key = path[-1]
    homes = [f"'{name}.{known[key]}'" for name in sections if key in (known := _names(sections[name]))]
    if len(path) == 1:
        what = f"section [{key}]" if isinstance(problem["input"], Mapping) else f"key '{key}' outside the sections"
        hints = homes or [f"[{name}]" for name in difflib.get_close_matches(key, sections, n=1)]
        return f"Unknown {what}{_hint(hints, list(sections))}"
    names = _names(sections[path[0]])
    hints = homes or [f"'{names[near]}'" for near in difflib.get_close_matches(key, names, n=1)]
    return f"Unknown key '{key}' in [{path[0]}]{_hint(hints, list(sections[path[0]].model_fields))}"


def _hint(hints: Sequence[str], known: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(hints)}?" if hints else f"; known are {', '.join(known)}."


def _names(section: type[BaseModel]) -> dict[str, str]:
    """Returns every name a key of the section goes by -> our name."""
    own = {name: name for name in section.model_fields}
    return own | {other: name for name in own for other in note_of(section, name, "also")}


def _expected(section: type[BaseModel], key: str) -> str:
    field = section.model_fields[key]
    parts = list(_kinds(field.annotation, _limits(field)))
    word = note_of(section, key, "word")
    return " or ".join([*parts, f'"{word}"'] if word else parts)


def _limits(field: FieldInfo | Any) -> str:
    """Returns the bounds of a field in words, such as " > 0 and < 1"."""
    metadata = field.metadata if isinstance(field, FieldInfo) else getattr(field, "__metadata__", ())
    inner = [part for item in metadata for part in getattr(item, "metadata", None) or [item]]
    found = [f"{sign} {getattr(item, name)}" for item in inner for name, sign in _SIGNS.items() if hasattr(item, name)]
    return f" {' and '.join(found)}" if found else ""


def _kinds(annotation: Any, limits: str) -> Iterator[str]:
    """Yields what each member of a type is called; None has no name, its word is told apart."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        yield from _kinds(annotation.__origin__, _limits(annotation))
    elif origin is Literal:
        texts = [f'"{text}"' for text in arguments]
        yield texts[0] if len(texts) == 1 else f"one of {', '.join(texts)}"
    elif origin is tuple:
        yield f"a list of {' or '.join(_plural(arguments[0]))}"
    elif arguments and origin is not dict:
        yield from (text for part in arguments if part is not type(None) for text in _kinds(part, limits))
    else:
        yield _KINDS.get(origin or annotation, "another value") + limits


def _plural(item: Any) -> Iterator[str]:
    yield "texts" if item is str else ", ".join(f'"{text}"' for text in get_args(item))


def _shown(value: object) -> str:
    """Returns a value as it would stand in the file, cut short."""
    plain = list(value) if isinstance(value, tuple) else value
    try:
        text = json.dumps(plain, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits has no text at all
        text = f"a {type(value).__name__} that cannot be shown"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
