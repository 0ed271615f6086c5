#!/bin/sh
# What a newcomer does who has the wheel and the package index, and nothing else: the demo, then records of their own on
# two clients. It ends with the tuned models' answers; "## N s" tells how long it has been going.
#
# Run: sh scripts/newcomer.sh dist/fedmezo-0.1.0-py3-none-any.whl > newcomer.log 2>&1      (three GB in a temporary folder)
set -eu
wheel=$(realpath "$1")
quickstart=$(realpath "$(dirname "$0")/../docs/quickstart-engineer.md")
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
unset FEDMEZO_CACHE FEDMEZO_DATA OMP_NUM_THREADS PYTHONPATH || true
export HOME="$home"
cd "$home"
start=$(date +%s)
step() { echo "## $(($(date +%s) - start)) s: $*"; }

step install
python3 -m venv .venv
.venv/bin/pip install --quiet "$wheel"
. .venv/bin/activate
pip list | grep -E "^(fedmezo|torch|transformers|peft) "

step demo
fedmezo config init demo.toml --like demo
fedmezo run demo.toml
fedmezo ask runs/demo "Find the city." --input "On 3 May Wilma paid 61 dollars in Lisbon for a kettle."

step own records
# The quickstart's own lines make them.
python - "$quickstart" <<'PY'
import re, sys
exec(re.search(r"```python\n(import json.*?)```", open(sys.argv[1]).read(), re.S)[1])
PY
fedmezo run --set data.path=tickets.jsonl --set model.name=smollm2-135m --set model.dtype=bfloat16 \
  --set federation.clients=2 --set federation.rounds=30 --set federation.batch_size=4 --out runs/mine
fedmezo ask runs/mine "Which team?" --input "I was charged twice for the umbrella."
fedmezo ask runs/mine "Which team?" --input "The box with the umbrella was broken."
fedmezo ask runs/mine "Which team?" --input "I cannot log in to order a umbrella."
fedmezo verify runs/mine
step done
