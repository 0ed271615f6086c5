"""Your own network between server and clients: anything that carries bytes can be a line. Runs in seconds.

python examples/own_network.py [FOLDER]

Here the line is a thread per client in this process. The clients would be processes on other machines; what they are
asked and answer is bytes, so HTTP, MQTT or a message queue does as well. `fedmezo server` does it over Flower.
"""

import itertools
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fedmezo import ClientOptions, Parcel, Returned, build_resident, load_config, run


class Threads:
    """A line to residents that each have a thread."""

    def __init__(self, clients: int) -> None:
        """Makes the clients; each builds its own model when it is greeted."""
        self.residents = [build_resident(ClientOptions(client=client)) for client in range(clients)]
        self.threads = [ThreadPoolExecutor(1) for _ in range(clients)]
        self.tickets = itertools.count()
        self.going: dict[str, Future[bytes]] = {}

    def nodes(self) -> frozenset[int]:
        """Returns who is there: everyone."""
        return frozenset(range(len(self.residents)))

    def send(self, parcels: Sequence[Parcel]) -> list[str | None]:
        """Has the residents work on their parcels."""
        tickets = [f"ticket {next(self.tickets)}" for _ in parcels]
        for ticket, parcel in zip(tickets, parcels, strict=True):
            resident = self.residents[parcel.node]
            self.going[ticket] = self.threads[parcel.node].submit(resident.answer, parcel.payload)
        return list(tickets)

    def receive(self, tickets: Collection[str]) -> list[Returned]:
        """Returns what is done."""
        done = [ticket for ticket in tickets if ticket in self.going and self.going[ticket].done()]
        return [Returned(ticket, self.going.pop(ticket).result()) for ticket in done]


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-network")
settings = ["model.name=builtin:tiny", "data.limit=300", "federation.rounds=5", "federation.local_steps=5"]
config = load_config(None, [*settings, "runtime.lanes=2", "runtime.threads=1", "guard.batches=0"])

over_threads = run(config, out=folder / "over-threads", line=Threads(config.federation.clients))
simulated = run(config, out=folder / "simulated")
print(f"{over_threads.bytes['up_per_client_round']:.0f} bytes up per client and round")
print(f"same bits as the simulation: {over_threads.digest == simulated.digest}")
