"""The wire format: pinned bytes, exact sizes, round trips, and nothing but WireError for anything else."""

import math
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.wire import News, Sums, decode_reply, decode_task, encode_reply, encode_task
from fedmezo.zo.coding import CODINGS, SUMS_CODINGS, coded
from fedmezo.zo.seedsum import DenseDelta

U32 = st.integers(0, 2**32 - 1)
FLOAT32 = st.floats(width=32, allow_infinity=False)
FINITE32 = st.floats(width=32, allow_infinity=False, allow_nan=False)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
K = 4096
TASK = Task(3, 2, 2**64 - 1, 1e-5, 1e-3, 2, clip=12.5)
REPLY = Reply(3, 2, 8, 1.25, (1.5, math.nan))
TENSORS = DenseDelta({"b": torch.tensor(-0.0), "a": torch.arange(6.0).reshape(2, 3)})
DENSE = replace(REPLY, delta=TENSORS)
NEWS = (News((TASK, replace(TASK, client=5, rate=2e-5)), ((1.0, 2.0), (math.nan, 3.0)), (1 / 3, 2 / 3)),)
# Every field has its own value, so that no two can be mixed up.
POOLED = Task(
    3, 2, 7, 1e-5, 1e-3, 2, 4, clip=12.5, multiple=2.5, law="rademacher", estimator="forward", dense=True, pool=3,
    odds=(1, 258, 65535), importance=True, coding="sign", normalise=True, momentum=0.5,
)  # fmt: skip
POOLED_NEWS = (News((POOLED, replace(POOLED, client=5)), ((1.0, -1.0), (0.0, math.nan, 1.0)), (0.25, 0.75)),)
SIGNS = replace(REPLY, coding="sign", slopes=(1.0, -1.0, math.nan, 0.0, 1.0, 1.0, -1.0, -1.0, 1.0))
SUMS = Sums(7, 3, "float16", (1.5, 0.0, -0.25))
MESSAGES = [
    (encode_task(TASK, NEWS), decode_task),
    (encode_task(POOLED, POOLED_NEWS), decode_task),
    (encode_task(POOLED, SUMS), decode_task),
    (encode_task(POOLED, Sums(7, 3, "float32", (0.0, 0.0, 1.5))), decode_task),
    (encode_task(TASK, TENSORS), decode_task),
    (encode_reply(REPLY), decode_reply),
    (encode_reply(SIGNS), decode_reply),
    (encode_reply(replace(REPLY, coding="float8")), decode_reply),
    (encode_reply(DENSE), decode_reply),
]


@st.composite
def tasks(draw, methods=("walk", "sgd", "adamw")):
    directions = draw(st.integers(1, 4))
    pool = draw(st.integers(0, 5))
    method = draw(st.sampled_from(methods))
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
        pool=pool,
        odds=draw(st.just(()) | st.tuples(*[st.integers(1, 65535)] * pool)),
        importance=draw(st.booleans()),
        coding=draw(st.sampled_from(CODINGS)),
        normalise=draw(st.booleans()) and directions > 1,
        momentum=draw(st.floats(0, 1, exclude_max=True)),
        method=method,
        weight_decay=0.0 if method == "walk" else draw(st.floats(0, allow_infinity=False)),
    )


def slopes_in(coding, size):
    return st.lists(FLOAT32.map(lambda slope: coded(slope, coding)), max_size=size).map(tuple)


@st.composite
def news(draw):
    shared, count = draw(tasks(methods=("walk",))), draw(st.integers(1, 4))
    walked = tuple(
        replace(shared, client=draw(U32), rate=draw(POSITIVE), clip=draw(st.floats(0))) for _ in range(count)
    )
    slopes = tuple(draw(slopes_in(shared.coding, shared.steps * shared.directions % 20)) for _ in walked)
    return News(walked, slopes, tuple(draw(st.floats(0, 1)) for _ in walked))


@st.composite
def sums(draw):
    coding = draw(st.sampled_from(SUMS_CODINGS))
    # bfloat16 and float16 round the largest float32 values up to 2**128, which no sum may be.
    value = FINITE32.filter(lambda x: abs(x) < 3.3e38) | st.just(0.0)
    values = tuple(draw(st.lists(value, min_size=1, max_size=40)))
    return Sums(draw(st.integers(0, 2**64 - 1)), len(values), coding, values)


