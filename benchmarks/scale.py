"""What a run costs with many clients: peak memory, and the server's share of a round's time.

    python benchmarks/scale.py [memory|server|clients|workers] [--steps 10] [--json]

All on the built-in model with rank-8 LoRA (14,336 trained scalars) and short records made up here.

`memory`: a fresh process per number of clients, everyone in each of two rounds; `rss_mb` is the peak, `data_mb` what the
clients' token rows take. `server`: one round's replies, made up, handed to everything the server does but the walks:
plan, tell, decode, aggregate, apply, journal; nanoseconds per (reply x step) have to stay level, so the work is linear.
`clients`: real rounds of 1,000 clients, whole cohort and ten of them, by share. `workers`: one such round by numbers of
processes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

THINGS = ("lamp", "chair", "horse", "apple", "river", "cloud", "stone", "bread", "glove", "train")
COLOURS = ("red", "green", "blue", "grey")
PEOPLE = (10, 100, 1000)
REPLIES = (100, 200, 400, 800)


def records(folder: Path, count: int) -> Path:
    """Writes short records, one JSON object a line."""
    path = folder / "records.jsonl"
    rows = (
        {"instruction": "Which colour?", "input": f"{THINGS[n % 10]} {n}", "output": COLOURS[n % 4]}
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(folder: Path, *, clients: int, cohort: int, steps: int, **runtime: object) -> Any:
    """Returns a configuration of the built-in model."""
    from fedmezo.studies.config import parse_config

    return parse_config(
        {
            "model": {"name": "builtin:tiny"},
            "data": {"path": str(records(folder, 4000)), "template": "{instruction} {input} is", "eval_examples": 100},
            "federation": {"clients": clients, "cohort": cohort, "local_steps": steps, "rounds": 10**6},
            "runtime": {"threads": 1, **runtime},
        }
    )


@contextmanager
def prepared(**wanted: Any) -> Iterator[tuple[Any, Any]]:
    """Lends what a run needs, and an empty journal in a folder that goes away."""
    from fedmezo.runtime.journal import Header, Journal
    from fedmezo.studies.build import build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = build(configured(folder, **wanted))
        header = Header("{}", "scale", built.bench.params.layout(), "gaussian", 1, "0", "2026-01-01T00:00:00+00:00")
        with Journal.create(folder / "journal.sqlite", header) as journal:
            yield built, journal


def rounds(built: Any, journal: Any, *, number: int, walkers: Any = None) -> Iterator[Any]:
    """Yields the reports of some rounds, without evaluation."""
    from fedmezo.runtime.simulate import simulate
    from fedmezo.studies.build import build_downlink

    yield from simulate(
        built.algorithm,
        built.bench,
        journal=journal,
        clients=range(built.config.federation.clients),
        rounds=number,
        every=10**6,
        evaluate=lambda: {"eval": {"loss": 0.0}},
        downlink=build_downlink(built.config, dim=built.bench.params.dim),
        walkers=walkers,
    )


def memory(*, clients: int, steps: int) -> dict[str, object]:
    """Returns the peak memory of this process after two rounds of everyone."""
    with prepared(clients=clients, cohort=clients, steps=steps) as (built, journal):
        loaded = _peak_mb()
        for _ in rounds(built, journal, number=2):
            pass
        rows = [row for part in built.data.parts for example in part for row in example.rows]
        data = sum(sys.getsizeof(row.ids) for row in rows) / 1e6
        return {"clients": clients, "loaded_mb": loaded, "rss_mb": _peak_mb(), "data_mb": data}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


class Clock(Counter[str]):
    """Seconds by name."""

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, its time added to `name`."""

        def wrapped(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self[name] += time.perf_counter() - began

        return wrapped

    @contextmanager
    def watching(self, journal: Any) -> Iterator[None]:
        """Lends a scope in which the parts of the server's work are timed."""
        from fedmezo.runtime import pull, simulate

        spots = [(simulate, "encode_task", "messages"), (simulate, "decode_task", "messages")]
        spots += [(simulate, "encode_reply", "messages"), (simulate, "decode_reply", "messages")]
        spots += [(pull.Downlink, "offers", "downlink"), (pull.Downlink, "remember", "downlink")]
        spots += [(simulate, "apply_", "apply"), (simulate, "checksum", "checksum")]
        spots += [(type(journal), "append", "journal")]
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in spots]
        for owner, name, part in spots:
            setattr(owner, name, self.timed(part, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, before in kept:
                setattr(owner, name, before)


def server(*, replies: int, steps: int, name: str = "fedmezo") -> dict[str, object]:
    """Returns what the server does in a round of so many replies, in ns per reply and step; the walks are made up."""
    from fedmezo.fl.algorithm import Reply

    def made_up(tasks: Any, bench: Any) -> list[Any]:
        return [
            Reply(t.round, t.client, 1, 1.0, tuple((7 * t.client + 3 * k) % 11 - 5.5 for k in range(t.steps)))
            for t in tasks
        ]

    clock = Clock()
    with prepared(clients=replies, cohort=replies, steps=steps) as (built, journal), clock.watching(journal):
        algorithm = _method(built, name)
        timed = replace(
            algorithm,
            plan=clock.timed("plan", algorithm.plan),
            aggregate=clock.timed("aggregate", algorithm.aggregate),
            client=made_up,
        )
        began = time.perf_counter()
        for report in rounds(replace(built, algorithm=timed), journal, number=4):
            if report.round == 0:  # the first round compiles, and limits every walk by itself
                clock.clear()
                began = time.perf_counter()
        whole = time.perf_counter() - began
    scale = 1e9 / (3 * replies * steps)
    return {"algorithm": name, "replies": replies, "ms": whole / 3 * 1e3, "ns": whole * scale} | {
        part: seconds * scale for part, seconds in clock.most_common()
    }


def _method(built: Any, name: str) -> Any:
    from fedmezo.studies.descent import build_algorithm

    algorithm = built.config.algorithm.model_copy(update={"name": name})
    return build_algorithm(built.config.model_copy(update={"algorithm": algorithm}), built.data.sizes)


def clients(*, cohort: int, steps: int, workers: int = 1) -> dict[str, object]:
    """Returns where the time of real rounds of 1,000 clients goes."""
    from fedmezo.studies.build import walkers_of

    clock = Clock()
    number = 3 if cohort > 100 else 60
    with prepared(clients=1000, cohort=cohort, steps=steps, workers=workers) as (built, journal):
        algorithm = built.algorithm
        timed = replace(
            algorithm,
            plan=clock.timed("plan", algorithm.plan),
            aggregate=clock.timed("aggregate", algorithm.aggregate),
            client=clock.timed("walks", algorithm.client),
        )
        apart = walkers_of(built) if workers > 1 else nullcontext()
        with clock.watching(journal), apart as walkers:
            for report in rounds(replace(built, algorithm=timed), journal, number=number, walkers=walkers):
                if report.round == 0:
                    clock.clear()
                    began = time.perf_counter()
            whole = time.perf_counter() - began
    known = sum(clock.values())
    shares = {part: seconds / whole for part, seconds in clock.most_common()}
    row = {"cohort": cohort, "workers": workers, "seconds_per_round": whole / (number - 1)}
    return row | ({} if workers > 1 else {**shares, "rest": 1 - known / whole})


def alone(what: str, **wanted: int) -> dict[str, object]:
    """Returns a measurement made by a fresh process."""
    given = [f"--{name}={value}" for name, value in wanted.items()]
    found = subprocess.run([sys.executable, __file__, what, "--one", *given], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return dict(json.loads(found.stdout))


def show(rows: list[dict[str, object]]) -> None:
    """Prints a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("  ".join(f"{name:>10}" for name in names))
    for row in rows:
        values = (row.get(name, "") for name in names)
        print("  ".join(f"{v:>10.4g}" if isinstance(v, float) else f"{v!s:>10}" for v in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("memory", "server", "clients", "workers"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clients", type=int, default=1000, help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(memory(clients=given.clients, steps=given.steps)))
        return
    steps = given.steps
    known: dict[str, Callable[[], list[dict[str, object]]]] = {
        "memory": lambda: [alone("memory", clients=many, steps=steps) for many in PEOPLE],
        "server": lambda: [
            server(replies=n, steps=steps, name=name) for name in ("fedmezo", "fedkseed-pro") for n in REPLIES
        ],
        "clients": lambda: [clients(cohort=cohort, steps=steps) for cohort in (1000, 10)],
        "workers": lambda: [clients(cohort=200, steps=steps, workers=n) for n in (1, 2)],
    }
    found = {}
    for name in [given.what] if given.what else known:
        found[name] = known[name]()
        if not given.json:
            print(f"\n{name}")
            show(found[name])
    if given.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
