"""What a server's configuration may name on a client's machine without the person at it having named it too.

A server says which model is tuned, on what data. Built-in models and data, and models of a pinned checksum, harm
nobody; a path is read with the client's rights, and a hub id is downloaded. These need a word of the person's own: the
same key by --set, their own --data, or --trust for all of it.
"""

from collections.abc import Sequence

from fedmezo.data.presets import PRESETS
from fedmezo.errors import ConfigError
from fedmezo.models.load import known_models
from fedmezo.studies.config import Config

__all__ = ["refuse_unasked"]

_BUILTIN = "builtin:"


def refuse_unasked(told: Config, settings: Sequence[str], *, own: bool) -> None:
    """Does nothing when all that a server names here is harmless, or was named by the person at the client.

    Args:
      told: the configuration as the server sent it.
      settings: the client's own `a.b=c`.
      own: whether the client trains on a file of its own, so that nothing of [data] is looked up.

    Raises:
      ConfigError: the first key that needs the person's word.
    """
    named = {setting.partition("=")[0].strip() for setting in settings}
    for key, value in _unasked(told, own=own):
        if key not in named:
            raise ConfigError(
                f"The server's configuration names {key} = '{value}' on this machine, which nobody here has confirmed; "
                f"if that is right, start the client with --set {key}={value}, with data of its own by --data, or with "
                "--trust."
            )


def _unasked(told: Config, *, own: bool) -> list[tuple[str, str]]:
    found = [] if told.model.name in known_models() else [("model.name", told.model.name)]
    found += [("adapter.start", told.adapter.start)] if told.adapter.start is not None else []
    if own:
        return found
    name = told.data.name
    if name is not None and not name.startswith(_BUILTIN) and name not in PRESETS:
        found.append(("data.name", name))
    return found + [(f"data.{key}", path) for key in ("path", "eval_path") if (path := getattr(told.data, key))]
