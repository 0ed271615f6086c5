"""One bit of every byte of what a run leaves."""

import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from crashing.bed import Bed, Row, Trial
from crashing.fork import forked

MOST = 3_000


def flip(bed: Bed) -> Iterator[Trial]:
    sealed = bed.template("run:more")
    assert sealed is not None
    for path in sorted(path for path in sealed.rglob("*") if path.is_file()):
        name = str(path.relative_to(sealed))
        yield f"flip sealed {name}", lambda n=name: _flipped_sealed(bed, sealed, n)
        if name.startswith("adapter/"):
            yield f"flip adapter {name[8:]}", lambda n=name[8:]: _flipped_sealed(bed, sealed / "adapter", n)
    yield "flip killed", lambda: _flipped_killed(bed, flips=3_000)


def _flipped_sealed(bed: Bed, source: Path, name: str) -> Row:
    """One bit of every byte of one file, or of as many bytes of it as `MOST`, drawn at random."""
    from fedmezo.errors import JournalError
    from fedmezo.studies.run import verify

    folder, draw = bed.fresh(), random.Random(name)
    shutil.copytree(source, folder)
    path, found = folder / name, 0
    whole = path.read_bytes()
    places = range(len(whole)) if len(whole) <= MOST else sorted(draw.sample(range(len(whole)), MOST))
    for at in places:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << draw.randrange(8)]))
        try:
            verify(folder)
        except JournalError:
            found += 1
        with path.open("r+b") as file:
            file.seek(at)
            file.write(whole[at : at + 1])
    assert path.read_bytes() == whole
    assert verify(folder)["ok"]
    shutil.rmtree(folder)
    return {"bytes": len(whole), "flips": len(places), "found": found, "equal": found == len(places), "lost": 0}


def _flipped_killed(bed: Bed, *, flips: int) -> Row:
    """Random bits of a killed run's files: each is found, or every round is as it was."""
    from fedmezo.errors import JournalError
    from fedmezo.runtime.journal import Journal

    killed, draw = bed.fresh(), random.Random(7)
    calls = bed.reference("run")[1]
    at = max(at for at, call in enumerate(calls, start=1) if "journal.sqlite-wal" in call and "pwrite" in call)
    forked(bed.armed("run", killed, "before", at))
    names = ("journal.sqlite", "journal.sqlite-wal", "journal.sqlite.lock")
    whole = {name: (killed / name).read_bytes() for name in names}
    folder, counts = bed.fresh(), {"found": 0, "harmless": 0, "lost": 0}
    folder.mkdir()

    def content() -> str:
        with Journal.open(folder / names[0], readonly=True) as journal:
            journal.verify_chain()
            return repr((journal.header, list(journal.rounds()), journal.evaluations(), journal.events()))

    def lay(changed: Mapping[str, bytes]) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name, data in {**whole, **changed}.items():
            (folder / name).write_bytes(data)

    lay({})
    truth = content()
    # Nine tenths of a young journal are empty pages; the log and the lock get as many flips as they.
    for number in range(flips):
        name = names[number % 3]
        data = bytearray(whole[name])
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        lay({name: bytes(data)})
        try:
            counts["harmless" if content() == truth else "lost"] += 1
        except JournalError:
            counts["found"] += 1
    shutil.rmtree(killed)
    shutil.rmtree(folder)
    sizes = {name: len(data) for name, data in whole.items()}
    return {"bytes": sizes, "flips": flips, **counts, "equal": not counts["lost"]}
