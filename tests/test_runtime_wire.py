"""The wire format: pinned bytes, exact sizes, round trips, old messages, nothing but WireError for anything else."""

import math
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.records import entries_of
from fedmezo.runtime.wire import News, Sums, Values, decode_reply, decode_task, encode_reply, encode_task
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
SIGNED_NEWS = (replace(POOLED_NEWS[0], slopes=((1.0, -1.0), (0.0, -1.0, 1.0))),)
SIGNS = replace(REPLY, coding="sign", slopes=(1.0, -1.0, math.nan, 0.0, 1.0, 1.0, -1.0, -1.0, 1.0))
SUMS = Sums(7, 3, "float16", (1.5, 0.0, -0.25))
VALUES = Values(
    {
        "a": torch.tensor([1.0, -0.0, math.nan]),
        "b": torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
        "c": torch.tensor(0.25, dtype=torch.float16),
    }
)
# As version 2 wrote them.
OLD = {
    "news": (
        "464d5a4f020103000000fffffffffffffffffca9f1d24d62503f00000000000008400000000000000000000000000000"
        "0000020000000100000000000000000000000002000000f168e388b5f8e43e0000000000002940000100000003000000"
        "fffffffffffffffffca9f1d24d62503f0000000000000840000000000000000000000000000000000200000001000000"
        "0000000000000000000200000002000000f168e388b5f8e43e0000000000002940abaaaa3e020000000000803f000000"
        "4005000000f168e388b5f8f43e0000000000002940abaa2a3f020000000000c07f000040407a359da5"
    ),
    "pooled_news": (
        "464d5a4f0201030000000700000000000000fca9f1d24d62503f0000000000000440000000000000e03f000000000000"
        "0000020000000400000003000000010104000f01000201ffff02000000f168e388b5f8e43e0000000000002940000100"
        "0000030000000700000000000000fca9f1d24d62503f0000000000000440000000000000e03f00000000000000000200"
        "00000400000003000000010104000f01000201ffff0200000002000000f168e388b5f8e43e0000000000002940000080"
        "3e02000000010000000005000000f168e388b5f8e43e00000000000029400000403f0300000004020000000000000003"
        "000000fdf651ec"
    ),
    "sums": (
        "464d5a4f0201030000000700000000000000fca9f1d24d62503f0000000000000440000000000000e03f000000000000"
        "0000020000000400000003000000010104000f01000201ffff02000000f168e388b5f8e43e0000000000002940010101"
        "000105003a00b07989455a"
    ),
    "tensors": (
        "464d5a4f020103000000fffffffffffffffffca9f1d24d62503f00000000000008400000000000000000000000000000"
        "0000020000000100000000000000000000000002000000f168e388b5f8e43e0000000000002940020200000001006102"
        "02000000000000000300000000000000000000000000803f0000004000004040000080400000a0400100620000000080"
        "f45d4075"
    ),
    "reply": "464d5a4f0202030000000200000008000000000000000000f43f00020000000000c03f0000c07f00f2969a39",
    "signs": ("464d5a4f0202030000000200000008000000000000000000f43f0409000000310102000000050000000600000000fd67b651"),
    "dense": (
        "464d5a4f0202030000000200000008000000000000000000f43f00020000000000c03f0000c07f010200000001006102"
        "02000000000000000300000000000000000000000000803f0000004000004040000080400000a0400100620000000080"
        "9abed80d"
    ),
}
OLD_MESSAGES = [
    (bytes.fromhex(OLD["news"]), decode_task, (TASK, NEWS)),
    (bytes.fromhex(OLD["pooled_news"]), decode_task, (POOLED, POOLED_NEWS)),
    (bytes.fromhex(OLD["sums"]), decode_task, (POOLED, SUMS)),
    (bytes.fromhex(OLD["tensors"]), decode_task, (TASK, TENSORS)),
    (bytes.fromhex(OLD["reply"]), decode_reply, REPLY),
    (bytes.fromhex(OLD["signs"]), decode_reply, SIGNS),
    (bytes.fromhex(OLD["dense"]), decode_reply, DENSE),
]
MESSAGES = [
    (encode_task(TASK, NEWS), decode_task),
    (encode_task(TASK, POOLED_NEWS), decode_task),
    (encode_task(POOLED, POOLED_NEWS), decode_task),
    (encode_task(TASK, VALUES), decode_task),
    (encode_task(POOLED, SUMS), decode_task),
    (encode_task(POOLED, Sums(7, 3, "float32", (0.0, 0.0, 1.5))), decode_task),
    (encode_task(TASK, TENSORS), decode_task),
    (encode_reply(REPLY), decode_reply),
    (encode_reply(SIGNS), decode_reply),
    (encode_reply(replace(REPLY, coding="float8")), decode_reply),
    (encode_reply(DENSE), decode_reply),
    *((data, decode) for data, decode, _ in OLD_MESSAGES),
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
        shared=draw(st.booleans()),
    )


