"""Batches as a pure function of (seed, client, round, step): there is no loader state to save or resume."""

from collections.abc import Mapping, Sequence

from fedmezo.data.prompt import Example
from fedmezo.data.split import shuffled
from fedmezo.errors import DataError
from fedmezo.fl.secret import drawn

__all__ = ["Batches"]


class Batches:
    """The clients' training batches.

    A client's local steps of all rounds are numbered t = round * local_steps + step. Batch t takes positions
    t * batch_size ... (t + 1) * batch_size - 1 of an endless stream that runs through the client's examples,
    each epoch in an order of its own. So every example is seen once per epoch, whatever the batch size.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Example]] | Mapping[int, Sequence[Example]],
        *,
        batch_size: int,
        local_steps: int,
        seed: int,
    ) -> None:
        """Keeps references to each client's examples: client -> examples, or in client order.

        Raises:
          DataError: no client, a client without examples, or a count below 1.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("local_steps", local_steps),
            ("clients", len(parts)),
        ):
            if value < 1:
                raise DataError(f"{name}: expected at least 1, got {value}.")
        named = parts.items() if isinstance(parts, Mapping) else enumerate(parts)
        self._parts = {client: tuple(part) for client, part in named}
        empty = [client for client, part in self._parts.items() if not part]
        if empty:
            raise DataError(
                f"Client {empty[0]} has no training example ({len(empty)} of {len(parts)} have none); "
                "use fewer clients, another split or a larger max_tokens."
            )
        self.batch_size = batch_size
        self.local_steps = local_steps
        self.seed = seed
        self._orders: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __call__(self, client: int, round: int, step: int) -> tuple[Example, ...]:
        """Returns the batch of one local step: batch_size examples, a pure function of its arguments.

        Args:
          client: one that has examples here.
          round: 0 or later.
          step: local step within the round, 0 <= step < local_steps.

        Raises:
          DataError: an argument out of its range.
        """
        if client not in self._parts:
            raise DataError(f"client: expected one of the {self.clients} that have data here, got {client}.")
        if not 0 <= step < self.local_steps:
            raise DataError(f"step: expected 0 <= step < {self.local_steps}, got {step}.")
        if round < 0:
            raise DataError(f"round: expected 0 or more, got {round}.")
        first = (round * self.local_steps + step) * self.batch_size
        return tuple(self._at(client, position) for position in range(first, first + self.batch_size))

    def drawn(self, client: int, draw: bytes) -> tuple[Example, ...]:
        """Returns a Poisson sample: each of the client's examples with probability batch_size / size; it may be empty.

        Args:
          client: one that has examples here.
          draw: the sample's name; a secret one hides who is in it.

        Raises:
          DataError: no such client.
        """
        if client not in self._parts:
            raise DataError(f"client: expected one of the {self.clients} that have data here, got {client}.")
        part = self._parts[client]
        return tuple(part[at] for at in drawn(draw, len(part), rate=self.batch_size / len(part)))

    @property
    def clients(self) -> int:
        """Returns the number of clients."""
        return len(self._parts)

    def size(self, client: int) -> int:
        """Returns the number of the client's training examples."""
        return len(self._parts[client])

    def _at(self, client: int, position: int) -> Example:
        part = self._parts[client]
        epoch, offset = divmod(position, len(part))
        return part[self._order(client, epoch)[offset]]

    def _order(self, client: int, epoch: int) -> tuple[int, ...]:
        # One order per client: rounds visit clients in turn, so a single one would be remade at each step.
        kept, order = self._orders.get(client, (-1, ()))
        if kept != epoch:
            order = tuple(shuffled(self.size(client), "batches", self.seed, client, epoch).tolist())
            self._orders[client] = epoch, order
        return order
