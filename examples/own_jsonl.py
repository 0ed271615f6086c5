"""Your own JSONL on three clients, from Python and by commands: the same bits. Runs in seconds.

python examples/own_jsonl.py [FOLDER]

A record is a line: {"instruction": ..., "input": ..., "output": ..., "category": ...}. Here `category` names who owns
it, so `split.kind = "natural"` gives every client its own lines; without owners, "iid" or "lda" deals them.
"""

import json
import subprocess
import sys
from pathlib import Path

import fedmezo

COLOURS = {"lamp": "red", "grass": "green", "sky": "blue", "snow": "white", "coal": "black", "lemon": "yellow"}
OWNERS = ("home", "office", "lab")

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-jsonl")
folder.mkdir(parents=True, exist_ok=True)


def record(owner: str, thing: str, number: int) -> dict[str, str]:
    """Returns one record."""
    asked = f"the {thing} in the {owner}, no {number}"
    return {"instruction": "Which colour?", "input": asked, "output": COLOURS[thing], "category": owner}


records = [record(owner, thing, number) for owner in OWNERS for number in range(10) for thing in COLOURS]
(folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
(folder / "mine.toml").write_text(
    f"""
[model]
name = "builtin:tiny"                # or a folder, a .gguf file, a Hugging Face id

[data]
path = "{folder / "mine.jsonl"}"
template = "{{instruction}} {{input}} is"
max_tokens = 48

[split]
kind = "natural"                     # each value of `category` is one client

[federation]
clients = {len(OWNERS)}
rounds = 6
local_steps = 5
batch_size = 4

[runtime]
threads = 1                          # the same bits whoever runs it
""",
    encoding="utf-8",
)

config = fedmezo.load_config(folder / "mine.toml")
summary = fedmezo.run(config, out=folder / "from-python")
print(f"loss {summary.eval['start']['loss']:.3f} -> {summary.eval['end']['loss']:.3f}")
print(f"{summary.bytes['up_per_client_round']:.0f} bytes up per client and round")

# The same by a command. `fedmezo` is this Python's own here, so that the example needs no PATH.
command = ["run", str(folder / "mine.toml"), "--out", str(folder / "by-command"), "--json", "--quiet"]
print("fedmezo", *command)
done = subprocess.run([sys.executable, "-m", "fedmezo", *command], check=True, capture_output=True, text=True)
print("same bits:", json.loads(done.stdout)["digest"] == summary.digest)