@st.composite
def deltas(draw):
    shapes = draw(st.dictionaries(st.text(max_size=5), st.lists(st.integers(0, 3), max_size=3), max_size=3))
    filled = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))
    return DenseDelta({name: torch.randn(shape, generator=draw(filled)) for name, shape in shapes.items()})


@st.composite
def replies(draw):
    coding = draw(st.sampled_from(CODINGS))
    numbers = (draw(U32), draw(U32), draw(U32), draw(st.floats()))
    return Reply(*numbers, draw(slopes_in(coding, 20)), delta=draw(st.none() | deltas()), coding=coding)


def normal(count, coding="float32"):
    """Slopes as a client would send."""
    values = np.random.default_rng(1).standard_normal(count).astype(np.float32)
    return tuple(coded(float(value), coding) for value in values)


def plain(message):
    """A message as text, nan equal to nan and -0.0 apart from 0.0; its tensors as bytes."""
    if isinstance(message, Reply):
        return repr((replace(message, delta=None), message.delta and plain(message.delta)))
    if isinstance(message, DenseDelta):
        return repr({name: (tuple(t.shape), t.numpy().tobytes()) for name, t in sorted(message.tensors.items())})
    return repr((message[0], plain(message[1]))) if isinstance(message[-1], DenseDelta) else repr(message)


def sealed(kind, body):
    data = b"FMZO" + bytes([2, kind]) + body
    return data + struct.pack("<I", zlib.crc32(data))


def pinned(data, parts):
    """The bytes are these parts and a right checksum."""
    text = "".join(parts)
    assert data.hex() == text + struct.pack("<I", zlib.crc32(bytes.fromhex(text))).hex()


SETTINGS = [
    "03000000", "ffffffffffffffff",  # round, seed
    "fca9f1d24d62503f", "0000000000000840", "0000000000000000", "0000000000000000",  # mu, multiple, momentum, decay
    "02000000", "01000000", "00000000",  # steps, directions, pool
    "00", "00", "00", "00", "00",  # law, estimator, coding, method, flags
]  # fmt: skip
WALKER = ["02000000", "f168e388b5f8e43e", "0000000000002940"]
POOLED_SETTINGS = [
    "03000000", "0700000000000000",
    "fca9f1d24d62503f", "0000000000000440", "000000000000e03f", "0000000000000000",
    "02000000", "04000000", "03000000",
    "01", "01", "04", "00", "0f",
    "0100", "0201", "ffff",
]  # fmt: skip


def test_task_bytes_are_pinned():
    pinned(encode_task(TASK), ["464d5a4f", "02", "01", *SETTINGS, *WALKER, "00", "00000000"])
    assert encode_task(TASK).hex().endswith("cda7a692")


def test_task_bytes_of_a_pool_are_pinned():
    pinned(encode_task(POOLED), ["464d5a4f", "02", "01", *POOLED_SETTINGS, *WALKER, "00", "00000000"])


def test_task_bytes_of_backpropagation_are_pinned():
    task = replace(TASK, method="adamw", weight_decay=0.5)
    changed = [*SETTINGS[:5], "000000000000e03f", *SETTINGS[6:12], "02", "00"]
    pinned(encode_task(task), ["464d5a4f", "02", "01", *changed, *WALKER, "00", "00000000"])


