"""The folder of a Flower App: a pyproject.toml that names our two apps and holds the configuration of a run.

The code itself is the installed package on every machine, so the folder has none.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from fedmezo import __version__
from fedmezo.errors import ConfigError

__all__ = ["write_app"]

_HEAD = """\
[project]
name = "fedmezo-run"
version = "{version}"
description = "A fedmezo run: fine-tuning on data that stays on many machines, with forward passes only."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedmezo"

[tool.flwr.app.components]
serverapp = "fedmezo.flower_server:app"
clientapp = "fedmezo.flower_client:app"

# The run: "folder" is where it goes on the server's machine, and all keys with a dot are those of a fedmezo
# configuration. Change one for a run with: flwr run -c 'federation.rounds=5'
[tool.flwr.app.config]
"""

_READ_ME = """\
# A fedmezo run as a Flower App

This folder holds the configuration of one run. The code is the package `fedmezo[flower]`, which every machine needs in
the same version. Start `flower-superlink`, a `fedmezo client` on every machine with data, and then:

    flwr run . -c 'folder="/where/the/run/goes"'

`folder` is a path on the server's machine. A stopped run goes on with `-c 'folder="..." resume=true'`.
"""


def write_app(folder: Path, config: Mapping[str, object]) -> None:
    """Writes the Flower App of a run; files of an older one are replaced.

    Args:
      folder: where to; it is made.
      config: the run configuration: text, whole numbers, numbers and booleans by key.

    Raises:
      ConfigError: the folder cannot be written, or a value is of another kind.
    """
    lines = [f"{key} = {_toml(key, value)}\n" for key, value in config.items()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pyproject.toml").write_text(_HEAD.format(version=__version__) + "".join(lines), "utf-8")
        (folder / "README.md").write_text(_READ_ME, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from None


def _toml(key: str, value: object) -> str:
    if isinstance(value, bool | str):
        # TOML's basic strings are JSON's, but for DEL, which must be escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    raise ConfigError(f"{key}: a Flower App takes text, numbers and booleans, got {value!r}; write it as JSON text.")
