"""Differential privacy of scalars: what a target epsilon asks for, what it costs, and who may know what.

    python examples/private.py

Three runs of the built-in model with the same data: not private; each client hides each of its examples; a trusted
server hides each client. About two minutes.
"""

import tempfile
from pathlib import Path

from fedmezo import load_config, plan, run

BASE = [
    'model.name="builtin:tiny"', 'model.dtype="float32"', 'data.name="builtin:skills/routing,follows,pairs,extract"',
    "data.limit=1200", "data.eval_examples=100", "data.max_tokens=96", "eval.examples=100",
    'data.template="{instruction}\\n{input} "', "adapter.rank=8", "federation.clients=4", "federation.rounds=12",
    "federation.local_steps=10", "federation.batch_size=8", "algorithm.rate=2e-3", "algorithm.mu=1e-3",
    "guard.batches=0", "output.report=false", "output.tensorboard=false",
]  # fmt: skip
RUNS = {
    "not private": [],
    "each example, by its client": ['privacy.mode="example"', "privacy.clip=0.03", "privacy.epsilon=4"],
    "each client, by the server": [
        'privacy.mode="central"', "privacy.clip=20", "privacy.epsilon=8", "algorithm.shared=true",
    ],
}  # fmt: skip


def main() -> None:
    """Runs all three and says what they have spent."""
    for name, settings in RUNS.items():
        config = load_config(None, [*BASE, *settings])
        with tempfile.TemporaryDirectory() as folder:
            if settings:
                told = plan(config)["privacy"]
                print(f"{name}: noise multiplier {told['sigma']:.3g} will cost epsilon {told['epsilon']:.3g}")
            done = run(config, out=Path(folder, "run"))
        spent = done.privacy["epsilon"] if done.privacy else "not counted"
        losses = f"{done.eval['start']['loss']:.3f} -> {done.eval['end']['loss']:.3f}"
        print(f"{name}: loss {losses}, epsilon {spent}")


if __name__ == "__main__":
    main()