def slopes_in(coding, least, most):
    return st.lists(FLOAT32.map(lambda slope: coded(slope, coding)), min_size=least, max_size=most).map(tuple)


@st.composite
def news(draw, shared=tasks(methods=("walk",))):  # noqa: B008
    shared, count = draw(shared), draw(st.integers(1, 4))

    def column(value):
        return [draw(value)] * count if draw(st.booleans()) else [draw(value) for _ in range(count)]

    clients = [draw(U32 | st.integers(0, 500)) for _ in range(count)]
    clients = sorted(clients) if draw(st.booleans()) else clients
    numbers = zip(clients, column(POSITIVE), column(st.floats(0)), strict=True)
    walked = tuple(replace(shared, client=client, rate=rate, clip=clip) for client, rate, clip in numbers)
    most = min(shared.steps * shared.directions, 20)
    slopes = tuple(draw(slopes_in(shared.coding, size, most)) for size in column(st.integers(0, most)))
    return News(walked, slopes, tuple(column(st.floats(0, 1))))


@st.composite
def told(draw):
    """A task and news for it, most of which are of its run and differ from it in round and odds only."""
    task = draw(tasks(methods=("walk", "walk", "sgd")))
    odds = st.just(()) | st.tuples(*[st.integers(1, 65535)] * task.pool)
    ours = st.builds(lambda number, drawn: replace(task, round=number, odds=drawn), U32, odds)
    items = [
        draw(news(ours) if task.method == "walk" and draw(st.integers(0, 3)) else news())
        for _ in range(draw(st.integers(0, 3)))
    ]
    return task, tuple(items)


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
def values(draw):
    kinds = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
    return Values({name: tensor.to(draw(kinds)) for name, tensor in draw(deltas()).tensors.items()})


@st.composite
def replies(draw):
    coding = draw(st.sampled_from(CODINGS))
    numbers = (draw(U32), draw(U32), draw(U32), draw(st.floats()))
    return Reply(*numbers, draw(slopes_in(coding, 0, 20)), delta=draw(st.none() | deltas()), coding=coding)


def normal(count, coding="float32"):
    """Slopes as a client would send."""
    values = np.random.default_rng(1).standard_normal(count).astype(np.float32)
    return tuple(coded(float(value), coding) for value in values)


def plain(message):
    """A message as text, nan equal to nan and -0.0 apart from 0.0; its tensors as types and bytes."""
    if isinstance(message, Reply):
        return repr((replace(message, delta=None), message.delta and plain(message.delta)))
    if isinstance(message, DenseDelta | Values):
        named = sorted(message.tensors.items())
        return repr((type(message), [(name, t.dtype, tuple(t.shape), bits(t)) for name, t in named]))
    if isinstance(message[-1], DenseDelta | Values):
        return repr((message[0], plain(message[1])))
    return repr(message)


def bits(tensor):
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16).numpy().tobytes()


def sealed(kind, body, version=4):
    data = b"FMZO" + bytes([version, kind]) + body
    return data + struct.pack("<I", zlib.crc32(data))


