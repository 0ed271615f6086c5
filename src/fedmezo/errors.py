"""The exception tree. Everything fedmezo raises on purpose derives from `FedMeZOError`.

    FedMeZOError
    ├── ConfigError    the configuration says something impossible      (exit code 2)
    ├── DataError      a data file or column is missing or unusable     (exit code 2)
    ├── ModelError     a model cannot be found, loaded or trained       (exit code 2)
    ├── NoiseError     the noise backend disagrees with the contract    (exit code 1)
    ├── WireError      bytes that are not a valid message               (exit code 1)
    ├── JournalError   a journal that is damaged, foreign or unwritable (exit code 1)
    │   └── SealError  a file that is not what it was when it was sealed
    ├── RunError       a run that cannot go on                          (exit code 1)
    └── StoppedError   the user stopped a verb                          (exit code 130)

Exit code 2 asks for another input, exit code 1 tells that something went wrong.
"""


class FedMeZOError(Exception):
    """Root of every error raised on purpose; `exit_code` is what the CLI returns for it."""

    exit_code: int = 1


class ConfigError(FedMeZOError):
    """The configuration says something impossible; the message names the key."""

    exit_code = 2


class DataError(FedMeZOError):
    """A data file, column or split is missing or unusable."""

    exit_code = 2


class ModelError(FedMeZOError):
    """A model, tokenizer or adapter cannot be found, loaded or trained."""

    exit_code = 2


class NoiseError(FedMeZOError):
    """The noise backend does not reproduce the contract's values on this machine."""


class WireError(FedMeZOError):
    """Bytes that are not a valid message."""


class JournalError(FedMeZOError):
    """A journal that is damaged, belongs to something else, or cannot be written."""


class SealError(JournalError):
    """A file that is not what it was when its folder was sealed."""


class RunError(FedMeZOError):
    """A run that cannot go on."""


class StoppedError(FedMeZOError):
    """The user stopped a verb; the message tells how to go on."""

    exit_code = 130


def missing(what: str, *, extra: str) -> ConfigError:
    """Returns the error for a library that only an extra brings; `what` is such as "The report needs plotly"."""
    return ConfigError(f"{what}, which is not installed; run: pip install 'fedmezo[{extra}]'")
