"""Clients on other machines as the walkers of a run: who is asked, how long is waited, and what is done about failures.

A round closes when everyone asked has answered or failed, or at its deadline, provided that as many replies as its
quorum are there. Short of that, those who did not answer are asked again, wherever they are by then, until the patience
is over. A client whose model is not the one a task starts from says so, and is sent what it lacks in the same round.
What comes after a round has closed is counted, and otherwise dropped.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.calls import (
    Behind,
    Done,
    Refused,
    Stranger,
    check_of,
    decode_answer,
    encode_request,
)
from fedmezo.runtime.line import Parcel, Returned
from fedmezo.runtime.packing import Packing
from fedmezo.runtime.pull import Tell
from fedmezo.runtime.roster import Roster
from fedmezo.runtime.walkers import Absence, Walked
from fedmezo.runtime.wire import decode_reply
from fedmezo.zo.params import Params

__all__ = ["Distant", "Terms"]

_POLL = 0.1  # seconds between looks at what came back
_GREET = 1.0  # seconds between looks at who is there, while replies are waited for
_SILENCE = 10.0  # seconds that are waited for clients before that is said
_PAUSE = 5.0  # seconds before a client that failed is asked again
_LATE = 8  # rounds for which an answer that is too late is still looked for: a machine that hangs never sends it
_AT_ONCE = 1 << 24  # bytes of tasks that are in memory at once: a thousand clients may each be sent a whole model


@dataclass(frozen=True)
class Terms:
    """How long is waited.

    Attributes:
      quorum: replies that a round needs; None for half of those asked, rounded up.
      deadline: seconds after which a round closes without the others.
      patience: seconds after which a run ends that has no quorum.
      start: clients that have to be there before the first round; None for all.
    """

    quorum: int | None = None
    deadline: float = 600.0
    patience: float = 600.0
    start: int | None = None


@dataclass
class Distant:
    """Clients on other machines; a `Walkers`.

    Attributes:
      roster: who is there.
      terms: how long is waited.
      apart: whether a round may begin before the last one is journaled.
    """

    roster: Roster
    terms: Terms
    apart: bool = True
    distant = True
    _late: dict[str, tuple[int, int]] = field(default_factory=dict)
    _began: bool = False

    def there(self, clients: Sequence[int]) -> Sequence[int]:
        """Returns those of the clients that are there; waits for all of them once, then for a quorum.

        Raises:
          RunError: too few were there when the patience was over.
        """
        start = len(clients) if self.terms.start is None else self.terms.start
        quorum = self._quorum(len(clients))
        enough, patience = quorum if self._began else start, self.terms.patience
        began, told = time.monotonic(), False
        while True:
            self.roster.greet()
            there, passed = self.roster.there(), time.monotonic() - began
            found, away = [c for c in clients if c in there], [c for c in clients if c not in there]
            if len(found) >= (quorum if passed > patience else enough):
                self._began = True
                return found
            if passed > min(_SILENCE, patience / 2) and not told:
                told = True
                self.roster.say(f"Waiting for clients {_listed(away)}: {len(found)} are there, {enough} are wanted.")
            if passed > patience:
                raise RunError(
                    f"Only {len(found)} of {len(clients)} clients are there after {patience:g} s, clients "
                    f"{_listed(away)} are not; start them and go on with `fedmezo server --resume`."
                )
            time.sleep(_POLL)

    def start(self, tasks: Sequence[Task], params: Params, tell: Tell) -> Callable[[], Walked]:
        """Asks the clients of the tasks to walk from `params` as they are now; returns what waits for the replies."""
        asking = _Asking(self, tasks, params, tell)
        asking.ask([task.client for task in tasks])
        return asking.wait

    def _quorum(self, asked: int) -> int:
        wanted = math.ceil(asked / 2) if self.terms.quorum is None else self.terms.quorum
        return max(1, min(wanted, asked))

    def _take_late(self) -> list[Absence]:
        """Returns what came too late since the last call."""
        late = []
        for back in self.roster.line.receive(self._late):
            client, round_number = self._late.pop(back.ticket)
            if back.payload is not None:
                told = f"client {client} answered round {round_number} after that was closed"
                late.append(Absence(client, "stale", told))
        return late

    def _await_late(self, sent: Mapping[str, tuple[int, int]]) -> None:
        """Notes ticket -> (client, round) of a round that closes without these; forgets those of rounds long closed."""
        newest = max((number for _, number in sent.values()), default=0)
        kept = {ticket: told for ticket, told in self._late.items() if newest - _LATE < told[1] <= newest}
        self._late = {**kept, **sent}


@dataclass
class _Sent:
    """A task on its way."""

    client: int
    node: int
    bytes: int
    exact: bool


class _Asking:
    """One round: what was asked of whom, and what came of it."""

    def __init__(self, owner: Distant, tasks: Sequence[Task], params: Params, tell: Tell) -> None:
        self._owner = owner
        self._tasks = {task.client: task for task in tasks}
        self._packing = Packing(tell, params, check=check_of(owner.roster.hello.run, params.digest()))
        self._shapes = {name: tuple(tensor.shape) for name, tensor in params}
        self._began = time.monotonic()
        self._sent: dict[str, _Sent] = {}
        self._replies: dict[int, tuple[Reply, Done]] = {}
        self._failed: dict[int, tuple[float, str, str]] = {}
        self._behind: list[int] = []
        self._down: dict[int, int] = dict.fromkeys(self._tasks, 0)
        self._up: dict[int, int] = dict.fromkeys(self._tasks, 0)

    def ask(self, clients: Sequence[int]) -> None:
        """Sends these clients their tasks; one that is away has failed for now."""
        seats, size = self._owner.roster.there(), 0
        going: list[tuple[_Sent, Parcel]] = []
        for client in clients:
            if client not in seats:
                self._fail(client, "away", "is not there")
                continue
            seat = seats[client]
            walk, exact = self._packing.walk(self._tasks[client], seat.held, exact=seat.exact)
            data = encode_request(walk)
            going.append((_Sent(client, seat.node, len(data), exact), Parcel(seat.node, data)))
            size += len(data)
            if size > _AT_ONCE:
                self._send(going)
                going, size = [], 0
        self._send(going)

    def _send(self, going: Sequence[tuple[_Sent, Parcel]]) -> None:
        tickets = self._owner.roster.line.send([parcel for _, parcel in going]) if going else ()
        for (sent, _), ticket in zip(going, tickets, strict=True):
            if ticket is None:
                self._fail(sent.client, "away", "could not be reached")
                continue
            self._failed.pop(sent.client, None)
            self._sent[ticket] = sent
            self._down[sent.client] += sent.bytes

    def wait(self) -> Walked:
        """Returns the replies, in the tasks' order, when the round closes.

        Raises:
          RunError: the patience was over without a quorum.
        """
        owner, terms = self._owner, self._owner.terms
        quorum, late, greeted = owner._quorum(len(self._tasks)), [], -math.inf
        while True:
            if time.monotonic() - greeted >= _GREET:
                owner.roster.greet()
                late += owner._take_late()
                greeted = time.monotonic()
            for back in owner.roster.line.receive(self._sent):
                self._heard(self._sent.pop(back.ticket), back)
            if self._behind:
                clients, self._behind = self._behind, []
                self.ask(clients)
            passed = time.monotonic() - self._began
            enough = len(self._replies) >= quorum
            if len(self._replies) == len(self._tasks) or (enough and (not self._sent or passed > terms.deadline)):
                return self._closed(late)
            if passed > max(terms.patience, terms.deadline):
                raise RunError(self._short_of(quorum))
            self._ask_again(enough=enough)
            time.sleep(_POLL)

    def _ask_again(self, *, enough: bool) -> None:
        """Asks those once more who are elsewhere than their task, and, while replies are wanting, those who failed."""
        seats, now, again = self._owner.roster.there(), time.monotonic(), []
        for ticket, sent in list(self._sent.items()):
            seat = seats.get(sent.client)
            if seat is not None and seat.node != sent.node:
                del self._sent[ticket]
                again.append(sent.client)
        if not enough:
            again += [c for c, (when, _, _) in self._failed.items() if c in seats and now - when > _PAUSE]
        if again:
            self.ask(again)

    def _heard(self, sent: _Sent, back: Returned) -> None:
        client, roster = sent.client, self._owner.roster
        if back.payload is None:
            self._fail(client, "failed", f"failed ({back.failure})")
            return
        self._up[client] += len(back.payload)
        try:
            answer = decode_answer(back.payload)
            most = self._tasks[client].slopes
            reply = decode_reply(answer.reply, shapes=self._shapes, most=most) if isinstance(answer, Done) else None
        except WireError as error:
            self._fail(client, "garbage", f"sent something that is no answer ({error})")
            return
        if isinstance(answer, Done) and reply is not None:
            self._take(sent, answer, reply)
        elif isinstance(answer, Behind) and roster.seats[client].held != answer.held:
            roster.holds(client, answer.held, exact=True)
            self._behind.append(client)
        elif isinstance(answer, Stranger):
            roster.again(client)
            self._fail(client, "away", "had to be told of the run again")
        else:
            why = answer.text if isinstance(answer, Refused) else "its model cannot be brought up to date"
            self._fail(client, "refused", f"refused: {why}")

    def _take(self, sent: _Sent, answer: Done, reply: Reply) -> None:
        task = self._tasks[sent.client]
        told = (reply.round, reply.client, len(reply.slopes))
        if told != (task.round, task.client, task.slopes):
            self._fail(
                sent.client, "garbage",
                f"answered with {told[2]} slopes of client {told[1]} for round {told[0]}, asked for {task.slopes} of "
                f"round {task.round}",
            )  # fmt: skip
            return
        self._owner.roster.holds(sent.client, task.round, exact=sent.exact)
        self._failed.pop(sent.client, None)
        self._replies[sent.client] = reply, answer

    def _fail(self, client: int, kind: str, why: str) -> None:
        self._failed[client] = time.monotonic(), kind, why

    def _closed(self, late: list[Absence]) -> Walked:
        for sent in self._sent.values():
            self._fail(sent.client, "late", f"did not answer within {self._owner.terms.deadline:g} s")
        rounds = {client: task.round for client, task in self._tasks.items()}
        self._owner._await_late({ticket: (s.client, rounds[s.client]) for ticket, s in self._sent.items()})
        missing = [client for client in self._tasks if client not in self._replies]
        absent = [Absence(c, self._failed[c][1], f"client {c} {self._failed[c][2]}") for c in missing]
        taken = [self._replies[client] for client in self._tasks if client in self._replies]
        return Walked(
            tuple(reply for reply, _ in taken),
            forwards=sum(answer.forwards for _, answer in taken),
            tokens=sum(answer.tokens for _, answer in taken),
            seconds=time.monotonic() - self._began,
            absent=(*late, *absent),
            sizes={client: (self._down[client], self._up[client]) for client in self._replies},
        )

    def _short_of(self, quorum: int) -> str:
        reasons = "; ".join(f"client {c} {why}" for c, (_, _, why) in sorted(self._failed.items()))
        silent = sorted(sent.client for sent in self._sent.values())
        told = "; ".join(filter(None, [reasons, f"clients {_listed(silent)} are silent" if silent else ""]))
        number, got = next(iter(self._tasks.values())).round, f"{len(self._replies)} of {len(self._tasks)}"
        return (
            f"Round {number}: {got} clients answered, {quorum} are needed ({told}); "
            "every finished round is in the journal: mend that and go on with `fedmezo server --resume`."
        )


def _listed(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients[:10])) + (" and more" if len(clients) > 10 else "")
