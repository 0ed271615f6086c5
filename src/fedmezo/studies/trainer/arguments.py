"""The arguments of a `ZOTrainer`, by the names of Hugging Face's TrainingArguments and TRL's SFTConfig."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from fedmezo.errors import ConfigError
from fedmezo.studies.config import Config, parse_config

__all__ = ["Course", "ZOTrainingArguments", "course_of", "refuse"]

_LONGEST = 30  # steps of a round; the paper's H
_NO_GRADIENT = "ZOTrainer computes no gradient: {name} has nothing to act on; leave it out."
_ONE_PROCESS = "ZOTrainer is one process on one machine: {name} has nothing to act on; leave it out."
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "adam_beta1", "adam_beta2", "adam_epsilon", "fp16_full_eval", "gradient_checkpointing",
            "gradient_checkpointing_kwargs", "half_precision_backend", "max_grad_norm", "neftune_noise_alpha", "optim",
            "optim_args", "optim_target_modules", "optimizers", "torch_compile", "weight_decay",
        ),
        _NO_GRADIENT,
    ),
    "gradient_accumulation_steps": "ZOTrainer computes no gradient, so {name} has nothing to gather; raise "
    "per_device_train_batch_size or directions.",
    **dict.fromkeys(
        (
            "accelerator_config", "dataloader_num_workers", "dataloader_pin_memory", "ddp_backend",
            "ddp_find_unused_parameters", "deepspeed", "fsdp", "fsdp_config", "local_rank", "tp_size",
        ),
        _ONE_PROCESS,
    ),
    **dict.fromkeys(
        ("warmup_ratio", "warmup_steps"),
        '{name}: a walk by forward passes has no warm-up; learning_rate="auto" finds the rate early in the run.',
    ),
    "load_best_model_at_end": "{name}: a run whose loss rises goes back to its best round by itself; leave it out, and "
    "take any step's adapter with `fedmezo export DIR --round N`.",
    "compute_metrics": "{name} would need every logit, and ZOTrainer computes those of label tokens only, one piece at "
    "a time; evaluate() gives eval_loss and eval_mean_token_accuracy.",
    "compute_loss_func": "{name}: the loss is the mean over label tokens, as Trainer's own; leave it out.",
    "data_collator": "{name}: nothing is padded, so nothing is collated; give rows with input_ids and labels.",
    "model_init": "{name}: give the model itself, or its name.",
    "packing": "{name}: rows are packed into forward passes without padding anyway, each on its own; leave it out.",
    "preprocess_logits_for_metrics": "{name}: ZOTrainer keeps no logits; leave it out.",
    "push_to_hub": "{name}: save_model(DIR) writes a folder that `hf upload` takes; leave it out.",
    "tokenizer": "{name} is called processing_class.",
}  # fmt: skip


def refuse(names: Sequence[str], *, known: Sequence[str], what: str) -> None:
    """Raises ConfigError, one line per name, when there are names that are not known."""
    said = []
    for name in names:
        if name in _REFUSED:
            said.append(_REFUSED[name].format(name=name))
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            said.append(f"{what} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; leave it out."))
    if said:
        raise ConfigError("\n".join(said))


@dataclass(frozen=True)
class ZOTrainingArguments:
    """What a `ZOTrainer` is told. Names that steer a gradient are refused, each in one sentence.

    Attributes:
      output_dir: the run's folder: journal, report, adapter, checkpoints.
      learning_rate: parameter units per unit of slope; "auto" is found by line searches early in the run.
      lr_scheduler_type: constant | linear | cosine | wsd; "auto" is wsd where the rate is "auto", else constant.
      max_steps: steps in all, rounded up to whole rounds; -1 goes by num_train_epochs.
      num_train_epochs: passes over the training rows.
      per_device_train_batch_size: rows per step.
      per_device_eval_batch_size: accepted; evaluation packs rows by tokens, and its result does not depend on that.
      logging_steps: steps between two entries of the log.
      eval_strategy: no | steps | epoch (the nearest whole round).
      eval_steps: steps between evaluations; None for logging_steps.
      save_strategy: no | steps | epoch; whatever it is, every round is in the journal.
      save_steps: steps between two folders checkpoint-N.
      save_total_limit: older checkpoint folders are deleted; None keeps all.
      seed: names every direction and batch.
      bf16: the frozen weights are bfloat16.
      fp16: the frozen weights are float16.
      use_cpu: stay on the CPU though there is a GPU.
      report_to: "none", "tensorboard" or "wandb"; the last stays on this machine until `wandb sync`.
      max_length: longest row in tokens, cut at its end.
      dataset_text_field: column of whole texts.
      completion_only_loss: loss over the completion alone; None: yes where the rows have a prompt.
      assistant_only_loss: loss over the assistant's turns alone.
      mu: distance of the two losses, in parameter units; "auto" is customary, and checked.
      directions: directions averaged per step, two forward passes each.
      clip: slopes are limited to this many of their running scale; "none" for no limit.

    Raises:
      ConfigError: a name that is refused or unknown, or a value that is impossible.
    """

    output_dir: str = "trainer_output"
    learning_rate: float | Literal["auto"] = "auto"
    lr_scheduler_type: str = "auto"
    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    logging_steps: int = 10
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: int | None = None
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    seed: int = 42
    bf16: bool = False
    fp16: bool = False
    use_cpu: bool = False
    report_to: str | Sequence[str] | None = "none"
    max_length: int = 1024
    dataset_text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    mu: float | Literal["auto"] = "auto"
    directions: int = 1
    clip: float | Literal["none"] = 3.0

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuses names before Python does, in sentences."""
        refuse(list(given), known=[field.name for field in fields(cls)], what="ZOTrainingArguments")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Checks what no configuration would."""
        for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}.")
        for name in ("eval_strategy", "save_strategy"):
            if _word(getattr(self, name)) not in ("no", "steps", "epoch"):
                raise ConfigError(f"{name}: expected no, steps or epoch, got {_word(getattr(self, name))!r}.")
        if self.bf16 and self.fp16:
            raise ConfigError("bf16 and fp16 are both set; set one of them.")
        if other := set(self._reports) - {"none", "tensorboard", "wandb"}:
            raise ConfigError(
                f"report_to: expected none, tensorboard or wandb, got {min(other)!r}; give a callback for it."
            )
        self._check_length()

    def _check_length(self) -> None:
        steps, epochs = self.max_steps, self.num_train_epochs
        if type(steps) is not int or (steps < 1 and steps != -1):
            raise ConfigError(f"max_steps: expected at least 1, or -1 for num_train_epochs, got {steps!r}.")
        if steps == -1 and not 0 < epochs < math.inf:
            raise ConfigError(f"num_train_epochs: expected more than 0, got {epochs}.")

    @property
    def _reports(self) -> tuple[str, ...]:
        return (self.report_to,) if isinstance(self.report_to, str) else tuple(self.report_to or ())

    @property
    def dtype(self) -> str:
        """The number format of the frozen weights."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    def config(
        self, course: "Course", *, model: str, dtype: str, adapter: Mapping[str, Any], window: int, template: str
    ) -> Config:
        """Returns the run's configuration: a federation of one client.

        Args:
          course: rounds and steps.
          model: name of the base model.
          dtype: of its weights.
          adapter: the section [adapter].
          window: tokens that the model takes at most.
          template: how `fedmezo ask` shall write a prompt.

        Raises:
          ConfigError: a value is impossible.
        """
        names = {"warmup_stable_decay": "wsd"}
        decay = names.get(_word(self.lr_scheduler_type), _word(self.lr_scheduler_type))
        told: dict[str, dict[str, Any]] = {
            "model": {"name": model, "dtype": dtype},
            "adapter": dict(adapter),
            "data": {"max_tokens": min(self.max_length, window), "template": template, "seed": self.seed},
            "federation": {
                "clients": 1,
                "rounds": course.rounds,
                "local_steps": course.round_steps,
                "batch_size": self.per_device_train_batch_size,
                "seed": self.seed,
            },
            "algorithm": {
                "rate": _number(self.learning_rate),
                "decay": decay,
                "mu": _number(self.mu),
                "directions": self.directions,
                "clip": _number(self.clip),
            },
            "eval": {"every": course.eval_rounds or course.rounds},
            "output": {name: name in self._reports for name in ("tensorboard", "wandb")},
            "runtime": {"device": "cpu" if self.use_cpu else "auto"},
        }
        return parse_config(told)