def as_before(task, told):
    """A task and its news as version 2 wrote them."""
    body = encode_task(task)[6:-8] + struct.pack("<I", len(told))
    for item in told:
        body += encode_task(item.tasks[0])[6:-29] + struct.pack("<I", len(item.tasks))
        for walker, slopes, weight in zip(item.tasks, item.slopes, item.weights, strict=True):
            body += encode_task(walker)[-29:-9] + struct.pack("<f", weight)
            body += encode_reply(Reply(0, 0, 0, 0.0, slopes, coding=walker.coding))[27:-5]
    return sealed(1, body, version=2)


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
    pinned(encode_task(TASK), ["464d5a4f", "04", "01", *SETTINGS, *WALKER, "00", "00000000"])
    assert encode_task(TASK).hex().endswith("da1148b9")


def test_task_bytes_of_a_pool_are_pinned():
    pinned(encode_task(POOLED), ["464d5a4f", "04", "01", *POOLED_SETTINGS, *WALKER, "00", "00000000"])


def test_task_bytes_of_backpropagation_are_pinned():
    task = replace(TASK, method="adamw", weight_decay=0.5)
    changed = [*SETTINGS[:5], "000000000000e03f", *SETTINGS[6:12], "02", "00"]
    pinned(encode_task(task), ["464d5a4f", "04", "01", *changed, *WALKER, "00", "00000000"])


RATE, CLIP = WALKER[1:]
FEW = replace(TASK, round=2, client=300)


@pytest.mark.parametrize(
    ("task", "told", "parts"),
    [
        (
            TASK, NEWS,
            ["54", "03000000", "02000000", "02", "03", RATE, "f168e388b5f8f43e", CLIP, "abaaaa3e", "abaa2a3f",
             "02000000", "0000803f", "00000040", "0000c07f", "00004040"],
        ),
        (
            TASK, POOLED_NEWS,
            ["1d", *POOLED_SETTINGS, "02000000", "02", "03", RATE, CLIP, "0000803e", "0000403f",
             "02000000", "03000000", "11", "02000000", "04000000", "07000000"],
        ),
        (
            POOLED, POOLED_NEWS,
            ["1e", "03000000", "0100", "0201", "ffff", "02000000", "02", "03", RATE, CLIP, "0000803e", "0000403f",
             "02000000", "03000000", "11", "02000000", "04000000", "07000000"],
        ),
        (
            TASK, [News((FEW, replace(FEW, client=428)), ((1.0,), (2.0,)), (0.5, 0.5))],
            ["7c", "02000000", "02000000", "ac02", "8001", RATE, CLIP, "0000003f", "01000000", "0000803f", "00000040"],
        ),
        (
            TASK, [News((FEW, replace(FEW, client=5)), ((1.0,), (2.0,)), (0.5, 0.5))],
            ["78", "02000000", "02000000", "2c010000", "05000000", RATE, CLIP, "0000003f", "01000000", "0000803f",
             "00000040"],
        ),
        (
            TASK, [News((replace(FEW, client=2**32 - 1),), ((1.0,),), (0.5,))],
            ["78", "02000000", "01000000", "ffffffff", RATE, CLIP, "0000003f", "01000000", "0000803f"],
        ),
    ],
)  # fmt: skip
def test_news_bytes_are_pinned(task, told, parts):
    pinned(encode_task(task, told), [encode_task(task)[:-8].hex(), "01000000", *parts])


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
    head = ["464d5a4f", "04", "01", *SETTINGS[:8], "03000000", *SETTINGS[9:], *WALKER, "01"]
    pinned(encode_task(task, Sums(task.seed, 3, coding, values)), head + parts)


def test_model_bytes_are_pinned():
    tensors = ["02000000", "0100", "61", "02", "0200000000000000", "0300000000000000"]
    tensors += ["00000000", "0000803f", "00000040", "00004040", "00008040", "0000a040"]
    tensors += ["0100", "62", "00", "00000080"]
    pinned(encode_task(TASK, TENSORS), ["464d5a4f", "04", "01", *SETTINGS, *WALKER, "02", *tensors])
    head = ["464d5a4f", "04", "02", "03000000", "02000000", "08000000", "000000000000f43f", "00"]
    pinned(encode_reply(DENSE), [*head, "02000000", "0000c03f", "0000c07f", "01", *tensors])


