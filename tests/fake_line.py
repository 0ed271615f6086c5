"""A network inside this process: nodes are functions from bytes to bytes, its clock is the parcels that were sent."""

from collections.abc import Callable, Collection, Sequence

from fedmezo.runtime.line import Parcel, Returned

Node = Callable[[bytes], bytes]


class Crash(Exception):
    """A node dies over a request; the network notices."""


class FakeLine:
    """A `Line` whose nodes answer at once, or `slow[node]` parcels later; `log` keeps (node, request, answer)."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.handlers = dict(nodes)
        self.online = set(nodes)
        self.slow: dict[int, int] = {}
        self.log: list[tuple[int, bytes, bytes]] = []
        self._queue: dict[str, tuple[int, bytes, int]] = {}
        self._notices: list[str] = []
        self._count = 0

    def nodes(self) -> frozenset[int]:
        for ticket in self._notices:
            node, request, _ = self._queue.pop(ticket)
            self.handlers[node](request)
        self._notices.clear()
        return frozenset(self.online)

    def send(self, parcels: Sequence[Parcel]) -> list[str | None]:
        tickets: list[str | None] = []
        for parcel in parcels:
            if parcel.node not in self.online:
                tickets.append(None)
                continue
            self._count += 1
            wait = 0 if parcel.greeting else self.slow.get(parcel.node, 0)
            self._queue[str(self._count)] = parcel.node, parcel.payload, self._count + wait
            tickets.append(str(self._count))
            if parcel.payload[:1] == b"\3":
                self._notices.append(str(self._count))  # nobody asks for the answer
        return tickets

    def receive(self, tickets: Collection[str]) -> list[Returned]:
        back = []
        for ticket in [t for t in tickets if t in self._queue]:
            node, request, due = self._queue[ticket]
            if due > self._count:
                continue
            del self._queue[ticket]
            try:
                answer = self.handlers[node](request)
                self.log.append((node, request, answer))
                back.append(Returned(ticket, answer))
            except Crash as error:
                back.append(Returned(ticket, None, str(error)))
        return back
