"""Whether a server's memory, time and files stay level over a long run in which things go wrong.

Run: python scripts/soak.py --kind tiny --rounds 10000 --out docs/results/soak.jsonl

Six clients, all in this process, with the bytes of a network between them and the server (load_line.py). In the course
of a run of R rounds client 4 takes its tasks and answers none (from 0.1 R to 0.2 R), client 5 is away (0.25 R to
0.75 R), client 3 fails (0.4 R to 0.5 R), no loss of a round is finite, so that the run goes back (0.6 R), and all
clients are started again without their models (0.85 R). A row per 100 rounds walked is added to the file as they come,
and one for each of these, with the most bytes that went to each node in a message about then. The last row says by how
many MB memory grew per 1,000 rounds, with 95 % intervals; `--fit` says so of the rows of a run that are there already.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from load_line import Node, Post, line_through, memory, node, server

from fedmezo.runtime.calls import Done, decode_answer, encode_answer
from fedmezo.runtime.progress import RoundReport
from fedmezo.runtime.wire import decode_reply, encode_reply

PEERS = 6
FAILING, SILENT, AWAY = 103, 104, 105  # nodes
Write = Callable[[Mapping[str, object]], None]


def lossless(handler: Node) -> Node:
    """Returns what answers as `handler` does, for whom no loss was finite."""

    def answer(request: bytes) -> bytes:
        given = handler(request)
        told = decode_answer(given)
        if not isinstance(told, Done):
            return given
        reply = decode_reply(told.reply)
        nothing = replace(reply, loss=math.nan, slopes=(math.nan,) * len(reply.slopes))
        return encode_answer(replace(told, reply=encode_reply(nothing)))

    return answer


class Weather:
    """What goes wrong, by rounds; each thing once, also when rounds are walked again."""

    def __init__(self, line: Post, *, kind: str, rounds: int, write: Write) -> None:
        self._line, self._kind, self._write = line, kind, write
        self._plan: Iterator[tuple[int, str, Callable[[], object]]] = iter(
            sorted(self._things(rounds), key=lambda thing: thing[0])
        )
        self._next = next(self._plan, None)
        self._sound: dict[int, Node] = {}
        self._told: list[tuple[str, int]] = []

    def _things(self, rounds: int) -> list[tuple[int, str, Callable[[], object]]]:
        line = self._line
        return [
            (rounds // 10, "client 4 is silent", lambda: line.silent.add(SILENT)),
            (rounds // 5, "client 4 answers again", lambda: line.silent.discard(SILENT)),
            (rounds // 4, "client 5 goes away", lambda: line.online.discard(AWAY)),
            (2 * rounds // 5, "client 3 fails", lambda: line.failing.add(FAILING)),
            (rounds // 2, "client 3 answers again", lambda: line.failing.discard(FAILING)),
            (3 * rounds // 5, "no loss is finite", self._spoil),
            (3 * rounds // 4, "client 5 is back", lambda: line.online.add(AWAY)),
            (17 * rounds // 20, "all clients are started again", self._restart),
        ]

    def _spoil(self) -> None:
        self._sound = dict(self._line.handlers)
        self._line.handlers |= {number: lossless(handler) for number, handler in self._sound.items()}

    def _restart(self) -> None:
        self._line.handlers |= {100 + client: node(self._kind, client) for client in range(PEERS)}

    def turn(self, report: RoundReport) -> None:
        """Takes a finished round; sees to what goes wrong in the next."""
        if self._sound:
            self._line.handlers, self._sound = self._sound, {}
        for what, since in self._told:
            self._write({"weather": what, "since": since, "largest": dict(self._line.largest)})
        self._told.clear()
        self._line.largest.clear()
        while self._next is not None and report.round + 1 >= self._next[0]:
            _, what, do = self._next
            do()
            self._told.append((what, report.round + 1))
            self._next = next(self._plan, None)


class Samples:
    """A row per so many rounds walked, whatever their numbers."""

    def __init__(self, line: Post, folder: Path, *, every: int, write: Write) -> None:
        self._line, self._folder, self._every, self._write = line, folder, every, write
        self._walked, self._rss = 0, 0.0
        self._last = self._now()

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time() - self._line.seconds, self._line.seconds

    def take(self, report: RoundReport) -> None:
        """Takes a finished round."""
        self._walked, self._rss = self._walked + 1, self._rss + memory()
        if self._walked % self._every:
            return
        now = self._now()
        wall, server_s, clients_s = ((b - a) / self._every * 1e3 for a, b in zip(self._last, now, strict=True))
        row = {
            "walked": self._walked, "round": report.round, "rss_mb": round(self._rss / self._every, 3),
            "server_ms": round(server_s, 3), "clients_ms": round(clients_s, 3), "wall_ms": round(wall, 3),
            "journal_mb": round((self._folder / "journal.sqlite").stat().st_size / 1e6, 3),
            "files": len(os.listdir("/proc/self/fd")), "loss": report.loss,
        }  # fmt: skip
        self._last, self._rss = now, 0.0
        self._write(row)


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Returns by how many MB memory grew per 1,000 rounds, from the rows of a run after its first tenth.

    In all: a line through the means of eighteen parts. Between one thing that went wrong and the next: one slope for
    all stretches, each with a level of its own; the first three rows of a stretch are left out.
    """
    last = max(row["walked"] for row in rows if "round" in row)
    stretches: list[list[tuple[float, float]]] = [[]]
    for row in rows:
        if "weather" in row:
            stretches.append([])
        elif "round" in row and row["walked"] > last / 10:
            stretches[-1].append((row["walked"] / 1000, row["rss_mb"]))
    everything = [point for stretch in stretches for point in stretch]
    size = max(1, len(everything) // 18)
    parts = [everything[at : at + size] for at in range(0, len(everything) - size + 1, size)]
    means = [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]
    told: dict[str, object] = {"fit": "MB per 1,000 rounds", "walked": last}
    told |= {"in all": line_through(means)} if len(means) > 2 else {}
    calm = [stretch[3:] for stretch in stretches if len(stretch) > 5]
    centred = [
        (x - fmean(x for x, _ in stretch), y - fmean(y for _, y in stretch)) for stretch in calm for x, y in stretch
    ]
    return told | ({"between": line_through(centred, levels=len(calm))} if len(centred) > len(calm) + 1 else {})


def soak(*, kind: str, rounds: int, out: Path, every: int = 100) -> dict[str, object]:
    """Returns the last row of a long run through all weathers; it and those before it are added to `out`."""
    rows: list[Mapping[str, Any]] = []

    def write(row: Mapping[str, object]) -> None:
        rows.append(row)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **row}) + "\n")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line, go = server(kind, folder=folder, clients=PEERS, cohort=PEERS, steps=1, rounds=rounds)
        samples = Samples(line, folder / "run", every=every, write=write)
        weather = Weather(line, kind=kind, rounds=rounds, write=write)

        def each(report: RoundReport) -> None:
            samples.take(report)
            weather.turn(report)

        began = time.perf_counter()
        try:
            go(each)
        finally:  # what was seen before an early end counts too
            sizes = {path.name: path.stat().st_size for path in (folder / "run").glob("journal*.sqlite")}
            fit = {**growth(rows), "seconds": round(time.perf_counter() - began, 1), "journals": sizes}
            write(fit)
    return fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("tiny", "light"), default="tiny", help="a language model, or a quadratic")
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True, help="the file that rows are added to")
    parser.add_argument("--fit", action="store_true", help="run nothing: fit the rows of this kind in the file")
    given = parser.parse_args()
    if given.fit:
        rows = [json.loads(line) for line in given.out.read_text(encoding="utf-8").splitlines()]
        print(json.dumps({"kind": given.kind, **growth([row for row in rows if row["kind"] == given.kind])}))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an early end has a last row too
    print(json.dumps(soak(kind=given.kind, rounds=given.rounds, out=given.out)))


if __name__ == "__main__":
    main()
