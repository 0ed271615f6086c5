"""Flower's secure aggregation (SecAgg+): the mean of what clients answer, of whom the server sees masked numbers only.

All that fedmezo knows of the protocol is in this file. Flower offers it for its older kind of app: a workflow at the
server that asks a strategy for the clients, and a modifier at the client around a function that returns parameters. So
the parameters are a client's share of a sum, the strategy knows nothing but who is asked, and everyone's weight is 1.

Flower seeds the generator of its masks with 32 bits, of which the common secret of a pair fills 28 at most (it is text
in base64, folded): a server could search them. `strengthened` puts SHAKE-256 of the whole secret in its place, on both
sides.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Status,
    bytes_to_ndarray,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmezo.errors import RunError
from fedmezo.runtime.calls import Behind, Refused, Share, decode_answer
from fedmezo.runtime.flower.shim import asked
from fedmezo.runtime.line import FEWEST, Mean

__all__ = ["is_stage", "levels_of", "secure_mean", "stage"]

_KEY = "payload"
_POLL = 0.1  # seconds between looks at what came back
_WALK = 2  # the exchange in which clients walk; before it keys and shares of keys are exchanged
_MODULUS = 1 << 32  # of all sums
_USERS = (
    "flwr.client.mod.secure_aggregation.secaggplus_mod",
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow",
)


def levels_of(clients: int) -> int:
    """Returns how many steps the range [-1, 1] is divided into: 2**24, or fewer for the sum not to overflow.

    A share is rounded up or down to a step at random, so a mean is off by less than 2 / levels in each number; 0, -1
    and 1 are exact.
    """
    return 1 << min(24, 31 - (clients - 1).bit_length())


def strengthened() -> None:
    """Makes both sides of Flower's protocol take their masks from `_masks`.

    Raises:
      RunError: this version of Flower takes them from elsewhere.
    """
    for name in _USERS:
        module = import_module(name)
        if not hasattr(module, "pseudo_rand_gen"):
            raise RunError(f"{name} makes its masks in a way that is unknown here; install flwr>=1.41,<1.42.")
        module.pseudo_rand_gen = _masks  # type: ignore[attr-defined]


def _masks(seed: bytes, below: int, shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.int64]]:
    """Returns numbers in [0, below), a power of two up to 2**32, that nobody can tell from random without the seed."""
    sizes = [math.prod(shape) for shape in shapes]
    stream = hashlib.shake_256(b"fedmezo masks" + seed).digest(4 * sum(sizes))
    numbers = np.frombuffer(stream, "<u4").astype(np.int64) & (below - 1)
    parts = np.split(numbers, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


# --- the client -------------------------------------------------------------------------------------------------------


def is_stage(msg: Message) -> bool:
    """Whether a message is one of the protocol's."""
    return msg.has_content() and RECORD_KEY_CONFIGS in msg.content


def stage(msg: Message, context: Context, *, answer: Callable[[bytes], bytes] | None = None) -> Message:
    """Returns the answer to one of the protocol's four messages; the third has the client walk.

    Args:
      msg: the message.
      context: as in `forward`.
      answer: who answers in this process instead of a worker.

    Raises:
      RunError: the client cannot walk, or the others are too few to hide it; Flower makes an error reply of it.
    """
    strengthened()
    told = msg.content.config_records[RECORD_KEY_CONFIGS]
    if told.get(Key.STAGE) == Stage.SHARE_KEYS and len(told) - 1 < FEWEST:
        raise RunError(
            f"The server asked for a sum of {len(told) - 1} clients, in which nobody hides; {FEWEST} may be."
        )
    return secaggplus_mod(msg, context, lambda inner, where: _share(inner, answer or partial(asked, context=where)))


def _share(msg: Message, worker: Callable[[bytes], bytes]) -> Message:
    """Returns what the worker adds to the sum, for the modifier to mask."""
    answer = decode_answer(worker(bytes(msg.content.config_records["fitins.config"][_KEY])))
    if not isinstance(answer, Share):
        why = answer.text if isinstance(answer, Refused) else "its model is another one than the server thought"
        raise RunError(f"{why} (it has {answer.held} rounds)" if isinstance(answer, Behind) else why)
    share = np.frombuffer(answer.values, "<f4").astype(np.float64)
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([share]), 1, {})
    return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=msg)


# --- the server -------------------------------------------------------------------------------------------------------


