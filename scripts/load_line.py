"""A server and its clients in one process, with the bytes of a network between them; for load.py and its test.

Kinds of clients: "stub" reads its task as a real client does and makes its slopes up; "light" is the client of
`fedmezo client` on a quadratic, its model checked against the server's bits; "tiny" is that client as it is, on the
built-in model, and the server is that of `fedmezo server` too.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from scipy import stats

from fedmezo import __version__
from fedmezo.fl.algorithm import Point, Reply
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.walk import take_walks
from fedmezo.runtime import distant
from fedmezo.runtime.calls import Done, Hello, Walk, Welcome, decode_request, encode_answer
from fedmezo.runtime.distant import Distant, Terms
from fedmezo.runtime.journal import Header, Journal
from fedmezo.runtime.line import Parcel, Returned
from fedmezo.runtime.progress import RoundReport
from fedmezo.runtime.pull import Downlink, Pull
from fedmezo.runtime.roster import Roster
from fedmezo.runtime.simulate import simulate
from fedmezo.runtime.wire import WIRE_VERSION, decode_task, encode_reply
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.kept import Held
from fedmezo.studies.resident import ClientOptions, Resident, _Taking, build_resident
from fedmezo.studies.run import run
from fedmezo.studies.watch import NullWatch
from fedmezo.zo.noise import NOISE_VERSION
from fedmezo.zo.params import Params, Saved
from fedmezo.zo.perturb import lane_

DIM = 14336  # trained parameters of the quadratic: as many as rank-8 LoRA has on the built-in model
DEADLINE = 0.02  # seconds that a round waits for a silent client
Choice = Pull | Literal["auto"]
Each = Callable[[RoundReport], None]
Node = Callable[[bytes], bytes]


def memory(name: str = "VmRSS") -> float:
    """Returns this process's memory in MB: VmRSS now, VmHWM the most since `forget_peak`."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(found.split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    """Has VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def line_through(points: Sequence[tuple[float, float]], *, levels: int = 1) -> dict[str, float]:
    """Returns slope, intercept, the slope's 95 % interval and the share of the variance that the line explains.

    Args:
      points: x and y.
      levels: numbers besides the slope that were fitted already, or are to be.
    """
    xs, ys = zip(*points, strict=True)
    found = stats.linregress(xs, ys)
    level = len(set(ys)) == 1  # nothing varies, so nothing is left to explain
    free = len(xs) - 1 - levels
    reach = 0.0 if level else stats.t.ppf(0.975, free) * found.stderr * math.sqrt((len(xs) - 2) / free)
    told = {"slope": found.slope, "low": found.slope - reach, "high": found.slope + reach}
    told |= {"intercept": found.intercept, "explained": 1.0 if level else found.rvalue**2}
    return {name: float(f"{value:.4g}") for name, value in told.items()}


class Post:
    """A `Line` inside this process: a parcel is answered as it is sent, and the answer waits to be asked for.

    Attributes:
      handlers: node -> what answers there.
      online: the nodes that are there.
      silent: nodes that take tasks and never answer.
      failing: nodes of which the network says that they failed.
      seconds: CPU time that the handlers took.
      down: bytes that went to nodes.
      up: bytes that came from them.
      largest: node -> bytes of the largest request that went to it since this was emptied.
    """

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        self.handlers, self.online = dict(nodes), set(nodes)
        self.silent: set[int] = set()
        self.failing: set[int] = set()
        self.largest: dict[int, int] = {}
        self.seconds, self.down, self.up, self._count = 0.0, 0, 0, 0
        self._back: dict[str, Returned] = {}

    def nodes(self) -> frozenset[int]:
        """Returns those that are online."""
        return frozenset(self.online)

    def send(self, parcels: Sequence[Parcel]) -> list[str | None]:
        """Returns tickets; whoever is asked has answered by then."""
        return [self._sent(parcel) if parcel.node in self.online else None for parcel in parcels]

    def _sent(self, parcel: Parcel) -> str:
        self._count += 1
        ticket, node = str(self._count), parcel.node
        self.largest[node] = max(self.largest.get(node, 0), len(parcel.payload))
        self.down += len(parcel.payload)
        if node in self.failing and not parcel.greeting:
            self._back[ticket] = Returned(ticket, None, "it failed")
        elif node not in self.silent or parcel.greeting:
            began = time.process_time()
            answer = self.handlers[node](parcel.payload)
            self.seconds += time.process_time() - began
            self.up += len(answer)
            if parcel.payload[:1] != b"\3":  # nobody asks for the answer to a notice
                self._back[ticket] = Returned(ticket, answer)
        return ticket

    def receive(self, tickets: Collection[str]) -> list[Returned]:
        """Returns the answers, each once."""
        return [self._back.pop(ticket) for ticket in list(tickets) if ticket in self._back]


class Quadratic:
    """A bench of half the mean squared distance to 1; copies are whole copies."""

    capacity = 1

    def __init__(self) -> None:
        self.params = Params({"x": torch.zeros(DIM)})
        self.forwards = self.tokens = 0

    @contextmanager
    def open(self, count: int) -> Iterator[Sequence[Params]]:
        """Lends copies."""
        yield [self.params.clone() for _ in range(count)]

    def losses(self, points: Sequence[Point]) -> list[float]:
        """Returns the loss at each point."""
        self.forwards += len(points)
        return [self._one(point) for point in points]

    def _one(self, point: Point) -> float:
        moved = torch.empty(DIM)
        lane_(moved, point.params["x"], name="x", seed=point.seed, offset=point.offset, law="gaussian")
        return 0.5 * float(((moved.double() - 1) ** 2).mean())

    def examples(self, client: int, round: int, step: int) -> int:
        """Returns 1."""
        return 1


