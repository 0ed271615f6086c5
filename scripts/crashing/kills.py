"""kill -9, at every write and at random instants; and two processes on one folder."""

import ctypes
import random
import shutil
import signal
import time
from collections.abc import Iterator

from crashing.bed import Bed, Row, Trial
from crashing.fork import MODES, Child, End, Tell, forked

SECTOR = 512  # bytes that a disk writes whole or not at all
BOUNDARIES = ("run", "run:rollback", "run:export", "run:more", "surge")


def boundary(bed: Bed) -> Iterator[Trial]:
    for name in BOUNDARIES:
        calls = bed.reference(name)[1]
        # Before its first way back a surging run is like any other.
        first = next(at for at, call in enumerate(calls) if "rollback" in call) if name == "surge" else 0
        for at, call in enumerate(calls, start=1):
            what, _, size = call.rsplit(" ", 2)
            beyond = name == "surge" and not first <= at <= first + 75
            if beyond or "-shm" in call:  # SQLite makes this file anew after every crash
                continue
            torn = what.endswith("write") and int(size) > SECTOR and name != "surge"
            for mode in ("before", "torn") if torn else ("before",):
                yield f"boundary {name} {mode} {at}", lambda n=name, m=mode, a=at, c=call: _killed_at(bed, n, m, a, c)


def _killed_at(bed: Bed, name: str, mode: str, at: int, call: str) -> Row:
    folder = bed.begin(name)
    ended = forked(bed.armed(name, folder, mode, at))
    return {"call": call, "died": ended.signal == signal.SIGKILL, **bed.judged(name, folder, ended)}


def kept(bed: Bed) -> Iterator[Trial]:
    """Returns the trials of what a client keeps between starts."""
    for mode in ("before", "torn"):
        for at in range(1, 9):
            yield f"kept {mode} {at}", lambda m=mode, a=at: _kept(bed, m, a)


def _kept(bed: Bed, mode: str, at: int) -> Row:
    """A client killed while it writes down its model finds the old one or the new one, never a mixture."""
    import torch

    from fedmezo.studies.kept import Held, keep, kept
    from fedmezo.zo.params import Params

    folder = bed.fresh()
    models = [Params({"a": torch.full((4096,), float(number))}) for number in (1, 2)]
    held = [Held("run", "i", rounds=number) for number in (1, 2)]
    keep(folder, models[0], held[0])

    def work(tell: Tell) -> None:
        bed.shim.crash_watch(str(folder).encode(), -1)
        bed.shim.crash_arm(MODES[mode], ctypes.c_long(at))
        keep(folder, models[1], held[1])

    ended = forked(work)
    mine = Params({"a": torch.zeros(4096)})
    found = kept(folder, mine, wanted=held[0])
    whole = any(found == told and mine.digest() == model.digest() for told, model in zip(held, models, strict=True))
    keep(folder, models[1], held[1])
    again = kept(folder, mine, wanted=held[0]) == held[1]
    shutil.rmtree(folder)
    return {"died": ended.signal == signal.SIGKILL, "lost": 0, "equal": whole and again}


def randomly(bed: Bed) -> Iterator[Trial]:
    for number in range(140):
        name = ("run", "surge", "pool", "fedavg", "personal", "shared", "run:more")[number % 7]
        yield f"random {name} {number}", lambda n=name, k=number: _killed_sometime(bed, n, seed=k)
    for number in range(4):
        yield f"random workers {number}", lambda k=number: _killed_sometime(bed, "workers", seed=k)


def _killed_sometime(bed: Bed, name: str, *, seed: int) -> Row:
    draw, folder = random.Random(f"{name} {seed}"), bed.begin(name)
    _, _, first, later = bed.reference(name)
    kills, rounds = 1, 0
    ended = forked(bed.act(name, folder), kill_after=draw.uniform(0, first))
    rounds = ended.rounds
    while draw.random() < 0.5:
        forked(bed.mend(name, folder), kill_after=draw.uniform(0, max(first, later)))
        kills += 1
    return {"kills": kills, "rounds": rounds, **bed.judged(name, folder, ended)}


def crowd(bed: Bed) -> Iterator[Trial]:
    for number in range(12):
        for pair in (("run", "run"), ("run:more", "run:more"), ("run:more", "run:rollback"), ("run:more", "read")):
            yield f"crowd {' and '.join(pair)} {number}", lambda p=pair, k=number: _together(bed, p, seed=k)


def _together(bed: Bed, pair: tuple[str, str], *, seed: int) -> Row:
    from fedmezo.studies.run import verify

    name, other = pair
    folder, draw = bed.begin(name), random.Random(seed)

    def reads(tell: Tell) -> None:
        for _ in range(10):
            tell({"ok": bool(verify(folder)["ok"])})
            time.sleep(0.02)

    first = Child(bed.act(name, folder)).begin()
    time.sleep(draw.choice([0, 0, 0.02, 0.1, 0.3]))
    second = Child(reads if other == "read" else bed.act(other, folder)).begin()
    ends = [first.end(), second.end()]
    row: Row = {"errors": [one.error for one in ends], "bug": ends[0].bug or ends[1].bug}
    return {**row, **bed.judged(other if other == "run:rollback" else name, folder, End(0, []))}