def test_the_bytes_of_values_are_pinned():
    tensors = ["03000000", "0100", "61", "01", "0300000000000000", "00", "0000803f", "00000080", "0000c07f"]
    tensors += ["0100", "62", "02", "0200000000000000", "0100000000000000", "02", "c03f", "00c0"]
    tensors += ["0100", "63", "00", "01", "0034"]
    pinned(encode_task(TASK, VALUES), ["464d5a4f", "04", "01", *SETTINGS, *WALKER, "03", *tensors])


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
    head = ["464d5a4f", "04", "02", "03000000", "02000000", "08000000", "000000000000f43f"]
    pinned(encode_reply(replace(REPLY, coding=coding, slopes=slopes)), [*head, *parts, "00"])


@given(told())
def test_decoding_a_task_undoes_encoding(message):
    assert repr(decode_task(encode_task(*message))) == repr(message)


def test_decoded_news_equal_those_sent():
    assert decode_task(encode_task(POOLED, SIGNED_NEWS)) == (POOLED, SIGNED_NEWS)


@given(told())
def test_decoding_version_2_undoes_encoding(message):
    task, news = message
    plain_news = tuple(replace(item, tasks=tuple(replace(t, shared=False) for t in item.tasks)) for item in news)
    message = replace(task, shared=False), plain_news
    assert repr(decode_task(as_before(*message))) == repr(message)


@given(tasks(), sums())
def test_decoding_sums_undoes_encoding(task, told):
    task = replace(task, seed=told.seed, pool=told.pool, odds=())
    assert repr(decode_task(encode_task(task, told))) == repr((task, told))


@given(tasks(), deltas() | values())
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


