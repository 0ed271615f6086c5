"""Tries millions of hostile inputs on everything that takes bytes from strangers, and records what came of it.

Run: python scripts/fuzz.py --inputs 12000000 --out docs/results/fuzz.jsonl [--only task,reply] [--engine mutation]

The law: what is refused is refused with the documented error, what is taken in is a valid value, and no input takes
more than the target's own time and 5 us a byte, or 64 MiB and 1 KiB a byte. Engine "atheris" follows the branches of
fedmezo's code (pip install atheris); "mutation" edits valid inputs blindly. Checksums are put right after each edit.

A chunk of inputs is one process and one row of the file: target, engine, inputs, how many were taken in, seconds,
crashes (ways in which the law was broken), slowest input, most memory of the process. A second start with the same file
goes on where the first one ended. Inputs that broke the law are kept in --keep, with those that reached new branches.
"""

import argparse
import gc
import hashlib
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fuzzing.course import Course, Target, mutate, name_of

_LENGTHS = (1 << 10, 1 << 12, 1 << 10, 1 << 16)  # most bytes of an input, by chunk
_CHUNK, _DEAR_CHUNK = 500_000, 10_000
_GUIDED = 4  # the first of so many chunks is atheris', which takes three times as long
_ROOM = 16 << 30  # bytes of address space: a mistake shall not take the machine's memory
# Whose branches are followed.
_FOLLOWED = ["fedmezo.runtime", "fedmezo.fl.algorithm", "fedmezo.data", "fedmezo.studies.config", "fedmezo.studies.kept",
             "fedmezo.studies.resident", "fedmezo.studies.appconfig", "fedmezo.models.adapters"]  # fmt: skip
_PARTS = 50  # how often the second engine writes down what it has done
_HUNG = 60  # seconds after which an input counts as one that never ends


