"""Noise v1: golden values, and the same bits from every backend."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.errors import NoiseError
from fedmezo.zo import noise as law
from fedmezo.zo.kernels import numba_ops, torch_ops
from fedmezo.zo.noise import derive_seed, noise, round_coefficient, table, tensor_id, uniform
from fedmezo.zo.perturb import check_backend

SEEDS = st.integers(0, 2**64 - 1)
LAWS = st.sampled_from(["gaussian", "rademacher"])


def philox_word(block: int, tensor: int, domain: int, seed: int) -> list[int]:
    """Philox4x32-10 in Python integers."""
    c, k = [block, 0, tensor, domain], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(high >> 32) ^ c[1] ^ k[0], high & 0xFFFFFFFF, (low >> 32) ^ c[3] ^ k[1], low & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_gives_the_published_known_answer():
    # Random123 kat_vectors, philox4x32-10, all zero counter and key.
    words = torch_ops.philox(torch.zeros(1, dtype=torch.int64), 0, 0, 0)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_word(0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(SEEDS, st.integers(0, 2**32 - 1), st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_an_entry_is_the_table_at_its_halfword(seed, tensor, index):
    word = philox_word(64 * (index >> 9) + (index & 63), tensor, 0, seed)[((index >> 6) & 7) >> 1]
    half = (word >> 16) if (index >> 6) & 1 else word & 0xFFFF
    got = torch_ops.entries(seed, tensor, start=index, size=1, law="gaussian", device=torch.device("cpu"))
    assert float(got) == table()[half] / 1024


@given(SEEDS, st.integers(0, 2**32 - 1), st.integers(0, 9000))
@settings(max_examples=50, deadline=None)
def test_a_rademacher_entry_is_its_bit(seed, tensor, index):
    word = philox_word(16 * (index >> 11) + (index & 15), tensor, 1, seed)[(index >> 4) & 3]
    got = torch_ops.entries(seed, tensor, start=index, size=1, law="rademacher", device=torch.device("cpu"))
    assert float(got) == (-1.0 if (word >> ((index >> 6) & 31)) & 1 else 1.0)


def test_golden_values():
    # Made by `noise(7, "w", size=4)` of noise v1; a change here is a new noise version.
    assert (noise(7, "w", size=4) * 1024).tolist() == [423.0, -171.0, -2489.0, -2329.0]
    assert noise(7, "w", size=8, start=64, law="rademacher").tolist() == GOLDEN_SIGNS
    assert tensor_id("model.layers.0.self_attn.q_proj.weight") == GOLDEN_ID
    assert derive_seed("direction", 0, 1, 2, 3, 0) == GOLDEN_SEED


GOLDEN_SIGNS = [1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0]
GOLDEN_ID = 2742275503
GOLDEN_SEED = 15130333711822346013


def test_the_table_is_a_standard_normal():
    values = table().astype(np.float64) / 1024
    assert abs(values.mean()) == 0
    assert values.var() == pytest.approx(1, abs=1e-5)
    assert (values**4).mean() == pytest.approx(3, abs=2e-3)
    assert (np.diff(values) >= 0).all()


def test_a_wrong_table_is_refused(monkeypatch):
    monkeypatch.setattr(law, "_TABLE_SHA256", "0" * 64)
    table.cache_clear()
    with pytest.raises(NoiseError, match="noise v1"):
        table()
    monkeypatch.undo()
    table.cache_clear()
    table()


def test_the_compiled_backend_passes_its_start_up_check_and_a_broken_one_does_not(monkeypatch):
    check_backend.cache_clear()
    check_backend("numba")
    broken = numba_ops.lookup().copy()
    broken[40000] += 1 / 1024
    monkeypatch.setattr(numba_ops, "lookup", lambda: broken)
    check_backend.cache_clear()
    with pytest.raises(NoiseError, match="FEDMEZO_NOISE=torch"):
        check_backend("numba")
    check_backend.cache_clear()


@given(SEEDS, st.integers(0, 2**32 - 1), st.integers(1, 5000), LAWS, st.floats(-10, 10))
@settings(max_examples=40, deadline=None)
def test_backends_write_the_same_bits(seed, tensor, size, which, coefficient):
    key = {"tensor": tensor, "seed": seed, "law": which}
    start = torch.linspace(-1, 1, size)
    exact = round_coefficient(coefficient)
    fast, plain = start.clone(), start.clone()
    numba_ops.step_(fast, coefficient=exact, **key)
    torch_ops.step_(plain, coefficient=exact, **key)
    assert torch.equal(fast, plain)
    made = [torch.empty(size) for _ in range(4)]
    numba_ops.lanes_(made[0], made[1], start, offset=exact, **key)
    torch_ops.lanes_(made[2], made[3], start, offset=exact, **key)
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])


@given(SEEDS, st.integers(0, 6000), st.integers(1, 3000), LAWS)
@settings(max_examples=40, deadline=None)
def test_any_part_of_a_direction_can_be_made_alone(seed, start, size, which):
    whole = noise(seed, "w", size=start + size, law=which)
    assert torch.equal(noise(seed, "w", start=start, size=size, law=which), whole[start:])


def test_large_tensors_have_the_same_bits_with_any_number_of_threads():
    size = (1 << 20) + 12345
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        target = torch.zeros(size)
        numba_ops.step_(target, tensor=9, seed=1, coefficient=0.5, law="gaussian")
        results.append(target)
    torch.set_num_threads(2)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(
        results[0] * 2, torch_ops.entries(1, 9, start=0, size=size, law="gaussian", device=results[0].device)
    )


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30))
def test_a_rounded_coefficient_has_11_bits_and_is_near(value):
    rounded = round_coefficient(value)
    mantissa, _ = math.frexp(rounded)
    assert mantissa * 2**11 == int(mantissa * 2**11)
    assert abs(rounded - value) <= abs(value) * 2**-11
    assert round_coefficient(rounded) == rounded


@given(st.floats(-4, 4), st.integers(0, 65535))
def test_a_rounded_coefficient_times_an_entry_is_exact_in_float32(value, index):
    entry = table()[index] / 1024
    exact = round_coefficient(value) * entry
    assert abs(exact) < 1e-30 or float(np.float32(exact)) == exact


def test_directions_are_uncorrelated():
    z = torch.stack([noise(seed, name, size=50_000) for seed in (1, 2, 2**32 + 1, 2**63) for name in ("a", "b")])
    gram = (z @ z.T) / 50_000
    off = gram - torch.eye(8)
    assert off.abs().max() < 5 / math.sqrt(50_000)


def test_uniform_is_uniform_and_apart_from_the_gaussian_domain():
    u = uniform(1, "w", size=200_000)
    assert u.abs().max() < 1
    assert u.mean().abs() < 0.01
    assert u.var().item() == pytest.approx(1 / 3, abs=0.01)
    assert torch.corrcoef(torch.stack([u, noise(1, "w", size=200_000)]))[0, 1].abs() < 0.02


def test_seeds_of_different_parts_differ():
    parts = [("a", 1, 23), ("a", 12, 3), ("a", "1", 23), ("a1", 23), ("a", 1, 2, 3)]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
