"""A configuration as Flower's flat run configuration, and back.

    run_config = app_config(config, folder="/runs/demo")     # {"federation.rounds": 20, ..., "folder": "/runs/demo"}
    config_of(run_config) == config

Flower knows text, whole numbers, numbers and booleans only. So a key that is left to the program has its word ("auto",
"all") or "" where it has none, and a list or table is JSON text.
"""

import json
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from fedmezo.errors import ConfigError
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.keys import Section, note_of

__all__ = ["app_config", "config_of"]

Value = str | int | float | bool


def app_config(config: Config, *, folder: str, resume: bool = False, more: int = 0) -> dict[str, Value]:
    """Returns the run configuration of a Flower App: every key of a configuration, and where the run goes.

    Args:
      config: what to do.
      folder: the run's folder on the server's machine.
      resume: go on with the run in that folder.
      more: rounds in all when going on; 0 for as many as configured.
    """
    told: dict[str, Value] = {"folder": folder, "resume": resume, "more": more}
    for name in type(config).model_fields:
        section: Section = getattr(config, name)
        told |= {f"{name}.{key}": _flat(section, key) for key in type(section).model_fields}
    return told


def config_of(run_config: Mapping[str, Any]) -> Config:
    """Returns the configuration in a run configuration; keys without a dot are not part of it.

    Raises:
      ConfigError: as `parse_config`.
    """
    given: dict[str, dict[str, Any]] = {}
    for dotted, value in run_config.items():
        name, dot, key = dotted.partition(".")
        if dot:
            given.setdefault(name, {})[key] = _read(name, key, value)
    return parse_config(given)


def _flat(section: Section, key: str) -> Value:
    value = getattr(section, key)
    if value is None:
        return str(note_of(type(section), key, "word"))
    if isinstance(value, tuple | Mapping):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, Value) else str(value)


def _read(name: str, key: str, value: Any) -> Any:
    """Returns a value as `parse_config` takes it; what is no key of a section is left to its complaint."""
    section = Config.model_fields[name].annotation if name in Config.model_fields else None
    field = section.model_fields.get(key) if isinstance(section, type) and issubclass(section, Section) else None
    if field is None or not isinstance(value, str):
        return value
    if value == "" and type(None) in get_args(field.annotation):
        return None
    if value[:1] in ("[", "{") and _holds_parts(field.annotation):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}.{key}: expected a list or table as JSON, got {value[:60]!r}: {error}.") from None
    return value


def _holds_parts(kind: Any) -> bool:
    """Whether a value of this type may be a list or a table."""
    return kind in (tuple, dict) or get_origin(kind) in (tuple, dict) or any(map(_holds_parts, get_args(kind)))
