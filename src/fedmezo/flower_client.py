"""The ClientApp of the Flower App: both kinds of message go, as bytes, to the worker process of `fedmezo client`.

In Flower's own simulation there is no such process: its actors live on between messages, so each keeps the clients it
has met in its memory. Messages of a secure sum are answered through Flower's masking (`runtime/flower/secagg.py`).
"""

from collections.abc import Callable
from functools import cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmezo.runtime.flower.shim import forward

__all__ = ["app"]

app = ClientApp()


@app.query()
@app.train()
def answer(msg: Message, context: Context) -> Message:
    """Returns a client's answer."""
    from fedmezo.runtime.flower.secagg import is_stage, stage

    simulated = context.node_config.get("partition-id") if "worker" not in context.node_config else None
    own = _resident(int(str(simulated))) if simulated is not None else None
    return stage(msg, context, answer=own) if is_stage(msg) else forward(msg, context, answer=own)


@cache
def _resident(client: int) -> Callable[[bytes], bytes]:
    from fedmezo.studies.resident import ClientOptions, build_resident

    # Server and clients are one simulation, of one person.
    return build_resident(ClientOptions(client=client, trusting=True)).answer
