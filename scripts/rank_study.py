"""The effective rank on SmolLM2-135M, for three tasks, LoRA and full: docs/results/rank.json, docs/rank.svg.

    FEDMEZO_DATA=... python scripts/rank_study.py            # what is missing in rank.json; an hour on one core
    FEDMEZO_DATA=... python scripts/rank_study.py --draw     # only the picture and the table of docs/rank.md

One command per entry of rank.json, which is written after each, so the script may be stopped and started again.
"""

import json
import math
import subprocess
import sys
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PAGE, BEGIN, END = HERE / "docs" / "rank.md", "<!-- ranks -->", "<!-- end of ranks -->"
RESULTS, PICTURE = HERE / "docs" / "results" / "rank.json", HERE / "docs" / "rank.svg"

BATCHES = {
    "sst2": ["federation.batch_size=2"],
    "gsm8k": ["data.max_tokens=64"],
    "natural-instructions": ["data.max_tokens=96"],
}
COUNT = {"sst2": 3, "gsm8k": 2, "natural-instructions": 2}
FULL = ("adapter.kind=full",)
GRADIENT = ("algorithm.name=fedavg", "algorithm.rate=0.1", "federation.local_steps=5")


def commands() -> list[list[str]]:
    """Returns the arguments of every measurement, the most wanted first."""

    def one(task: str, *options: str, settings: tuple[str, ...] = ()) -> list[str]:
        words = [word for pair in [*BATCHES[task], *settings] for word in ("--set", pair)]
        return ["analyze", "rank", f"configs/{task}.toml", *words, "--batches", str(COUNT[task]), *options, "--json"]

    def backprop(directions: int, steps: int) -> list[str]:
        return ["--method", "backprop", "--directions", str(directions), "--steps", str(steps)]

    forward = ["--method", "forward", "--directions", "32"]
    return [
        one("sst2", *backprop(12, 10)),
        one("sst2", *backprop(5, 6), settings=FULL),
        one("gsm8k", *backprop(8, 8)),
        one("natural-instructions", *backprop(8, 8)),
        one("sst2", *backprop(6, 6), "--after", "3", settings=GRADIENT),
        one("sst2", *forward, settings=FULL),
        one("gsm8k", *backprop(5, 6), settings=FULL),
        one("natural-instructions", *backprop(5, 6), settings=FULL),
        one("sst2", *forward),
        one("gsm8k", *forward),
        one("natural-instructions", *forward),
        one("gsm8k", *forward, settings=FULL),
        one("natural-instructions", *forward, settings=FULL),
        one("sst2", *backprop(6, 5), "--layers"),
    ]


