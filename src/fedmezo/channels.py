"""Standard output and standard error of the command: results on the one, everything else on the other."""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer

__all__ = ["aside", "emit", "fail", "plain", "saying"]


@contextmanager
def aside() -> Iterator[None]:
    """Sends to standard error whatever anything, even a child process, prints meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def emit(result: Mapping[str, Any]) -> None:
    """Prints a result as one JSON object on one line of standard output."""
    typer.echo(json.dumps(plain(result), allow_nan=False))


def saying(*, quiet: bool = False) -> Callable[[str], None]:
    """Returns what is told of a verb's progress: a line on standard error, or nothing."""
    return lambda text: None if quiet else typer.echo(text, err=True)


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: numbers that are not finite become null, anything unknown its text."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, float) or hasattr(value, "item"):
        number = value if isinstance(value, float) else value.item()
        return number if not isinstance(number, float) or math.isfinite(number) else None
    return value if isinstance(value, str | int | None) else str(value)


def fail(error: BaseException, text: str, *, given: Sequence[str], code: int) -> int:
    """Returns `code` after telling the error: a line per problem, and one object on standard output under --json."""
    if os.environ.get("FEDMEZO_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    for line in text.splitlines():
        typer.echo(f"error: {line}", err=True)
    if "--json" in given:
        emit({"error": {"type": type(error).__name__, "message": text}})
    return code