def secure_mean(grid: Grid, requests: Mapping[int, bytes], *, numbers: int, enough: int, deadline: float) -> Mean:
    """Returns the mean of the shares that nodes answer with; arguments as `SecureLine.mean`.

    Every pair of clients shares a mask, and every client gives the others shares of its secrets, of which `enough` are
    needed to take the masks from the sum.

    Raises:
      RunError: Flower's workflow was sent something that it cannot make sense of.
    """
    strengthened()
    watched, asker = _Watched(grid, numbers, deadline), _Asker(requests)
    workflow = SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=enough / len(requests),
        max_weight=1.0,
        clipping_range=1.0,
        quantization_range=levels_of(len(requests)),
        modulus_range=_MODULUS,
        timeout=deadline,
    )
    try:
        workflow(watched, _context(asker))  # type: ignore[arg-type]
    except _LostEarlyError:
        return Mean(None, frozenset(), watched.failed, watched.sizes)
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RunError(f"A client sent what secure aggregation cannot use ({what}).") from error
    took = asker.took if asker.values is not None else frozenset()
    return Mean(asker.values, took, watched.failed, watched.sizes)


def _context(asker: "_Asker") -> LegacyContext:
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    context.state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(Parameters([], ""), keep_input=True)
    context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1, WorkflowKey.START_TIME: 0.0})
    return LegacyContext(context=context, strategy=asker)


class _Node(ClientProxy):  # type: ignore[misc]
    """A node by its number; nothing is asked of it in this way."""

    def __init__(self, node: int) -> None:
        super().__init__(str(node))
        self.node_id = node

    def _never(self, *_: Any, **__: Any) -> Any:
        raise RunError("A node is asked through Flower's grid only, a bug; please report it.")

    get_properties = get_parameters = fit = evaluate = reconnect = _never


class _Asker(Strategy):  # type: ignore[misc]
    """Says who is asked for what, and keeps the mean.

    Attributes:
      values: the mean; None until it is there.
      took: the nodes whose shares are in it.
    """

    def __init__(self, requests: Mapping[int, bytes]) -> None:
        self._requests = requests
        self.values: NDArray[np.float64] | None = None
        self.took: frozenset[int] = frozenset()

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
        return [(_Node(node), FitIns(parameters, {_KEY: asked})) for node, asked in self._requests.items()]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        self.values = parameters_to_ndarrays(results[0][1].parameters)[0]  # all results hold the mean by now
        self.took = frozenset(node.node_id for node, _ in results)
        return None, {}

    def _never(self, *_: Any, **__: Any) -> Any:
        return None

    initialize_parameters = configure_evaluate = aggregate_evaluate = evaluate = _never


class _LostEarlyError(Exception):
    """A node failed before it had given shares of its keys."""


class _Watched:
    """The part of a `Grid` that the workflow uses, with a shorter pause between looks; notes failures and sizes.

    Flower's workflow asks for shares of the keys of every node that is missing in the end. Of one that never gave any
    out there are none, and all fail; so a loss that early ends the attempt at once, before anyone has walked.
    """

    def __init__(self, grid: Grid, numbers: int, deadline: float) -> None:
        self._grid, self._numbers, self._deadline, self._exchange = grid, numbers, deadline, 0
        self.failed: dict[int, str] = {}
        self.sizes: dict[int, tuple[int, int]] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        nodes = [message.metadata.dst_node_id for message in sent]
        for node, message in zip(nodes, sent, strict=True):
            self._count(node, down=_size(message))
        tickets = list(self._grid.push_messages(sent)) or [None] * len(sent)
        waiting = {ticket: node for ticket, node in zip(tickets, nodes, strict=True) if ticket is not None}
        replies, over = [], time.monotonic() + self._deadline
        missing = dict(waiting)
        while missing and time.monotonic() < over:
            for reply in self._grid.pull_messages(set(missing)):
                node = missing.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    self.failed[node] = " ".join(str(reply.error.reason).split())[:400]
                elif self._exchange == _WALK and _lengths(reply) != [1, self._numbers]:
                    self.failed[node] = f"sent {_lengths(reply)} numbers instead of [1, {self._numbers}]"
                else:
                    self._count(node, up=_size(reply))
                    replies.append(reply)
            if missing:
                time.sleep(_POLL)
        self.failed |= {node: f"did not answer within {self._deadline:g} s" for node in missing.values()}
        self.failed |= {node: "could not be reached" for node in nodes if node not in waiting.values()}
        if self._exchange < _WALK and len(replies) < len(sent):
            raise _LostEarlyError
        self._exchange += 1
        return replies

    def _count(self, node: int, *, down: int = 0, up: int = 0) -> None:
        before = self.sizes.get(node, (0, 0))
        self.sizes[node] = before[0] + down, before[1] + up


def _lengths(reply: Message) -> list[int]:
    """Returns how many numbers a masked share has: first the weight, then the share."""
    try:
        masked = reply.content.config_records.get(RECORD_KEY_CONFIGS, {}).get(Key.MASKED_PARAMETERS, [])
        return [bytes_to_ndarray(part).size for part in masked]
    except Exception:  # what a client sends as an array may be anything, and numpy raises accordingly
        return []


def _size(message: Message) -> int:
    """Returns the bytes of what a message says, without Flower's framing."""
    return sum(len(key) + _bytes(value) for record in message.content.values() for key, value in record.items())


def _bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return len(value) if isinstance(value, bytes | str) else len(value.data) if hasattr(value, "data") else 8
