"""What a client can send instead of its reply, and an algorithm some of whose clients do; for tests and studies.

An attack is made anew for every run, since some remember: `ATTACKS["replay"]()` is a function (task, reply) -> what is
sent, the reply being the honest one. What is bytes is sent as it is; all else through the wire's bytes. The server's
side takes what answers the task and drops the rest, as `runtime/distant.py` does.
"""

import math
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fedmezo.errors import WireError
from fedmezo.fl.algorithm import Reply
from fedmezo.fl.pool import directions_of
from fedmezo.runtime.wire import decode_reply, encode_reply
from fedmezo.zo.estimate import robust_scale
from fedmezo.zo.perturb import walk_delta
from fedmezo.zo.seedsum import DenseDelta, Walk

LARGEST = float(np.finfo(np.float32).max)
PLANTED = 77  # the name of the target that colluders push to


def _slopes(reply, change):
    """Returns the reply with every slope changed, and every number of a change of the parameters."""
    if reply.delta is not None and not reply.slopes:
        changed = {name: tensor.clone().apply_(change) for name, tensor in reply.delta.tensors.items()}
        return replace(reply, delta=DenseDelta(changed))
    slopes = np.clip([change(slope) for slope in reply.slopes], -LARGEST, LARGEST).astype(np.float32)
    return replace(reply, slopes=tuple(slopes.astype(float).tolist()))


def nan(task, reply):
    return replace(_slopes(reply, lambda _: math.nan), loss=math.nan)


def inf(task, reply):
    """An infinite slope, under a checksum that is right; a `Reply` cannot even hold one."""
    data = encode_reply(replace(reply, slopes=(1.0,) * len(reply.slopes), coding="float32"))
    body = data[:-4].replace(struct.pack("<f", 1.0), struct.pack("<f", math.inf))
    return body + struct.pack("<I", zlib.crc32(body))


def garbage(task, reply):
    return random.Random(task.round).randbytes(200)


def huge(task, reply):
    return replace(_slopes(reply, lambda _: LARGEST), loss=1e300, examples=2**32 - 1)


def sign_flip(task, reply):
    return _slopes(reply, lambda slope: -slope)


def scaled(task, reply):
    return _slopes(reply, lambda slope: 100 * slope)


def scaled_flip(task, reply):
    return _slopes(reply, lambda slope: -100 * slope)


def stale(task, reply):
    return replace(reply, round=max(task.round - 1, 0) if task.round else 1)


class Replay:
    """The slopes of the last round it was asked, under the names of this one."""

    def __init__(self):
        self.last = {}

    def __call__(self, task, reply):
        old = self.last.get(task.client, reply)
        self.last[task.client] = reply
        return replace(reply, slopes=old.slopes, delta=old.delta, loss=old.loss)


class Drift:
    """All colluders push to one planted place, far beyond any honest slope: slopes of a plane that falls towards it.

    Args:
      params: names and shapes of what is trained.
      size: how steep, in multiples of the first colluder's own scale in that round.
      law: the directions' law.
    """

    def __init__(self, params, *, size=10.0, law="gaussian"):
        self.params, self.size, self.law = params, size, law
        self.scales = {}
        self.along = {}

    def __call__(self, task, reply):
        scale = self.scales.setdefault(task.round, robust_scale(reply.slopes) or 1.0)
        named = directions_of(task).seeds
        slopes = [-self.size * scale * self._towards(seed) for seed in named]
        return replace(reply, slopes=tuple(np.array(slopes, np.float32).astype(float).tolist()))

    def _towards(self, seed):
        """Returns z(seed) . v / |v| for the planted v."""
        if seed not in self.along:
            self.along = {key: self.along[key] for key in list(self.along)[-4096:]}
            target, own = (_written(self.params, name, self.law) for name in (PLANTED, seed))
            self.along[seed] = float(own @ target / np.linalg.norm(target))
        return self.along[seed]


def _written(params, seed, law):
    tensors = walk_delta(params, Walk((seed,), (1.0,)), law=law).tensors
    return np.concatenate([tensor.detach().cpu().double().numpy().reshape(-1) for tensor in tensors.values()])


def attacks(params):
    """Returns name -> what makes the attack; `params` has the names and shapes of what is trained."""
    return {
        "nan": lambda: nan,
        "inf": lambda: inf,
        "garbage": lambda: garbage,
        "stale": lambda: stale,
        "huge": lambda: huge,
        "sign-flip": lambda: sign_flip,
        "scaled": lambda: scaled,
        "scaled-flip": lambda: scaled_flip,
        "replay": Replay,
        "drift": lambda: Drift(params),
    }


SILENT = ("nan", "inf", "garbage", "stale")  # of which a server takes nothing
ATTACKS = {name: make() for name, make in attacks(None).items() if name not in ("replay", "drift")}  # without memory


def delivered(task, sent) -> Reply | None:
    """Returns the reply that a server takes from a client; None where it is no answer to the task."""
    try:
        reply = decode_reply(sent if isinstance(sent, bytes) else encode_reply(sent))
    except WireError:
        return None
    asked = (task.round, task.client, task.slopes)
    return reply if (reply.round, reply.client, len(reply.slopes)) == asked else None


def attacked(algorithm, attack: Callable, liars: Sequence[int]):
    """Returns the algorithm whose clients `liars` send what the attack makes of their replies."""

    def client(tasks, bench):
        honest = zip(tasks, algorithm.client(tasks, bench), strict=True)
        sent = [delivered(task, attack(task, reply) if task.client in liars else reply) for task, reply in honest]
        return [reply for reply in sent if reply is not None]

    return replace(algorithm, client=client)
