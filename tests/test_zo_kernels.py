"""The kernels: the same bits from every backend, for every dtype, law, size and place; and fair rounding of halves."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmezo.zo.kernels import numba_ops, torch_ops
from fedmezo.zo.noise import GAUSSIAN_DOMAIN, ROUNDING_DOMAIN, round_coefficient

SEEDS = st.integers(0, 2**64 - 1)
SIZES = st.one_of(st.integers(1, 70), st.integers(1, 5000), st.sampled_from([2047, 2048, 2049, 4096]))
STARTS = st.one_of(st.just(0), st.integers(0, 7000), st.sampled_from([2048, 4095, 6144]))
COEFFICIENTS = st.floats(-4, 4).map(round_coefficient)
LAWS = ["gaussian", "rademacher"]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
CPU = torch.device("cpu")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
every_law = pytest.mark.parametrize("law", LAWS)
every_backend = pytest.mark.parametrize("backend", [numba_ops, torch_ops], ids=["numba", "torch"])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, one nan being as good as another."""
    whole = torch.int16 if a.element_size() == 2 else torch.int32
    return a.dtype == b.dtype and bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


def weights(size: int, dtype: torch.dtype) -> Tensor:
    """Values of all sizes, subnormal numbers of the halves and values near their largest among them."""
    random = torch.Generator().manual_seed(size)
    spread = torch.randn(size, generator=random) * torch.exp2(torch.randint(-40, 18, (size,), generator=random))
    return spread.to(dtype)


def awkward() -> Tensor:
    """Float32 values at which roundings go wrong."""
    edges = [0.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-126, 1e-40, 1e-45, 65503.9, 65504.0, 65519.9, 65520.0, 1e30]
    edges += [3.4028234e38, 3.3961775e38, math.inf, 1 - 2.0**-24, 1023.99994 * 2.0**-24, 2.0**-14 * (1 - 2.0**-24)]
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    values = torch.tensor([sign * edge for edge in edges for sign in (1, -1)], dtype=torch.float32)
    return torch.cat([values, nans])


@every_dtype
@every_law
@given(SEEDS, st.integers(0, 2**32 - 1), SIZES, STARTS, COEFFICIENTS)
@settings(max_examples=15, deadline=None)
def test_steps_and_lanes_have_the_same_bits_everywhere(dtype, law, seed, tensor, size, start, coefficient):
    key = {"tensor": tensor, "seed": seed, "law": law, "start": start}
    source = weights(size, dtype)
    made = []
    for backend in (numba_ops, torch_ops):
        target, *lanes = source.clone(), *(torch.empty_like(source) for _ in range(3))
        backend.step_(target, coefficient=coefficient, **key)
        backend.lanes_(lanes[0], lanes[1], source, offset=coefficient, **key)
        backend.lane_(lanes[2], source, offset=coefficient, **key)
        made.append([target, *lanes])
    assert all(map(same, *made))
    assert same(made[0][1], made[0][3])


