"""Doing the cells of a study that have no record, in processes; a record is written as soon as it is there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Protocol

from fedmezo.errors import ConfigError, RunError
from fedmezo.studies.suite.cells import Cell, cells_of, missing_variables
from fedmezo.studies.suite.kinds import perform
from fedmezo.studies.suite.measures import measure
from fedmezo.studies.suite.records import Record, Store, adopt
from fedmezo.studies.suite.study import Study

__all__ = ["Progress", "check_one", "run_study"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class Progress(Protocol):
    """Is told how a study goes."""

    def planned(self, *, cells: int, there: int, waiting: Sequence[str]) -> None:
        """Takes how many cells there are, how many have a record, and why others cannot be run here."""

    def done(self, cell: Cell, record: Record, *, left: int) -> None:
        """Takes one cell that was run, and how many are left."""


class _Silent:
    def planned(self, *, cells: int, there: int, waiting: Sequence[str]) -> None:
        """Does nothing."""

    def done(self, cell: Cell, record: Record, *, left: int) -> None:
        """Does nothing."""


def run_study(
    study: Study,
    scale: str,
    *,
    store: Store,
    seeds: int | None = None,
    grids: Sequence[str] = (),
    only: Mapping[str, Sequence[str]] | None = None,
    workers: int = 1,
    watch: Progress | None = None,
) -> list[Record]:
    """Runs the cells of a study that have no record, and returns the records of all its cells.

    Interrupted, it goes on where it was when called again; failed cells are tried again. A cell that another study has
    run is not run again. Cells that need data that is not here are left out.

    Args:
      study: which.
      scale: of its scales.
      store: where records are.
      seeds: paired seeds; None for the study's own.
      grids: these grids only; all when empty.
      only: factor -> the levels that are run.
      workers: processes, one thread each.
      watch: is told.

    Raises:
      ConfigError: the scale is not offered, or a grid or level does not exist.
      RunError: a process died; what was done is kept.
    """
    watch, cells = watch or _Silent(), cells_of(study, scale, seeds=seeds, grids=grids, only=only)
    known = store.by_key(scale)
    missing = {cell.key: names for cell in cells if (names := missing_variables(cell))}
    todo = list({c.key: c for c in cells if c.key not in known and c.key not in missing}.values())
    waiting = sorted({f"Set {name} to the folder of the data sets." for names in missing.values() for name in names})
    watch.planned(cells=len(cells), there=len(cells) - len(todo) - len(missing), waiting=waiting)
    kept = {record.key for record in store.of(study.name, scale) if not record.error}
    for cell in cells:
        if cell.key in known and cell.key not in kept:
            store.append(adopt(known[cell.key], cell))
    for left, (cell, record) in enumerate(_done(todo, workers=workers), 1):
        store.append(record)
        watch.done(cell, record, left=len(todo) - left)
    return store.current(cells)


def _done(cells: Sequence[Cell], *, workers: int) -> Iterator[tuple[Cell, Record]]:
    """Yields the cells as they are done."""
    if workers == 1:
        yield from ((cell, perform(cell)) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")
    word, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(word,))
    with ours, _single_threads(), pool:
        running: dict[Future[Record], Cell] = {}
        waiting = list(reversed(cells))
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    cell = waiting.pop()
                    running[pool.submit(perform, cell)] = cell
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    record = future.result()
                    yield running.pop(future), record
        except BrokenProcessPool:
            labels = "; ".join(cell.label for cell in running.values())
            raise RunError(
                f"A process died, perhaps for want of memory, at one of: {labels}. Go on with the same command, with "
                "fewer --workers if it happens again."
            ) from None
        finally:
            if running:
                ours.close()  # cells that are stopped half-way are not waited for
            pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threads() -> Iterator[None]:
    """Lends a scope whose child processes use one thread each."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _prepare(word: Connection) -> None:
    """Readies a process for cells; it ends when the one that began it closes its end of `word`, or is no more."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave, args=(word,), daemon=True).start()


def _leave(word: Connection) -> None:
    with suppress(EOFError, OSError):
        word.recv()
    os._exit(1)


def check_one(study: Study, scale: str, *, store: Store, kind: str = "", tolerance: float = 1e-3) -> list[str]:
    """Runs the cheapest recorded cell again and returns how it differs from its record; empty for not at all.

    Memory is not compared: it is that of a machine.

    Args:
      study: which.
      scale: of its scales.
      store: where records are.
      kind: what the cell does; any when empty.
      tolerance: relative; other machines round other bits.

    Raises:
      ConfigError: no such record, or none that can be run here.
    """
    cells = {cell.key: cell for cell in cells_of(study, scale) if not missing_variables(cell)}
    known = [r for r in store.of(study.name, scale) if r.key in cells and not r.error and kind in ("", r.kind)]
    if known and all(record.kind == "memory" for record in known):
        return []
    known = [record for record in known if record.kind != "memory"]
    if not known:
        raise ConfigError(f"Study {study.name} has no such record at scale {scale} whose cell could be run here.")
    record = min(known, key=lambda one: one.cpu)
    again = perform(cells[record.key])
    if again.error:
        return [f"{record.key}: it fails now: {again.error}"]
    return list(_differences(record, replace(again, levels=record.levels), tolerance=tolerance))


def _differences(record: Record, again: Record, *, tolerance: float) -> Iterator[str]:
    if len(record.points) != len(again.points):
        yield f"{record.key}: {len(again.points)} evaluations, recorded {len(record.points)}"
        return
    names = ("end", "area") if record.points else tuple(record.values)
    for name in names:
        old, new = measure(record, name), measure(again, name)
        if abs(old - new) > tolerance * max(abs(old), 1e-12):
            yield f"{record.key}: {name} is {new:.8g}, recorded {old:.8g}"
