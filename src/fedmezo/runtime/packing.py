"""A round's tasks as bytes: what many of its clients have to be told is packed once, not once for each."""

from fedmezo.fl.algorithm import Task
from fedmezo.runtime.calls import UNCHECKED, Walk
from fedmezo.runtime.pull import Offer, Tell
from fedmezo.runtime.wire import Sums, Values, encode_task, pack_told
from fedmezo.zo.params import Params

__all__ = ["Packing"]

_KEPT = 4  # contents that stay packed: nearly all clients of a round have been in the last one, so need the same


class Packing:
    """Packs the tasks of one round.

    Args:
      tell: what a client is offered, by the rounds that its model has behind it.
      params: the server's model, as it is in this round.
      check: what tells that model.
    """

    def __init__(self, tell: Tell, params: Params, *, check: bytes) -> None:
        self._tell, self._params, self._check = tell, params, check
        self._packed: dict[int | str, bytes] = {}

    def walk(self, task: Task, held: int, *, exact: bool) -> tuple[Walk, bool]:
        """Returns a task with what brings its client's model up to date, and whether that will have the server's bits.

        Args:
          task: the task.
          held: rounds that the client's model has behind it.
          exact: whether the client's model has the server's bits now.
        """
        offer = self._tell(held)
        exact = offer.kind == "dense" or (exact and not isinstance(offer.content, Sums))
        told = self._told(task, held if offer.kind == "pairs" else offer.kind, offer)
        return Walk(self._check if exact else UNCHECKED, encode_task(task, told)), exact

    def _told(self, task: Task, key: int | str, offer: Offer) -> bytes:
        """Returns what is the same for all tasks of the round whose clients are offered this."""
        if key not in self._packed:
            dense = Values({name: tensor.detach().cpu() for name, tensor in self._params})
            self._packed[key] = pack_told(task, dense if offer.kind == "dense" else offer.content)
            if len(self._packed) > _KEPT:
                del self._packed[next(iter(self._packed))]
        return self._packed[key]