@every_dtype
@every_law
@every_backend
@given(
    seed=SEEDS, steps=st.lists(st.tuples(SEEDS, COEFFICIENTS), max_size=3), size=SIZES, start=STARTS,
    offset=COEFFICIENTS,
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_a_visit_is_its_steps_then_its_lanes(backend, dtype, law, seed, steps, size, start, offset):
    key = {"tensor": 77, "law": law, "start": start}
    seen, stepped = weights(size, dtype), weights(size, dtype)
    lanes = [torch.empty_like(seen) for _ in range(4)]
    backend.visit_(lanes[0], lanes[1], seen, steps=steps, seed=seed, offset=offset, **key)
    for taken, coefficient in steps:
        torch_ops.step_(stepped, seed=taken, coefficient=coefficient, **key)
    torch_ops.lanes_(lanes[2], lanes[3], stepped, seed=seed, offset=offset, **key)
    assert same(seen, stepped)
    assert same(lanes[0], lanes[2])
    assert same(lanes[1], lanes[3])


@every_dtype
@every_law
@every_backend
def test_a_block_of_rows_steps_as_it_does_in_the_whole(backend, dtype, law):
    whole, parts = weights(9000, dtype), weights(9000, dtype)
    key = {"tensor": 5, "seed": 2**64 - 1, "law": law}
    backend.step_(whole, coefficient=0.375, **key)
    for begin, end in ((0, 1000), (1000, 1001), (1001, 6200), (6200, 9000)):
        backend.step_(parts[begin:end], coefficient=0.375, start=begin, **key)
    assert same(whole, parts)


@every_dtype
@every_law
@given(
    st.lists(
        st.tuples(st.lists(st.tuples(SEEDS, st.floats(-1, 1, width=32)), max_size=4), st.floats(0, 1)), max_size=3
    ),
    SIZES,
    SEEDS,
)
@settings(max_examples=15, deadline=None)
def test_walks_have_the_same_bits_everywhere(dtype, law, walks, size, rounding):
    terms = {
        "seeds": [[seed for seed, _ in walk] for walk, _ in walks],
        "coefficients": [[coefficient for _, coefficient in walk] for walk, _ in walks],
        "weights": [weight for _, weight in walks],
    }
    fast, plain = weights(size, dtype), weights(size, dtype)
    numba_ops.walks_(fast, tensor=3, law=law, rounding=rounding, **terms)
    torch_ops.walks_(plain, tensor=3, law=law, rounding=rounding, **terms)
    assert same(fast, plain)


def test_large_halves_have_the_same_bits_with_any_number_of_threads():
    size, key = (1 << 20) + 12345, {"tensor": 9, "law": "gaussian", "start": 100}
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            target = torch.full((size,), 0.01, dtype=torch.bfloat16)
            lanes = [torch.empty_like(target) for _ in range(2)]
            numba_ops.visit_(*lanes, target, steps=[(1, 2.0**-9)], seed=2, offset=2.0**-6, **key)
            results.append([target, *lanes])
    finally:
        torch.set_num_threads(2)
    assert all(map(same, results[0], results[1]))
    assert all(map(same, results[0], results[2]))
    torch_ops.visit_(*lanes, target.fill_(0.01), steps=[(1, 2.0**-9)], seed=2, offset=2.0**-6, **key)
    assert all(map(same, results[0], [target, *lanes]))


def fairly(value: float, bits: int, dtype: torch.dtype) -> float:
    """Stochastic rounding in exact arithmetic: up when what is cut off, plus the random bits, is a whole step."""
    digits, lowest, largest = (7, -126, 3.3895314e38) if dtype == torch.bfloat16 else (10, -14, 65504.0)
    if dtype == torch.float16:
        bits = bits >> 3 << 3
    if not abs(value) < largest or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, lowest)
    step = Fraction(2) ** (exponent - digits)
    count = math.floor(abs(Fraction(value)) / step + Fraction(bits, 2**16))
    return math.copysign(float(count * step), value)


# Numbers whose distance to float16's grid below 2**-14 float32 can hold: others may round on the way.
VALUES = st.one_of(
    st.floats(2.0**-14, 65500, width=32),
    st.integers(0, 2**23 - 1).map(lambda count: count * 2.0**-37),
    st.floats(-100, 100, width=32).filter(lambda value: value == 0 or abs(value) >= 2.0**-14),
)


@every_half
@given(VALUES, st.integers(0, 65535))
@settings(max_examples=300, deadline=None)
def test_the_rounding_is_that_of_exact_arithmetic(dtype, value, bits):
    got = torch_ops.stochastic(torch.tensor([value]), torch.tensor([bits]), dtype)
    assert float(got) == fairly(value, bits, dtype)


@every_half
@given(SEEDS, SIZES, STARTS)
@settings(max_examples=20, deadline=None)
def test_rounding_has_the_same_bits_everywhere(dtype, seed, size, start):
    source = torch.cat([awkward(), weights(size, torch.float32)])
    fast, plain = (torch.empty(source.numel(), dtype=dtype) for _ in range(2))
    numba_ops.stochastic_(fast, source, tensor=8, seed=seed, start=start)
    torch_ops.stochastic_(plain, source, tensor=8, seed=seed, start=start)
    assert same(fast, plain)
    assert torch.equal(fast.isnan(), source.isnan())
    if dtype == torch.bfloat16:
        nan = source.isnan()
        kept = (source[nan].view(torch.int32) >> 16 | 0x40).to(torch.int16)
        assert torch.equal(fast[nan].view(torch.int16), kept)


@every_half
@every_backend
def test_rounding_leaves_every_half_as_it_is(backend, dtype):
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    target = torch.empty_like(halves)
    for seed in range(3):
        backend.stochastic_(target, halves.to(torch.float32), tensor=1, seed=seed)
        assert same(target, halves)


@every_half
@every_law
@every_backend
def test_a_step_of_coefficient_zero_moves_no_half(backend, dtype, law):
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    target = halves.clone()
    backend.step_(target, tensor=1, seed=3, coefficient=0.0, law=law)
    assert torch.equal(target.nan_to_num(7.0, posinf=8.0, neginf=9.0), halves.nan_to_num(7.0, posinf=8.0, neginf=9.0))


