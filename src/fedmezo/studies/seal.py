"""The seal of a folder: MANIFEST.json with the sha256 of every file, so that one changed bit anywhere is found.

The journal's hash chain guards its records, but a SQLite file has bytes that belong to no record, and a summary or an
adapter has no chain. So a verb that wrote into a run's folder seals it when all went well, and whoever opens the
journal to write takes the seal off first: a run that was stopped has none, and its chain is all there is to check.

    {"about": {"rounds": "4"}, "files": {"config.toml": {"bytes": 1755, "sha256": "..."}, ...}, ..., "seal": "..."}

The last field is the sha256 of all the others, and the file has one spelling only, so it guards itself too. It is no
signature: who may write the folder can seal it again. Who keeps the seal elsewhere notices that as well.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmezo.errors import SealError
from fedmezo.runtime.journal import Journal
from fedmezo.studies.folder import write_whole, writing

__all__ = ["MANIFEST", "Seal", "broken", "check", "renew", "seal", "seal_of", "sealing", "sound", "unseal"]

MANIFEST = "MANIFEST.json"
_FORMAT = 1
_LARGEST = 1 << 24  # bytes of a manifest, some 100,000 files
# What a run leaves; the state of Flower's programs beside it changes for as long as they live.
_OF_A_RUN = ("journal*.sqlite", "*.toml", "*.json", "*.sha256", "report.html", "adapter/*", "tensorboard/*")
_OF_AN_EXPORT = ("*",)


@dataclass(frozen=True)
class Seal:
    """What a manifest says.

    Attributes:
      kind: "run", "adapter" or "model".
      files: path inside the folder -> bytes and sha256.
      about: what the folder holds, in names and values.
      seal: sha256 of all of that.
    """

    kind: str
    files: Mapping[str, tuple[int, str]]
    about: Mapping[str, str]
    seal: str


def seal(folder: Path, *, kind: str, about: Mapping[str, str] = {}) -> str:
    """Writes the seal of a folder as it is now, and returns it.

    Args:
      folder: a run's: what runs leave in it is sealed; any other: every file that lies directly in it.
      kind: "run", "adapter" or "model".
      about: what it holds, for people and programs.

    Raises:
      RunError: the disk is full or fails.
      ConfigError: the folder cannot be written.
    """
    with writing(folder):
        files = {_name(path, folder): _measured(path) for path in _sealable(folder, kind)}
        text, made = _spelt(kind, files, about)
        write_whole(folder / MANIFEST, text)
    return made


def unseal(folder: Path) -> None:
    """Takes the seal off a folder that is about to change."""
    with writing(folder):
        (folder / MANIFEST).unlink(missing_ok=True)


@contextmanager
def sealing(folder: Path, journal: Journal) -> Iterator[None]:
    """Lends a scope in which a run's folder may change; it is sealed at the end, unless an error ends it."""
    unseal(folder)
    yield
    # A reader in the middle of something keeps the newest rounds out of the file; what will change is not sealed.
    if journal.settle():
        seal(folder, kind="run", about={"rounds": str(journal.last)})


def renew(folder: Path, name: str) -> None:
    """Seals a folder again after its file or subfolder `name` was written anew; does nothing where there is no seal."""
    known = seal_of(folder)
    if known is None:
        return
    kept = {path: told for path, told in known.files.items() if path.split("/")[0] != name}
    found = {_name(path, folder): _measured(path) for path in _sealable(folder, known.kind)}
    fresh = {path: told for path, told in found.items() if path.split("/")[0] == name}
    with writing(folder):
        write_whole(folder / MANIFEST, _spelt(known.kind, {**kept, **fresh}, known.about)[0])


def seal_of(folder: Path) -> Seal | None:
    """Returns what a folder's manifest says, or None when it has none.

    Raises:
      SealError: a bit of the manifest itself has changed.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        text = path.read_bytes().decode("utf-8")
        told = json.loads(text)
        files = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in told["files"].items()}
        about = {str(name): str(value) for name, value in told["about"].items()}
        spelt, made = _spelt(str(told["kind"]), files, about)
        if spelt != text or any(_strays(name) for name in files):
            raise ValueError("it is not as it was written")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SealError(f"{path} is damaged, so it seals nothing; restore a copy of the folder.") from error
    return Seal(str(told["kind"]), files, about, made)


def broken(folder: Path) -> list[str]:
    """Returns the sealed files that are not what they were, in name order; none where there is no seal.

    Raises:
      SealError: a bit of the manifest itself has changed.
    """
    known = seal_of(folder)
    return (
        [] if known is None else [name for name, told in sorted(known.files.items()) if not _same(folder, name, told)]
    )


def sound(folder: Path, name: str) -> bool:
    """Returns whether one file is what it was when the folder was sealed; also where there is no seal."""
    known = seal_of(folder)
    while known is not None and name in known.files and not _same(folder, name, known.files[name]):
        before, known = known, seal_of(folder)
        if known == before:  # else somebody writes into the folder, who has taken the seal off first
            return False
    return True


def check(folder: Path, *, in_part: bool = False) -> Seal | None:
    """Returns a folder's seal after comparing every byte with it, or None when it has none.

    Args:
      folder: the folder.
      in_part: whether files may be gone, as from a copy of some of them.

    Raises:
      SealError: a bit of a file has changed, or the file is gone.
    """
    known = seal_of(folder)
    changed = [name for name in broken(folder) if not in_part or (folder / name).exists()]
    if changed and seal_of(folder) != known:
        return check(folder, in_part=in_part)  # somebody writes into the folder, who has taken the seal off first
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise SealError(
            f"{folder / changed[0]}{more} is not what it was when the folder was sealed; restore a copy, or delete "
            f"{folder / MANIFEST} if it was changed on purpose."
        )
    return known


def _spelt(kind: str, files: Mapping[str, tuple[int, str]], about: Mapping[str, str]) -> tuple[str, str]:
    """Returns the one text that says this, and its seal."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    told = {"about": dict(sorted(about.items())), "files": listed, "format": _FORMAT, "kind": kind}
    made = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return json.dumps({**told, "seal": made}, indent=1) + "\n", made


def _sealable(folder: Path, kind: str) -> Iterator[Path]:
    found = {path for pattern in (_OF_A_RUN if kind == "run" else _OF_AN_EXPORT) for path in folder.glob(pattern)}
    for path in sorted(found):
        if path != folder / MANIFEST and path.suffix != ".new" and path.is_file() and not path.is_symlink():
            yield path


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _strays(name: str) -> bool:
    """Whether a name leads out of the folder."""
    return not name or os.path.isabs(name) or ".." in name.split("/") or "\0" in name


def _measured(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _same(folder: Path, name: str, told: tuple[int, str]) -> bool:
    path = folder / name
    try:
        whole = path.is_file() and not path.is_symlink() and path.stat().st_size == told[0]
        return whole and _measured(path) == told
    except OSError:
        return False
