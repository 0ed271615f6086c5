"""The process at the other end of `workers.py`: it builds a bench and walks as it is told, until the parent is gone."""

import json
import socket
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module

from fedmezo.runtime.frames import bits_of, end_with_parent, get, put
from fedmezo.runtime.walkers import Client, MeteredBench, Walked, checksum, walk
from fedmezo.runtime.wire import decode_task, encode_reply
from fedmezo.zo.params import Params

__all__ = ["Recipe", "serve"]

Recipe = Callable[[int], tuple[Client, MeteredBench]]


def serve(line: int) -> None:
    """Does a worker's work until the parent is gone; `line` is the descriptor of its end of the line."""
    end_with_parent()
    with socket.socket(fileno=line) as parent, suppress(EOFError, ConnectionError):
        place = json.loads(bytes(get(parent)))["place"]
        try:
            client, bench = _recipe(bytes(get(parent)))(place)
            _tell(parent, {"layout": bench.params.layout()})
        except Exception as error:
            _tell(parent, _failure(error))
            return
        _walk_on(parent, client, bench)


def _recipe(told: bytes) -> Recipe:
    """Returns the recipe that goes by a name, with the arguments it came with."""
    named = json.loads(told)
    found: Recipe = partial(getattr(import_module(named["module"]), named["function"]), *named["arguments"])
    return found


def _walk_on(parent: socket.socket, client: Client, bench: MeteredBench) -> None:
    done: dict[int, Walked | Exception] = {}
    while True:
        order = json.loads(bytes(get(parent)))
        if order["do"] == "walk":
            _take_model_(bench.params, parent)
            tasks = [decode_task(bytes(get(parent)))[0] for _ in range(order["tasks"])]
            try:
                done[order["number"]] = walk(client, bench, tasks)
            except Exception as error:
                done[order["number"]] = error
            continue
        walked = done.pop(order["number"])
        if isinstance(walked, Exception):
            _tell(parent, _failure(walked))
            continue
        spent = {"forwards": walked.forwards, "tokens": walked.tokens, "seconds": walked.seconds}
        _tell(parent, {"replies": len(walked.replies), "held": checksum(bench.params), **spent})
        for reply in walked.replies:
            put(parent, encode_reply(reply))


def _take_model_(params: Params, parent: socket.socket) -> None:
    for _, tensor in params:
        host = tensor.detach().cpu()  # the tensor's own memory unless it lies on another device
        get(parent, bits_of(host))
        if tensor.device.type != "cpu":
            tensor.detach().copy_(host)


def _tell(parent: socket.socket, answer: Mapping[str, object]) -> None:
    put(parent, json.dumps(answer).encode())


def _failure(error: Exception) -> dict[str, object]:
    return {"error": type(error).__name__, "text": str(error), "trace": "".join(traceback.format_exception(error))}
