"""Makes examples/tour.ipynb: runs its cells in this process and stores what they print and show.

    python scripts/notebook.py            # writes the notebook
    python scripts/notebook.py --check    # runs the cells, and compares with what is stored, numbers aside

The cells are here, so that they are read, checked and changed as Python. No package of Jupyter is needed to make the
notebook, and nothing in it is fetched from anywhere.
"""

import ast
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tour.ipynb"

# (kind, text): what the reader sees, in order.
CELLS: tuple[tuple[str, str], ...] = (
    (
        "markdown",
        """# A tour of fedmezo

Three clients tune a language model together. Nobody shares data and nobody computes a gradient. The model here is
`builtin:tiny`, 0.86 million parameters in the package, so all cells run in seconds and without a network. Outputs are
stored; run the cells again for your own.""",
    ),
    (
        "code",
        """import tempfile
from dataclasses import replace
from pathlib import Path

import fedmezo
from fedmezo import Journal, build, load_config
from fedmezo.studies.config import with_changes

folder = Path(tempfile.mkdtemp())
config = load_config(
    overrides=[
        "model.name=builtin:tiny",
        "data.name=builtin:skills/pairs",
        "data.limit=300",
        "data.template={instruction} {input} is",
        "federation.rounds=12",
        "federation.local_steps=8",
        "federation.batch_size=4",
        "algorithm.rate=4e-3",
        "eval.examples=50",
        "runtime.threads=1",
    ]
)
print(fedmezo.__version__)""",
    ),
    (
        "markdown",
        """## One step

A step asks two questions of the model: what is the loss a little further along a random direction, and what is it a
little back? The difference, divided by twice the distance, is the slope. That number is all a client sends.""",
    ),
    (
        "code",
        """from fedmezo.fl.algorithm import Point

built = build(config)
bench, mu = built.bench, built.config.algorithm.mu
seed = 7  # names a direction of as many entries as there are trained numbers
ahead, behind = bench.losses([Point(bench.params, seed, side * mu, client=0, round=0, step=0) for side in (1, -1)])
print(f"{bench.params.dim:,} trained numbers; the direction is the seed {seed}")
print(f"loss ahead {ahead:.5f}, loss behind {behind:.5f}, slope {(ahead - behind) / (2 * mu):+.3f}")""",
    ),
    (
        "markdown",
        """## A run

Twelve rounds of eight steps for three clients. Whatever happens is in the journal before you see it.""",
    ),
    (
        "code",
        """summary = fedmezo.run(config, out=folder / "run")
print(f"loss {summary.eval['start']['loss']:.3f} -> {summary.eval['end']['loss']:.3f}")
print(f"{summary.bytes['up_per_client_round']:.0f} bytes up per client and round")
print(f"the adapter itself would be {4 * summary.dim:,} bytes")""",
    ),
    (
        "code",
        """class Picture:
    \"\"\"An SVG that a notebook shows.\"\"\"

    def __init__(self, svg):
        self.svg = svg

    def _repr_svg_(self):
        return self.svg

    def __repr__(self):
        return f"a picture, {len(self.svg)} characters"


def curves(series, *, width=520, height=180, colours=("#3b7dd8", "#d8743b", "#3ba36b")):
    \"\"\"Returns a picture of some series over the rounds.\"\"\"
    low, high = min(map(min, series.values())), max(map(max, series.values()))
    parts = []
    for (name, values), colour, row in zip(series.items(), colours, range(9)):
        step = (width - 150) / max(1, len(values) - 1)
        drop = (height - 40) / (high - low)
        place = [f"{40 + n * step:.1f},{10 + drop * (high - v):.1f}" for n, v in enumerate(values)]
        parts.append(f'<polyline points="{" ".join(place)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 100}" y="{24 + 18 * row}" fill="{colour}" font-size="13">{name}</text>')
    for value, y in ((high, 14), (low, height - 26)):
        parts.append(f'<text x="2" y="{y}" fill="#888" font-size="12">{value:.2f}</text>')
    parts.append(f'<text x="40" y="{height - 6}" fill="#888" font-size="12">training loss, nats, by round</text>')
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return Picture(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{"".join(parts)}</svg>')


with Journal.open(folder / "run" / "journal.sqlite", readonly=True) as journal:
    rounds = list(journal.rounds())
curves({f"client {n}": [e.reply.loss for r in rounds for e in r.entries if e.task.client == n] for n in range(3)})""",
    ),
    (
        "markdown",
        """## The journal is the run

From the base model and the journal, the tuned model is rebuilt to the bit. A run can go back, and go on: the end is the
same.""",
    ),
    (
        "code",
        """print("rebuilt, same digest:", fedmezo.verify(folder / "run")["digest"] == summary.digest)
print("journal:", (folder / "run" / "journal.sqlite").stat().st_size // 1000, "kB")
fedmezo.rollback(folder / "run", round=5)
print("back at round 5 and on to 12, same digest:", fedmezo.resume(folder / "run").digest == summary.digest)""",
    ),
    (
        "markdown",
        """## An algorithm is a value

`build` makes everything a run needs. Any part can be replaced, and `run` takes the result: here the clients walk along
the same directions, and the median takes the place of the mean.""",
    ),
    (
        "code",
        """shared = with_changes(config, ["algorithm.shared=true", "federation.rounds=4"])
built = build(shared)
careful = replace(built, algorithm=fedmezo.with_robust_mean(built.algorithm, "median"))
outvoted = fedmezo.run(careful, out=folder / "median")
print(f"loss {outvoted.eval['start']['loss']:.3f} -> {outvoted.eval['end']['loss']:.3f} by medians of slopes")""",
    ),
    (
        "markdown",
        """## The adapter is PEFT's

`adapter/` in the run's folder loads with plain `peft`, without this package.""",
    ),
    (
        "code",
        """from peft import PeftConfig

peft = PeftConfig.from_pretrained(folder / "run" / "adapter")
print(peft.peft_type.value, "rank", peft.r, "on", ", ".join(sorted(peft.target_modules)))
sorted(path.name for path in (folder / "run" / "adapter").iterdir())""",
    ),
)


