"""Writes the README's tables from the raw results in docs/results; see docs/results/README.md for the commands.

python scripts/results.py          # rewrite the tables between the markers
python scripts/results.py --check  # exit 1 if they differ
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"


def read(name: str) -> dict:
    """Returns one raw result."""
    return json.loads((RESULTS / name).read_text())


def span(values: list[float], form: str) -> str:
    """Returns `low to high`, or one value if they print alike."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def demo() -> str:
    """Returns the demo's table over three seeds."""
    runs = [read(f"demo-seed{seed}.json") for seed in range(3)]
    both = [[run["eval"][when] for run in runs] for when in ("start", "end")]
    rows = [
        "| three clients, three seeds | start | end |",
        "|---|---|---|",
        "| evaluation loss, nats per answer token | "
        + " | ".join(span([e["loss"] for e in each], ".2f") for each in both)
        + " |",
        "| answer tokens right | "
        + " | ".join(span([100 * e["token_accuracy"] for e in each], ".0f") + " %" for each in both)
        + " |",
    ]
    written = [
        [read(f"demo-seed{seed}-written-{when}.json")["exact_match"] for seed in range(3)] for when in ("start", "end")
    ]
    rows.append(
        "| written answers exactly right (80 examples) | "
        + " | ".join(span([100 * w for w in each], ".0f") + " %" for each in written)
        + " |"
    )
    up = runs[0]["bytes"]["up_per_client_round"]
    dense = 4 * runs[0]["dim"]
    rows += [
        "",
        f"{runs[0]['forwards']:,} forward passes over {runs[0]['tokens']:,} tokens; {up:.0f} bytes up per client and round, where the "
        f"adapter itself has {dense:,} ({dense / up:,.0f} times more). Seed 0, two cores: "
        f"{runs[0]['seconds'] / 60:.1f} minutes of training.",
    ]
    return "\n".join(rows)


def measured() -> str:
    """Returns the table of the real data sets and of memory and speed."""
    rows = [
        "| data, split | loss start | loss end | accuracy | up, bytes per client and round | command |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in (
        ("gsm8k", "GSM8K, iid"),
        ("dolly", "Dolly-15k, meta"),
        ("sst2", "SST-2, lda"),
        ("mbxp", "MBXP, lda"),
    ):
        run = read(f"{name}.json")
        start, end = run["eval"]["start"], run["eval"]["end"]
        key = "accuracy" if "accuracy" in end else "token_accuracy"
        what = "answers" if key == "accuracy" else "tokens"
        rows.append(
            f"| {label} | {start['loss']:.3f} | {end['loss']:.3f} | {100 * start[key]:.1f} → {100 * end[key]:.1f} % of {what} | "
            f"{run['bytes']['up_per_client_round']:.0f} | `fedmezo run configs/{name}.toml` |"
        )
    rows += ["", "| memory and speed | ratio | command |", "|---|---|---|"]
    for name, label in (
        ("memory", "compiled noise"),
        ("memory-torch", "`FEDMEZO_NOISE=torch`, saves the compiler's 100 MB"),
    ):
        for row in read(f"{name}.json")["runs"]:
            rows.append(
                f"| peak memory, LoRA step / (plain forward + adapter), {row['tokens']} tokens, rank {row['rank']}, {label} | "
                f"{row['ratio']:.3f} | `python benchmarks/memory.py --tokens {row['tokens']} --rank {row['rank']}` |"
            )
    family = {row["mode"]: row["peak_mb"] for row in read("memory-backprop.json")["rows"]}
    named = (("sgd", "FedAvg, sgd"), ("sgd-ckpt", "FedAvg, sgd, gradient checkpointing"), ("adamw", "FedAvg, adamw"))
    for mode, label in (*named, ("plain-sgd", "plain PEFT, sgd")):
        rows.append(
            f"| peak memory of a local step, {label} / FedMeZO, 256 tokens, rank 8, libraries included | "
            f"{family[mode] / family['step']:.2f} | `python benchmarks/memory.py --tokens 256 --rank 8` |"
        )
    for row in read("step.json")["rows"]:
        rows.append(
            f"| time, LoRA step / two plain forwards, {row['tokens']} tokens, rank {row['rank']}, {row['dtype']} | "
            f"{row['ratio_two_forwards']:.2f} | `python benchmarks/step.py` |"
        )
    return "\n".join(rows)


