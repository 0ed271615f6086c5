"""Journals: files with wrong bytes, and files whose chain of checksums is right and whose rows are not."""

import math
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import torch

from fedmezo.errors import JournalError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.chain import digest_of as _digest
from fedmezo.runtime.journal import LOOK, Entry, Header, Journal, Round, replay
from fedmezo.runtime.ledger import TABLES, Ledger
from fedmezo.runtime.pace import Look, start_of
from fedmezo.zo.params import Params
from fedmezo.zo.seedsum import DenseDelta
from fuzzing.course import Check, Target
from fuzzing.mutation import sealed

__all__ = ["TARGETS", "read_all"]

_PAGE = 512  # bytes; the smallest that SQLite has, so that an edit meets something more often
_KINDS = 8
_TEXTS = ("", "nan", "-1", "1e999", "9" * 5000, "{}", "[" * 5000, "null", '{"at": 1}', "gaussian", "\x00")


def _params() -> Params:
    return Params({"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(4)})


def _round(number: int) -> Round:
    tasks = [Task(number, client, 7, 0.01, 1e-3, 2, clip=math.inf, dense=client == 4) for client in (0, 4)]
    replies = [Reply(number, task.client, 3, 1.5, (1.5, math.nan)) for task in tasks]
    if number == 2:
        tasks = [replace(task, method="sgd", dense=False) for task in tasks]
        grown = DenseDelta({name: torch.ones_like(tensor) for name, tensor in _params()})
        replies = [replace(reply, slopes=(), delta=grown) for reply in replies]
    entries = tuple(Entry(t, r, 0.5, 80, 60) for t, r in zip(tasks, replies, strict=True))
    events = (("note", "naïve"), (LOOK, start_of(number, [2.0, 1.0]).to_json()))
    return Round(
        number, entries, loss=1.5, rate=0.01, slowed=1.0, seconds=0.5, forwards=12, tokens=40,
        evaluations={"eval": {"loss": 1.25, "accuracy": math.nan}}, events=events,
    )  # fmt: skip


@cache
def journals() -> list[bytes]:
    """Returns the bytes of valid journals: an empty one, and one of three rounds."""
    found = []
    for rounds in (0, 3):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "journal.sqlite"
            header = Header("{}", "ab" * 32, _params().layout(), "gaussian", 1, "0.1.0", "2026-01-02T03:04:05+00:00")
            with Journal.create(path, header) as journal:
                journal.record_evaluation(-1, "eval", {"loss": 2.0})
                for number in range(rounds):
                    journal.append(_round(number))
                journal.add_event(journal.last, "slow", "0.5")
            with closing(sqlite3.connect(path, isolation_level=None)) as db:
                for said in ("PRAGMA journal_mode = DELETE", f"PRAGMA page_size = {_PAGE}", "VACUUM"):
                    db.execute(said)
            found.append(path.read_bytes())
    return found


def read_all(path: Path, *, verified: bool = False) -> str:
    """Returns all that a journal says, as text, after checking all of it if asked to; raises JournalError."""
    with Journal.open(path, readonly=True) as journal:
        if verified:
            journal.verify_chain()
        looks = [Look.from_json(detail) for _, kind, detail in journal.events() if kind == LOOK]
        rounds = list(journal.rounds())
        said = [journal.header, rounds, journal.evaluations(), journal.events(), journal.slowed(), looks]
        params = _params()
        replay(params, journal)
        return repr((said, params.digest()))


def _clean(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder / "journal.sqlite"


def _damaged(folder: Path) -> Check:
    """The law: what is read is what was written."""
    right = set()
    for data in journals():
        _clean(folder).write_bytes(data)
        right.add(read_all(folder / "journal.sqlite"))

    def check(data: bytes) -> bool:
        path = _clean(folder)
        path.write_bytes(data)
        try:
            read_all(path)
            said = read_all(path, verified=True)
        except JournalError:
            return False
        if said not in right:
            raise AssertionError("a damaged journal was read as if it were sound")
        return True

    return check


def _forged(folder: Path) -> Check:
    """The law: rows that nobody wrote are refused, or are valid values."""
    template = journals()[-1]

    def check(data: bytes) -> bool:
        path = _clean(folder)
        path.write_bytes(template)
        with closing(sqlite3.connect(path, isolation_level=None)) as db, suppress(sqlite3.Error, OverflowError):
            db.execute("PRAGMA journal_mode = OFF")
            db.execute("PRAGMA synchronous = OFF")
            _forge_(db, path, data)
        try:
            read_all(path)
        except JournalError:
            return False
        return True

    return check


def _forge_(db: sqlite3.Connection, path: Path, data: bytes) -> None:
    """Changes cells as `data` says, and makes the chain right again."""
    db.execute("BEGIN")
    for table, row, column, value in _edits(data):
        names = [str(found[1]) for found in db.execute(f"PRAGMA table_info({table})")]
        name = names[column % len(names)]
        rows = db.execute(f"SELECT rowid, {name} FROM {table}").fetchall()
        with suppress(sqlite3.IntegrityError):
            if rows and value is None and row >= 128:
                db.execute(f"DELETE FROM {table} WHERE rowid = ?", (rows[row % len(rows)][0],))
            elif rows:
                number, before = rows[row % len(rows)]
                new = _message(before, value) if isinstance(before, bytes) and isinstance(value, bytes) else value
                db.execute(f"UPDATE {table} SET {name} = ? WHERE rowid = ?", (new, number))
    ledger = Ledger(path, db, None)
    for link, number in db.execute("SELECT link, round FROM links ORDER BY link").fetchall():
        digest = _digest(ledger._before(link), (link, number), ledger._rows(link))
        db.execute("UPDATE links SET digest = ? WHERE link = ?", (digest, link))
    db.execute("COMMIT")


def _edits(data: bytes) -> Iterator[tuple[str, int, int, int | float | str | bytes | None]]:
    tables, at = [*TABLES, "links"], 0
    while at + 5 <= len(data):
        table, row, column, kind, size = data[at : at + 5]
        rest = data[at + 5 : at + 5 + size]
        number = int.from_bytes(rest[:8], "little", signed=True)
        values = (None, number, struct.unpack("<d", rest[:8].ljust(8, b"\0"))[0], rest.decode(errors="replace"), rest,
                  _TEXTS[(number or 1) % len(_TEXTS)], rest, -number)  # fmt: skip
        yield tables[table % len(tables)], row, column, values[kind % _KINDS]
        at += 5 + size


def _message(before: bytes, edits: bytes) -> bytes:
    """Returns a message with other bytes in it, and a right checksum."""
    room = bytearray(before or b"\0")
    for place, byte in zip(edits[::2], edits[1::2], strict=False):
        room[place % len(room)] = byte
    return sealed(bytes(room), Random(0))


def _edit_seeds() -> list[bytes]:
    """Returns one edit of each kind for every table."""
    rest = (b"", bytes([3] * 8), struct.pack("<d", 2.5), b"text", bytes([20, 255, 40, 1]), bytes([1]), b"", b"\1")
    return [
        bytes([table, 1, column, kind, len(rest[kind])]) + rest[kind]
        for table in range(len(TABLES) + 1) for column in range(2, 13, 3) for kind in range(_KINDS)
    ]  # fmt: skip


TARGETS = (
    Target("journal (wrong bytes)", journals, _damaged, share=0.05, most=1 << 16, dear=True, seconds=1.0),
    Target("journal (wrong rows)", _edit_seeds, _forged, share=0.02, most=1 << 9, dear=True, seconds=1.0),
)
