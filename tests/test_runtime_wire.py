"""The wire format: pinned bytes, round trips, and nothing but WireError for anything else."""

import math
import struct
import tracemalloc
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.wire import News, decode_reply, decode_task, encode_reply, encode_task
from fedmezo.zo.seedsum import DenseDelta

U32 = st.integers(0, 2**32 - 1)
FLOAT32 = st.floats(width=32, allow_infinity=False)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
TASK = Task(3, 2, 2**64 - 1, 1e-5, 1e-3, 2, clip=12.5)
REPLY = Reply(3, 2, 8, 1.25, (1.5, math.nan))
DENSE = replace(REPLY, delta=DenseDelta({"b": torch.tensor(-0.0), "a": torch.arange(6.0).reshape(2, 3)}))
NEWS = (News((TASK, replace(TASK, client=5, rate=2e-5)), ((1.0, 2.0), (math.nan, 3.0)), (1 / 3, 2 / 3)),)


@st.composite
def tasks(draw):
    directions = draw(st.integers(1, 4))
    return Task(
        draw(U32),
        draw(U32),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.floats(0, allow_infinity=False)),
        draw(POSITIVE),
        draw(st.integers(1, 5) | st.just(2**24 // directions)),
        directions,
        clip=draw(st.floats(0) | st.just(math.inf)),
        multiple=draw(POSITIVE),
        law=draw(st.sampled_from(["gaussian", "rademacher"])),
        estimator=draw(st.sampled_from(["two-point", "forward", "forward-half"])),
        dense=draw(st.booleans()),
    )


@st.composite
def news(draw):
    shared, count = draw(tasks()), draw(st.integers(1, 4))
    walked = tuple(
        replace(shared, client=draw(U32), rate=draw(POSITIVE), clip=draw(st.floats(0))) for _ in range(count)
    )
    slopes = tuple(tuple(draw(st.lists(FLOAT32, max_size=shared.steps * shared.directions % 6))) for _ in walked)
    return News(walked, slopes, tuple(draw(st.floats(0, 1)) for _ in walked))


@st.composite
def deltas(draw):
    shapes = draw(st.dictionaries(st.text(max_size=5), st.lists(st.integers(0, 3), max_size=3), max_size=3))
    filled = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))
    return DenseDelta({name: torch.randn(shape, generator=draw(filled)) for name, shape in shapes.items()})


REPLIES = st.builds(
    Reply, U32, U32, U32, st.floats(), st.lists(FLOAT32, max_size=9).map(tuple), delta=st.none() | deltas()
)


def plain(reply):
    """A reply as text, nan equal to nan and -0.0 apart from 0.0; its tensors as bytes."""
    tensors = reply.delta and {
        name: (tuple(t.shape), t.numpy().tobytes()) for name, t in sorted(reply.delta.tensors.items())
    }
    return repr((replace(reply, delta=None), tensors))


def sealed(kind, body):
    data = b"FMZO" + bytes([1, kind]) + body
    return data + struct.pack("<I", zlib.crc32(data))


def test_task_bytes_are_pinned():
    assert encode_task(TASK).hex() == (
        "464d5a4f" "01" "01"
        "03000000" "ffffffffffffffff" "fca9f1d24d62503f" "0000000000000840" "02000000" "01000000" "00" "00" "00"
        "02000000" "f168e388b5f8e43e" "0000000000002940" "00000000" "6f1462f8"
    )  # fmt: skip


def test_reply_bytes_are_pinned():
    assert encode_reply(REPLY).hex() == (
        "464d5a4f" "01" "02" "03000000" "02000000" "08000000" "000000000000f43f"
        "02000000" "0000c03f" "0000c07f" "00" "82061ba8"
    )  # fmt: skip


@given(tasks(), st.lists(news(), max_size=3))
def test_decoding_a_task_undoes_encoding(task, told):
    assert repr(decode_task(encode_task(task, told))) == repr((task, tuple(told)))


@given(REPLIES)
def test_decoding_a_reply_undoes_encoding(reply):
    assert plain(decode_reply(encode_reply(reply))) == plain(reply)


@given(REPLIES.map(lambda reply: replace(reply, delta=None)))
def test_a_scalar_reply_fits_its_budget(reply):
    assert len(encode_reply(reply)) <= 64 + 4 * len(reply.slopes)


@given(tasks())
def test_a_task_without_news_fits_its_budget(task):
    assert len(encode_task(task)) <= 96


@given(news())
def test_news_cost_four_bytes_per_slope_and_a_small_header(item):
    cost = len(encode_task(TASK, [item])) - len(encode_task(TASK))
    assert cost == 43 + sum(28 + 4 * len(slopes) for slopes in item.slopes)


@pytest.mark.parametrize(
    ("data", "decode"),
    [(encode_task(TASK, NEWS), decode_task), (encode_reply(REPLY), decode_reply), (encode_reply(DENSE), decode_reply)],
)
def test_every_flipped_bit_is_noticed(data, decode):
    decode(data)
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode(bytes(broken))