@every_dtype
@every_law
def test_infinities_and_nan_step_to_themselves(dtype, law):
    source = torch.tensor([math.inf, -math.inf, math.nan]).to(dtype).repeat(1000)
    for backend in (numba_ops, torch_ops):
        target, lanes = source.clone(), [torch.empty_like(source) for _ in range(2)]
        backend.visit_(*lanes, target, tensor=2, steps=[(1, 0.5)], seed=2, offset=0.25, law=law)
        assert all(same(result, source) for result in (target, *lanes))


@every_half
@pytest.mark.parametrize("value", [1.0 + 2.0**-12, -0.3, 1e-3, 2.0**-14 * 1.0003, 3.3e-6, -4.1e-8, 1000.1])
def test_rounding_is_unbiased_over_seeds(dtype, value):
    size, seeds = 2048, 100
    source, total = torch.full((size,), value), torch.zeros(size, dtype=torch.float64)
    target = torch.empty(size, dtype=dtype)
    for seed in range(seeds):
        numba_ops.stochastic_(target, source, tensor=4, seed=seed)
        total += target.double()
    lower, upper = target.min().double(), target.max().double()
    step = float(upper - lower)
    assert 0 < step <= max(abs(value) * 2.0**-7, 2.0**-24)
    assert abs(float(total.mean()) / seeds - float(source[0])) < 5 * step / math.sqrt(size * seeds * 4)
    # Each place by itself too, not only on average: 2048 sums of 100 fair coins.
    assert float((total / seeds - float(source[0])).abs().max()) < 5 * step / math.sqrt(seeds * 4)


def test_many_small_steps_arrive_where_rounding_to_nearest_would_stand_still():
    target = torch.ones(4096, dtype=torch.bfloat16)
    for seed in range(200):
        torch_ops.stochastic_(target, target.float() + 1e-3, tensor=1, seed=seed)
    assert float(target.float().mean()) == pytest.approx(1.2, abs=0.01)
    assert (torch.ones(1, dtype=torch.bfloat16) + 1e-3 == 1).all()


def test_the_rounding_bits_are_apart_from_the_direction():
    z, bits = (
        torch_ops.halfwords(12, 34, 0, 200_000, domain, CPU).double() for domain in (GAUSSIAN_DOMAIN, ROUNDING_DOMAIN)
    )
    assert torch.corrcoef(torch.stack([z, bits]))[0, 1].abs() < 0.02
    assert float(bits.mean()) == pytest.approx(32767.5, abs=5 * 65536 / math.sqrt(12 * 200_000))


@every_half
def test_lanes_round_to_nearest_even(dtype):
    source = torch.ones(4096, dtype=dtype)
    lane, epsilon = torch.empty_like(source), torch.finfo(dtype).eps
    signs = torch_ops.entries(6, 1, start=0, size=4096, law="rademacher", device=CPU)
    numba_ops.lane_(lane, source, tensor=1, seed=6, offset=epsilon / 2, law="rademacher")
    assert torch.equal(lane.float(), torch.where(signs > 0, 1.0, 1 - epsilon / 2))
    numba_ops.lane_(lane, source + epsilon, tensor=1, seed=6, offset=epsilon / 2, law="rademacher")
    assert torch.equal(lane.float(), torch.where(signs > 0, 1 + 2 * epsilon, 1.0))


def test_a_float32_target_takes_rounding_as_it_is():
    source, target = awkward(), torch.empty(len(awkward()))
    for backend in (numba_ops, torch_ops):
        backend.stochastic_(target, source, tensor=1, seed=1)
        assert same(target, source)


def test_kernels_are_compiled_anew_when_their_parts_change(monkeypatch, tmp_path):
    monkeypatch.setattr(numba_ops, "__file__", str(tmp_path / "numba_ops.py"))
    stamps = []
    for text in ("one", "two", "two"):
        (tmp_path / "numba_part.py").write_text(text)
        file = SimpleNamespace(_source_stamp=(1.5, 1000))
        numba_ops._keep_with_sources(SimpleNamespace(_cache=SimpleNamespace(_cache_file=file)))
        stamps.append(file._source_stamp)
    assert stamps[0] != stamps[1] == stamps[2]
    assert numba_ops._keep_with_sources(SimpleNamespace()) is None
    assert len(numba_ops._visit._cache._cache_file._source_stamp[1]) == 64


def test_the_compiled_direction_is_the_table_over_1024():
    z = numba_ops.entries(3, 4, size=70_000, law="gaussian")
    index = torch_ops.halfwords(3, 4, 0, 70_000, GAUSSIAN_DOMAIN, CPU).numpy()
    assert np.array_equal(z.numpy(), numba_ops.lookup()[index])
