"""Prints, per configuration, how many evaluation prompts also occur in training.

    python scripts/overlap.py > docs/results/overlap.jsonl

`FEDMEZO_DATA` names the folder with the public data sets, for the configurations that read them.
"""

import json
from collections import Counter

from fedmezo.studies.build import load_base, read_data
from fedmezo.studies.config import load_config

CASES = [("configs/demo.toml", [f"data.seed={seed}"]) for seed in range(3)]
CASES += [(None, [])] + [(f"configs/{name}.toml", []) for name in ("gsm8k", "dolly", "sst2", "mbxp")]


def main() -> None:
    """Counts and prints one object per configuration."""
    tokenizer = load_base(load_config("configs/demo.toml")).tokenizer
    for path, overrides in CASES:
        data = read_data(load_config(path, overrides), tokenizer)
        trained = {example.rows[0].ids[: example.rows[0].start] for part in data.parts for example in part}
        judged = data.evaluation["eval"]
        again = Counter(e.category for e in judged if e.rows[0].ids[: e.rows[0].start] in trained)
        row = {"config": path or "defaults", "set": overrides, "examples": len(judged), "repeated": again.total()}
        print(json.dumps({**row, "categories": dict(again)}), flush=True)


if __name__ == "__main__":
    main()
