"""A run with a live page beside it: open the printed address in a browser. Half a minute.

python examples/watch_a_run.py [FOLDER [SECONDS]]

The page stays SECONDS after the run's end, 0 by default; with more of them there is time to look at it.
"""

import sys
import tempfile
import time
from pathlib import Path

import fedmezo

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "run"
config = fedmezo.load_config(
    overrides=[
        "model.name=builtin:tiny",
        "federation.rounds=8",
        "federation.local_steps=4",
        "federation.batch_size=2",
        "eval.every=2",
        "eval.examples=20",
        "output.export=false",
        "output.report=false",
    ]
)
with fedmezo.watch(folder, port=0) as page:
    sys.stdout.write(f"live page: {page.url}\n")
    summary = fedmezo.run(config, out=folder)
    sys.stdout.write(f"loss {summary.eval['start']['loss']:.3f} -> {summary.eval['end']['loss']:.3f}\n")
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
