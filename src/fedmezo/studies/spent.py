"""What a client has told of its data in a private run: counted by itself, on its own disk, before it tells more.

A server may be wrong about what a client has answered, or lie. So the client keeps the questions it has answered, and
what each may have cost; the same question again costs nothing, because it gets the same answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.accountant import Releases, epsilon
from fedmezo.fl.privacy import Noise, question_of
from fedmezo.studies.folder import write_whole, writing
from fedmezo.studies.privacy import Privacy, releases_of
from fedmezo.studies.secret import kept_secret, key_for

if TYPE_CHECKING:
    from fedmezo.data.prompt import Example
    from fedmezo.fl.algorithm import Task
    from fedmezo.studies.config import Config

__all__ = ["Spent"]

_FILE = "privacy.json"
_LARGEST_DELTA = 1e-5  # that a client with a budget of its own counts by


@dataclass
class Spent:
    """One client's account of one run.

    Attributes:
      folder: where it is kept.
      run: the run's name.
      privacy: the section, with this client's own budget if it has one.
      rate: the rate at which its units are sampled.
      secret: names its noise and samples, for this run on these data.
      whole: whether the budget is of all runs that the folder knows, as a client's own is, instead of this one.
    """

    folder: Path
    run: str
    privacy: Privacy
    rate: float
    secret: bytes = field(repr=False)
    whole: bool = False

    @classmethod
    def of(
        cls, config: Config, folder: Path | None, *, run: str, part: Sequence[Example], whole: bool = False
    ) -> Spent | None:
        """Returns the account of a client; None where it makes no noise of its own.

        Args:
          config: the run's configuration.
          folder: where the client keeps its state.
          run: the run's name.
          part: its training examples.
          whole: as the attribute.

        Raises:
          ConfigError: there is no such folder, or the client has a budget of its own and shall make no noise.
        """
        # A seed or a delta of the server's choice would make the noise known, or hide nothing.
        delta = min(config.privacy.delta, _LARGEST_DELTA) if whole else config.privacy.delta
        privacy = config.privacy.model_copy(update={"noise_seed": None, "delta": delta})
        if not privacy.local:
            if whole:
                raise ConfigError(
                    "This client has a budget of its own (privacy.epsilon), and with privacy.mode = "
                    f'"{privacy.mode}" the server sees its slopes as they are; leave it out to trust that server.'
                )
            return None
        if folder is None:
            raise ConfigError(
                "This run is private, and the client has to remember what it has told: start it with --state DIR."
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            secret = kept_secret(folder, privacy, make=True)
        told = [[(row.ids, row.start) for row in one.rows] + [one.answer, one.options] for one in part]
        data = hashlib.sha256(repr(told).encode()).hexdigest()
        rate = releases_of(config, {0: len(part)})[0]
        return cls(folder, run, privacy, rate, key_for(secret, run, data), whole)

    def spend(self, task: Task, model: str) -> str:
        """Notes that a task is about to be answered, and returns a sentence on what has been spent.

        Args:
          task: the task.
          model: digest of the model it starts from.

        Raises:
          RunError: that would be more than the budget; nothing is noted then.
          ConfigError: the account cannot be read or written.
        """
        noise = Noise(self.privacy.limit, float(self.privacy.sigma or 0), self.secret)
        asked = question_of(task, model, noise).hex()
        known = self._read()
        own = known.get(self.run, {})
        count = task.steps if self.privacy.mode == "example" else 1
        if asked not in own:
            own = {**own, asked: [noise.sigma, self.rate, count]}
        after = {**known, self.run: own}
        counted = [one for some in after.values() for one in some.values()] if self.whole else list(own.values())
        cost = self._cost(counted)
        budget = math.inf if self.privacy.epsilon is None else self.privacy.epsilon
        if cost > budget:
            raise RunError(
                f"This client's privacy budget is spent: round {task.round} would bring it to epsilon {cost:.4g}, and "
                f"privacy.epsilon is {budget:g}."
            )
        with writing(self.folder):
            write_whole(self.folder / _FILE, json.dumps(after) + "\n")
        return f"Round {task.round}: epsilon {cost:.3g} so far."

    def _cost(self, answers: Sequence[Any]) -> float:
        alike: Counter[tuple[float, float]] = Counter()
        for sigma, rate, count in answers:
            alike[sigma, rate] += count
        releases = [Releases(sigma, rate, count) for (sigma, rate), count in sorted(alike.items())]
        return epsilon(releases, delta=self.privacy.delta, accountant=self.privacy.accountant)

    def _read(self) -> dict[str, Any]:
        path = self.folder / _FILE
        try:
            told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); restore it, or use a new --state folder.") from error
        if not isinstance(told, dict):
            raise ConfigError(f"{path} is not this client's account; restore it, or use a new --state folder.")
        return told
