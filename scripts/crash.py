"""Kills, full disks, clocks that jump, crowds and flipped bits: what a run survives, one row per trial.

Run: python scripts/crash.py --out docs/results/crash.jsonl [--part NAME,...] [--every N] [--sums]

  boundary  kill -9 before every call that changes a file of the run's folder, and in the middle of every longer write
  random    kill -9 at random instants, also of the process that goes on
  disk      from the n-th write on the disk is full, or one write alone fails; a file limit; a small file system
  place     a folder that may not be written, from the start or from some round on
  clock     the wall clock jumps between rounds, by up to ten years
  crowd     two processes on one folder
  memory    no memory in a walk: in this process, in a worker process, in a client across a line
  kept      kill -9 while a client writes down its model
  flip      one bit of every byte, or of 3,000 bytes of a longer file: of a sealed run, of an adapter, of a killed run

After each fault the user's next step is taken (`resume`, `rollback` or `export` again), and everything that a run leaves
is compared with that of a run nobody disturbed. Bits that may differ: seconds, peak memory, and the names of backups.

Everything is imported and one run is done before the first trial; a trial is a fork of that process. Calls are counted
by crashing/shim.c, which is compiled here and loaded before libc. A second call of this script does what is missing.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from crashing.bed import ROOT, Bed, Row, Trial
from crashing.faults import clock, disk, place
from crashing.flips import flip
from crashing.fork import preloaded
from crashing.kills import boundary, crowd, kept, randomly
from crashing.memory import memory

PARTS: dict[str, Callable[[Bed], Iterator[Trial]]] = {
    "boundary": boundary, "random": randomly, "disk": disk, "place": place, "clock": clock, "crowd": crowd,
    "memory": memory, "kept": kept, "flip": flip,
}  # fmt: skip


def sums(rows: list[Row]) -> str:
    """Returns a line of figures for each part: trials, kills, flips and those found, rounds lost, unequal ends."""
    lines = []
    for part in PARTS:
        of_it = [row for row in rows if row["part"] == part]
        kills = sum(row.get("kills", int(row.get("died", False))) for row in of_it)
        flips, found = (sum(row.get(name, 0) for row in of_it) for name in ("flips", "found"))
        harmless, lost = (sum(row.get(name, 0) for row in of_it) for name in ("harmless", "lost"))
        bad = sum(not row["equal"] or bool(row.get("bug")) for row in of_it)
        told = f"{len(of_it):5} trials {kills:5} kills {flips:6} flips {found:6} found {harmless:5} harmless"
        lines.append(f"{part:9}{told} {lost:2} lost {bad:2} not as undisturbed")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--every", type=int, default=1, help="only every N-th trial of each part")
    parser.add_argument("--sums", action="store_true", help="say what the rows of --out come to, and try nothing")
    asked = parser.parse_args()
    if asked.sums:
        print(sums([json.loads(line) for line in asked.out.read_text().splitlines()]))
        return
    shim = preloaded()
    done = {json.loads(line)["trial"] for line in asked.out.read_text().splitlines()} if asked.out.exists() else set()
    with tempfile.TemporaryDirectory(prefix="crash-") as home:
        Path(home).chmod(0o755)  # nobody has to get through
        bed = Bed(shim, Path(home))
        for part in asked.part.split(","):
            for number, (name, trial) in enumerate(PARTS[part](bed)):
                if number % asked.every or name in done:
                    continue
                began = time.perf_counter()
                row = {"part": part, "trial": name, **trial()}
                row["seconds"] = round(time.perf_counter() - began, 3)
                # Where this machine has its folders is nobody's business.
                line = json.dumps(row).replace(f"{home}/", "").replace(f"{ROOT}/", "")
                with asked.out.open("a") as file:
                    file.write(line + "\n")
                good = row["equal"] and not row["lost"] and not row.get("bug")
                print("ok  " if good else "BAD ", line, flush=True)


if __name__ == "__main__":
    main()