COMPARED = (("sst2", "SST-2, lda"), ("dolly", "Dolly-15k, summarization held out"), ("gsm8k", "GSM8K, iid"))


def compared() -> str:
    """Returns the comparisons on real data, the bytes of coarse numbers, and Rouge-L on the task held out."""
    rows = [
        "| data, start loss | algorithm | loss at one equal rate | tuned rate | loss | right | bytes both ways | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    said = []
    for name, label in ((name, label) for name, label in COMPARED if (RESULTS / f"compare-{name}.json").exists()):
        result = read(f"compare-{name}.json")
        start = next(row["start_loss"] for row in result["rows"] if row["start_loss"] is not None)
        (budget, amount), seeds = next(iter(result["budget"].items())), len(result["seeds"])
        equal = {arm["arm"]: arm for arm in result["arms"] if arm["column"] == "equal"}
        for arm in (arm for arm in result["arms"] if arm["column"] == "tuned"):
            right, of = (arm["accuracy"], "answers") if arm["accuracy"] else (arm["token_accuracy"], "tokens")
            alike = equal.get(arm["arm"])
            at_equal = f"{_loss(alike)} at {alike['rate']:g}" if alike else "not run"
            rows.append(
                f"| {label}, {start:.3f} | {arm['arm']} | {at_equal} | {arm['rate']:g} | "
                f"{_loss(arm)} | {100 * right['mean']:.1f} % of {of} | {arm['bytes']['mean']:,.0f} | {arm['peak_rss_mb']['mean']:,.0f} MB |"
            )
        verdicts = [
            f"At one equal rate: {v['text']}" if v["column"] == "equal" else v["text"]
            for v in result["verdicts"]
            if v["measure"] != "seconds" and (v["column"] != "equal" or v["measure"] == "loss")
        ]
        said += [f"- {label}, {amount:,.0f} {budget} each, {seeds} seeds. " + " ".join(verdicts)]
    return "\n".join([*rows, "", *said, "", *_coarse(), "", *_held_out()])


def _loss(arm: dict) -> str:
    return f"{arm['loss']['mean']:.3f} ± {arm['loss']['sd']:.3f}"


def _coarse() -> list[str]:
    lines = [json.loads(line) for line in (RESULTS / "wire_bytes.jsonl").read_text().splitlines()]
    rows = [
        "| K = 4,096, 200 steps, tiny model, after 5 rounds | bytes down | bytes up | final loss, three seeds |",
        "|---|---|---|---|",
    ]
    for form in dict.fromkeys(line["format"] for line in lines):
        same = [line for line in lines if line["format"] == form]
        down, up = (max(line[way] for line in same) for way in ("bytes_down", "bytes_up"))
        rows.append(f"| {form} | {down:,} | {up:,} | {', '.join(format(line['loss_end'], '.3f') for line in same)} |")
    return rows


def _held_out() -> list[str]:
    run = read("natural-instructions.json")
    lines = [json.loads(line) for line in (RESULTS / "rouge.jsonl").read_text().splitlines()]
    rows = ["| task never trained on | rounds | loss | Rouge-L | examples |", "|---|---|---|---|---|"]
    rows += [
        f"| {line['what']} | {line['round']} | {line['loss']:.3f} | {line['rouge_l']:.3f} | {line['examples']} |"
        for line in lines
    ]
    for when, done in (("start", 0), ("end", run["rounds"])):
        found = run["eval"][when]
        name = f"Natural-Instructions, test tasks, {run['clients']} clients: fedkseed, rate {run['rate']:g}"
        rows.append(f"| {name} | {done} | {found['loss']:.3f} | {found['rouge_l']:.3f} | {found['examples']:.0f} |")
    return rows


def main() -> None:
    """Rewrites or checks the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = new = path.read_text()
    for name, table in (("demo", demo()), ("compare", compared()), ("measured", measured())):
        new = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", new, flags=re.DOTALL
        )
    if check and new != old:
        raise SystemExit("README.md differs from docs/results; run python scripts/results.py.")
    path.write_text(new)


if __name__ == "__main__":
    main()
