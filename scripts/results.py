"""Writes the tables of README and docs from the raw results in docs/results; see docs/results/README.md for the commands.

python scripts/results.py          # rewrite the tables between the markers
python scripts/results.py --check  # exit 1 if they differ
"""

import argparse
import json
import math
import re
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = ("README.md", "docs/rate.md", "docs/speed.md", "docs/compare.md", "docs/studies/findings.md")


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
    """Returns the table of the real data sets."""
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
    return "\n".join(rows)


def bench(name: str) -> list[dict]:
    """Returns the rows of one result of `fedmezo bench`."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


def find(rows: list[dict], name: str, dtype: str = "float32", tokens: int | None = None) -> dict:
    """Returns the row of that name."""
    return next(
        row for row in rows if row["name"] == name and row["dtype"] == dtype and tokens in (None, row["tokens"])
    )


CASES = [(dtype, tokens) for dtype in ("float32", "bfloat16") for tokens in (64, 256)]


def steps() -> str:
    """Returns what `fedmezo bench step` found."""
    # In bfloat16 a step is quick enough to be disturbed by its neighbours; those rows were measured again, alone.
    found_steps = [row for row in bench("step") if row["dtype"] == "float32"] + bench("step-bfloat16")
    rows = [
        "| one step, against two plain forwards / speed-up over the in-place scheme | "
        + " | ".join(f"{dtype}, {tokens} tokens" for dtype, tokens in CASES)
        + " |",
        "|---|" + "---|" * len(CASES),
    ]
    for name, label in (("lora", "LoRA, rank 128, query and value"), ("full", "all parameters")):
        found = [find(found_steps, f"step: {name}, one step", *case) for case in CASES]
        cells = [f"{row['ratio_two_forwards']:.2f} / {1 / row['ratio_inplace']:.1f}x" for row in found]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def speed() -> str:
    """Returns what `fedmezo bench` found beyond steps: packing, noise, replay, memory."""
    rows = ["| | float32 | bfloat16 |", "|---|---|---|"]
    rows += [_noise(law) for law in ("gaussian", "rademacher")]
    rows += [_packed(cohort) for cohort in ("8 x 24", "16+32+64+128", "4 x 64")]
    replay = find(bench("replay"), "replay: 90 seeds over 7,372,800 LoRA parameters, gaussian")
    rows.append(f"| replaying 90 seeds over 7.4 M parameters, seconds | {replay['value']:.2f} | |")
    rows += [_memory(mode, label) for mode, label in MEMORY]
    return "\n".join(rows)


def _cell(rows: list[dict], name: str, dtype: str, show: str, pick: str = "value") -> str:
    found = [row for row in rows if row["name"] == name and row["dtype"] == dtype and row[pick] is not None]
    return format(found[0][pick], show) if found else ""


def _noise(law: str) -> str:
    name, form = f"noise: step_, {law}", ".2f"
    cells = (_cell(bench("noise"), name, dtype, form) for dtype in ("float32", "bfloat16"))
    return f"| theta += c z, {law.capitalize()}, ns per entry | {' | '.join(cells)} |"


def _packed(cohort: str) -> str:
    rows = [row for row in bench("simulate") if row["dtype"] == "float32"] + bench("simulate-bfloat16")
    name = f"simulate: {cohort}: speed-up of forwards over plain ones"
    step = f"simulate: {cohort}: speed-up of a step over the in-place scheme"
    cells = [
        f"{_cell(rows, name, dtype, '.2f')} / {_cell(rows, step, dtype, '.2f')}" if _cell(rows, name, dtype, "") else ""
        for dtype in ("float32", "bfloat16")
    ]
    return f"| {cohort} tokens in one pass, speed-up of forwards over plain ones / of steps over the in-place scheme | {' | '.join(cells)} |"


MEMORY = (
    ("plain forward", "a plain forward"),
    ("lora, our step", "a LoRA step"),
    ("full, our step", "a step of all parameters"),
    ("lora, in-place scheme", "in-place scheme, LoRA"),
    ("full, in-place scheme", "in-place scheme, all parameters"),
    ("lora, FedAvg sgd", "FedAvg by SGD, LoRA"),
    ("lora, FedAvg sgd, gradient checkpointing", "FedAvg by SGD with checkpointing, LoRA"),
    ("lora, FedAvg adamw", "FedAvg by AdamW, LoRA"),
    ("full, FedAvg adamw", "FedAvg by AdamW, all parameters"),
)


def _memory(mode: str, label: str) -> str:
    cells = [
        _cell(bench("memory"), f"memory: {mode}, extra over loaded", dtype, ",.0f") for dtype in ("float32", "bfloat16")
    ]
    return f"| memory over the loaded model, 256 tokens, {label}, MB | {' | '.join(cells)} |"


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


def _rates(arm: str) -> list[dict]:
    lines = [json.loads(line) for line in (RESULTS / "rates.jsonl").read_text().splitlines()]
    return [line for line in lines if line["arm"] == arm]


def _unguarded(task: str) -> list[dict]:
    """Returns the runs of a grid whose rate stayed what it was: the guard had nothing to do, or was told to do nothing."""
    calm = [line for line in _rates("grid") if line["task"] == task and line.get("taken_back") == 0]
    return calm + [line for line in _rates("plain") if line["task"] == task]


def _mean_fall(lines: list[dict]) -> float:
    return fmean(line["start"] - (math.inf if line["end"] is None else line["end"]) for line in lines)


def rates() -> str:
    """Returns the table of rate = "auto" against a grid."""
    rows = [
        "| task | best constant rate, of the grid | fall with it | fall with auto, by seed | share of the best | forward passes "
        "spent on looks |",
        "|---|---|---|---|---|---|",
    ]
    tasks = dict.fromkeys(line["task"] for line in _rates("auto"))
    plain = {line["task"] for line in _rates("plain")}
    for task, grid, label in [
        *((task, _rates("grid"), task) for task in tasks),
        *((task, _unguarded(task), f"{task}, the grid without a guard") for task in tasks if task in plain),
    ]:
        tried: dict[float, list[dict]] = {}
        for line in grid:
            if line["task"] == task:
                tried.setdefault(line["asked"], []).append(line)
        auto = [line for line in _rates("auto") if line["task"] == task]
        # Rates that were left out for the later seeds were the worst or the slowest of the first one.
        whole = max(map(len, tried.values()))
        falls = {rate: _mean_fall(lines) for rate, lines in tried.items() if len(lines) == whole}
        best = max(falls, key=lambda rate: falls[rate])
        single = ", ".join(f"{line['start'] - line['end']:.3f}" for line in auto)
        share, looks = _mean_fall(auto) / falls[best], fmean((line["looks"] or 0) / line["forwards"] for line in auto)
        rows.append(f"| {label} | {best:g} | {falls[best]:.3f} | {single} | {share:.0%} | {looks:.0%} |")
    return "\n".join(rows)


def high() -> str:
    """Returns the table of rates that are far too high."""
    rows = ["| task | rate | start, by seed | end, by seed | rounds taken back |", "|---|---|---|---|---|"]
    lines = _rates("high")
    for task, rate in dict.fromkeys((line["task"], line["asked"]) for line in lines):
        same = [line for line in lines if (line["task"], line["asked"]) == (task, rate)]
        starts, ends = (", ".join(f"{line[when]:.2f}" for line in same) for when in ("start", "end"))
        rows.append(
            f"| {task} | {rate:g} | {starts} | {ends} | {', '.join(str(line['taken_back']) for line in same)} |"
        )
    return "\n".join(rows)


def network() -> str:
    """Returns the table of the run over Flower, beside the simulation of it."""
    run, rounds = read("network.json"), json.loads((ROOT / "benchmarks/results/flower-rounds.json").read_text())
    same = "the same" if run["same bits as simulated"] else "OTHER"
    up, down = run["payload up, bytes, at most"], run["payload down, bytes, at most"]
    messages = run["clients"] * run["rounds"]
    flower = run["flower, bytes"]
    return "\n".join(
        [
            f"| {run['clients']} clients with TLS and keys on one machine, SmolLM2-135M, GSM8K, {run['rounds']} rounds of "
            f"{run['steps']} steps | |",
            "|---|---|",
            f"| trained bits, beside the simulation's | {same} ({run['digest'][:12]}) |",
            f"| payload per client and round | {up} bytes up, {down} down |",
            f"| with Flower's framing and the handshake, on average | {flower['up'] / messages:,.0f} bytes up, "
            f"{flower['down'] / messages:,.0f} down |",
            f"| models loaded per client | {max(run['models loaded per client'])} |",
            f"| a round beyond its walk; Flower alone, empty messages, in the same run | "
            f"{rounds['median of fedmezo beyond the walk']:.1f} s; {rounds['median of flower alone']:.1f} s |",
        ]
    )


def verdicts() -> str:
    """Returns the claims of the studies with their verdicts, from the raw records."""
    from fedmezo.studies.suite import Store, load_studies
    from fedmezo.studies.suite.claims import effect_text
    from fedmezo.studies.suite.site import beside, best, scales_of

    rows = ["| study | where | claim | scale | verdict | effect, 95 % interval |", "|---|---|---|---|---|---|"]
    for name, study in load_studies(ROOT / "studies").items():
        scales = scales_of(study, Store(ROOT / "studies" / "records"))
        for place, claim in enumerate(study.claims):
            found = best(scales, place)
            told = beside(scales, place)
            also = "".join(f"; {other.scale}: {other.word.removesuffix(' at this scale')}" for other in told)
            meaning = f"{effect_text(found.effect)} {claim.meaning}".replace("|", "\\|")
            rows.append(f"| {name} | {claim.where} | {claim.text} | {found.scale} | {found.word}{also} | {meaning} |")
    return "\n".join(rows)


def main() -> None:
    """Rewrites or checks the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    tables = {
        "demo": demo(),
        "compare": compared(),
        "measured": measured(),
        "speed": speed(),
        "steps": steps(),
        "rates": rates(),
        "high": high(),
        "network": network(),
        "verdicts": verdicts(),
    }
    for path in (ROOT / name for name in PAGES):
        old = new = path.read_text()
        for name, table in tables.items():
            new = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                lambda m, t=table: f"{m[1]}{t}\n{m[2]}",
                new,
                flags=re.DOTALL,
            )
        if check and new != old:
            raise SystemExit(f"{path.name} differs from docs/results; run python scripts/results.py.")
        path.write_text(new)


if __name__ == "__main__":
    main()
