"""What a `ZOTrainer` tells while it goes: state, log and callbacks, in the shapes of Hugging Face's."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fedmezo.runtime.journal import Journal
from fedmezo.runtime.progress import RoundReport, report_of
from fedmezo.runtime.simulate import START
from fedmezo.studies.files import JOURNAL
from fedmezo.studies.trainer.arguments import Course, ZOTrainingArguments
from fedmezo.studies.watch import NullWatch

__all__ = ["Control", "Follower", "TrainerState", "eval_entry"]


@dataclass
class TrainerState:
    """Where a training is; the names are those of transformers' TrainerState.

    Attributes:
      global_step: steps done; it goes back where a run whose loss rose goes back.
      epoch: passes over the training rows so far.
      max_steps: steps of the run.
      num_train_epochs: passes of the run, rounded up.
      logging_steps: steps between two entries of the log.
      train_batch_size: rows per step.
      log_history: what was logged, oldest first.
      is_local_process_zero: always true.
      is_world_process_zero: always true.
    """

    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: int = 10
    train_batch_size: int = 8
    log_history: list[dict[str, float]] = field(default_factory=list)
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


@dataclass
class Control:
    """What a callback may ask for: an early end, or a checkpoint after this round; the other flags are not read.

    Attributes:
      should_training_stop: end after this round.
      should_save: write checkpoint-N after this round.
      should_epoch_stop: not read.
      should_evaluate: not read.
      should_log: not read.
    """

    should_training_stop: bool = False
    should_save: bool = False
    should_epoch_stop: bool = False
    should_evaluate: bool = False
    should_log: bool = False


def eval_entry(metrics: Mapping[str, float], *, prefix: str = "eval") -> dict[str, float]:
    """Returns an evaluation under Trainer's names: loss, mean_token_accuracy, tokens and samples."""
    names = {"loss": "loss", "token_accuracy": "mean_token_accuracy", "tokens": "num_tokens", "examples": "num_samples"}
    return {f"{prefix}_{new}": float(metrics[old]) for old, new in names.items() if old in metrics}


class Follower(NullWatch):
    """Keeps the state of a run, calls the callbacks and has checkpoints written; a `Watch`.

    Args:
      arguments: what the trainer was told.
      course: rounds and steps.
      callbacks: objects with any of the methods of transformers' TrainerCallback.
      extras: what callbacks get by name, such as model.
      save: writes the checkpoint of so many steps.
    """

    def __init__(
        self,
        arguments: ZOTrainingArguments,
        course: Course,
        *,
        callbacks: Sequence[Any],
        extras: Mapping[str, Any],
        save: Callable[[int], None],
    ) -> None:
        self._arguments, self._course, self._save = arguments, course, save
        self._callbacks, self._extras = callbacks, dict(extras)
        self._losses: list[float] = []
        self._folder = Path(arguments.output_dir)
        self.notes: list[str] = []
        self.control = Control()
        self.state = TrainerState(
            max_steps=course.steps,
            num_train_epochs=math.ceil(course.steps / course.epoch_steps),
            logging_steps=arguments.logging_steps,
            train_batch_size=arguments.per_device_train_batch_size,
        )

    def start(self, info: Mapping[str, object]) -> None:
        """Restores the state of a run that goes on, and opens the training."""
        if info.get("done"):
            with Journal.open(self._folder / JOURNAL, readonly=True) as journal:
                self._recall(journal)
        self._tell("on_train_begin")
        self._tell("on_step_begin")

    def note(self, text: str) -> None:
        """Keeps one sentence about the run."""
        self.notes.append(text)

    def round(self, report: RoundReport) -> None:
        """Takes one finished round: log, evaluation, checkpoint, callbacks."""
        if report.round == 0 and not self.state.log_history and self._course.eval_rounds:
            with Journal.open(self._folder / JOURNAL, readonly=True) as journal:
                self.state.log_history += self._at_start(journal)
        entries = self._advance(report)
        self._tell("on_step_end")
        for entry in entries:
            self.state.log_history.append(entry)
            if "eval_loss" in entry:
                self._tell("on_evaluate", metrics=entry)
            self._tell("on_log", logs=dict(entry))
        if self._due(report.round + 1, self._course.save_rounds) or self.control.should_save:
            self._save(self.state.global_step)
            self._tell("on_save")
        self.control.should_save = False
        if not self.stops(report):
            self._tell("on_step_begin")

    def stops(self, report: RoundReport) -> bool:
        """Whether a callback wants the run to end after this round."""
        return self.control.should_training_stop and report.round + 1 < report.rounds

    def end(self, entry: Mapping[str, float]) -> None:
        """Logs the last entry and closes the training."""
        self.state.log_history.append(dict(entry))
        self._tell("on_log", logs=dict(entry))
        self._tell("on_train_end")

    def _recall(self, journal: Journal) -> None:
        """Takes the state from the journal, as if every round had been followed."""
        self.state.log_history += self._at_start(journal) if self._course.eval_rounds else []
        for done in journal.rounds():
            self.state.log_history += self._advance(report_of(done, self._course.rounds))

    def _at_start(self, journal: Journal) -> list[dict[str, float]]:
        judged = [dict(found) for number, name, found in journal.evaluations() if (number, name) == (START, "eval")]
        return [{**eval_entry(metrics), "epoch": 0.0, "step": 0} for metrics in judged]

    def _advance(self, report: RoundReport) -> list[dict[str, float]]:
        """Moves the state on by one round; returns its entries of the log."""
        step = (report.round + 1) * self._course.round_steps
        self.state.global_step, self.state.epoch = step, step / self._course.epoch_steps
        self._losses.append(report.loss)
        return list(self._entries(report))

    def _entries(self, report: RoundReport) -> Iterator[dict[str, float]]:
        place = {"epoch": self.state.epoch, "step": self.state.global_step}
        if self._due(report.round + 1, self._course.log_rounds):
            finite = list(filter(math.isfinite, self._losses))
            yield {"loss": fmean(finite) if finite else math.nan, "learning_rate": report.rate, **place}
            self._losses.clear()
        if "eval" in report.evaluations:
            yield {**eval_entry(report.evaluations["eval"]), **place}

    def _due(self, done: int, every: int) -> bool:
        return every > 0 and (done % every == 0 or done == self._course.rounds)

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self._callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                answer = method(self._arguments, self.state, self.control, **self._extras, **more)
                self.control = self.control if answer is None else answer