def targets() -> dict[str, Target]:
    """Returns all targets by name."""
    from fuzzing import files, messages

    return {target.name: target for target in (*messages.TARGETS, *files.TARGETS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000_000, help="in all, over all targets")
    parser.add_argument("--out", type=Path, required=True, help="rows are added to this file")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder of the inputs worth keeping")
    parser.add_argument("--only", default="", help="targets, by commas")
    parser.add_argument("--engine", choices=("both", "atheris", "mutation"), default="both")
    parser.add_argument("--one", nargs=4, metavar=("TARGET", "ENGINE", "INPUTS", "CHUNK"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        _chunk(asked.one[0], asked.one[1], int(asked.one[2]), int(asked.one[3]), keep=asked.keep, record=asked.out)
        return
    if asked.engine != "mutation" and importlib.util.find_spec("atheris") is None:
        raise SystemExit("There is no atheris here: pip install atheris, or give --engine mutation.")
    chosen = [target for name, target in targets().items() if not asked.only or name in asked.only.split(",")]
    for target, number, inputs in _turns(chosen, asked.inputs, asked.out):
        engine = ("mutation" if number % _GUIDED else "atheris") if asked.engine == "both" else asked.engine
        row = _apart(target, engine, inputs, number, keep=asked.keep)
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        if not row["inputs"]:
            raise SystemExit(f"Target {target.name} cannot be tried: {row['found']}")


def done(out: Path) -> Counter[str]:
    """Returns how many inputs each target has had, by a file of rows."""
    found: Counter[str] = Counter()
    for line in out.read_text().splitlines() if out.exists() else ():
        row = json.loads(line)
        found[row["target"]] += row["inputs"]
    return found


def _turns(chosen: list[Target], inputs: int, out: Path) -> Iterator[tuple[Target, int, int]]:
    """Yields (target, its chunk's number, inputs) until each target has its share; who lacks most is next."""
    whole = sum(target.share for target in chosen)
    wanted = {target.name: math.ceil(inputs * target.share / whole) for target in chosen}
    numbers = (
        Counter(json.loads(line)["target"] for line in out.read_text().splitlines()) if out.exists() else Counter()
    )
    while True:
        had = done(out)
        lacking = [target for target in chosen if had[target.name] < wanted[target.name]]
        if not lacking:
            return
        target = min(lacking, key=lambda target: had[target.name] / wanted[target.name])
        size = min(_DEAR_CHUNK if target.dear else _CHUNK, wanted[target.name] - had[target.name])
        yield target, numbers[target.name], size
        numbers[target.name] += 1


def _apart(target: Target, engine: str, inputs: int, number: int, *, keep: Path) -> dict[str, object]:
    """Returns the row of a chunk that ran in a process of its own; one that died has crashed once more."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as folder:
        record = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--one", target.name, engine, str(inputs), str(number)]
        code = subprocess.run(
            [*command, "--keep", str(keep), "--out", str(record)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        row = json.loads(record.read_text()) if record.exists() else {"target": target.name, "inputs": 0, "crashes": 0}
    if code.returncode:
        said = code.stderr.decode(errors="replace").strip().splitlines()[-1:]
        row["crashes"] = int(row["crashes"]) + 1
        row["found"] = [*row.get("found", []), f"the process ended with code {code.returncode} {said}"]
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {**row, "engine": engine, "chunk": number, "source": source(), "when": when}


def source() -> str:
    """Returns a digest of fedmezo's code, so that a row says what was tried."""
    import fedmezo

    state = hashlib.sha256()
    for path in sorted(Path(fedmezo.__file__).parent.rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()[:12]


def _chunk(name: str, engine: str, inputs: int, number: int, *, keep: Path, record: Path) -> None:
    """Tries one chunk in this process and writes its row; when it dies on the way, the row is what was done by then."""
    resource.setrlimit(resource.RLIMIT_AS, (_ROOM, _ROOM))
    (corpus := keep / "corpus" / name.replace(" ", "-")).mkdir(parents=True, exist_ok=True)
    (folder := record.parent / "work").mkdir()
    if engine == "atheris":
        _guided(name, inputs, number, corpus=corpus, folder=folder, record=record)
    course = _opened(name, folder)
    for part in range(_PARTS):
        mutate(course, inputs * (part + 1) // _PARTS - course.inputs, seed=number * _PARTS + part)
        _write(course, record, keep=keep)


def _opened(name: str, folder: Path) -> Course:
    warnings.simplefilter("ignore")  # what PEFT says about every key it does not know
    target = targets()[name]
    course = Course(target, target.open(folder))
    course.warm_()
    gc.collect()
    gc.freeze()  # torch's own objects are looked at no more
    return course


def _write(course: Course, record: Path, *, keep: Path) -> None:
    record.with_suffix(".new").write_text(json.dumps(course.row()))
    os.replace(record.with_suffix(".new"), record)
    for what, data in course.found.items():
        folder = keep / "found" / course.target.name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name_of(data)).write_bytes(data)
        (folder / f"{name_of(data)}.txt").write_text(what + "\n")
    course.saved = time.perf_counter()


def _guided(name: str, inputs: int, number: int, *, corpus: Path, folder: Path, record: Path) -> None:
    """Lets atheris choose the inputs; never returns: libFuzzer ends the process."""
    from random import Random

    import atheris
    from fuzzing.mutation import edited

    with atheris.instrument_imports(include=_FOLLOWED):
        course = _opened(name, folder)
    target, rng, seeds = course.target, Random(number), list(course.target.seeds())
    keep = corpus.parent.parent
    for seed in seeds:
        (corpus / name_of(seed)).write_bytes(seed)

    def one(data: bytes) -> None:
        course.try_(data)
        if course.inputs == inputs or time.perf_counter() - course.saved > 1:
            _write(course, record, keep=keep)

    def change(data: bytes, most: int, seed: int) -> bytes:
        half = atheris.Mutate(data, most) if rng.random() < 0.5 else edited(data, rng, others=seeds, most=most)
        return target.mend(half, rng)[:most]

    most = min(target.most, _LENGTHS[number % len(_LENGTHS)])
    options = [f"-runs={inputs}", f"-seed={number + 1}", f"-max_len={max(most, *map(len, seeds))}", f"-timeout={_HUNG}"]
    options += ["-rss_limit_mb=6000", f"-artifact_prefix={keep}/", "-verbosity=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