def executed(source: str, names: dict[str, Any], *, label: str) -> list[dict[str, Any]]:
    """Returns what a cell prints, and what its last expression shows, as outputs of a notebook."""
    tree = ast.parse(source, label)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, label, "exec"), names)  # our own cells
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), label, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_svg_"):
            data["image/svg+xml"] = [value._repr_svg_()]
        outputs.append({"output_type": "execute_result", "metadata": {}, "data": data})
    return outputs


def notebook() -> dict[str, Any]:
    """Returns the notebook, its cells run one after another in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells: list[dict[str, Any]] = []
    count = 0
    for number, (kind, text) in enumerate(CELLS):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        if kind == "code":
            count += 1
            outputs = executed(text, names, label=f"cell {number}")
            for output in outputs:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = count
            cell |= {"execution_count": count, "outputs": outputs}
        cells.append(cell)
    about = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def without_numbers(book: dict[str, Any]) -> str:
    """Returns the notebook as text in which every number is the same one: machines differ in last digits."""
    return re.sub(r"[+-]?\d[\d,.]*(e-?\d+)?", "0", json.dumps(book, indent=1, ensure_ascii=False))


def main() -> int:
    """Writes or checks the notebook; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    book = notebook()
    if "--check" not in sys.argv[1:]:
        NOTEBOOK.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"Wrote {NOTEBOOK.name}: {len(book['cells'])} cells.")
        return 0
    if without_numbers(book) != without_numbers(json.loads(NOTEBOOK.read_text(encoding="utf-8"))):
        print("The notebook is not what its cells say now; run: python scripts/notebook.py")
        return 1
    print("The cells say what is stored.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
