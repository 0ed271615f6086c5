"""What a link of the journal's hash chain is the digest of."""

import hashlib
import struct
from collections.abc import Mapping, Sequence

from fedmezo.runtime.sqlitefile import TABLES

__all__ = ["Row", "Rows", "Value", "digest_of"]

Value = int | float | str | bytes | None
Row = Sequence[Value]
Rows = Mapping[str, Sequence[Row]]


def digest_of(before: Value, key: Row, rows: Rows) -> bytes:
    """Returns the digest of a record: of the record's before it, its own number and round, and every row of it."""
    state = hashlib.sha256(_frame((before, *key)))
    for table in TABLES:
        for row in rows[table]:
            state.update(_frame((table, *row)))
    return state.digest()


def _frame(values: Row) -> bytes:
    """Returns the values with their types and lengths, so that no two rows give the same bytes."""
    parts = [struct.pack("<I", len(values))]
    for value in values:
        data = struct.pack("<d", value) if isinstance(value, float) else value
        data = data if isinstance(data, bytes) else str(data).encode()
        parts.append(struct.pack("<cQ", type(value).__name__[0].encode(), len(data)) + data)
    return b"".join(parts)
