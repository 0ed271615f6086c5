"""The batches a run is judged on again and again: where they are, and what the model loses on them.

They are training batches of the clients that no round reaches, so they cost the evaluation set nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedmezo.fl.algorithm import Bench, Point
from fedmezo.runtime.pace import Pace
from fedmezo.zo.noise import Law
from fedmezo.zo.params import kept
from fedmezo.zo.perturb import apply_
from fedmezo.zo.seedsum import Update

__all__ = ["Lookout", "places_of"]

_BEYOND = 1 << 31  # the first of the round numbers that name these batches


@dataclass(frozen=True)
class Lookout:
    """What is judged, and when.

    Attributes:
      pace: when.
      bench: holds the global model.
      places: (client, round) of each batch.
      law: of the walks' directions.
    """

    pace: Pace
    bench: Bench
    places: tuple[tuple[int, int], ...]
    law: Law = "gaussian"

    def losses(self) -> list[float]:
        """Returns the loss of the model as it is on each batch, nats; one forward pass per batch."""
        params = self.bench.params
        return self.bench.losses([Point(params, 0, 0.0, client, round_, 0) for client, round_ in self.places])

    def stretched(self, updates: Sequence[Update], *, by: float) -> list[float]:
        """Returns the losses where these last updates, which the model has in it, would have been `by` times as long.

        The model's bits lie in a temporary file meanwhile, and are its own again afterwards.
        """
        with kept(self.bench.params):
            for update in updates:
                further = tuple((by - 1) * weight for weight in update.weights)
                apply_(self.bench.params, replace(update, weights=further), law=self.law)
            return self.losses()


def places_of(clients: int, count: int) -> tuple[tuple[int, int], ...]:
    """Returns (client, round) of `count` batches, spread evenly over the clients."""
    if count >= clients:
        return tuple((place % clients, _BEYOND + place // clients) for place in range(count))
    return tuple((place * clients // count, _BEYOND) for place in range(count))
