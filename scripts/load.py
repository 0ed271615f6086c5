"""What a server's round costs by the number of its clients: CPU time, memory, bytes.

Run: python scripts/load.py --out docs/results/load.jsonl

All clients are in this process, and every request and every answer is the bytes that a network would carry
(load_line.py). Each row is a fresh process. Kind "stub": a client reads its task as a real one does and makes its slopes
up, so that what is measured is the server. Kind "tiny": clients are those of `fedmezo client`, each with a model of its
own, and `peak_mb` has their models in it. `server_ms` is the median round's CPU time of the process without that of
the clients' handlers; `peak_mb` is what the most memory of the rounds is above that after the first. The first round,
which compiles, is left out. After the rows of a kind and a cohort comes a straight line through them.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from load_line import forget_peak, line_through, memory, server

from fedmezo.runtime.progress import RoundReport

TEN = 10  # the cohort of rows whose rounds do not ask everyone
PEOPLE = {"stub": (10, 50, 100, 200, 400, 1000), "tiny": (10, 50, 100, 200)}
COHORTS = {"stub": (0, TEN), "tiny": (0,)}  # 0 for everyone
FITTED = ("server_ms", "peak_mb", "journal_per_round")


def measure(*, kind: str, clients: int, cohort: int, steps: int, rounds: int) -> dict[str, object]:
    """Returns what `rounds` rounds cost, each."""
    seen: list[tuple[float, float, int, int]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line, go = server(kind, folder=folder, clients=clients, cohort=cohort, steps=steps, rounds=rounds)
        loaded = 0.0

        def each(report: RoundReport) -> None:
            nonlocal loaded
            if report.round == 0:
                loaded = memory()
                forget_peak()
            seen.append((time.process_time() - line.seconds, line.seconds, line.down, line.up))

        go(each)
        peak = memory("VmHWM")
        journal = (folder / "run" / "journal.sqlite").stat().st_size
    server_s, clients_s, down, up = (
        median(after - before for before, after in pairwise(column)) for column in zip(*seen, strict=True)
    )
    return {
        "kind": kind, "clients": clients, "cohort": cohort, "steps": steps, "rounds": rounds,
        "server_ms": round(server_s * 1e3, 2), "clients_ms": round(clients_s * 1e3, 2),
        "loaded_mb": round(loaded, 1), "peak_mb": round(peak - loaded, 1),
        "down": down, "up": up, "journal_per_round": round(journal / rounds),
    }  # fmt: skip


def alone(**wanted: object) -> dict[str, Any]:
    """Returns a row measured by a fresh process."""
    given = [f"--{name}={value}" for name, value in wanted.items()]
    found = subprocess.run([sys.executable, __file__, "--one", *given], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def fits(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Returns a straight line through each column of some rows, by clients, and how time grows from row to row.

    `exponent` is the power of the number of clients by which server_ms grows from the last row but one to the last: 1
    is linear, less is a fixed part that still counts.
    """
    found: dict[str, object] = {"kind": rows[0]["kind"], "fit": "per client", "cohort": rows[0]["cohort"]}
    for name in FITTED:
        found[name] = line_through([(row["clients"], row[name]) for row in rows])
    (few, less), (many, more) = ((row["clients"], row["server_ms"]) for row in rows[-2:])
    return found | {"exponent": round(math.log(more / less) / math.log(many / few), 3)}


def table(kinds: Sequence[str], *, steps: int, rounds: int) -> Iterator[dict[str, object]]:
    """Yields the rows of each kind of clients, then the line through them."""
    for kind in kinds:
        for few in COHORTS[kind]:
            rows = []
            for clients in PEOPLE[kind]:
                rows.append(alone(kind=kind, clients=clients, cohort=few or clients, steps=steps, rounds=rounds))
                yield rows[-1]
            yield fits(rows) | {"cohort": few or "everyone"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=tuple(PEOPLE))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clients", type=int, default=10, help=argparse.SUPPRESS)
    parser.add_argument("--cohort", type=int, default=10, help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="the file that rows are added to")
    given = parser.parse_args()
    told = {"steps": given.steps, "rounds": given.rounds}
    if given.one:
        print(json.dumps(measure(kind=given.kind, clients=given.clients, cohort=given.cohort, **told)))
        return
    for row in table([given.kind] if given.kind else list(PEOPLE), **told):
        print(json.dumps(row), flush=True)
        if given.out is not None:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
