"""Rows of local data files: json, jsonl (both also gzipped), csv and parquet."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fedmezo.errors import DataError

__all__ = ["SUFFIXES", "Row", "data_files", "read_rows", "stem"]

Row = dict[str, object]

# What a packed file may hold unpacked: this, and so many times its size. Text packs to a tenth, a bomb to a thousandth.
_ROOM, _TIMES = 64 << 20, 100
_CELLS = 1 << 20  # values of a parquet file, in the same way: a value can take no bytes at all


def data_files(path: Path) -> list[Path]:
    """Returns the data files `path` names: itself, or a folder's own, by name; subfolders are not entered.

    Raises:
      DataError: there is nothing at `path`, or a folder without data files.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"There is no data file or folder '{path}'; check the path.")
    found = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file))
    if not found:
        raise DataError(f"The folder '{path}' holds no file ending in {', '.join(SUFFIXES)}; check the path.")
    return found


def stem(path: Path) -> str:
    """Returns the file's name without its data suffix, ".jsonl.gz" being one suffix."""
    return path.name.removesuffix(_suffix(path))


def read_rows(path: Path) -> list[Row]:
    """Returns the file's rows, each a mapping from column to value, in file order.

    Raises:
      DataError: an unknown kind of file, damaged or badly encoded content, or no row at all.
    """
    suffix = _suffix(path)
    if not suffix:
        raise DataError(f"Cannot read '{path}' by its name; expected one ending in {', '.join(SUFFIXES)}.")
    try:
        rows = SUFFIXES[suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it to UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file or fetch it again.") from error
    if not rows:
        raise DataError(f"{path}: the file holds no rows; give a file with at least one.")
    return rows


def _suffix(path: Path) -> str:
    name = path.name
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and name != suffix), "")


def _open(path: Path, *, newline: str | None = None) -> TextIO:
    # utf-8-sig: spreadsheets put a byte order mark in front, which would join the first column's name.
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(io.BufferedReader(_Unpacked(path)), encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


class _Unpacked(io.RawIOBase):
    """A packed file as it is unpacked, up to what may be in one of its size."""

    _file: Any = None

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, _ROOM + _TIMES * path.stat().st_size
        self._file = gzip.open(path)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any, /) -> int:
        size = self._file.readinto(room)
        self._left -= size
        if self._left < 0:
            raise DataError(f"{self._path}: unpacks to more than {_TIMES} times its size; unpack it yourself.")
        return size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def _parse(text: str, *, path: Path, line: int) -> object:
    try:
        return json.loads(text)
    # A number of more than 4,300 digits is a ValueError of no other kind.
    except (ValueError, RecursionError) as error:
        number = line + getattr(error, "lineno", 1) - 1
        raise DataError(f"{path}, line {number}: bad JSON ({error}); correct that line.") from error


def _row(value: object, *, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}; write one per record.")
    return value


def _json(path: Path) -> list[Row]:
    with _open(path) as file:
        value = _parse(file.read(), path=path, line=1)
    items = value if isinstance(value, list) else [value]
    return [_row(item, where=f"{path}, record {index}") for index, item in enumerate(items, start=1)]


def _json_lines(path: Path) -> list[Row]:
    with _open(path) as file:
        return [
            _row(_parse(text.strip(), path=path, line=number), where=f"{path}, line {number}")
            for number, text in enumerate(file, start=1)
            if text.strip()
        ]


def _csv_rows(path: Path) -> Iterator[Row]:
    with _open(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    where = f"{path}, line {reader.line_num}"
                    raise DataError(f"{where}: more values than the header has columns; quote commas.")
                yield dict(row)
        except csv.Error as error:
            # The inner reader's count: DictReader's own is not yet advanced when a line is bad.
            where = f"{path}, line {reader.reader.line_num}"
            raise DataError(f"{where}: bad CSV ({error}); correct that line.") from error


def _csv(path: Path) -> list[Row]:
    return list(_csv_rows(path))


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: needs the package 'pyarrow'; install it or convert to jsonl.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_size(file.metadata, path)
            rows: list[Row] = file.read().to_pylist()
    # A date beyond the year 9999 or text that is none shows when it is made a value of Python's.
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); fetch or write it again.") from error
    return rows


def _check_size(told: Any, path: Path) -> None:
    """Raises DataError when a parquet file says that it holds more than a file of its size may."""
    size = path.stat().st_size
    there = sum(max(0, told.row_group(at).total_byte_size) for at in range(told.num_row_groups))
    cells = told.num_rows * max(1, told.num_columns)
    if there > _ROOM + _TIMES * size or cells > _CELLS + _TIMES * size:
        raise DataError(f"{path}: {size:,} bytes that hold {cells:,} values or {there:,} bytes; convert it to jsonl.")


SUFFIXES: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json,
    ".json.gz": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
