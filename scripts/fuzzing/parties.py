"""A client and a server, which must survive whatever the other one says."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmezo.errors import ModelError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime import distant
from fedmezo.runtime.calls import (
    Behind,
    Done,
    Refused,
    Walk,
    Welcome,
    check_of,
    decode_answer,
    encode_answer,
    encode_request,
)  # fmt: skip
from fedmezo.runtime.distant import Distant, Terms
from fedmezo.runtime.line import Parcel, Returned
from fedmezo.runtime.pull import Offer
from fedmezo.runtime.roster import Roster
from fedmezo.runtime.wire import encode_reply, encode_task
from fedmezo.studies import resident as inside
from fedmezo.studies.resident import ClientOptions, Resident
from fedmezo.zo.params import Saved
from fuzzing.course import Check, Target, same
from fuzzing.mutation import sealed_after
from fuzzing.seeds import HELLO, RUN, answers, asked, params, requests

__all__ = ["TARGETS"]


class _Bench:
    """The least that a client walks on."""

    capacity, forwards, tokens = 1, 0, 0

    def __init__(self) -> None:
        self.params = params()


def _walked(told: Sequence[Task], bench: Any) -> list[Reply]:
    """Answers without a walk, which may take as long as the server wants."""
    return [Reply(t.round, t.client, 1, 1.0, (1.0,) * min(t.slopes, 8), coding=t.coding) for t in told]


def _client(folder: Path) -> Check:
    """The law of a client: it answers whatever comes, and then still follows a server that means well."""

    def _nothing(*told: object, **options: object) -> None:
        raise ModelError("There is no model here.")

    inside.load_base = _nothing  # a hello may ask for a model of gigabytes
    bench: Any = _Bench()
    good = encode_request(Walk(check_of(RUN, params().digest()), encode_task(asked(0))))
    base = Saved(bench.params)

    def check(data: bytes) -> bool:
        client = Resident(ClientOptions(client=2), lambda said: None)
        taking = inside._Taking(HELLO, bench, _walked, 1, base, inside.Held(RUN, "0" * 32))
        base.restore_(bench.params)
        client._taking = taking
        answer = decode_answer(client.answer(data))
        if client._taking is None:
            return False  # a hello of another run ends this one, whatever comes of it
        after = decode_answer(client.answer(good))
        if isinstance(after, Behind):
            after = decode_answer(client.answer(good))
        same(type(after), Done)
        return not isinstance(answer, Refused)

    return check


_HOSTILE = 11  # the node that answers with the input; one with a lower number is seated first


class _Answering:
    """A line with two nodes: one answers with the input, the other one as it should.

    Who is which client, clients say themselves; a node that has the number of another one and comes first is believed.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._waiting = data, {}  # type: dict[str, tuple[int, bool]]

    def nodes(self) -> frozenset[int]:
        return frozenset((_HOSTILE - 1, _HOSTILE))

    def send(self, parcels: Sequence[Parcel]) -> list[str | None]:
        tickets = [str(len(self._waiting) + at) for at in range(len(parcels))]
        self._waiting |= {t: (p.node, p.greeting) for t, p in zip(tickets, parcels, strict=True)}
        return list(tickets)

    def receive(self, tickets: Collection[str]) -> list[Returned]:
        return [Returned(ticket, self._answer(*self._waiting[ticket])) for ticket in list(tickets)]

    def _answer(self, node: int, greeting: bool) -> bytes:  # noqa: FBT001
        if node == _HOSTILE and greeting == (self._data[:1] == b"\1"):
            return self._data
        client, instance = (2, "0" * 32) if node == _HOSTILE else (3, "f" * 32)
        if greeting:
            return encode_answer(Welcome(RUN, client, instance, 40, 0))
        return encode_answer(Done(encode_reply(Reply(0, client, 8, 1.25, (1.5, -0.5))), 4, 9, 0.5))


def _server(folder: Path) -> Check:
    """The law of a server: a client may lose its own place in a round, and nothing else changes."""
    model, both = params(), [asked(0), replace(asked(0), client=3)]
    distant._POLL = 0.0

    def check(data: bytes) -> bool:
        roster = Roster(_Answering(data), HELLO, frozenset((2, 3)), lambda said: None)
        server = Distant(roster, Terms(quorum=1, deadline=0.0, patience=0.0, start=1))
        there = server.there([2, 3])
        done = server.start([task for task in both if task.client in there], model, lambda held: Offer("pairs"))()
        got = {reply.client: reply for reply in done.replies}
        same(got[3].slopes, (1.5, -0.5))
        same({(reply.round, len(reply.slopes)) for reply in done.replies}, {(0, 2)})
        same(got.keys() | {absence.client for absence in done.absent} >= set(there), True)  # noqa: FBT003
        return len(done.replies) == 2

    return check


TARGETS = (
    Target("client", requests, _client, share=0.3, mend=sealed_after({2: 9, 4: 9}), most=1 << 11, seconds=1.0),
    Target("server", answers, _server, share=0.1, mend=sealed_after({2: 17}), most=1 << 14),
)
