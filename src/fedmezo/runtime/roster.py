"""Who is there: which node is which client, and what its model has behind it. Each node is greeted once, then asked."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from fedmezo.errors import WireError
from fedmezo.runtime.calls import Hello, Notice, Refused, Welcome, decode_answer, encode_request
from fedmezo.runtime.line import Line, Parcel, Returned

__all__ = ["Roster", "Seat"]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Seat:
    """A client that takes part.

    Attributes:
      node: where it is now.
      instance: what tells it from another one with its number.
      held: rounds its model has behind it, as far as the server knows.
      exact: whether that model has the server's bits.
      examples: training examples it owns.
    """

    node: int
    instance: str
    held: int
    exact: bool
    examples: int


@dataclass
class Roster:
    """The clients that take part, kept up to date by `greet`.

    Attributes:
      line: the way to them.
      hello: what every node is told.
      clients: the numbers a client may have.
      say: hears, in sentences, who came and who was turned away.
      seated: hears of every client that takes its seat.
      seats: client -> its seat; also of one that is away.
    """

    line: Line
    hello: Hello
    clients: frozenset[int]
    say: Say
    seated: Callable[[int, Seat], None] = lambda client, seat: None
    seats: dict[int, Seat] = field(default_factory=dict)
    _greeted: dict[str, int] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    _waiting: dict[int, Welcome] = field(default_factory=dict)
    _told: set[int] = field(default_factory=set)
    _mute: set[int] = field(default_factory=set)
    _there: frozenset[int] = frozenset()

    def greet(self) -> None:
        """Greets nodes that are new, takes in the answers that came, and forgets nodes that went."""
        self._there = self.line.nodes()
        self._known &= self._there
        self._told &= self._there
        self._mute &= self._there
        self._waiting = {node: told for node, told in self._waiting.items() if node in self._there}
        self._send(sorted(self._there - self._known))
        for back in self.line.receive(self._greeted):
            self._heard(self._greeted.pop(back.ticket), back)
        for node, told in sorted(self._waiting.items()):
            self._seat(node, told)

    def again(self, client: int) -> None:
        """Has a client greeted once more, because it knows nothing of the run."""
        if client in self.seats:
            self._known.discard(self.seats[client].node)

    def there(self) -> dict[int, Seat]:
        """Returns the seats of the clients that are there, by client in ascending order."""
        return {client: self.seats[client] for client in sorted(self.seats) if self.seats[client].node in self._there}

    def holds(self, client: int, held: int, *, exact: bool) -> None:
        """Notes what a client's model has behind it."""
        self.seats[client] = replace(self.seats[client], held=held, exact=exact)

    def _send(self, nodes: Iterable[int]) -> None:
        parcels = [Parcel(node, encode_request(self.hello), greeting=True) for node in nodes]
        for parcel, ticket in zip(parcels, self.line.send(parcels) if parcels else (), strict=True):
            if ticket is not None:
                self._greeted[ticket] = parcel.node
                self._known.add(parcel.node)

    def _heard(self, node: int, back: Returned) -> None:
        try:
            answer = decode_answer(back.payload) if back.payload is not None else None
        except WireError as error:
            self.say(f"A node was turned away, it answered no hello: {error}")
            return
        if answer is None:
            # It may be loading its model, or its worker is being started again: it is asked once more.
            self._known.discard(node)
            if node not in self._mute:
                self._mute.add(node)
                self.say(f"A node did not answer the hello ({back.failure}); it is asked again until it does.")
        elif isinstance(answer, Refused):
            self.say(f"A client cannot take part: {answer.text}")
        elif not isinstance(answer, Welcome) or answer.run != self.hello.run:
            self.say("A node was turned away: it answered the hello with something else.")
        else:
            self._waiting[node] = answer

    def _seat(self, node: int, told: Welcome) -> None:
        """Gives a client its seat, unless another one has it."""
        client, has = told.client, self.seats.get(told.client)
        if client not in self.clients:
            self._turn_away(node, f"client {client} is unknown here; the run has {_span(self.clients)}")
        elif has is not None and has.node in self._there - {node} and has.instance != told.instance:
            if node not in self._told:
                self._told.add(node)
                self.say(f"A second client says it is client {client}; it waits until the first one has gone.")
                self._notify(node, f"Client {client} takes part already, from elsewhere; give this one another --id.")
        else:
            del self._waiting[node]
            self.seats[client] = Seat(node, told.instance, told.held, told.exact, told.examples)
            self.seated(client, self.seats[client])
            if has is None or has.node != node:
                self.say(f"Client {client} is there, with {told.examples} examples and {told.held} rounds behind it.")

    def _turn_away(self, node: int, why: str) -> None:
        del self._waiting[node]
        self.say(f"A client was turned away: {why}.")
        self._notify(node, f"The server turned this client away: {why}.")

    def _notify(self, node: int, text: str) -> None:
        self.line.send([Parcel(node, encode_request(Notice(text)), greeting=True)])


def _span(clients: Iterable[int]) -> str:
    numbers = sorted(clients)
    return f"clients {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"client {numbers[0]}"