def cost(item, task):
    """What the format says news take."""
    first, count = item.tasks[0], len(item.tasks)
    nobodys = {"round": 0, "client": 0, "rate": 0.0, "clip": 0.0, "odds": ()}
    alike = repr(replace(first, **nobodys)) == repr(replace(task, **nobodys))
    clients = [walker.client for walker in item.tasks]
    gaps = [after - before for before, after in pairwise([0, *clients])]
    short = sum(max(1, -(-gap.bit_length() // 7)) for gap in gaps)
    size = 5 if alike else 62
    size += 2 * len(first.odds) + 4 + (min(short, 4 * count) if min(gaps) >= 0 else 4 * count)
    rates, clips = [walker.rate for walker in item.tasks], [walker.clip for walker in item.tasks]
    for each, column in ((8, rates), (8, clips), (4, item.weights), (4, map(len, item.slopes))):
        column = [*map(repr, column)]
        size += each if len(set(column)) == 1 else each * count
    slopes = [slope for some in item.slopes for slope in some]
    size += (BITS[first.coding] * len(slopes) + 7) // 8
    return size + (4 + 4 * sum(abs(slope) != 1 for slope in slopes) if first.coding == "sign" else 0)


@given(told())
def test_news_cost_what_the_format_says_and_never_a_byte_more_than_one_above_version_2(message):
    task, items = message
    assert len(encode_task(task, items)) == 96 + 2 * len(task.odds) + sum(cost(item, task) for item in items)
    assert len(encode_task(task, items)) <= len(as_before(task, items)) + len(items)


def a_round(count, steps, **changes):
    """A task, and news of the round before: `count` walks of as many steps by clients 7 apart."""
    task = Task(3, 2, 7, 1e-5, 1e-3, steps, clip=12.5)
    walked = tuple(replace(task, round=2, client=7 * client) for client in range(count))
    walked = tuple(replace(one, **{name: value(one) for name, value in changes.items()}) for one in walked)
    slopes = normal(count * steps)
    return task, News(walked, tuple(slopes[at * steps : (at + 1) * steps] for at in range(count)), (1 / count,) * count)


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_walk_of_the_round_before_costs_its_slopes_and_one_byte(count, steps):
    task, item = a_round(count, steps)
    assert len(encode_task(task, [item])) == 96 + 33 + count + 4 * steps * count


def test_rates_of_their_own_cost_eight_bytes_per_further_walk():
    task, item = a_round(100, 10, rate=lambda walker: 1e-5 * (1 + walker.client))
    assert len(encode_task(task, [item])) == 96 + 33 + 100 + 4 * 1000 + 8 * 99
    task, item = a_round(100, 10, rate=lambda walker: 1e-5 * (1 + walker.client), clip=lambda walker: walker.client)
    assert len(encode_task(task, [item])) == 96 + 33 + 100 + 4 * 1000 + 16 * 99


def test_what_news_cost_depends_on_neither_round_nor_odds_of_the_task_they_go_with():
    task, item = a_round(4, 3, pool=lambda _: 3, odds=lambda _: (1, 2, 3))
    sizes = {
        len(encode_task(one, [item])) - len(encode_task(one))
        for number in (0, 2, 3, 2**32 - 1)
        for odds in ((), (1, 2, 3), (4, 5, 6))
        for one in [replace(task, round=number, pool=3, odds=odds, client=number, rate=0.5, clip=1.0)]
    }
    assert sizes == {33 + 6 + 4 + 48}


def test_the_odds_of_news_are_their_own():
    task, item = a_round(4, 3, pool=lambda _: 3, odds=lambda _: (1, 2, 3))
    for told in (item, replace(item, tasks=tuple(replace(walker, odds=()) for walker in item.tasks))):
        for odds in ((), (1, 2, 3), (4, 5, 6)):
            message = replace(task, pool=3, odds=odds), (told,)
            assert decode_task(encode_task(*message)) == message


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8}, {"mu": 0.5}, {"multiple": 4.0}, {"momentum": 0.5}, {"steps": 4}, {"directions": 2}, {"pool": 9},
        {"law": "rademacher"}, {"estimator": "forward"}, {"coding": "sign"}, {"method": "sgd"}, {"dense": True},
        {"importance": True}, {"normalise": True, "directions": 2}, {"method": "sgd", "weight_decay": 0.5},
        {"momentum": -0.0},
    ],
)  # fmt: skip
def test_news_of_other_settings_bring_their_own(other):
    task, item = a_round(4, 3)
    task = replace(task, **other)
    assert len(encode_task(task, [item])) == 96 + 33 + 57 + 4 + 48
    assert repr(decode_task(encode_task(task, [item]))) == repr((task, (item,)))


def test_a_thousand_news_are_as_many_times_one():
    task, item = a_round(3, 2)
    assert len(encode_task(task, [item] * 1000)) == 96 + 1000 * (33 + 3 + 24)


@given(values())
def test_values_cost_their_scalars_and_a_small_header(told):
    assert len(encode_task(TASK, told)) == 92 + 4 + sum(
        2 + len(name.encode()) + 1 + 8 * tensor.dim() + 1 + tensor.nbytes for name, tensor in told.tensors.items()
    )


def test_news_carry_the_odds_of_a_round_once():
    walked = [replace(TASK, client=client, pool=K, odds=(7,) * K) for client in range(10)]
    item = News(tuple(walked), ((1.0,),) * 10, (0.1,) * 10)
    assert len(encode_task(TASK, [item])) == 96 + 33 + 57 + 2 * K + 10 * (1 + 4)
    assert len(encode_task(replace(TASK, pool=K), [item])) == 96 + 33 + 2 * K + 10 * (1 + 4)


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
            decode(sealed(data[5], data[6:size], data[4]) if size > 6 and size != len(data) - 4 else b"")
    with pytest.raises(WireError, match="left over"):
        decode(sealed(data[5], data[6:-4] + b"\0", data[4]))


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
@given(st.sampled_from([1, 2]), st.binary(max_size=160), st.sampled_from([2, 3, 4]))
def test_arbitrary_bodies_with_a_right_checksum_are_refused_or_valid(kind, body, version):
    check(sealed(kind, body, version))


