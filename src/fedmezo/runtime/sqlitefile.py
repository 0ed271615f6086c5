"""The SQLite file beneath the journal: its tables, who may write it, and what is wrong when it does not open."""

import fcntl
import hashlib
import os
import sqlite3
import struct
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fedmezo.errors import JournalError

__all__ = [
    "APPLICATION_ID",
    "FORMAT",
    "TABLES",
    "Head",
    "connect",
    "head_of",
    "lay_out",
    "lock",
    "set_head",
    "sync_folder",
]

APPLICATION_ID = 0x464D5A4A  # "FMZJ"
FORMAT = 1

# A column that may hold nan is nullable: SQLite keeps nan as NULL.
TABLES = {
    "run": """config TEXT NOT NULL, fingerprint TEXT NOT NULL, layout TEXT NOT NULL, law TEXT NOT NULL,
        noise_version INTEGER NOT NULL, package TEXT NOT NULL, created TEXT NOT NULL, kind TEXT NOT NULL""",
    "rounds": """round INTEGER NOT NULL UNIQUE, loss REAL, rate REAL, slowed REAL, seconds REAL,
        forwards INTEGER NOT NULL, tokens INTEGER NOT NULL, digest TEXT""",
    "replies": """round INTEGER NOT NULL, client INTEGER NOT NULL, weight REAL NOT NULL, rate REAL NOT NULL, loss REAL,
        examples INTEGER NOT NULL, skipped INTEGER NOT NULL, bytes_down INTEGER NOT NULL, bytes_up INTEGER NOT NULL,
        task BLOB NOT NULL, reply BLOB NOT NULL, UNIQUE (round, client)""",
    "evaluations": """round INTEGER NOT NULL, split TEXT NOT NULL, metric TEXT NOT NULL, value REAL,
        UNIQUE (round, split, metric)""",
    "events": "round INTEGER NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL",
}
_LINKS = "CREATE TABLE links (link INTEGER PRIMARY KEY, round INTEGER NOT NULL, digest BLOB NOT NULL)"
_TABLE = """CREATE TABLE {name} (
    link INTEGER NOT NULL REFERENCES links ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED, place INTEGER NOT NULL,
    {columns}, PRIMARY KEY (link, place))"""


_HEAD = struct.Struct("<8sQ32s")
_MARK = b"fmzhead1"


class Head(NamedTuple):
    """How far a journal had come: its number of records, and the digest of the last one."""

    links: int
    digest: bytes


def lay_out(db: sqlite3.Connection) -> None:
    """Makes the tables of an empty file and marks it as ours."""
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {FORMAT}")
    db.execute(_LINKS)
    for name, columns in TABLES.items():
        db.execute(_TABLE.format(name=name, columns=columns))
    db.execute("CREATE INDEX events_by_round ON events (round)")


def lock(path: Path) -> int:
    """Returns the descriptor of the locked lock file beside `path`; closing it, or dying, unlocks it.

    SQLite's own locks last for one transaction only, and closing any descriptor of the database drops them.

    Raises:
      JournalError: another process writes the journal, or the folder cannot be written.
    """
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise JournalError(
            f"{path} cannot be written: {error.strerror} in {path.parent}; make that folder writable or choose another."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        reason = "another process is writing it" if isinstance(error, BlockingIOError) else error.strerror
        raise JournalError(f"{path} cannot be locked: {reason}; wait for it to end, or stop it.") from error
    return descriptor


def set_head(descriptor: int, head: Head | None, *, sync: bool = False) -> None:
    """Writes into a locked lock file how far its journal has come; None when that is not known.

    A chain cannot show that its newest records are gone, as they are when one bit of SQLite's write-ahead log changes
    after a crash. So the head is written after a record, and before records are cut off: it is never ahead of the file.

    Raises:
      OSError: the disk fails.
    """
    body = _HEAD.pack(_MARK, *head) if head is not None else b""
    if head is None:
        os.ftruncate(descriptor, 0)
    else:
        # In one piece: a process that is killed has written all of it or nothing.
        os.pwrite(descriptor, body + hashlib.sha256(body).digest(), 0)
    if sync:
        os.fsync(descriptor)


def head_of(path: Path) -> Head | None:
    """Returns how far the journal at `path` has come at least; None when nobody wrote it down.

    Raises:
      JournalError: a bit of what was written down has changed.
    """
    try:
        data = Path(f"{path}.lock").read_bytes()
    except OSError:
        return None
    if not data:
        return None
    body = data[: _HEAD.size]
    if data[_HEAD.size :] != hashlib.sha256(body).digest() or len(body) != _HEAD.size:
        raise JournalError(
            f"{path}.lock is damaged and no longer says how far the journal had come; delete it to go on without that."
        )
    mark, links, digest = _HEAD.unpack(body)
    return Head(links, digest) if mark == _MARK else None


def sync_folder(folder: Path) -> None:
    """Makes a new file's name survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def connect(path: Path, *, readonly: bool) -> sqlite3.Connection:
    """Returns a connection to a journal file, after making sure that it is one.

    Raises:
      JournalError: it is damaged, something else, newer than this package, or not writable.
    """
    wal = Path(f"{path}-wal")
    try:
        return _identified(path, "mode=rw", readonly=readonly)
    except sqlite3.OperationalError as error:
        # SQLite cannot read a WAL-mode file in a folder it may not write, unless told that nobody else writes it.
        if readonly and not (wal.exists() and wal.stat().st_size):
            with suppress(sqlite3.Error, UnicodeError):
                return _identified(path, "immutable=1", readonly=True)
        advice = "copy it" if readonly else "make the file and its folder writable, or copy them"
        raise JournalError(f"{path} cannot be opened ({error}); {advice} to a place you may write.") from error
    except (sqlite3.DatabaseError, UnicodeError) as error:
        raise JournalError(f"{path} is damaged or not a journal ({error}); restore a copy of it.") from error


def _identified(path: Path, mode: str, *, readonly: bool) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, isolation_level=None, timeout=30)
    try:
        _check(path, db)
        if readonly:
            # Not mode=ro: such a connection leaves its -wal and -shm files behind.
            db.execute("PRAGMA query_only = ON")
        else:
            for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                db.execute(f"PRAGMA {setting}")
            db.execute("BEGIN IMMEDIATE")
            db.execute("ROLLBACK")
        return db
    except BaseException:
        db.close()
        raise


def _check(path: Path, db: sqlite3.Connection) -> None:
    tables = {str(row[0]) for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    mark, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if mark != APPLICATION_ID:
        raise JournalError(f"{path} is a file of another kind; give the journal that `fedmezo run` made.")
    if version > FORMAT:
        raise JournalError(f"{path} has journal format {version}, this fedmezo reads up to {FORMAT}; update fedmezo.")
    missing = {"links", *TABLES} - tables
    if version < 1 or missing:
        raise JournalError(f"{path} is damaged: it lacks {sorted(missing) or 'its version'}; restore a copy of it.")
    # A column that computes itself, or a trigger, would be somebody else's program.
    if foreign := _schema(db) - _ours():
        raise JournalError(f"{path} holds what no journal has: {sorted(name for name, _ in foreign)}; restore a copy.")


def _schema(db: sqlite3.Connection) -> frozenset[tuple[str, str]]:
    """Returns name and text of everything that was made in a file."""
    rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return frozenset((str(name), str(sql)) for name, sql in rows)


@cache
def _ours() -> frozenset[tuple[str, str]]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        lay_out(db)
        return _schema(db)
