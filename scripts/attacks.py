"""Appends to docs/results/attacks.jsonl what clients that lie do to runs under each rule, one line per run.

    python scripts/attacks.py tiny sst2 [--out docs/results/attacks.jsonl] [--until 23:00]
    python scripts/attacks.py --table         # prints the table of docs/robust.md from the file

The runs are a user's (`studies.build` of a configuration), without the guard: what a line shows is the rule's own doing.
A fifth of the clients lies in every round. Lines that are in the file already are not run again, so the command can be
stopped at any time. A run takes a quarter of a minute (`tiny`) to three minutes (`sst2`, which needs FEDMEZO_DATA) on one core.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedmezo.studies.build import build
from fedmezo.studies.config import Config, changed, load_config, parse_config
from fedmezo.studies.descent import build_algorithm, resolve
from fedmezo.zo.perturb import apply_

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from attacks import attacked, attacks  # noqa: E402

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMPARING, WHOLE_WALKS = ("median", "trimmed-mean", "sign-vote"), ("norm-bound", "multi-krum")
FIRST = {"tiny": ("median", "trimmed-mean"), "sst2": ("trimmed-mean", "multi-krum")}
ATTACKS = ("sign-flip", "drift", "huge", "scaled", "replay", "nan")  # infinities, garbage and old answers are as nan
SEEDS = 2
CLEAN, MARGIN = ("none", "3", "none"), 0.4


@dataclass(frozen=True)
class Cell:
    """One run: on what, under which rule and clip, with shared directions or not, who lies how, and its seed."""

    task: str
    rule: str
    clip: str
    attack: str
    seed: int
    shared: bool


def cells(tasks: Sequence[str]) -> Iterator[Cell]:
    """Yields the runs, those that matter most first; what a small model can afford is more seeds and all rules."""
    for task in tasks:
        yield from _first(task, 0)
    if "tiny" in tasks:
        yield from (cell for seed in range(1, SEEDS) for cell in _first("tiny", seed))
        yield from (cell for seed in range(SEEDS) for cell in _more("tiny", seed))


def _first(task: str, seed: int) -> Iterator[Cell]:
    """Yields a clean run, every attack under two rules, and two attacks on the paper's plain mean."""
    yield Cell(task, "none", "3", "none", seed, shared=True)
    yield from (Cell(task, rule, "3", attack, seed, shared=True) for attack in ATTACKS for rule in FIRST[task])
    yield from (Cell(task, "none", "none", attack, seed, shared=True) for attack in ("huge", "drift"))


def _more(task: str, seed: int) -> Iterator[Cell]:
    """Yields all attacks and none under all rules, and under the plain mean with the clip and without."""
    everything = ("none", *ATTACKS, "scaled-flip")
    for rule in (*COMPARING, *WHOLE_WALKS, "none"):
        yield from (Cell(task, rule, "3", attack, seed, shared=True) for attack in everything)
    yield from (Cell(task, "none", "none", attack, seed, shared=True) for attack in everything)
    for rule in ("none", *WHOLE_WALKS):
        yield from (Cell(task, rule, "3", attack, seed, shared=False) for attack in everything)


def config_of(cell: Cell) -> Config:
    """Returns the configuration of a run."""
    plain = {
        "tiny": lambda: parse_config(
            {
                "model": {"name": "builtin:tiny"},
                "adapter": {"rank": 8, "alpha": 16, "targets": LINEARS},
                "data": {
                    "name": "builtin:skills/routing,priority",
                    "objective": "choices",
                    "limit": 850,
                    "template": "{instruction}\n{input} ",
                    "max_tokens": 96,
                    "eval_examples": 150,
                },
                "federation": {"clients": 10, "rounds": 15, "local_steps": 3, "batch_size": 4},
                "algorithm": {"rate": 4e-3, "mu": 1e-3, "decay": "linear"},
            }
        ),
        "sst2": lambda: changed(
            load_config(ROOT / "configs" / "sst2.toml"),
            {
                "federation": {"clients": 5, "rounds": 10, "local_steps": 5, "batch_size": 16},
                "algorithm": {"rate": 1e-2},
                "data": {"limit": 3000},
                "eval": {"examples": 100},
            },
        ),
    }[cell.task]()
    return changed(
        plain,
        {
            "federation": {"seed": cell.seed},
            "data": {"seed": cell.seed},
            "split": {"kind": "iid"},
            "algorithm": {"shared": cell.shared, "clip": cell.clip if cell.clip == "none" else float(cell.clip)},
            "robust": {"rule": cell.rule},
            "runtime": {"threads": 1},
        },
    )


