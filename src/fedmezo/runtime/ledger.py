"""An append-only SQLite file whose records form a hash chain; `journal.py` says what the records mean.

A record is some rows that were written in one transaction. All of them carry its link number, and row `link` of table
`links` holds sha256(digest of the link before, link, round, every column of every row). One changed bit in any row
breaks the chain from that link on. What a chain cannot show is that its newest records were cut off cleanly, so the
lock file beside it holds the chain's head (see `set_head`).
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from fedmezo.errors import JournalError
from fedmezo.runtime.chain import Row, Rows, Value, digest_of
from fedmezo.runtime.sqlitefile import TABLES, Head, connect, head_of, lay_out, lock, set_head, sync_folder

__all__ = ["Ledger", "Row", "Rows", "Value", "integer"]

_ROOM = 1024  # bytes of a row, at most, that are neither text nor blob
_NEXT = "SELECT COALESCE(MAX(link) + 1, 0) FROM links"
_DIGEST = "SELECT digest FROM links WHERE link = ?"


class Ledger:
    """An open ledger; make one with `create` or `open`, give it back with `close`."""

    def __init__(self, path: Path, db: sqlite3.Connection, held: int | None) -> None:
        """Takes over an identified connection, and the lock file's descriptor when it may write."""
        self.path = path
        self._db = db
        self._lock = held

    @classmethod
    def create(cls, path: Path, rows: Rows) -> "Ledger":
        """Makes a new ledger whose link 0 holds `rows`; the file appears whole or not at all.

        Raises:
          JournalError: something is there already, or the folder cannot be written.
        """
        held = lock(path)
        new = path.with_name(path.name + ".new")
        try:
            if path.exists():
                raise JournalError(f"{path} is there already; resume that run or choose another folder.")
            # Without its journal an old WAL is worthless, yet SQLite would apply it to the new file.
            for stale in (f"{path}-wal", f"{path}-shm", new, f"{new}-journal"):
                Path(stale).unlink(missing_ok=True)
            set_head(held, None)
            with closing(sqlite3.connect(new, isolation_level=None)) as db:
                db.execute("BEGIN")
                lay_out(db)
                head = cls(new, db, None)._insert(0, rows)
                db.execute("COMMIT")
            new.rename(path)
            sync_folder(path.parent)
            set_head(held, head)
            return cls(path, connect(path, readonly=False), held)
        except BaseException as error:
            os.close(held)
            if not isinstance(error, sqlite3.Error | OSError):
                raise
            raise JournalError(f"{path} cannot be made ({error}); free some disk space or choose another.") from error

    @classmethod
    def open(cls, path: Path, *, readonly: bool) -> "Ledger":
        """Opens a ledger; many may read it while one writes it.

        Raises:
          JournalError: it is not there, not a ledger, damaged, newer than this package, locked or not writable.
        """
        if not path.is_file():
            raise JournalError(f"There is no journal at {path}; give the folder that `fedmezo run` made.")
        held = None if readonly else lock(path)
        try:
            return cls(path, connect(path, readonly=readonly), held)
        except BaseException:
            if held is not None:
                os.close(held)
            raise

    def add(self, round_number: int, rows: Rows) -> None:
        """Adds a record in one transaction; when it returns, the record is on the disk.

        Raises:
          JournalError: the disk is full or fails; the ledger is as it was.
        """
        with self._writing():
            head = self._insert(round_number, rows)
        self._came_to(head)

    def cut(self, link: int, round_number: int, rows: Rows) -> None:
        """Removes all records from `link` on and adds one that says so, in one transaction."""
        with self._writing():
            if self._lock is not None and isinstance(before := self._before(link), bytes):
                set_head(self._lock, Head(link, before), sync=True)
            self._db.execute("DELETE FROM links WHERE link >= ?", (link,))
            head = self._insert(round_number, rows)
        self._came_to(head)

    def _came_to(self, head: Head) -> None:
        # The record is on the disk; a head that lags behind only guards less.
        if self._lock is not None:
            with suppress(OSError):
                set_head(self._lock, head)

    def settle(self) -> bool:
        """Moves everything from SQLite's write-ahead log into the file; returns whether all of it is there.

        Raises:
          JournalError: the disk is full or fails.
        """
        try:
            busy, frames, moved = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise JournalError(f"{self.path} cannot be written ({error}); its rounds are safe all the same.") from error
        return not busy and frames == moved

    def _insert(self, round_number: int, rows: Rows) -> Head:
        link = self._db.execute(_NEXT).fetchone()[0]
        for table, listed in rows.items():
            for place, row in enumerate(listed):
                self._fits(table, row)
                marks = ", ".join("?" * (len(row) + 2))
                self._db.execute(f"INSERT INTO {table} VALUES ({marks})", (link, place, *row))
        # Read back before hashing: SQLite may keep another form of a number than it was given.
        digest = digest_of(self._before(link), (link, round_number), self._rows(link))
        self._db.execute("INSERT INTO links VALUES (?, ?, ?)", (link, round_number, digest))
        return Head(link + 1, digest)

    def _fits(self, table: str, row: Row) -> None:
        size = sum(len(value) for value in row if isinstance(value, bytes | str)) + _ROOM
        most = self._db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
        if size > most:
            raise JournalError(
                f"{self.path} cannot hold a row of {size:,} bytes in its table {table}, SQLite takes at most {most:,}; "
                "nothing of this record was written. Train fewer parameters, or with an algorithm that sends scalars."
            )

    @property
    def writable(self) -> bool:
        """Whether this process writes it, and so no other."""
        return self._lock is not None

    def length(self) -> int:
        """Returns the number of records."""
        return integer(self.query(_NEXT)[0][0])

    def query(self, sql: str, *values: Value) -> list[Row]:
        """Returns the rows of a query that only reads."""
        with self.reading():
            return self._db.execute(sql, values).fetchall()

    def record(self, link: int) -> Rows:
        """Returns a record's rows by table, without link and place, after checking them against the chain.

        Raises:
          JournalError: a bit of it has changed since it was written.
        """
        with self.reading():
            found = self._db.execute("SELECT round, digest FROM links WHERE link = ?", (link,)).fetchone()
            rows = self._rows(link)
            if not found or found[1] != digest_of(self._before(link), (link, found[0]), rows):
                which = f"record {link} (round {found[0] if found else '?'})" if link else "its header"
                raise JournalError(f"{self.path} is damaged: {which} differs from its checksum; restore a copy of it.")
            return {table: [row[2:] for row in listed] for table, listed in rows.items()}

    def _rows(self, link: int) -> Rows:
        return {
            table: self._db.execute(f"SELECT * FROM {table} WHERE link = ? ORDER BY place", (link,)).fetchall()
            for table in TABLES
        }

    def _before(self, link: int) -> Value:
        found = self._db.execute(_DIGEST, (link - 1,)).fetchone()
        return found[0] if found else None

    def verify(self) -> None:
        """Checks every record, then SQLite's own structures.

        Raises:
          JournalError: naming the first round that is damaged.
        """
        with self.reading():
            sound = 0
            try:
                for link in range(self.length()):
                    sound += len(self.record(link)["rounds"])
                problem = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
                orphans = self._db.execute("PRAGMA foreign_key_check").fetchall()
            except (JournalError, sqlite3.Error, UnicodeError) as error:
                raise JournalError(
                    f"{self.path}: round {sound} is damaged, the {sound} before it are sound "
                    f"({error.__cause__ or 'checksum'}); restore a copy of the file, or keep the sound rounds with "
                    f"`fedmezo rollback {self.path.parent} --round {sound}`."
                ) from error
            if problem != "ok" or orphans:
                raise JournalError(f"{self.path}: all {sound} rounds are sound, but the file is damaged ({problem}).")
        self.check_head()

    def check_head(self) -> None:
        """Checks that no record is missing at the end.

        Raises:
          JournalError: the newest ones are gone, or nobody can tell.
        """
        head = head_of(self.path)
        while head is not None and self.query(_DIGEST, head.links - 1) != [(head.digest,)]:
            known, head = head, head_of(self.path)
            if known == head:  # else somebody has just taken records back
                sound = integer(self.query("SELECT COALESCE(MAX(round) + 1, 0) FROM rounds")[0][0])
                lost = head.links - self.length()
                raise JournalError(
                    f"{self.path}: the {sound} rounds in it are sound, but its {lost} newest records are gone; restore "
                    f"a copy, or go on from there with `fedmezo rollback {self.path.parent} --round {sound}`."
                )

    def backup(self, label: str) -> Path:
        """Returns a new copy of the whole ledger, beside it; `label` stands in its name before a number."""
        number = 1
        while (target := self.path.with_name(f"{self.path.stem}.{label}-{number}{self.path.suffix}")).exists():
            number += 1
        half = target.with_name(target.name + ".new")
        try:
            half.unlink(missing_ok=True)
            with closing(sqlite3.connect(half)) as copy:
                self._db.backup(copy)
            half.rename(target)
        except (sqlite3.Error, OSError) as error:
            raise JournalError(
                f"{target} cannot be written ({error}); nothing was changed, free some space."
            ) from error
        return target

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Holds one consistent view of the file, whatever a writer does meanwhile."""
        try:
            outermost = not self._db.in_transaction
            if outermost:
                self._db.execute("BEGIN")
            try:
                yield
            finally:
                if outermost:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
        except sqlite3.ProgrammingError as error:
            raise JournalError(f"{self.path} is closed; open it again.") from error
        except (sqlite3.Error, UnicodeError) as error:
            raise JournalError(f"{self.path} cannot be read ({error}); `fedmezo verify` says from where on.") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self._lock is None:
            raise JournalError(f"{self.path} is not open for writing; open it without readonly.")
        safe = 0
        try:
            self._db.execute("BEGIN IMMEDIATE")
            safe = self._db.execute("SELECT COALESCE(MAX(round) + 1, 0) FROM rounds").fetchone()[0]
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                kept = f"the {safe} rounds up to round {safe - 1} are safe" if safe else "no round was complete"
                raise JournalError(
                    f"{self.path} cannot be written ({error}); {kept}. "
                    f"Mend that (free some disk space) and go on with `fedmezo resume {self.path.parent}`."
                ) from error
            raise

    def close(self) -> None:
        """Closes the file and lets others write it; a second call does nothing."""
        with suppress(sqlite3.Error):
            self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def integer(value: Value) -> int:
    """Returns an INTEGER column's value; raises JournalError when the file holds something else there."""
    if not isinstance(value, int):
        raise JournalError(f"The journal holds {value!r} where a number belongs; `fedmezo verify` says from where on.")
    return value