def test_news_bytes_are_pinned():
    pinned(
        encode_task(TASK, POOLED_NEWS),
        [
            "464d5a4f", "02", "01", *SETTINGS, *WALKER, "00", "01000000",
            *POOLED_SETTINGS, "02000000",
            *WALKER, "0000803e", "02000000", "01", "00000000",
            "05000000", *WALKER[1:], "0000403f", "03000000", "04", "02000000", "00000000", "03000000",
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("coding", "values", "parts"),
    [
        ("float32", (1.5, 1.0, -0.25), ["00", "00", "0000c03f", "0000803f", "000080be"]),
        ("float32", (0.0, 0.0, 1.5), ["00", "01", "04", "0000c03f"]),
        ("float16", (1.5, 0.0, -0.25), ["01", "0100", "01", "05", "003a", "00b0"]),
        ("float16", (1.5, 1.0, -0.25), ["01", "0100", "00", "003a", "0038", "00b0"]),
        ("bfloat16", (2.0**-20, 0.0, 0.0), ["02", "edff", "01", "01", "003f"]),
        ("bfloat16", (0.0, 0.0, 0.0), ["02", "0000", "01", "00"]),
    ],
)
def test_sums_bytes_are_pinned(coding, values, parts):
    task = replace(TASK, pool=3)
    head = ["464d5a4f", "02", "01", *SETTINGS[:8], "03000000", *SETTINGS[9:], *WALKER, "01"]
    pinned(encode_task(task, Sums(task.seed, 3, coding, values)), head + parts)


def test_model_bytes_are_pinned():
    tensors = ["02000000", "0100", "61", "02", "0200000000000000", "0300000000000000"]
    tensors += ["00000000", "0000803f", "00000040", "00004040", "00008040", "0000a040"]
    tensors += ["0100", "62", "00", "00000080"]
    pinned(encode_task(TASK, TENSORS), ["464d5a4f", "02", "01", *SETTINGS, *WALKER, "02", *tensors])
    head = ["464d5a4f", "02", "02", "03000000", "02000000", "08000000", "000000000000f43f", "00"]
    pinned(encode_reply(DENSE), [*head, "02000000", "0000c03f", "0000c07f", "01", *tensors])


@pytest.mark.parametrize(
    ("coding", "slopes", "parts"),
    [
        ("float32", (1.5, -math.nan), ["00", "02000000", "0000c03f", "0000c07f"]),
        ("float16", (1.5, -math.nan), ["01", "02000000", "003e", "007e"]),
        ("bfloat16", (1.5, -math.nan), ["02", "02000000", "c03f", "c07f"]),
        ("float8", (1.5, -math.nan, -0.0), ["03", "03000000", "3e", "7e", "80"]),
        ("sign", (1.0, -1.0, 1.0), ["04", "03000000", "05", "00000000"]),
        ("sign", SIGNS.slopes, ["04", "09000000", "3101", "02000000", "05000000", "06000000"]),
        ("sign", (), ["04", "00000000", "00000000"]),
    ],
)
def test_reply_bytes_are_pinned(coding, slopes, parts):
    head = ["464d5a4f", "02", "02", "03000000", "02000000", "08000000", "000000000000f43f"]
    pinned(encode_reply(replace(REPLY, coding=coding, slopes=slopes)), [*head, *parts, "00"])


@given(tasks(), st.lists(news(), max_size=3))
def test_decoding_a_task_undoes_encoding(task, told):
    assert repr(decode_task(encode_task(task, told))) == repr((task, tuple(told)))


@given(tasks(), sums())
def test_decoding_sums_undoes_encoding(task, told):
    task = replace(task, seed=told.seed, pool=told.pool, odds=())
    assert repr(decode_task(encode_task(task, told))) == repr((task, told))


@given(tasks(), deltas())
def test_decoding_a_model_undoes_encoding(task, told):
    assert plain(decode_task(encode_task(task, told))) == plain((task, told))


@given(replies())
def test_decoding_a_reply_undoes_encoding(reply):
    assert plain(decode_reply(encode_reply(reply))) == plain(reply)


@given(sums())
def test_rounding_sums_is_idempotent(told):
    assert Sums(told.seed, told.pool, told.coding, told.values) == told


@pytest.mark.parametrize("coding", SUMS_CODINGS[1:])
def test_a_largest_sum_that_rounds_up_keeps_the_smallest_stable(coding):
    told = Sums(0, 3, coding, (1 - 2.0**-13, 2.0**-24, -(2.0**-23)))
    assert told.values[0] == 1
    assert Sums(0, 3, coding, told.values) == told
    assert decode_task(encode_task(Task(0, 0, 0, 0.1, 0.1, 1, pool=3), told))[1] == told


@pytest.mark.parametrize(("coding", "unit"), [("float32", 2**-23), ("float16", 2**-10), ("bfloat16", 2**-7)])
def test_sums_are_rounded_to_half_a_unit(coding, unit):
    values = normal(K)
    told = Sums(0, K, coding, values).values
    wrong = np.abs(np.subtract(told, values))
    largest = max(map(abs, values))
    assert (wrong <= unit / 2 * np.maximum(np.abs(values), largest * 2**-14)).all()
    assert (wrong.max() > unit / 16 * largest) == (coding != "float32")


@pytest.mark.parametrize("scale", [2.0**-140, 1e-20, 1.0, 1e30])
def test_sixteen_bit_sums_have_no_scale_of_their_own(scale):
    scale = 2.0 ** round(math.log2(scale))
    told = Sums(0, 3, "float16", (1.5 * scale, -1024 * scale, 0.0))
    assert told.values == (1.5 * scale, -1024 * scale, 0.0)
    task = Task(0, 0, 0, 0.1, 0.1, 1, pool=3)
    assert decode_task(encode_task(task, told))[1] == told


@given(replies().map(lambda reply: replace(reply, delta=None)))
def test_a_scalar_reply_fits_its_budget(reply):
    assert len(encode_reply(reply)) <= 64 + 4 * len(reply.slopes)


@given(tasks())
def test_a_task_without_news_takes_96_bytes_and_its_odds(task):
    assert len(encode_task(task)) == 96 + 2 * len(task.odds)


BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "sign": 1}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("count", [0, 1, 8, 9, 200])
def test_slopes_cost_the_bits_of_their_coding(coding, count):
    size = len(encode_reply(replace(REPLY, coding=coding, slopes=normal(count, coding))))
    assert size == 36 + (BITS[coding] * count + 7) // 8 + 4 * (coding == "sign")


