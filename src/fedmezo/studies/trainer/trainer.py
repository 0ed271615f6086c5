"""`ZOTrainer`: Hugging Face's Trainer on one machine, by forward passes; a run of this package with one client."""

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from fedmezo.data.imbalance import split_report
from fedmezo.data.prompt import Example
from fedmezo.data.sft import Reading, encode_rows, is_conversation
from fedmezo.errors import ConfigError
from fedmezo.models.given import adopt, dtype_of, lora_settings
from fedmezo.models.load import Loaded, load_model
from fedmezo.studies.build import Built, build, device_of
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.deal import FederatedData
from fedmezo.studies.folder import is_run, opened
from fedmezo.studies.judge import flat
from fedmezo.studies.run import resume, run
from fedmezo.studies.trainer.arguments import Course, ZOTrainingArguments, course_of, refuse
from fedmezo.studies.trainer.state import Follower, TrainerState, eval_entry
from fedmezo.studies.uses import rollback, save

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["TrainOutput", "ZOTrainer"]

_LOG = logging.getLogger("fedmezo.trainer")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class TrainOutput(NamedTuple):
    """What `ZOTrainer.train` returns, as transformers' TrainOutput.

    Attributes:
      global_step: steps done.
      training_loss: mean training loss over the log, nats.
      metrics: train_runtime, train_steps_per_second, train_loss, epoch.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class ZOTrainer:
    """Trains a language model on one machine by forward passes, behind the names of Hugging Face's Trainer.

        trainer = ZOTrainer("HuggingFaceTB/SmolLM2-135M", ZOTrainingArguments("out"), train_dataset=rows,
                            peft_config=LoraConfig(r=8))
        trainer.train()

    The run in `args.output_dir` is one of `fedmezo run`: a journal, a report, an adapter. Nothing is printed; give
    transformers' PrinterCallback or ProgressCallback for that.

    Attributes:
      args: what it was told.
      state: where it is, and `state.log_history`.

    Args:
      model: a model's name or folder, or a causal language model of transformers; the latter is frozen, or, without
        peft_config, trained in place.
      args: None for the defaults.
      train_dataset: rows, see `data/sft.py`: tokenised, or with the columns that TRL's SFTTrainer takes.
      eval_dataset: rows to judge by.
      processing_class: the tokenizer; None for that of a model given by name.
      peft_config: a LoraConfig, or the folder of a PEFT adapter to go on from; None trains all parameters.
      formatting_func: row -> text; the rows are then texts.
      callbacks: objects, or classes, with any of the methods of transformers' TrainerCallback.

    Raises:
      ConfigError: an argument that is refused, or impossible.
    """

    def __init__(
        self,
        model: Any,
        args: ZOTrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: "LoraConfig | str | Path | None" = None,
        formatting_func: Any = None,
        callbacks: Sequence[Any] = (),
        **others: Any,
    ) -> None:
        refuse(list(others), known=_OWN, what="ZOTrainer")
        if args is not None and not isinstance(args, ZOTrainingArguments):
            raise ConfigError(f"args: expected fedmezo.ZOTrainingArguments, got {type(args).__name__}.")
        self.args = args or ZOTrainingArguments()
        self.state = TrainerState()
        self._given, self._tokenizer, self._peft, self._formatting = (
            model, processing_class, peft_config, formatting_func,
        )  # fmt: skip
        self._callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks or ()]
        self._tuned: Built | None = None
        self._loaded: Loaded | None = None
        self._encoded: dict[str, tuple[Example, ...]] = {}
        self._rows = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}

    @property
    def model(self) -> Any:
        """The base model; without peft_config it is the one that is trained."""
        return self._base().model

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self._base().tokenizer

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:  # noqa: FBT001
        """Trains, and returns what came of it.

        Args:
          resume_from_checkpoint: True goes on where the journal in output_dir ends; a folder checkpoint-N goes back to
            step N first. Either way the result has the bits of a training that was never interrupted.

        Raises:
          ConfigError: output_dir holds a run and nothing was said of resuming, holds none to go on with, or holds one
            that was begun with other arguments.
        """
        folder, going_on = Path(self.args.output_dir), bool(resume_from_checkpoint)
        if is_run(folder) != going_on:
            said = "holds no run to go on with" if going_on else "holds a run already"
            raise ConfigError(f"{folder} {said}; give another output_dir, or resume_from_checkpoint={not going_on}.")
        course = course_of(self.args, len(self._examples("train_dataset")))
        if isinstance(resume_from_checkpoint, str | Path):
            _go_back(folder, Path(resume_from_checkpoint), course)
        began, built = time.monotonic(), self._build(course, before=_begun(folder) if going_on else None)
        follower = self._follow(course)
        self.state, self._tuned = follower.state, built
        if course.steps != self.args.max_steps > 0:
            _LOG.warning("max_steps is %d instead of %d: whole rounds.", course.steps, self.args.max_steps)
        if going_on:
            resume(folder, built=built, watch=follower, stop=follower.stops)
        else:
            run(built, out=folder, watch=follower, stop=follower.stops)
        for note in follower.notes:
            _LOG.log(logging.WARNING if note in built.notes else logging.INFO, note)
        return self._ended(follower, time.monotonic() - began)

    def evaluate(self, eval_dataset: Any = None, *, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Returns the loss, nats per label token, and the share of label tokens that were the likeliest.

        Args:
          eval_dataset: rows; None for those of the trainer.
          metric_key_prefix: what the names begin with.
        """
        given = eval_dataset is not None
        examples = self._read(eval_dataset, "eval_dataset") if given else self._examples("eval_dataset")
        began, built = time.monotonic(), self._tuned or self._untrained()
        metrics = eval_entry(flat(built.bench.evaluate(examples)), prefix=metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = time.monotonic() - began
        metrics["epoch"] = self.state.epoch
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        return metrics

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Writes the model as it stands: a PEFT adapter folder; a whole model where all parameters are trained.

        Args:
          output_dir: where to; None for the folder `adapter` in args.output_dir, where `train` has written it already.

        Raises:
          ConfigError: the folder holds a run.
        """
        folder = Path(output_dir) if output_dir is not None else Path(self.args.output_dir) / "adapter"
        if is_run(folder):
            raise ConfigError(f"save_model: {folder} holds the run; give another folder, such as {folder / 'adapter'}.")
        save(self._tuned or self._untrained(), folder)

    def predict(self, *_: Any, **__: Any) -> None:
        """Raises ConfigError: predictions of every token are never computed here."""
        raise ConfigError("predict: ZOTrainer keeps no logits; use evaluate(), or load the saved model and predict.")

    def _follow(self, course: Course) -> Follower:
        extras = {"model": self.model, "processing_class": self.processing_class, "train_dataloader": ()}
        return Follower(self.args, course, callbacks=self._callbacks, extras=extras, save=self._checkpoint)

    def _ended(self, follower: Follower, seconds: float) -> TrainOutput:
        state = follower.state
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        loss = fmean(losses) if losses else float("nan")
        speed = state.global_step / seconds if seconds > 0 else 0.0
        metrics = {"train_runtime": seconds, "train_steps_per_second": speed, "train_loss": loss, "epoch": state.epoch}
        follower.end({**metrics, "step": state.global_step})
        return TrainOutput(state.global_step, loss, metrics)

    def _checkpoint(self, steps: int) -> None:
        """Writes checkpoint-N, and deletes the oldest beyond the limit."""
        folder = Path(self.args.output_dir)
        if self._tuned is not None:
            save(self._tuned, folder / f"checkpoint-{steps}")
        limit = self.args.save_total_limit
        found = sorted((int(m[1]), p) for p in folder.iterdir() if (m := _CHECKPOINT.fullmatch(p.name)))
        for _, path in found[: -limit if limit else 0]:
            shutil.rmtree(path, ignore_errors=True)

    def _base(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> Loaded:
        device = device_of("cpu" if self.args.use_cpu else "auto")
        if not isinstance(self._given, str | Path):
            loaded = adopt(self._given, self._tokenizer, device=device)
            wanted, found = self.args.dtype, dtype_of(loaded.model)
            if wanted not in ("float32", found):
                raise ConfigError(f"The model given is {found}, not {wanted}; load it with dtype=torch.{wanted}.")
            return loaded
        loaded = load_model(str(self._given), dtype=self.args.dtype, device=device)
        return loaded if self._tokenizer is None else replace(loaded, tokenizer=self._tokenizer)

    def _examples(self, name: str) -> tuple[Example, ...]:
        if self._rows[name] is None:
            raise ConfigError(f"{name}: expected rows, got none; give {name}.")
        if name not in self._encoded:
            self._encoded[name] = self._read(self._rows[name], name)
        return self._encoded[name]

    def _read(self, rows: Any, name: str) -> tuple[Example, ...]:
        if not hasattr(rows, "__len__") or isinstance(rows, Mapping):
            raise ConfigError(f"{name}: expected rows with a length, got {type(rows).__name__}; make a list of it.")
        a, base = self.args, self._base()
        texts = [{a.dataset_text_field: self._formatting(row)} for row in rows] if self._formatting else rows
        reading = Reading(
            min(a.max_length, base.window), a.dataset_text_field, a.completion_only_loss, a.assistant_only_loss
        )
        encoded = encode_rows(texts, base.tokenizer, reading=reading)
        if encoded.dropped:
            _LOG.warning("%s: left out %d rows: %s.", name, encoded.dropped, ", ".join(encoded.reasons))
        return encoded.examples

    def _build(self, course: Course, *, before: Config | None = None) -> Built:
        """Returns what a run needs; its mu is that of the configuration `before`, where it was measured."""
        if self._tuned is not None and self._peft is None:
            self._loaded = None  # its own weights were trained
        base = self._base()
        judged = {"eval": self._examples("eval_dataset")} if course.eval_rounds else {}
        config = self._config(course, base)
        if before is not None and config.algorithm.mu is None:
            config = config.model_copy(
                update={"algorithm": config.algorithm.model_copy(update={"mu": before.algorithm.mu})}
            )
        return build(config, loaded=base, data=_one_clients(self._examples("train_dataset"), judged))

    def _untrained(self) -> Built:
        examples = self._examples("eval_dataset" if self._rows["train_dataset"] is None else "train_dataset")
        config = self._config(course_of(self.args, len(examples)), self._base())
        self._tuned = build(config, loaded=self._base(), data=_one_clients(examples, {}), measure=False)
        return self._tuned

    def _config(self, course: Course, base: Loaded) -> Config:
        name = str(self._given) if isinstance(self._given, str | Path) else base.source.removeprefix("python:")
        adapter: dict[str, Any] = {"kind": "full"}
        if isinstance(self._peft, str | Path):
            adapter = {"kind": "lora", "start": str(self._peft)}
        elif self._peft is not None:
            adapter = {"kind": "lora", **lora_settings(base.model, self._peft)}
        return self.args.config(
            course,
            model=name or "python:model",
            dtype=dtype_of(base.model),
            adapter=adapter,
            window=base.window,
            template="chat" if self._formatting is None and is_conversation(*self._rows.values()) else "{instruction}",
        )


_OWN = ("train_dataset", "eval_dataset", "processing_class", "peft_config", "formatting_func", "callbacks")


def _one_clients(examples: tuple[Example, ...], judged: Mapping[str, tuple[Example, ...]]) -> FederatedData:
    """Returns the data of a federation of one."""
    return FederatedData((examples,), judged, split_report([range(len(examples))], [""] * len(examples)), {}, ())


def _begun(folder: Path) -> Config:
    """Returns the configuration with which the run in a folder was begun."""
    with opened(folder, readonly=True) as journal:
        return parse_config(json.loads(journal.header.config))


def _go_back(folder: Path, checkpoint: Path, course: Course) -> None:
    """Takes back the rounds after a checkpoint."""
    found = _CHECKPOINT.fullmatch(checkpoint.name)
    if found is None or checkpoint.absolute().parent != folder.absolute():
        raise ConfigError(f"resume_from_checkpoint: expected True or {folder}/checkpoint-N, got {checkpoint}.")
    if int(found[1]) % course.round_steps:
        raise ConfigError(f"{checkpoint}: step {found[1]} is not the end of a round of {course.round_steps} steps.")
    rollback(folder, round=int(found[1]) // course.round_steps)
