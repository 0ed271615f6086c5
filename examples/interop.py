"""A run's adapter in other programs, and back: plain peft, a second run that starts from it, a tracker of your own.

python examples/interop.py [FOLDER]

Runs in seconds on the tiny model that comes with fedmezo; yours is a hub id or a folder.
"""

import shutil
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmezo import ask, load_config, run, verify

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/interop")
base = shutil.copytree(str(files("fedmezo") / "assets" / "tiny"), folder / "base", dirs_exist_ok=True)
settings = [
    f"model.name={base}",
    "data.limit=200",
    "federation.rounds=3",
    "federation.local_steps=4",
    "guard.batches=0",
]


class Curves:
    """A tracker: anything with `log(metrics, step)`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Prints one number per round; step is the number of rounds done."""
        sys.stdout.write(f"round {step}: training loss {metrics['train/loss']:.3f}\n")


first = run(load_config(None, settings), out=folder / "first", trackers=[Curves()])
adapter = folder / "first" / "adapter"
sys.stdout.write(f"model card: {len((adapter / 'README.md').read_text().splitlines())} lines\n")
sys.stdout.write(f"sealed: {verify(adapter)['ok']}\n")

# Nothing of fedmezo in these five lines.
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
ids = tokenizer("Write the plural of cat.", return_tensors="pt")["input_ids"]
with torch.no_grad():
    sys.stdout.write(f"plain peft: logits {tuple(model(ids).logits.shape)}\n")

# Any LoRA adapter with safetensors can be the start, also one that PEFT trained by backpropagation.
second = run(load_config(None, [*settings, f"adapter.start={adapter}"]), out=folder / "second")
sys.stdout.write(f"the second run starts where the first ended: {second.eval['start'] == first.eval['end']}\n")
sys.stdout.write(f"asked: {ask(folder / 'second', 'Write the plural of cat.', max_tokens=8)!r}\n")
