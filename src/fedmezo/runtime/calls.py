"""What a server and a client on another machine say to each other.

A call is one byte that says its kind, and:

    requests  1 hello    JSON of `Hello`: who is asked to take part in what
              2 walk     check 8 bytes, then a task with what brings the client up to date (`wire.py`)
              3 notice   UTF-8: a sentence for the person at the client; the answer says nothing
              4 addend   as walk; asks for a share of a sum instead of the reply
    answers   1 welcome  JSON of `Welcome`
              2 done     forwards u32, tokens u64, seconds f32, then a reply (`wire.py`)
              3 behind   held u32: the model here has so many rounds behind it; send what came since
              4 stranger nothing: no hello was heard, or another run's
              5 refused  UTF-8: one sentence why not
              6 noted    nothing
              7 share    f32 x (steps + 1): what the walk adds to a sum (`fl/share.py`); leaves the machine masked

`check` is the first 8 bytes of sha256(run + digest of the model), so a client walks from the server's bits or not at
all; 8 zero bytes are for a client whose model is made of a pool's sums, which agree up to rounding. Numbers are
little-endian. Decoding arbitrary bytes raises `WireError` or returns a valid call.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from fedmezo.errors import WireError

__all__ = [
    "ADDEND", "PROTOCOL", "UNCHECKED", "Addend", "Behind", "Done", "Hello", "Noted", "Notice", "Refused", "Share",
    "Stranger", "Walk", "Welcome", "check_of", "decode_answer", "decode_request", "encode_answer", "encode_request",
]  # fmt: skip

PROTOCOL = 1
UNCHECKED = bytes(8)
ADDEND = b"\4"  # how the bytes of an `Addend` begin
MAX_JSON = 1 << 20
MAX_SENTENCE = 1 << 12
_DONE = struct.Struct("<IQf")
_HELD = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Hello:
    """Who is asked to take part in what; both sides compare everything but the configuration.

    Attributes:
      run: sha256 of the run's header, in hex; another run has another one.
      package: version of fedmezo.
      wire: version of the wire format.
      noise: version of the noise.
      fingerprint: sha256 of the base model's weights.
      layout: `Params.layout()` of what is trained.
      config: the resolved configuration as JSON.
      protocol: version of these calls.
    """

    run: str
    package: str
    wire: int
    noise: int
    fingerprint: str
    layout: str
    config: str
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Welcome:
    """A client's answer to a hello that it can follow.

    Attributes:
      run: the hello's run.
      client: its stable number.
      instance: 32 hex digits that its state was given when it was made; tells a client that came back from another one.
      examples: training examples it owns.
      held: rounds its model has behind it.
      exact: whether the model has the server's bits; else it was made of sums.
    """

    run: str
    client: int
    instance: str
    examples: int
    held: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Walk:
    """A task with what brings the client up to date, as the bytes of `wire.encode_task`, and the model's check."""

    check: bytes
    task: bytes


@dataclass(frozen=True, slots=True)
class Addend(Walk):
    """A walk of which only a share of a sum is asked for."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A sentence for the person at the client."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """A reply as the bytes of `wire.encode_reply`, and what it took: forward passes, tokens, seconds."""

    reply: bytes
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """A client's share of a sum as float32 bytes; for the masking on its own machine only."""

    values: bytes


@dataclass(frozen=True, slots=True)
class Behind:
    """The client's model has `held` rounds behind it, which is not what the task was sent for."""

    held: int


@dataclass(frozen=True, slots=True)
class Refused:
    """One sentence why the client cannot do it."""

    text: str


@dataclass(frozen=True, slots=True)
class Stranger:
    """The client knows nothing of this run; it has to be told."""


@dataclass(frozen=True, slots=True)
class Noted:
    """The answer to a notice."""


Request = Hello | Walk | Notice
Answer = Welcome | Done | Behind | Stranger | Refused | Noted | Share
T = TypeVar("T", Hello, Welcome)


def check_of(run: str, digest: str) -> bytes:
    """Returns the 8 bytes that tell a run's model."""
    return hashlib.sha256((run + digest).encode()).digest()[:8]


