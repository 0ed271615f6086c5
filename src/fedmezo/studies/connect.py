"""A run whose clients are on other machines: who is greeted with what, and what is kept of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path

from fedmezo import __version__
from fedmezo.errors import ConfigError
from fedmezo.runtime.calls import Hello
from fedmezo.runtime.distant import Distant, Terms
from fedmezo.runtime.journal import Header, Journal
from fedmezo.runtime.line import Line, SecureLine
from fedmezo.runtime.roster import Roster, Seat
from fedmezo.runtime.secure import Secure
from fedmezo.runtime.walkers import Walkers
from fedmezo.runtime.wire import WIRE_VERSION
from fedmezo.studies.build import Built
from fedmezo.studies.folder import write_whole, writing
from fedmezo.studies.watch import Watch
from fedmezo.zo.noise import NOISE_VERSION

__all__ = ["CLIENTS", "NETWORK", "connected", "run_name"]

NETWORK = "network"  # the kind of a run's header, and of the events that say who came and went
CLIENTS = "clients.json"  # client -> training examples it said it owns


def run_name(header: Header) -> str:
    """Returns what tells a run from all others: the sha256 of its header, in hex."""
    return hashlib.sha256(json.dumps(astuple(header)).encode()).hexdigest()


def connected(built: Built, journal: Journal, line: Line, *, folder: Path, watch: Watch) -> tuple[Built, Walkers]:
    """Returns the run's objects with its clients' own sizes in force, and the clients as walkers.

    Args:
      built: the server's objects; their data is what the server judges by.
      journal: the run's.
      line: the way to the clients.
      folder: the run's; the sizes the clients said are kept there.
      watch: told who comes, who is turned away.

    Raises:
      ConfigError: the run is secure, and the line takes no secret sums.
    """
    config = built.config
    sizes = {**built.data.sizes, **_known(folder)}

    def say(text: str) -> None:
        journal.add_event(journal.last, NETWORK, text)
        watch.note(text)

    def seated(client: int, seat: Seat) -> None:
        if sizes.get(client) != seat.examples:
            sizes[client] = seat.examples
            with writing(folder):
                write_whole(folder / CLIENTS, json.dumps({str(c): n for c, n in sorted(sizes.items())}) + "\n")

    hello = Hello(
        run=run_name(journal.header),
        package=__version__,
        wire=WIRE_VERSION,
        noise=NOISE_VERSION,
        fingerprint=built.loaded.fingerprint,
        layout=built.bench.params.layout(),
        config=config.model_dump_json(),
    )
    roster = Roster(line, hello, frozenset(range(config.federation.clients)), say, seated)
    told = config.network
    terms = Terms(told.quorum, deadline=told.deadline, patience=told.patience, start=told.clients)
    method = built.method(sizes)
    walkers = Distant(roster, terms)
    if config.privacy.mode == "central":
        # A sum with noise is told to nobody before it is on the disk: a round asked for again would be another sum.
        walkers.apart = False
    if told.secure:
        if not isinstance(line, SecureLine):
            raise ConfigError("network.secure = true: this way to the clients takes no secret sums; use Flower's.")
        walkers = Secure(roster, terms, line=line)
    return replace(built, algorithm=method), walkers


def _known(folder: Path) -> Mapping[int, int]:
    path = folder / CLIENTS
    return {int(c): int(n) for c, n in json.loads(path.read_text()).items()} if path.exists() else {}