def test_a_sign_that_is_none_costs_four_bytes():
    signs = normal(200, "sign")
    sizes = [
        len(encode_reply(replace(REPLY, coding="sign", slopes=(*odd, *signs[len(odd) :]))))
        for odd in ((), (0.0,), (math.nan, 0.0))
    ]
    assert sizes == [65, 69, 73]


@given(news())
def test_news_cost_their_slopes_and_a_small_header(item):
    cost = len(encode_task(TASK, [item])) - len(encode_task(TASK))
    shared = item.tasks[0]
    slopes = [sum((BITS[shared.coding] * len(some) + 7) // 8 for some in item.slopes)]
    if shared.coding == "sign":
        slopes += [4 + 4 * sum(abs(slope) != 1 for slope in some) for some in item.slopes]
    assert cost == 65 + 2 * len(shared.odds) + 28 * len(item.tasks) + sum(slopes)


def test_news_carry_the_odds_of_a_round_once():
    walked = [replace(TASK, client=client, pool=K, odds=(7,) * K) for client in range(10)]
    item = News(tuple(walked), ((1.0,),) * 10, (0.1,) * 10)
    assert len(encode_task(TASK, [item])) == 96 + 65 + 2 * K + 10 * (28 + 4)


def exchange(*, pool_coding, coding):
    """The bytes of one client in one round of FedKSeed: K sums down, 200 slopes up."""
    task = Task(59, 9, 2**63, 1e-5, 1e-3, 200, clip=3.0, pool=K, coding=coding)
    down = encode_task(task, Sums(task.seed, K, pool_coding, normal(K)))
    up = encode_reply(Reply(59, 9, 200, 1.25, normal(200, coding), coding=coding))
    return len(down), len(up)


def test_a_round_of_fedkseed_takes_fewer_bytes_than_the_paper_says():
    down, up = exchange(pool_coding="float32", coding="float32")
    assert (down, up) == (92 + 2 + 4 * K, 36 + 4 * 200)
    assert down + up == 17_314 <= 17_984 + 64


def test_sixteen_bits_halve_the_round():
    for coding in ("float16", "bfloat16"):
        down, up = exchange(pool_coding=coding, coding=coding)
        assert (down, up) == (92 + 4 + 2 * K, 36 + 2 * 200)
        assert down + up == 8_724 < 9_000


def test_a_round_of_signs_takes_twenty_nine_bytes_up():
    assert exchange(pool_coding="float16", coding="sign") == (92 + 4 + 2 * K, 36 + 25 + 4)


@pytest.mark.parametrize(("coding", "size", "head"), [("float32", 4, 2), ("float16", 2, 4), ("bfloat16", 2, 4)])
def test_sums_are_sparse_when_that_is_smaller(coding, size, head):
    task = replace(TASK, pool=K)
    for count in (0, 1, 200, K - K // 8 // size - 1, K - K // 8 // size, K):
        told = Sums(task.seed, K, coding, (1.5,) * count + (0.0,) * (K - count))
        cost = len(encode_task(task, told)) - 92 - head
        assert cost == min(size * K, K // 8 + size * count)
        assert decode_task(encode_task(task, told)) == (task, told)


def test_odds_and_sums_of_a_pool_are_decoded_at_once():
    task = replace(TASK, pool=K, odds=tuple(range(1, K + 1)))
    walked = tuple(replace(task, client=client) for client in range(10))
    data = encode_task(task, [News(walked, ((1.0, 2.0),) * 10, (0.1,) * 10)] * 10)
    began = time.perf_counter()
    assert decode_task(data)[1][9].tasks[9].odds == task.odds
    assert time.perf_counter() - began < 0.1
    plenty = encode_task(task, Sums(task.seed, K, "float16", normal(K)))
    began = time.perf_counter()
    decode_task(plenty)
    assert time.perf_counter() - began < 0.1


def test_the_walks_of_news_share_their_odds():
    task = replace(TASK, pool=K, odds=(7,) * K)
    item = News((task, replace(task, client=5)), ((1.0,),) * 2, (0.5, 0.5))
    first, second = decode_task(encode_task(TASK, [item]))[1][0].tasks
    assert first.odds is second.odds


@pytest.mark.parametrize(("data", "decode"), MESSAGES)
def test_every_flipped_bit_is_noticed(data, decode):
    decode(data)
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode(bytes(broken))


@pytest.mark.parametrize(("data", "decode"), MESSAGES)
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
    for decode, again in ((decode_task, lambda got: encode_task(*got)), (decode_reply, encode_reply)):
        try:
            got = decode(data)
        except WireError:
            continue
        assert plain(decode(again(got))) == plain(got)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_valid(data):
    check(data)


@settings(max_examples=300)
@given(st.sampled_from([1, 2]), st.binary(max_size=160))
def test_arbitrary_bodies_with_a_right_checksum_are_refused_or_valid(kind, body):
    check(sealed(kind, body))


HEADS = {
    "tensors": (1, encode_task(TASK)[6:-9] + b"\2"),
    "sums": (1, encode_task(replace(TASK, pool=3))[6:-9] + b"\1"),
    "signs": (2, encode_reply(replace(REPLY, coding="sign", slopes=()))[6:-13]),
    "bytes": (2, encode_reply(replace(REPLY, coding="float8", slopes=()))[6:-9]),
}


@settings(max_examples=500)
@given(st.sampled_from(sorted(HEADS)), st.lists(st.integers(0, 9) | st.integers(0, 255), max_size=40))
def test_arbitrary_content_with_a_right_head_and_checksum_is_refused_or_valid(head, rest):
    kind, begin = HEADS[head]
    check(sealed(kind, begin + bytes(rest)))


@settings(max_examples=1000)
@given(
    st.sampled_from([data for data, _ in MESSAGES]),
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from([0, 1, 2, 9, 127, 128, 240, 255])), max_size=6),
)
def test_edited_messages_with_a_right_checksum_are_refused_or_valid(data, edits):
    body = bytearray(data[6:-4])
    for at, value in edits:
        body[at % len(body)] = value
    check(sealed(data[5], bytes(body)))


def claims(count):
    """Messages that say they hold `count` of something and do not."""
    number = struct.pack("<I", count)
    bare = encode_task(TASK)[6:-4]
    with_odds = bytearray(bare)
    with_odds[52:56], with_odds[60] = number, 8
    with_sums = bytearray(encode_task(replace(TASK, pool=3), Sums(TASK.seed, 3, "float32", (0.0, 0.0, 1.0)))[6:-4])
    with_sums[52:56] = number
    for coding in range(5):
        yield decode_reply, sealed(2, struct.pack("<IIIdB", 0, 0, 0, 0.0, coding) + number)
    yield decode_reply, sealed(2, struct.pack("<IIIdB", 0, 0, 0, 0.0, 4) + struct.pack("<IB", 8, 0) + number)
    yield decode_reply, sealed(2, struct.pack("<IIIdBIBI", 0, 0, 0, 0.0, 0, 0, 1, count))
    yield decode_task, sealed(1, bare[:-4] + number)
    yield decode_task, sealed(1, bare[:-4] + struct.pack("<I", 1) + bare[:61] + number)
    yield decode_task, sealed(1, bare[:-5] + b"\2" + number)
    yield decode_task, sealed(1, bytes(with_odds))
    yield decode_task, sealed(1, bytes(with_sums))
    empty = struct.pack("<H1sB3Q", 1, b"a", 3, 0, 2**62, count)
    yield decode_reply, sealed(2, struct.pack("<IIIdBIBI", 0, 0, 0, 0.0, 0, 0, 1, 1) + empty)


@pytest.mark.parametrize("count", [2**16, 2**20, 2**24, 2**32 - 1])
def test_a_count_is_checked_before_anything_of_its_size_is_made(count):
    for decode, data in claims(count):
        tracemalloc.start()
        with pytest.raises(WireError):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50_000


@pytest.mark.parametrize(("coding", "code"), [(0, "010080ff"), (1, "01fc"), (2, "81ff"), (3, "fd")])
def test_every_nan_is_a_skipped_slope_and_leaves_as_the_one_that_senders_write(coding, code):
    body = struct.pack("<IIIdBI", 0, 0, 0, 0.0, coding, 1) + bytes.fromhex(code) + b"\0"
    reply = decode_reply(sealed(2, body))
    assert reply.skipped == 1
    assert encode_reply(reply) == encode_reply(replace(reply, slopes=(math.nan,))) != sealed(2, body)


@pytest.mark.parametrize(("coding", "code"), [("float32", "010080ff"), ("float16", "01fc"), ("bfloat16", "81ff")])
def test_sums_of_any_nan_are_refused(coding, code):
    task = replace(TASK, pool=1)
    data = encode_task(task, Sums(task.seed, 1, coding, (0.75,)))
    with pytest.raises(WireError, match="finite"):
        decode_task(sealed(1, data[6 : -4 - len(code) // 2] + bytes.fromhex(code)))


def test_a_count_beyond_the_bytes_there_is_named():
    data = sealed(2, struct.pack("<IIIdBI", 0, 0, 0, 0.0, 0, 2) + bytes(7))
    with pytest.raises(WireError, match="slopes for the bytes there: at most 1, got 2"):
        decode_reply(data)


@pytest.mark.parametrize(("coding", "size"), [(3, 2**24 + 1), (4, 2**21 + 1)])
def test_more_slopes_than_a_task_can_ask_for_are_refused_before_they_are_read(coding, size):
    data = sealed(2, struct.pack("<IIIdBI", 0, 0, 0, 0.0, coding, 2**24 + 1) + bytes(size + 5))
    tracemalloc.start()
    with pytest.raises(WireError, match="slopes: at most 16777216"):
        decode_reply(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000


def test_a_pool_is_limited():
    within, beyond = replace(TASK, pool=2**20), replace(TASK, pool=2**20 + 1)
    assert decode_task(encode_task(within))[0] == within
    body = bytearray(encode_task(within)[6:-4])
    body[52:56] = struct.pack("<I", 2**20 + 1)
    for refused in (lambda: encode_task(beyond), lambda: decode_task(sealed(1, bytes(body)))):
        with pytest.raises(WireError, match="seeds in a pool: at most 1048576, got 1048577"):
            refused()


def test_impossible_fields_are_refused_with_one_sentence():
    body = bytearray(encode_task(TASK)[6:-4])
    body[12:20] = struct.pack("<d", -1.0)
    with pytest.raises(WireError, match=r"^Not a valid task: Task.mu must be finite and > 0, got -1.0; .* again\.$"):
        decode_task(sealed(1, bytes(body)))


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [(56, 2, "law"), (57, 3, "estimator"), (58, 5, "coding"), (59, 3, "method"), (60, 16, "flags")],
)
def test_unknown_names_are_refused(at, value, what):
    body = bytearray(encode_task(TASK)[6:-4])
    body[at] = value
    with pytest.raises(WireError, match=f"unknown {what} {value}"):
        decode_task(sealed(1, bytes(body)))


def test_another_version_and_another_kind_are_named():
    data = encode_task(TASK)
    with pytest.raises(WireError, match="wire format 3, expected 2"):
        decode_task(data[:4] + b"\3" + data[5:])
    with pytest.raises(WireError, match="of kind 1, expected 2"):
        decode_reply(data)


def test_version_1_is_refused():
    task = (
        "464d5a4f" "01" "01"
        "03000000" "ffffffffffffffff" "fca9f1d24d62503f" "0000000000000840" "02000000" "01000000" "00" "00" "00"
        "02000000" "f168e388b5f8e43e" "0000000000002940" "00000000" "6f1462f8"
    )  # fmt: skip
    reply = "464d5a4f0102030000000200000008000000000000000000f43f020000000000c03f0000c07f0082061ba8"
    for decode, old in ((decode_task, task), (decode_reply, reply)):
        with pytest.raises(WireError, match="wire format 1, expected 2: both sides need the same fedmezo"):
            decode(bytes.fromhex(old))


@pytest.mark.parametrize(
    ("marks", "good"),
    [((0, 3), True), ((3, 0), False), ((0, 0), False), ((0, 1), False), ((4,), True), ((6,), False)],
)
def test_exceptions_among_signs_are_in_order_and_range(marks, good):
    body = struct.pack(f"<IIIdBIBI{len(marks)}IB", 0, 0, 0, 0.0, 4, 3, 7, len(marks), *marks, 0)
    if good:
        assert decode_reply(sealed(2, body)).skipped == sum(mark % 2 for mark in marks)
    else:
        with pytest.raises(WireError, match="out of order or range"):
            decode_reply(sealed(2, body))


@pytest.mark.parametrize(
    ("exponent", "largest", "sentence"),
    [
        *((exponent, 0.75, "exponent of its sums") for exponent in (-30000, -149, 129, 30000)),
        *((1, largest, "relative to 2") for largest in (1.0, 1.5, 1024.0, 0.25, 2.0**-20)),
        (0, 0.75, None),
        (-148, 0.5, None),
        (128, 0.75, None),
        (128, 2.0, "finite"),
        (1, math.nan, "finite"),
        (1, math.inf, "finite"),
    ],
)
def test_an_exponent_that_no_sender_writes_is_refused(exponent, largest, sentence):
    body = bytearray(encode_task(POOLED, Sums(7, 3, "float16", (1.5, 0.0, 0.0)))[6:-4])
    assert body[-6:] == struct.pack("<hBBe", 1, 1, 1, 0.75)
    body[-6:] = struct.pack("<hBBe", exponent, 1, 1, largest)
    if sentence is None:
        assert decode_task(sealed(1, bytes(body)))[1].values == (math.ldexp(largest, exponent), 0.0, 0.0)
    else:
        with pytest.raises(WireError, match=sentence):
            decode_task(sealed(1, bytes(body)))


def test_sums_that_no_sender_rounded_are_refused():
    body = encode_task(POOLED, Sums(7, 3, "float16", (1.5, 1.0, 0.0)))[6:-4]
    assert body[-8:] == struct.pack("<hBBee", 1, 1, 3, 0.75, 0.5)
    # 2**-160 is nothing in float32, which sums are.
    with pytest.raises(WireError, match="not what float16 writes relative to"):
        decode_task(sealed(1, body[:-8] + struct.pack("<hBBee", -140, 1, 3, 0.75, 2.0**-20)))


@pytest.mark.parametrize("other", [replace(POOLED, seed=8), replace(POOLED, pool=4, odds=())])
def test_sums_of_another_pool_are_refused(other):
    with pytest.raises(WireError, match="task's own pool"):
        encode_task(other, SUMS)


@pytest.mark.parametrize(
    ("pool", "coding", "values"),
    [
        (0, "float32", ()),
        (2, "float32", (1.0,)),
        (1, "float32", (1.0, 2.0)),
        (2**20 + 1, "float32", ()),
        (1, "float32", (math.nan,)),
        (1, "float16", (-math.inf,)),
        (1, "float32", (1e39,)),
        (1, "float16", (3.4028234e38,)),
        (1, "bfloat16", (3.4028234e38,)),
        (1, "float8", (1.0,)),
    ],
)
def test_sums_that_contradict_themselves_are_refused(pool, coding, values):
    with pytest.raises(RunError, match="Sums"):
        Sums(7, pool, coding, values)


def test_tensors_must_have_the_shapes_asked_for():
    data, shapes = encode_reply(DENSE), {"a": (2, 3), "b": ()}
    assert plain(decode_reply(data, shapes=shapes)) == plain(DENSE)
    for wrong in ({"a": (3, 2), "b": ()}, {"a": (2, 3)}, {**shapes, "c": (1,)}):
        with pytest.raises(WireError, match="expected"):
            decode_reply(data, shapes=wrong)


def test_a_name_that_is_not_text_is_refused():
    data = encode_reply(DENSE)
    assert data.count(b"\1\0a\2") == 1
    with pytest.raises(WireError, match="utf-8"):
        decode_reply(sealed(2, data[6:-4].replace(b"\1\0a\2", b"\1\0\xff\2")))


def test_decoded_tensors_are_writable_and_own_their_memory():
    first, second = (decode_reply(encode_reply(DENSE)).delta.tensors["a"] for _ in range(2))
    first.add_(1)
    assert torch.equal(second + 1, first)


def test_a_model_must_have_the_shapes_asked_for():
    data, shapes = encode_task(TASK, TENSORS), {"a": (2, 3), "b": ()}
    assert plain(decode_task(data, shapes=shapes)) == plain((TASK, TENSORS))
    with pytest.raises(WireError, match="expected"):
        decode_task(data, shapes={"a": (2, 3)})


@pytest.mark.parametrize(
    ("coding", "slopes"),
    [
        ("float32", (0.1, 1e39, -1e-50)),
        ("float16", (1 + 2**-11, 65536.0, -(2.0**-25))),
        ("bfloat16", (1 + 2**-8, 3.4e38, 1e39)),
        ("float8", (1.125, 65536.0, 2.0**-17)),
        ("sign", (2.0, -0.5, 1e-30)),
    ],
)
def test_slopes_that_a_coding_cannot_write_are_not_rounded_in_secret(coding, slopes):
    for slope in slopes:
        with pytest.raises(WireError, match=f"in {coding}|{coding} values"):
            encode_reply(replace(REPLY, coding=coding, slopes=(1.0, slope)))
        walked = replace(TASK, coding=coding)
        with pytest.raises(WireError, match=f"in {coding}|{coding} values"):
            encode_task(TASK, [News((walked,), ((1.0, slope),), (1.0,))])


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
        ((TASK, replace(TASK, coding="sign")), ((1.0,), (1.0,)), (0.5, 0.5)),
        ((TASK, replace(TASK, pool=2)), ((1.0,), (1.0,)), (0.5, 0.5)),
        ((replace(TASK, pool=2), replace(TASK, pool=2, odds=(1, 2))), ((1.0,), (1.0,)), (0.5, 0.5)),
        ((replace(TASK, pool=2, odds=(2, 1)), replace(TASK, pool=2, odds=(1, 2))), ((1.0,), (1.0,)), (0.5, 0.5)),
        ((replace(TASK, method="sgd"),), ((),), (1.0,)),
        ((TASK,), ((1.0, 2.0, 3.0),), (1.0,)),
        ((TASK,), ((math.inf,),), (1.0,)),
        ((TASK,), ((1.0,),), (math.nan,)),
        ((TASK,), ((1.0,),), (1e39,)),
    ],
)
def test_news_that_contradict_themselves_are_refused(walked, slopes, weights):
    with pytest.raises(RunError, match="News"):
        News(walked, slopes, weights)
