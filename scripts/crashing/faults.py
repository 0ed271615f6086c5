"""A full disk, a folder that may not be written, a clock that jumps."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crashing.bed import Bed, Row, Trial, telling
from crashing.fork import Tell, forked

NOBODY = 65534


def disk(bed: Bed) -> Iterator[Trial]:
    calls = bed.reference("run")[1]
    for mode in ("full", "fails"):
        for at in range(1, len(calls) + 1, 3):
            yield f"disk {mode} {at}", lambda m=mode, a=at: _failing(bed, m, a, calls[a - 1])
    for limit in (20_000, 60_000, 80_000, 100_000, 140_000, 200_000):
        yield f"disk file-limit {limit}", lambda n=limit: _limited(bed, n)
    for size in (96, 128, 192, 256, 320, 448):
        yield f"disk file-system {size}", lambda n=size: _small(bed, n)


def _failing(bed: Bed, mode: str, at: int, call: str) -> Row:
    folder = bed.begin("run")
    ended = forked(bed.armed("run", folder, mode, at))
    row = {"call": call, "error": ended.error, "bug": ended.bug}
    return {**row, **bed.judged("run", folder, ended)}


def _limited(bed: Bed, limit: int) -> Row:
    folder = bed.begin("run")

    def work(tell: Tell) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        bed.act("run", folder)(tell)

    ended = forked(work)
    return {"error": ended.error, "bug": ended.bug, **bed.judged("run", folder, ended)}


def _small(bed: Bed, kilobytes: int) -> Row:
    """A file system that is really full; only root can make one."""
    mount = bed.home / "small"
    mount.mkdir(exist_ok=True)
    given = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", mount], capture_output=True)
    if given.returncode:
        return {"skipped": given.stderr.decode().strip(), "equal": True, "lost": 0}
    try:
        folder = mount / "run"
        ended = forked(bed.act("run", folder))
        subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
        return {"error": ended.error, "bug": ended.bug, **bed.judged("run", folder, ended)}
    finally:
        subprocess.run(["umount", mount], check=True)


def place(bed: Bed) -> Iterator[Trial]:
    for verb in ("run", "run:more", "run:rollback"):
        yield f"place {verb}", lambda v=verb: _forbidden(bed, v)
    for at in range(3):
        yield f"place run from round {at}", lambda n=at: _forbidden_later(bed, n)


def _forbidden(bed: Bed, name: str) -> Row:
    """In a folder nobody may write: writers refuse in a sentence and leave all as it was, readers work."""
    from fedmezo.studies.run import evaluate, export, verify

    folder = bed.begin(name)
    folder.mkdir(exist_ok=True)
    before = _bytes_of(folder)
    out = Path(tempfile.mkdtemp(dir=bed.home))
    out.chmod(0o777)

    def work(tell: Tell) -> None:
        with powerless(folder):
            if ":" in name:
                tell({"read": [bool(verify(folder)["ok"]), bool(evaluate(folder)), export(folder, out=out / "a").name]})
            bed.act(name, folder)(tell)

    ended = forked(work)
    row = {"error": ended.error, "bug": ended.bug, "untouched": _bytes_of(folder) == before}
    row["read"] = any("read" in one for one in ended.told) or ":" not in name
    return {**row, **bed.judged(name, folder, ended)}


def _forbidden_later(bed: Bed, at: int) -> Row:
    from fedmezo.studies.run import run

    folder = bed.begin("run")

    def work(tell: Tell) -> None:
        watch = telling(tell)
        told = watch.round

        def forbids(report: Any) -> None:
            told(report)
            if report.round == at:
                folder.chmod(0o555)
                os.seteuid(NOBODY)

        watch.round = forbids
        run(bed.config("run"), out=folder, watch=watch)

    ended = forked(work)
    folder.chmod(0o755)
    return {"error": ended.error, "bug": ended.bug, **bed.judged("run", folder, ended)}


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def powerless(folder: Path) -> Iterator[None]:
    """Root may write anywhere, so become nobody for a while."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        folder.chmod(0o755)


JUMPS = (-10 * 365 * 86_400, -86_400, -1, 3_600, 10 * 365 * 86_400)


def clock(bed: Bed) -> Iterator[Trial]:
    for name in ("run", "surge"):
        for jump in JUMPS:
            yield f"clock {name} {jump}", lambda n=name, j=jump: _jumping(bed, n, j)


def _jumping(bed: Bed, name: str, jump: int) -> Row:
    """Forward and back again, round by round, and once more for the process that goes on after a kill."""
    from fedmezo.studies.run import resume, run

    folder = bed.begin(name)

    def work(tell: Tell) -> None:
        watch = telling(tell)
        told = watch.round

        def jumps(report: Any) -> None:
            told(report)
            bed.shim.crash_clock(ctypes.c_long(jump if report.round % 2 == 0 else 0))
            tell({"year": time.gmtime().tm_year})
            if report.round == 1 and not resumed:
                os.kill(os.getpid(), signal.SIGKILL)

        watch.round = jumps
        if resumed:
            tell({"summary": resume(folder, watch=watch).seconds})
        else:
            run(bed.config(name), out=folder, watch=watch)

    resumed = False
    ended = forked(work)
    resumed = True
    after = forked(work)
    seconds = next((one["summary"] for one in after.told if "summary" in one), -1)
    years = sorted({one["year"] for one in (*ended.told, *after.told) if "year" in one})
    row = {"years": years, "sane": 0 <= seconds < 60, "bug": after.bug, "error": after.error}
    return {**row, **bed.judged(name, folder, ended)}