@pytest.mark.parametrize(
    ("data", "decode"), [(encode_task(TASK, NEWS), decode_task), (encode_reply(DENSE), decode_reply)]
)
def test_every_truncation_and_every_addition_is_noticed(data, decode):
    for size in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:size])
        with pytest.raises(WireError):
            decode(sealed(data[5], data[6:size]) if size > 6 and size != len(data) - 4 else b"")
    with pytest.raises(WireError, match="left over"):
        decode(sealed(data[5], data[6:-4] + b"\0"))


def check(data):
    """Either decoder raises WireError or returns what encodes and decodes to itself."""
    try:
        task, told = decode_task(data)
        assert repr(decode_task(encode_task(task, told))) == repr((task, told))
    except WireError:
        pass
    try:
        reply = decode_reply(data)
        assert plain(decode_reply(encode_reply(reply))) == plain(reply)
    except WireError:
        pass


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_valid(data):
    check(data)


@settings(max_examples=300)
@given(st.sampled_from([1, 2]), st.binary(max_size=120))
def test_arbitrary_bodies_with_a_right_checksum_are_refused_or_valid(kind, body):
    check(sealed(kind, body))


@settings(max_examples=500)
@given(
    st.sampled_from([encode_task(TASK, NEWS), encode_reply(REPLY), encode_reply(DENSE)]),
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from([0, 1, 2, 9, 127, 128, 240, 255])), max_size=6),
)
def test_edited_messages_with_a_right_checksum_are_refused_or_valid(data, edits):
    body = bytearray(data[6:-4])
    for at, value in edits:
        body[at % len(body)] = value
    check(sealed(data[5], bytes(body)))


@pytest.mark.parametrize("count", [1, 2**24, 2**32 - 1])
def test_a_count_is_checked_before_anything_of_its_size_is_made(count):
    reply = sealed(2, struct.pack("<IIIdI", 0, 0, 0, 0.0, count))
    told = sealed(1, encode_task(TASK)[6:-8] + struct.pack("<I", count))
    empty = struct.pack("<H1sB3Q", 1, b"a", 3, 0, 2**62, count)
    huge = sealed(2, struct.pack("<IIIdIBI", 0, 0, 0, 0.0, 0, 1, 1) + empty)
    tracemalloc.start()
    for data, decode in ((reply, decode_reply), (told, decode_task), (huge, decode_reply)):
        with pytest.raises(WireError):
            decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_impossible_fields_are_refused_with_one_sentence():
    body = bytearray(encode_task(TASK)[6:-4])
    body[12:20] = struct.pack("<d", -1.0)
    with pytest.raises(WireError, match=r"^Not a valid task: Task.mu must be finite and > 0, got -1.0; .* again\.$"):
        decode_task(sealed(1, bytes(body)))


def test_another_version_and_another_kind_are_named():
    data = encode_task(TASK)
    with pytest.raises(WireError, match="wire format 2, expected 1"):
        decode_task(data[:4] + b"\2" + data[5:])
    with pytest.raises(WireError, match="of kind 1, expected 2"):
        decode_reply(data)


def test_tensors_must_have_the_shapes_asked_for():
    data, shapes = encode_reply(DENSE), {"a": (2, 3), "b": ()}
    assert plain(decode_reply(data, shapes=shapes)) == plain(DENSE)
    for wrong in ({"a": (3, 2), "b": ()}, {"a": (2, 3)}, {**shapes, "c": (1,)}):
        with pytest.raises(WireError, match="expected"):
            decode_reply(data, shapes=wrong)


def test_decoded_tensors_are_writable_and_own_their_memory():
    first, second = (decode_reply(encode_reply(DENSE)).delta.tensors["a"] for _ in range(2))
    first.add_(1)
    assert torch.equal(second + 1, first)


@pytest.mark.parametrize("slope", [0.1, 1e39, -1e-50])
def test_slopes_that_are_not_float32_are_not_rounded_in_secret(slope):
    with pytest.raises(WireError, match="float32"):
        encode_reply(replace(REPLY, slopes=(slope,)))


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.bfloat16)])
def test_tensors_that_are_not_float32_are_refused(tensor):
    with pytest.raises(WireError, match="float32"):
        encode_reply(replace(REPLY, delta=DenseDelta({"a": tensor})))


@pytest.mark.parametrize(
    ("walked", "slopes", "weights"),
    [
        ((), (), ()),
        ((TASK,), ((1.0,),), (0.5, 0.5)),
        ((TASK, replace(TASK, round=4)), ((1.0,), (1.0,)), (0.5, 0.5)),
        ((TASK,), ((1.0, 2.0, 3.0),), (1.0,)),
        ((TASK,), ((math.inf,),), (1.0,)),
        ((TASK,), ((1.0,),), (math.nan,)),
        ((TASK,), ((1.0,),), (1e39,)),
    ],
)
def test_news_that_contradict_themselves_are_refused(walked, slopes, weights):
    with pytest.raises(RunError, match="News"):
        News(walked, slopes, weights)