class Stage:
    """One task and seed: model and data, which all its runs share, and the untrained model's figures."""

    def __init__(self, cell: Cell) -> None:
        self.built = build(config_of(cell))
        self.judged = self.built.data.evaluation["eval"][: self.built.config.eval.examples]
        self.untrained, self.before = self.built.bench.params.clone(), self.judge()

    def judge(self) -> tuple[float | None, float | None]:
        """Returns loss and accuracy of the model as it is."""
        found = self.built.bench.evaluate(self.judged)
        return _rounded(found.loss), _rounded(found.accuracy)

    def play(self, cell: Cell) -> Mapping[str, Any]:
        """Returns who lied, and the losses and the accuracies before and after a run."""
        config, bench = resolve(config_of(cell), dim=self.built.bench.params.dim), self.built.bench
        clients, law = range(config.federation.clients), config.algorithm.law
        liars = clients[1::5]
        algorithm = build_algorithm(config, self.built.data.sizes, params=bench.params)
        if cell.attack != "none":
            algorithm = attacked(algorithm, attacks(bench.params)[cell.attack](), liars)
        bench.params.copy_(self.untrained)
        state = algorithm.init()
        for _ in range(config.federation.rounds):
            tasks = algorithm.plan(state, clients)
            tasks, replies = algorithm.gather(tasks, algorithm.client(tasks, bench))
            state, update = algorithm.aggregate(state, tasks, replies)
            apply_(bench.params, update, law=law)
        (start, right), (end, righter) = self.before, self.judge()
        return {
            "liars": list(liars) if cell.attack != "none" else [],
            "clients": len(clients),
            "start": start,
            "end": end,
            "start_accuracy": right,
            "end_accuracy": righter,
        }


def _rounded(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else round(number, 4)


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a Markdown table: the mean over seeds, and whether it is within the margin of the clean run."""
    runs: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        shared = "yes" if row["shared"] else "no"
        runs.setdefault((row["task"], row["rule"], row["clip"], shared, row["attack"]), []).append(row)
    clean = {(r["task"], r["shared"], r["seed"]): r for r in rows if (r["rule"], r["clip"], r["attack"]) == CLEAN}
    yield "| task | rule | clip | shared | attack | seeds | final loss | of the clean gain lost | within |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for names, found in runs.items():
        bases = [clean[row["task"], row["shared"], row["seed"]] for row in found]
        ends = [math.inf if row["end"] is None else row["end"] for row in found]
        end, start, base = fmean(ends), fmean(row["start"] for row in found), fmean(row["end"] for row in bases)
        lost = (end - base) / (start - base)
        cells = (*names, str(len(found)), f"{end:.3f}", f"{lost:.0%}", "yes" if lost <= MARGIN else "no")
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs what is not in the file yet, until the time that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=("tiny", "sst2", []))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "attacks.jsonl")
    parser.add_argument("--until", default="", help="begin no run after this time, HH:MM")
    parser.add_argument("--table", action="store_true", help="print what is in the file, and run nothing")
    told = parser.parse_args()
    torch.set_num_threads(1)
    old = [json.loads(line) for line in told.out.read_text().splitlines()] if told.out.exists() else []
    if told.table:
        print("\n".join(table(old)))
        return
    done = {Cell(**{name: row[name] for name in Cell.__annotations__}) for row in old}
    stages: dict[tuple[str, int], Stage] = {}
    for cell in cells(told.tasks):
        if cell in done or (told.until and time.strftime("%H:%M") >= told.until):
            continue
        if (cell.task, cell.seed) not in stages:
            stages = {(cell.task, cell.seed): Stage(cell)}
        began = time.perf_counter()
        found = stages[cell.task, cell.seed].play(cell)
        done.add(cell)
        with told.out.open("a") as file:
            file.write(json.dumps(asdict(cell) | found | {"seconds": round(time.perf_counter() - began, 1)}) + "\n")


if __name__ == "__main__":
    main()
