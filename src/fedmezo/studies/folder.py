"""The folder of a run: which one it is, what lies in it, and the run's objects made again from its journal."""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedmezo.errors import ConfigError, JournalError, RunError
from fedmezo.models.load import Loaded
from fedmezo.runtime.journal import Journal
from fedmezo.studies.build import load_base
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.files import JOURNAL
from fedmezo.zo.noise import NOISE_VERSION

__all__ = ["aside", "base_of", "is_run", "new_folder", "opened", "rounds_upto", "write_whole", "writing"]

_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


def new_folder(config: Config, out: Path | None) -> Path:
    """Returns the folder a new run goes to; it is not made yet.

    Raises:
      ConfigError: it holds a run already, or cannot be made or written.
    """
    named = out or (Path(config.output.dir).expanduser() if config.output.dir else None)
    folder = named or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    with writing(folder):
        taken = (folder / JOURNAL).exists()
    if taken:
        raise ConfigError(
            f"{folder} holds a run already; go on with `fedmezo resume {folder}` or choose another --out."
        )
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written" if there.is_dir() else "is a file, not a folder"
        raise ConfigError(f"The run cannot go to {folder}: {there} {reason}; choose another --out.")
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write into `folder` into a sentence.

    Raises:
      RunError: the disk is full or fails.
      ConfigError: any other reason; another folder would do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in _DISK:
            raise RunError(f"{folder} cannot be written ({reason}); free some disk space and try again.") from error
        raise ConfigError(f"{folder} cannot be written ({reason}); choose another folder.") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, whenever the process or the power fails."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """Lends a new folder inside `folder`, whose content takes its place in `folder` at the end.

    What others write is not theirs to write halfway: a library's half file, whatever its name, goes with the next call.
    """
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in sorted(new.iterdir()):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds a run; raises ConfigError where nobody can tell."""
    try:
        return (folder / JOURNAL).exists()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror}); make it readable or give another.") from error


@contextmanager
def opened(folder: Path, *, readonly: bool = False) -> Iterator[Journal]:
    """Lends the journal of a run's folder.

    Raises:
      ConfigError: the folder holds no run, or cannot be entered.
      JournalError: as `Journal.open`.
    """
    path = folder / JOURNAL
    if not is_run(folder):
        raise ConfigError(f"{folder} holds no run (no {JOURNAL} in it); give the folder that `fedmezo run` made.")
    with Journal.open(path, readonly=readonly) as journal:
        yield journal


def rounds_upto(journal: Journal, number: int | None) -> int:
    """Returns how many rounds to take: `number`, or all of them.

    Raises:
      ConfigError: there are not so many.
    """
    upto = journal.last if number is None else number
    if not 0 <= upto <= journal.last:
        raise ConfigError(f"--round: expected 0 to {journal.last} (complete rounds), got {upto}.")
    return upto


def base_of(journal: Journal, loaded: Loaded | None = None) -> tuple[Config, Loaded]:
    """Returns a run's configuration and its base model, after checking that it is the one the run began with.

    Args:
      journal: the run's.
      loaded: the model, where the caller has it; None to load what the configuration names.

    Raises:
      JournalError: the model has changed, or the run's directions are of another version of the noise.
    """
    header = journal.header
    config = parse_config(json.loads(header.config))
    if header.noise_version != NOISE_VERSION:
        raise JournalError(
            f"The journal uses noise v{header.noise_version}, this package noise v{NOISE_VERSION}; "
            f"install fedmezo {header.package}."
        )
    loaded = loaded or load_base(config)
    if loaded.fingerprint != header.fingerprint:
        raise JournalError(
            f"The base model has changed: fingerprint {loaded.fingerprint[:12]}, the journal's is "
            f"{header.fingerprint[:12]}; restore the model '{config.model.name}' the run started from."
        )
    return config, loaded