def _word(value: Any) -> str:
    """Returns the text of a word or of one of transformers' enumerations."""
    return str(getattr(value, "value", value))


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class Course:
    """How steps become rounds.

    Attributes:
      round_steps: steps of a round.
      rounds: rounds of the run.
      epoch_steps: steps of an epoch.
      log_rounds: rounds between two entries of the log.
      eval_rounds: rounds between two evaluations; 0 for none.
      save_rounds: rounds between two checkpoint folders; 0 for none.
    """

    round_steps: int
    rounds: int
    epoch_steps: int
    log_rounds: int
    eval_rounds: int
    save_rounds: int

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.rounds * self.round_steps


def course_of(arguments: ZOTrainingArguments, examples: int) -> Course:
    """Returns the rounds of a run over so many training examples.

    A round ends wherever something has to be logged, judged or saved: it is the longest of at most 30 steps that
    divides logging_steps, eval_steps and save_steps, as far as these are in use.
    """
    a = arguments
    epoch = math.ceil(examples / max(a.per_device_train_batch_size, 1))
    steps = a.max_steps if a.max_steps > 0 else math.ceil(a.num_train_epochs * epoch)
    wanted = {"eval": (_word(a.eval_strategy), a.eval_steps or a.logging_steps)}
    wanted["save"] = (_word(a.save_strategy), a.save_steps)
    common = math.gcd(a.logging_steps, *(every for how, every in wanted.values() if how == "steps"))
    length = max(size for size in range(1, _LONGEST + 1) if common % size == 0)
    length = min(length, steps)
    every = {
        name: 0 if how == "no" else max(1, round((epoch if how == "epoch" else steps_between) / length))
        for name, (how, steps_between) in wanted.items()
    }
    rounds = math.ceil(steps / length)
    return Course(length, rounds, epoch, max(1, a.logging_steps // length), every["eval"], every["save"])