def measure() -> list[dict]:
    """Returns all entries, those that were missing measured now."""
    entries = json.loads(RESULTS.read_text())["entries"] if RESULTS.exists() else []
    for words in commands():
        if words in [entry["command"] for entry in entries]:
            continue
        print("fedmezo", *words, file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", "fedmezo", *words], cwd=HERE, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print("failed:", done.stdout, file=sys.stderr)
            continue
        entries.append({"command": words, "rows": json.loads(done.stdout)["rows"]})
        RESULTS.write_text(json.dumps({"entries": entries}, indent=1) + "\n")
    return entries


WIDTH, LEFT, RIGHT, LINE, TOP = 860, 330, 30, 24, 64
LOW, HIGH = 0.1, 3000.0
COLOURS = {"hessian": "#c2410c", "ggn": "#1d4ed8", "forward": "#4d7c0f"}
NAMES = {"hessian": "Hessian", "ggn": "Gauss-Newton", "forward": "forward passes"}


def x_of(value: float) -> float:
    share = math.log(min(max(value, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def text(x: float, y: float, words: str, *, size: int = 13, colour: str = "#222", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, *, colour: str, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def mark(row: dict, y: float) -> list[str]:
    """Returns a dot with its interval, a lower bound in absolute eigenvalues, or why there is neither."""
    colour, span = COLOURS[row["method"]], row["intervals"].get("rank")
    made = []
    if row["rank"] is not None and span:
        made.append(line(x_of(span[0]), y, x_of(span[1]), y, colour=colour, extra='stroke-width="2"'))
        made.append(f'<circle cx="{x_of(row["rank"]):.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
    else:
        made.append(text(LEFT + 6, y + 4, "no rank: the trace is below or near 0", size=11, colour=colour))
    if (least := least_of(row)) is not None:
        x = x_of(least)
        made.append(f'<path d="M{x:.1f} {y - 6:.1f} l9 6 l-9 6 z" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return made


def least_of(row: dict) -> float | None:
    """Returns a lower bound on the rank in absolute eigenvalues, for a Hessian with negative ones."""
    if row["method"] != "hessian" or row["lambda_min"] > -0.2 * row["norm"] or row["part"] != "all":
        return None
    return row["intervals"]["frobenius2"][0] / row["intervals"]["norm"][1] ** 2


def svg(entries: list[dict]) -> str:
    """Returns the picture: one line per measurement of a whole model, ranks on a logarithmic axis."""
    rows = [(task_of(entry), row) for entry in entries for row in entry["rows"] if row["part"] == "all"]
    rows.sort(key=lambda pair: (pair[1]["adapter"], list(BATCHES).index(pair[0]), pair[1]["after"]))
    bottom = TOP + LINE * len(rows)
    made = [text(16, 24, "Effective rank of the loss's curvature, SmolLM2-135M", size=16)]
    made += [
        text(
            16,
            44,
            "dot: tr(H) / |H| with 95 % interval; triangle: lower bound in absolute eigenvalues",
            size=12,
            colour="#555",
        )
    ]
    for tick in (0.1, 1, 10, 100, 1000):
        made.append(line(x_of(tick), TOP, x_of(tick), bottom, colour="#e5e5e5"))
        made.append(text(x_of(tick), bottom + 18, f"{tick:g}", size=12, anchor="middle"))
    for limit, words in ((8, "LoRA rank 8"), (200, "paper: 200")):
        made.append(line(x_of(limit), TOP, x_of(limit), bottom + 24, colour="#111", extra='stroke-dasharray="5 4"'))
        made.append(text(x_of(limit), bottom + 38, words, size=12, anchor="middle"))
    for number, (task, row) in enumerate(rows):
        y = TOP + LINE * (number + 0.5)
        after = f", {row['after']} rounds" if row["after"] else ""
        made.append(text(16, y + 4, f"{task}, {row['adapter']}{after}: {NAMES[row['method']]}"))
        made += mark(row, y)
    size = f'width="{WIDTH}" height="{bottom + 52}" viewBox="0 0 {WIDTH} {bottom + 52}"'
    body = "\n".join(made)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'


def task_of(entry: dict) -> str:
    return Path(entry["command"][2]).stem


def markdown(entries: list[dict]) -> str:
    """Returns the table of docs/rank.md."""
    lines = [
        "| task | trained | rounds | matrix | trace | largest | lowest | rank | 95 % | absolute, at least |",
        "|" + "---|" * 10,
    ]
    for entry in entries:
        for row in (row for row in entry["rows"] if row["part"] == "all"):
            span = row["intervals"].get("rank")
            numbers = [
                row["trace"],
                row["norm"] if row["method"] == "forward" else row["lambda_max"],
                row["lambda_min"],
                row["rank"],
            ]
            cells = [task_of(entry), row["adapter"], str(row["after"]), NAMES[row["method"]], *map(told, numbers)]
            lines.append(
                "| "
                + " | ".join([*cells, f"{told(span[0])} to {told(span[1])}" if span else "-", told(least_of(row))])
                + " |"
            )
    return "\n".join(lines)


def told(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


if __name__ == "__main__":
    found = json.loads(RESULTS.read_text())["entries"] if "--draw" in sys.argv else measure()
    PICTURE.write_text(svg(found))
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(found)}\n{END}{rest.split(END)[1]}")
