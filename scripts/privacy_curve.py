"""What privacy costs on the built-in model: one row of JSON per run, appended as it ends; runs that are there are left out.

    python scripts/privacy_curve.py --out docs/results/privacy.jsonl [--seeds 3] [--config FILE]
    python scripts/privacy_curve.py --out docs/results/privacy.jsonl --table
    python scripts/privacy_curve.py --out docs/results/privacy.jsonl --picture docs/privacy.svg

Four clients with some 530 examples each of tasks the model has never seen. Runs of one seed differ in their noise, and
in their batches: "none" takes fixed ones, all others Poisson samples; "inf" limits differences and adds no noise; "noise" is a control. With
--config another run is made private instead, its own clip being privacy.clip. About ten minutes on one quiet core.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from fedmezo import Config, load_config, run

EPSILONS = ("none", "inf", "8", "4", "1", "0.2", "noise")
ALONE = ("privacy.clip=3e-8", "privacy.sigma=4.39e6")  # the noise of epsilon 0.2, and next to nothing of the data
CLIP, DELTA = 0.03, 1e-5
TINY = (
    'model.name="builtin:tiny"', 'model.dtype="float32"', "adapter.rank=8", "adapter.alpha=16",
    'data.name="builtin:skills/routing,follows,pairs,extract"', "data.limit=2400", "data.max_tokens=96",
    "data.eval_examples=200", 'data.template="{instruction}\\n{input} "', "federation.clients=4",
    "federation.rounds=30", "federation.local_steps=10", "federation.batch_size=8", "algorithm.rate=2e-3",
    "algorithm.mu=1e-3", 'algorithm.decay="linear"', "eval.examples=200", "eval.every=30",
)  # fmt: skip
QUIET = ("output.export=false", "output.report=false", "output.tensorboard=false", "guard.batches=0")


def config_of(epsilon: str, *, seed: int, file: str | None, clip: float) -> Config:
    """Returns one run's configuration."""
    private = () if epsilon == "none" else ('privacy.mode="example"', f"privacy.clip={clip}", f"privacy.delta={DELTA}")
    noise = {"inf": ("privacy.sigma=0.0",), "noise": ALONE}.get(epsilon, (f"privacy.epsilon={epsilon}",))
    more = (*private, *noise, f"privacy.noise_seed={seed}") if private else ()
    base = () if file else TINY
    return load_config(file, [*base, *QUIET, f"federation.seed={seed}", f"data.seed={seed}", *more])


def row_of(epsilon: str, *, seed: int, file: str | None, clip: float) -> dict[str, object]:
    """Returns what came of one run."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        done = run(config_of(epsilon, seed=seed, file=file, clip=clip), out=Path(folder, "run"))
    spent = done.privacy or {}
    return {
        "model": file or "builtin:tiny",
        "epsilon": epsilon,
        "seed": seed,
        "sigma": spent.get("sigma"),
        "spent": spent.get("epsilon"),
        "delta": spent.get("delta"),
        "clip": None if epsilon == "none" else clip,
        "rounds": done.rounds,
        "start": done.eval["start"]["loss"],
        "end": done.eval["end"]["loss"],
        "accuracy": done.eval["end"].get("accuracy"),
        "forwards": done.forwards,
        "seconds": round(time.time() - began, 1),
    }


def rows_in(path: Path) -> list[dict[str, object]]:
    """Returns the rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def groups(rows: Sequence[Mapping[str, object]]) -> Iterator[tuple[Mapping[str, object], list[float]]]:
    """Yields one row of each kind, and by how much each seed's loss fell."""
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        for epsilon in EPSILONS:
            some = [row for row in rows if (row["model"], row["epsilon"]) == (model, epsilon)]
            for clip in sorted({float(str(row["clip"] or 0)) for row in some}, reverse=True):
                same = [row for row in some if float(str(row["clip"] or 0)) == clip]
                yield same[0], [float(str(row["start"])) - float(str(row["end"])) for row in same]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Returns the table of docs/privacy.md."""
    lines = ["| epsilon | clip | noise multiplier | seeds | loss, less than at the start |", "|---|---|---|---|---|"]
    for row, gains in groups(rows):
        epsilon = str(row["epsilon"])
        spread = f" ± {stdev(gains):.2f}" if len(gains) > 1 else ""
        sigma = "none" if epsilon in ("none", "inf") else f"{float(str(row['sigma'])):.3g}"
        named = {"none": "no privacy", "inf": "inf (limit, no noise)", "noise": "(the noise of 0.2 alone)"}
        name = named.get(epsilon, epsilon)
        lines.append(f"| {name} | {row['clip'] or 'none'} | {sigma} | {len(gains)} | {fmean(gains):.2f}{spread} |")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, object]]) -> str:
    """Returns an SVG of the table's rows at the usual clip: a bar for each epsilon, a dot for each seed."""
    found = [(str(row["epsilon"]), gains) for row, gains in groups(rows) if row["clip"] in (None, CLIP)]
    top = max(max(gains) for _, gains in found) * 1.1
    wide, high, left = 96, 220, 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide * len(found) + 20} {high + 70}" '
        'font-family="sans-serif" font-size="13" fill="#555">'
        f'<text x="{left}" y="18">loss, less than at the start (nats); dots are seeds</text>'
    ]
    for tick in (0.0, 0.5, 1.0, 1.5):
        y = 30 + high * (1 - tick / top)
        parts.append(f'<path d="M{left} {y:.1f}H{left + wide * len(found)}" stroke="#ccc"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
    for place, (epsilon, gains) in enumerate(found):
        x, height = left + wide * place + 18, max(high * fmean(gains) / top, 0)
        parts.append(f'<rect x="{x}" y="{30 + high - height:.1f}" width="60" height="{height:.1f}" fill="#3a8fb7"/>')
        ends = [30 + high * (1 - gain / top) for gain in gains]
        parts += [f'<circle cx="{x + 30}" cy="{end:.1f}" r="3.5" fill="#222"/>' for end in ends]
        named = {"none": "no privacy", "inf": "epsilon inf", "noise": "noise alone"}
        name = named.get(epsilon, f"epsilon {epsilon}")
        parts.append(f'<text x="{x + 30}" y="{high + 52}" text-anchor="middle">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config")
    parser.add_argument("--clip", type=float, default=CLIP)
    parser.add_argument("--epsilons", nargs="+", default=list(EPSILONS), choices=EPSILONS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    if asked.table:
        print(table(rows_in(asked.out)))
    elif asked.picture:
        asked.picture.write_text(picture(rows_in(asked.out)))
    else:
        for seed in range(asked.seeds):
            for epsilon in asked.epsilons:
                there = {(row["model"], row["epsilon"], row["seed"], row["clip"]) for row in rows_in(asked.out)}
                clip = None if epsilon == "none" else asked.clip
                if (asked.config or "builtin:tiny", epsilon, seed, clip) not in there:
                    row = row_of(epsilon, seed=seed, file=asked.config, clip=asked.clip)
                    with asked.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
