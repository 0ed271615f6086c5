"""Prints, per configuration, what was dropped because the evaluation asks it too, and that nothing of it is left.

    python scripts/overlap.py > docs/results/overlap.jsonl

`FEDMEZO_DATA` names the folder with the public data sets, for the configurations that read them. Only the tokenizer
of the model is loaded. The exit status is 1 when a training prompt is left that an evaluation set holds.
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from fedmezo.data.prompt import Example
from fedmezo.models.fetch import fetch
from fedmezo.studies.config import load_config
from fedmezo.studies.deal import SEEN, FederatedData, read_data

CASES = [("configs/demo.toml", [f"data.seed={seed}"]) for seed in range(3)]
CASES += [(None, []), (None, ["eval.per_client=true"])]
CASES += [
    (f"configs/{name}.toml", [])
    for name in ("gsm8k", "dolly", "sst2", "mbxp", "fedkseed-dolly", "natural-instructions")
]


def prompt(example: Example) -> tuple[int, ...]:
    row = example.rows[0]
    return row.ids[: row.start]


def left(data: FederatedData) -> int:
    """Counts the evaluation examples, of all sets, whose prompt a client still trains on."""
    trained = {prompt(example) for part in data.parts for example in part}
    return sum(prompt(example) in trained for judged in data.evaluation.values() for example in judged)


def main() -> int:
    """Counts and prints one object per configuration."""
    tokenizer = AutoTokenizer.from_pretrained(Path(fetch("smollm2-135m")), local_files_only=True)
    remaining = 0
    for path, overrides in CASES:
        data = read_data(load_config(path, overrides), tokenizer)
        row = {
            "config": path or "defaults",
            "set": overrides,
            "train": sum(data.sizes.values()),
            "sets": len(data.evaluation),
            "examples": sum(map(len, data.evaluation.values())),
            "dropped": data.dropped.get(SEEN, 0),
            "repeated": left(data),
        }
        remaining += row["repeated"]
        print(json.dumps(row), flush=True)
    return int(remaining > 0)


if __name__ == "__main__":
    sys.exit(main())