HEADS = {
    "news": (1, encode_task(TASK)[6:-8] + b"\1\0\0\0"),
    "own news": (1, encode_task(TASK)[6:-8] + b"\1\0\0\0\x7d" + encode_task(TASK)[6:-29]),
    "walks": (1, encode_task(TASK)[6:-8] + b"\1\0\0\0\x7c\0\0\0\0\2\0\0\0"),
    "signed walks": (
        1,
        encode_task(replace(TASK, coding="sign"))[6:-8] + b"\1\0\0\0\x7c\0\0\0\0\1\0\0\0\0" + bytes(20),
    ),
    "values": (1, encode_task(TASK)[6:-9] + b"\3"),
    "tensors": (1, encode_task(TASK)[6:-9] + b"\2"),
    "sums": (1, encode_task(replace(TASK, pool=3))[6:-9] + b"\1"),
    "signs": (2, encode_reply(replace(REPLY, coding="sign", slopes=()))[6:-13]),
    "bytes": (2, encode_reply(replace(REPLY, coding="float8", slopes=()))[6:-9]),
}


@settings(max_examples=500)
@given(st.sampled_from(sorted(HEADS)), st.lists(st.integers(0, 9) | st.integers(0, 255), max_size=40))
def test_arbitrary_content_with_a_right_head_and_checksum_is_refused_or_valid(head, rest):
    kind, begin = HEADS[head]
    for version in (2, 3, 4):
        check(sealed(kind, begin + bytes(rest), version))


@settings(max_examples=1000)
@given(
    st.sampled_from([data for data, _ in MESSAGES]),
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from([0, 1, 2, 9, 127, 128, 240, 255])), max_size=6),
)
def test_edited_messages_with_a_right_checksum_are_refused_or_valid(data, edits):
    body = bytearray(data[6:-4])
    for at, value in edits:
        body[at % len(body)] = value
    check(sealed(data[5], bytes(body), data[4]))