def encode_request(request: Request) -> bytes:
    """Returns the bytes of a request; those of a walk are 9 more than its task's."""
    if isinstance(request, Walk):
        return (ADDEND if isinstance(request, Addend) else b"\2") + request.check + request.task
    return b"\1" + _json(request) if isinstance(request, Hello) else b"\3" + _text(request.text)


def decode_request(data: bytes) -> Request:
    """Returns the request; the task in a walk is not decoded.

    Raises:
      WireError: the bytes are no request.
    """
    kind, body = data[:1], bytes(data[1:])
    if kind == b"\1":
        return _of(Hello, body)
    if kind in (b"\2", ADDEND) and len(body) > len(UNCHECKED):
        return (Walk if kind == b"\2" else Addend)(body[:8], body[8:])
    if kind == b"\3":
        return Notice(_sentence(body))
    raise WireError(f"Not a request: {len(data)} bytes of kind {data[:1].hex() or 'none'}.")


def encode_answer(answer: Answer) -> bytes:
    """Returns the bytes of an answer; those of a reply are 17 more than its own."""
    if isinstance(answer, Done):
        return b"\2" + _DONE.pack(answer.forwards, answer.tokens, answer.seconds) + answer.reply
    if isinstance(answer, Welcome):
        return b"\1" + _json(answer)
    if isinstance(answer, Behind):
        return b"\3" + _HELD.pack(answer.held)
    if isinstance(answer, Share):
        return b"\7" + answer.values
    return b"\5" + _text(answer.text) if isinstance(answer, Refused) else _WORDLESS[type(answer)]


_WORDLESS: dict[type[Stranger] | type[Noted], bytes] = {Stranger: b"\4", Noted: b"\6"}


def decode_answer(data: bytes) -> Answer:
    """Returns the answer; the reply in it is not decoded.

    Raises:
      WireError: the bytes are no answer.
    """
    kind, body = data[:1], bytes(data[1:])
    if kind == b"\1":
        return _of(Welcome, body)
    if kind == b"\2" and len(body) > _DONE.size:
        forwards, tokens, seconds = _DONE.unpack_from(body)
        if not 0 <= seconds < 1e9:
            raise WireError(f"Not an answer: a walk of {seconds} seconds.")
        return Done(body[_DONE.size :], forwards, tokens, seconds)
    if kind == b"\3" and len(body) == _HELD.size:
        return Behind(*_HELD.unpack(body))
    if kind == b"\7" and body and len(body) % 4 == 0:
        return Share(body)
    if kind == b"\5":
        return Refused(_sentence(body))
    if data in (b"\4", b"\6"):
        return Stranger() if data == b"\4" else Noted()
    raise WireError(f"Not an answer: {len(data)} bytes of kind {data[:1].hex() or 'none'}.")


def _json(told: Hello | Welcome) -> bytes:
    return json.dumps(asdict(told), separators=(",", ":")).encode()


def _of(kind: type[T], body: bytes) -> T:
    """Returns the dataclass that JSON stands for; every field has to be there, with a value of its type."""
    name = kind.__name__.lower()
    if len(body) > MAX_JSON:
        raise WireError(f"Not a {name}: {len(body)} bytes, at most {MAX_JSON} may be.")
    try:
        told: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"Not a {name}: no JSON ({error}).") from None
    wanted: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    if not isinstance(told, dict) or told.keys() != wanted.keys():
        raise WireError(f"Not a {name}: expected the fields {', '.join(wanted)}; have both sides run one fedmezo.")
    for field, type_ in wanted.items():
        value = told[field]
        if type(value) is not type_ or not _good(value):
            raise WireError(f"Not a {name}: {field} is {str(value)[:40]!r}.")
    return kind(**told)


def _good(value: str | int | bool) -> bool:  # noqa: FBT001
    """Whether a number fits 32 bits, and text can be written: JSON can name halves of letters."""
    if not isinstance(value, str):
        return 0 <= value < 2**32
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(sentence: str) -> bytes:
    return sentence.encode()[:MAX_SENTENCE]


def _sentence(body: bytes) -> str:
    """Returns what the other side wrote on one line, without anything a terminal would take for an order."""
    text = body[:MAX_SENTENCE].decode(errors="replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
