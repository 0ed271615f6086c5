"""Hugging Face's Trainer without gradients: the same names, a PEFT adapter, a resume to the bit. Runs in seconds.

python examples/hf_trainer.py [FOLDER]
"""

import sys
from pathlib import Path

from peft import LoraConfig, PeftModel

from fedmezo import ZOTrainer, ZOTrainingArguments, load_model
from fedmezo.data.skills import skills

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/hf-trainer")

# Rows as TRL's SFTTrainer takes them: prompt and completion, or text, or messages; or tokenised, with labels.
records = skills(count=150, seed=1, categories=["pairs"])
rows = [{"prompt": f"{r.instruction}\n{r.input}", "completion": f" {r.output}"} for r in records]
args = ZOTrainingArguments(
    output_dir=str(folder / "run"),
    learning_rate=3e-3,  # or "auto", the default, which is found early in a longer run
    max_steps=60,
    per_device_train_batch_size=4,
    logging_steps=5,
    eval_strategy="steps",
    eval_steps=20,
    save_steps=20,
    seed=1,
)


class StopAt:
    """A callback, as transformers has them."""

    def __init__(self, step: int) -> None:
        """Keeps the step."""
        self.step = step

    def on_step_end(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        """Asks for an end."""
        control.should_training_stop = state.global_step >= self.step
        return control


def trainer(**more: object) -> ZOTrainer:
    """Returns a trainer; made anew as a new process would."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    return ZOTrainer("builtin:tiny", args, train_dataset=rows[50:], eval_dataset=rows[:50], peft_config=config, **more)


trainer(callbacks=[StopAt(20)]).train()
again = trainer()
again.train(resume_from_checkpoint=True)
for entry in again.state.log_history:
    if "eval_loss" in entry:
        print(f"step {entry['step']:.0f}: eval_loss {entry['eval_loss']:.3f}")

# The adapter is PEFT's own; nothing of this package is needed to use it.
base = load_model("builtin:tiny")
tuned = PeftModel.from_pretrained(base.model, folder / "run" / "adapter")
ids = base.tokenizer(rows[0]["prompt"], return_tensors="pt")
answer = tuned.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=base.tokenizer.eos_token_id)
print(repr(rows[0]["prompt"]), "->", repr(base.tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])))
start, *_, end = (entry["eval_loss"] for entry in again.state.log_history if "eval_loss" in entry)
print("the loss fell:", end < start)