def claims(count):
    """Messages that say they hold `count` of something and do not."""
    number = struct.pack("<I", count)
    bare = encode_task(TASK)[6:-4]
    with_odds = bytearray(bare)
    with_odds[52:56], with_odds[60] = number, 8
    with_sums = bytearray(encode_task(replace(TASK, pool=3), Sums(TASK.seed, 3, "float32", (0.0, 0.0, 1.0)))[6:-4])
    with_sums[52:56] = number
    signed = bytearray(bare[:-4] + struct.pack("<IB", 1, 0x7C))
    signed[58] = 4
    for coding in range(5):
        yield decode_reply, sealed(2, struct.pack("<IIIdB", 0, 0, 0, 0.0, coding) + number)
    yield decode_reply, sealed(2, struct.pack("<IIIdB", 0, 0, 0, 0.0, 4) + struct.pack("<IB", 8, 0) + number)
    yield decode_reply, sealed(2, struct.pack("<IIIdBIBI", 0, 0, 0, 0.0, 0, 0, 1, count))
    yield decode_task, sealed(1, bare[:-4] + number)
    yield decode_task, sealed(1, bare[:-4] + number, version=2)
    yield decode_task, sealed(1, bare[:-4] + struct.pack("<I", 1) + bare[:61] + number, version=2)
    one = bare[:-4] + struct.pack("<IB", 1, 0x7C)
    yield decode_task, sealed(1, one[:-1] + b"\1" + bare[:61] + number)
    yield decode_task, sealed(1, one + bytes(4) + number)
    walk = struct.pack("<ddf", 1.0, 1.0, 1.0)
    for walks in (1, 4, 200):
        # One count for all walks, with bytes for fewer of them.
        told = struct.pack("<II", 0, walks) + bytes(walks) + walk + number
        yield decode_task, sealed(1, one + told + bytes(min(4 * (count - 1) * walks, 400)))
        yield decode_task, sealed(1, bytes(signed) + told + bytes(min(count * walks // 8, 400)))
    yield decode_task, sealed(1, one[:-1] + b"\x3c" + struct.pack("<II", 0, 2) + bytes(2) + walk + number * 2)
    yield decode_task, sealed(1, bare[:-5] + b"\2" + number)
    yield decode_task, sealed(1, bare[:-5] + b"\3" + number)
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


@pytest.mark.parametrize(("coding", "size"), [(0, 4 * 1496), (1, 2 * 1496), (3, 1496), (4, 187)])
def test_slopes_of_all_walks_beyond_the_bytes_there_are_named(coding, size):
    task = replace(TASK, coding=CODINGS[coding])
    told = struct.pack("<IBII", 1, 0x7C, 2, 300) + bytes(300) + struct.pack("<ddfI", 1.0, 1.0, 1.0, 5)
    with pytest.raises(WireError, match="slopes for the bytes there: at most 1496, got 1500"):
        decode_task(sealed(1, encode_task(task)[6:-8] + told + bytes(size)))


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
    [(56, 2, "law"), (57, 3, "estimator"), (58, 5, "coding"), (59, 3, "method"), (60, 32, "flags")],
)
def test_unknown_names_are_refused(at, value, what):
    body = bytearray(encode_task(TASK)[6:-4])
    body[at] = value
    with pytest.raises(WireError, match=f"unknown {what} {value}"):
        decode_task(sealed(1, bytes(body)))


def test_another_version_and_another_kind_are_named():
    data = encode_task(TASK)
    for version in (0, 1, 5, 255):
        sentence = f"wire format {version}, expected 2 to 4: both sides need the same fedmezo"
        with pytest.raises(WireError, match=sentence):
            decode_task(data[:4] + bytes([version]) + data[5:])
        with pytest.raises(WireError, match=sentence):
            decode_task(sealed(1, data[6:-4], version))
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
        with pytest.raises(WireError, match="wire format 1, expected 2 to 4: both sides need the same fedmezo"):
            decode(bytes.fromhex(old))


@pytest.mark.parametrize(("data", "decode", "message"), OLD_MESSAGES)
def test_version_2_is_read(data, decode, message):
    assert data[4] == 2
    assert plain(decode(data)) == plain(message)


def test_version_2_is_written_by_no_one():
    assert {data[4] for data in (encode_task(TASK, NEWS), encode_task(POOLED, SUMS), encode_reply(REPLY))} == {4}
    assert as_before(TASK, NEWS) == bytes.fromhex(OLD["news"])
    # A message that says it is of version 4 and has news as in version 2 is none, and the other way round.
    for data, version in (
        (bytes.fromhex(OLD["news"]), 4),
        (encode_task(TASK, NEWS), 2),
        (encode_task(TASK, VALUES), 2),
    ):
        with pytest.raises(WireError):
            decode_task(sealed(1, data[6:-4], version))


def test_version_3_is_read_and_knows_no_shared_directions():
    for task, told in ((TASK, NEWS), (POOLED, SUMS), (TASK, VALUES)):
        body = encode_task(task, told)[6:-4]
        assert plain(decode_task(sealed(1, body, 3))) == plain(decode_task(sealed(1, body)))
    assert plain(decode_reply(sealed(2, encode_reply(REPLY)[6:-4], 3))) == plain(REPLY)
    # The header of a task as version 3 wrote it.
    assert sealed(1, encode_task(TASK)[6:-4], 3).hex().startswith("464d5a4f030103000000ffffffffffffffff")
    shared = encode_task(replace(TASK, shared=True))
    assert decode_task(shared)[0].shared
    with pytest.raises(WireError, match="unknown flags 16"):
        decode_task(sealed(1, shared[6:-4], 3))


def test_a_row_of_a_journal_of_version_2_is_read():
    task, reply = sealed(1, encode_task(TASK)[6:-4], 2), bytes.fromhex(OLD["reply"])
    assert task.hex().endswith("cda7a692")
    row = (3, 2, 0.5, 1e-5, 1.25, 8, 1, len(task), len(reply), task, reply)
    (entry,) = entries_of([row])
    assert (entry.task, entry.weight, repr(entry.reply)) == (TASK, 0.5, repr(REPLY))


WALKED = (
    encode_task(TASK)[6:-8] + struct.pack("<I", 1),
    struct.pack("<ddfI", 1e-5, 12.5, 0.5, 0),
)


@pytest.mark.parametrize(
    ("form", "count", "clients", "expected"),
    [
        (0x7C, 2, "0203", [2, 5]),
        (0x7C, 2, "0200", [2, 2]),
        (0x7C, 1, "ffffffff0f", [2**32 - 1]),
        (0x7C, 1, "8080808010", "client must be in"),
        (0x7C, 2, "ffffffff0f01", "client must be in"),
        (0x7C, 1, "8000", "variable length"),
        (0x7C, 1, "808080808001", "variable length"),
        (0x7C, 2, "80808080800101", "variable length"),
        (0x7C, 2, "0280", "variable length"),
        (0x78, 2, "0500000002000000", [5, 2]),
        (0x7C, 0, "00", "no walk"),
        (0x7F, 1, "02", "form of news 127"),
        (0xFC, 1, "02", "form of news 252"),
    ],
)
def test_clients_of_news_are_gaps_in_order_or_as_they_are(form, count, clients, expected):
    head, tail = WALKED
    tail = bytes(tail) if clients != "0280" else b"\x80" * 24
    data = sealed(1, head + struct.pack("<BII", form, 2, count) + bytes.fromhex(clients) + tail)
    if isinstance(expected, str):
        with pytest.raises(WireError, match=expected):
            decode_task(data)
    else:
        assert [walker.client for walker in decode_task(data)[1][0].tasks] == expected


def test_what_decoded_news_take_is_in_proportion_to_their_bytes():
    task, item = a_round(2_000, 1, round=lambda _: 2)
    data = encode_task(task, [replace(item, slopes=((),) * 2_000)])
    assert len(data) == 96 + 33 + 2_000
    tracemalloc.start()
    decode_task(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 * len(data)


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
    data, shapes = encode_task(TASK, VALUES), {"a": (3,), "b": (2, 1), "c": ()}
    assert plain(decode_task(data, shapes=shapes)) == plain((TASK, VALUES))
    for wrong in ({**shapes, "b": (1, 2)}, {"a": (3,), "b": (2, 1)}, {**shapes, "d": ()}):
        with pytest.raises(WireError, match="expected"):
            decode_task(data, shapes=wrong)


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


@pytest.mark.parametrize("kind", [torch.float64, torch.int32, torch.uint16, torch.float8_e5m2, torch.complex64])
def test_values_of_other_types_are_refused(kind):
    with pytest.raises(WireError, match="must be float32 or float16 or bfloat16"):
        encode_task(TASK, Values({"a": torch.zeros(2).to(kind)}))


def test_values_keep_their_bits():
    for kind, words in ((torch.float32, torch.int32), (torch.float16, torch.int16), (torch.bfloat16, torch.int16)):
        limits = torch.iinfo(words)
        # Every bit of a number, nan of every kind included, in a tensor that is not in one piece.
        odd = torch.tensor([[limits.min, limits.max, -1], [limits.max - 1, 0x7C01, 1]], dtype=words).T.view(kind)
        (decoded,) = decode_task(encode_task(TASK, Values({"a": odd})))[1].tensors.values()
        assert (decoded.dtype, decoded.shape) == (kind, (3, 2))
        assert torch.equal(decoded.view(words), odd.view(words))


def test_an_unknown_type_of_values_is_refused():
    body = bytearray(encode_task(TASK, VALUES)[6:-4])
    at = body.index(b"a\1\3\0\0\0\0\0\0\0") + 10
    body[at] = 3
    with pytest.raises(WireError, match="unknown type of tensor 3"):
        decode_task(sealed(1, bytes(body)))


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
