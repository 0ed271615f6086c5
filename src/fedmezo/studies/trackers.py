"""The trackers of a run: those that the configuration asks for, and those a program brings.

run(config, trackers=[mine])        # mine.log({"train/loss": 1.9, ...}, step=3)

Weights & Biases gets numbers and settings only: no path, no record, no text of the run, nothing of the machine.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmezo.errors import ConfigError, missing
from fedmezo.studies.config import Config
from fedmezo.studies.public import public_settings
from fedmezo.studies.watch import TensorBoardWatch, Tracker, TrackerWatch, Watch, Watchers

__all__ = ["WeightsAndBiases", "with_trackers"]

# What wandb would find out by itself: the program and its path, the user, host, packages, git remote, what is printed.
_KEPT_BACK: Mapping[str, Any] = {
    "console": "off", "disable_git": True, "disable_code": True, "host": "none", "silent": True, "x_disable_meta": True,
    "x_disable_machine_info": True, "x_disable_stats": True, "x_save_requirements": False,
}  # fmt: skip


class WeightsAndBiases:
    """A tracker that writes a run of Weights & Biases, by default on this machine only: `wandb sync` sends it later.

    $WANDB_MODE = online sends it at once; $WANDB_PROJECT and $WANDB_NAME name it. A resumed run is a new run there,
    whose steps go on. Steps of wandb never go back, so after rounds were taken back they go on too; the number of
    rounds done is the metric "round".

    Raises:
      ConfigError: wandb is not installed.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        """Takes the folder in which wandb keeps its files, and the run's configuration."""
        try:
            import wandb
        except ImportError as error:
            raise missing("output.wandb needs wandb", extra="wandb") from error
        self._begin: Any = wandb.init
        self._folder, self._config = folder, config
        self._run: Any = None
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes the numbers of one round."""
        if self._run is None:
            self._run = self._begun()
        self._step = max(self._step + 1, step)
        self._run.log({"round": step, **metrics}, step=self._step)

    def finish(self) -> None:
        """Ends the run there."""
        if self._run is not None:
            self._run.finish()
        self._run = None

    def _begun(self) -> Any:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{self._config.algorithm.name}-{self._config.digest()[:8]}"
        return self._begin(
            project=os.environ.get("WANDB_PROJECT", "fedmezo"),
            name=os.environ.get("WANDB_NAME", name),
            config=public_settings(self._config),
            dir=str(self._folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            reinit="create_new",
            settings=dict(_KEPT_BACK),
        )


def with_trackers(watch: Watch, config: Config, *, folder: Path, trackers: Sequence[Tracker] = ()) -> Watch:
    """Returns `watch`, joined by the trackers that are wanted; it is told of those that are not installed.

    Args:
      watch: who looks on.
      config: which trackers [output] asks for.
      folder: the run's.
      trackers: further ones.
    """
    found: list[Watch] = [watch]
    try:
        if config.output.tensorboard:
            found.append(TensorBoardWatch(folder / "tensorboard", say=watch.note))
    except ConfigError as error:
        watch.note(str(error))
    try:
        if config.output.wandb:
            found.append(TrackerWatch(WeightsAndBiases(folder, config), say=watch.note))
    except ConfigError as error:
        watch.note(str(error))
    found += [TrackerWatch(tracker, say=watch.note) for tracker in trackers]
    return Watchers(found) if len(found) > 1 else watch
