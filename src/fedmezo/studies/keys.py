"""What a key of a configuration is made of, and what every section has in common.

A key that may be left to the program has a word ("auto", "all") that stands for None in files and on the command line.
The field's customary names (lr, eps, lora_r, ...) are accepted and mapped to ours.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["MAX_SEED", "Section", "key", "note_of"]

MAX_SEED = 2**63 - 1  # the largest whole number that TOML holds


def key(
    text: str, *, default: Any, word: str = "", also: tuple[str, ...] = (), example: object = "", **limits: Any
) -> Any:
    """Returns a pydantic field.

    Args:
      text: what the key means, with its unit and the paper's symbol.
      default: its value when left out.
      word: what stands for None in a file; none by default.
      also: other names it goes by.
      example: a value to show where the default is None and has no word.
      limits: pydantic's own (ge, gt, le, lt, min_length).
    """
    notes: dict[str, Any] = {"x-word": word, "x-also": list(also), "x-example": example}
    return Field(default, description=text, json_schema_extra={k: v for k, v in notes.items() if v}, **limits)


def note_of(section: type[BaseModel], name: str, note: Literal["word", "also", "example"]) -> Any:
    """Returns what a field was given for `note`, or "" when it was given nothing."""
    extra = section.model_fields[name].json_schema_extra
    return extra.get(f"x-{note}", "") if isinstance(extra, dict) else ""


class Section(BaseModel):
    """One table of the file; unknown keys are errors and nothing is converted silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def canonical(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `given` under our own key names.

        Raises:
          ValueError: one key was given under two names.
        """
        names = {other: name for name in cls.model_fields for other in note_of(cls, name, "also")}
        found: dict[str, Any] = {}
        came_as: dict[str, str] = {}
        for given_name, value in given.items():
            name = names.get(given_name, given_name)
            if name in found:
                raise ValueError(f"{came_as[name]!r} and {given_name!r} mean the same key; give only {name!r}.")
            found[name], came_as[name] = value, given_name
        return found

    @model_validator(mode="before")
    @classmethod
    def _accept(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: cls._plain(name, value) for name, value in cls.canonical(given).items()}

    @classmethod
    def _plain(cls, name: str, value: Any) -> Any:
        """Returns a value with lists as tuples, and None for the word that stands for it."""
        if isinstance(value, int) and abs(value) > MAX_SEED:
            raise ValueError(f"'{name}' is a whole number of more than 64 bits; give a smaller one.")
        if name in cls.model_fields and isinstance(value, str) and value and value == note_of(cls, name, "word"):
            return None
        return tuple(value) if isinstance(value, list) else value