class Light(Resident):
    """A client on a quadratic."""

    def _take_part(self, hello: Hello) -> _Taking:
        bench: Any = Quadratic()
        return _Taking(hello, bench, take_walks, 1, Saved(bench.params), Held(hello.run, self._instance))


class Stub:
    """A client without a model: it reads every byte that it is sent, and its slopes follow from round and client."""

    def __init__(self, client: int) -> None:
        self._client, self._run = client, ""

    def answer(self, request: bytes) -> bytes:
        """Returns a welcome or a reply."""
        told = decode_request(request)
        if isinstance(told, Hello):
            self._run = told.run
        if not isinstance(told, Walk):
            return encode_answer(Welcome(self._run, self._client, f"{self._client:032x}", 1, 0))
        task, _ = decode_task(told.task, shapes={"x": (DIM,)})
        slopes = tuple(math.sin(float(self._client + 31 * task.round + step)) for step in range(task.slopes))
        rounded = tuple(torch.tensor(slopes).tolist())
        return encode_answer(Done(encode_reply(Reply(task.round, self._client, 1, 1.0, rounded)), 2, 2, 0.0))


def node(kind: str, client: int) -> Node:
    """Returns what answers for a client."""
    if kind == "stub":
        return Stub(client).answer
    return (
        Light(ClientOptions(client), lambda _: None).answer
        if kind == "light"
        else build_resident(ClientOptions(client, trusting=True)).answer
    )


def server(
    kind: str, *, folder: Path, clients: int, cohort: int, steps: int, rounds: int, pull: Choice = "auto"
) -> tuple[Post, Callable[[Each], None]]:
    """Returns the line to the clients, and what does the run and tells each of its rounds.

    The journal is `folder`/run/journal.sqlite. A round closes without those that did not answer at once.
    """
    distant._POLL = 0.001  # the clients have answered by the time the server looks
    line = Post({100 + client: node(kind, client) for client in range(clients)})
    if kind == "tiny":
        config = _tiny(folder, clients=clients, cohort=cohort, steps=steps, rounds=rounds, pull=pull)
        return line, lambda each: _product(config, folder / "run", line, each)
    (folder / "run").mkdir(parents=True)
    told = {"clients": clients, "cohort": cohort, "steps": steps, "rounds": rounds, "pull": pull}
    return line, lambda each: _plain(folder / "run", line, each, **told)


def _plain(folder: Path, line: Post, each: Each, **told: Any) -> None:
    bench: Any = Quadratic()
    header = Header("{}", "load", bench.params.layout(), "gaussian", NOISE_VERSION, __version__, "", "network")
    hello = Hello("load", __version__, WIRE_VERSION, NOISE_VERSION, "load", bench.params.layout(), "{}")
    everyone = range(told["clients"])
    settings = Settings(0.02, steps=told["steps"], rounds=told["rounds"])
    with Journal.create(folder / "journal.sqlite", header) as journal:
        roster = Roster(line, hello, frozenset(everyone), lambda _: None)
        for report in simulate(
            fedmezo(settings, seed=1, cohort=told["cohort"]),
            bench,
            journal=journal,
            clients=everyone,
            rounds=told["rounds"],
            evaluate=lambda: {"eval": {"loss": 0.0}},
            every=10**6,
            on_surge="rollback",
            downlink=Downlink(DIM, told["pull"]),
            walkers=Distant(roster, Terms(quorum=1, deadline=DEADLINE, patience=60.0)),
        ):
            each(report)


class _Each(NullWatch):
    def __init__(self, each: Each) -> None:
        self._each = each

    def round(self, report: RoundReport) -> None:
        self._each(report)


def _product(config: Config, folder: Path, line: Post, each: Each) -> None:
    run(config, out=folder, line=line, watch=_Each(each))


def _tiny(folder: Path, *, clients: int, cohort: int, steps: int, rounds: int, pull: Choice) -> Config:
    rows = [{"instruction": "Say", "input": f"word {n}", "output": "red"} for n in range(max(100, 2 * clients + 20))]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taking_part = {"clients": clients, "cohort": cohort, "rounds": rounds, "local_steps": steps, "batch_size": 1}
    return parse_config(
        {
            "model": {"name": "builtin:tiny"},
            "adapter": {"rank": 2, "alpha": 4},
            "data": {"path": str(path), "template": "{instruction} {input} is", "eval_examples": 8},
            "federation": {**taking_part, "pull": pull},
            "algorithm": {"rate": 1e-3, "mu": 1e-3},
            "eval": {"every": max(1, rounds // 10), "examples": 8},
            "network": {"quorum": 1, "deadline": DEADLINE},
            "guard": {"on_surge": "rollback"},
            "output": {"export": False, "report": False, "tensorboard": False},
            "runtime": {"lanes": 1, "threads": 1},
        }
    )
