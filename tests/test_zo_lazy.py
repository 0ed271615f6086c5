"""Steps that are taken at the next look have the bits of steps taken at once; 16-bit weights round without bias."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmezo.zo.lazy import LazyParams, blocks
from fedmezo.zo.params import Params, kept
from fedmezo.zo.perturb import apply_, lanes_, row_, step_, visit_, walk_delta
from fedmezo.zo.seedsum import Update, Walk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"a": (50, 7), "b": (9,), "c": (2, 3, 5)}
STEPS = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.floats(-0.1, 0.1)), max_size=4)


@pytest.fixture(params=["torch", ""], ids=["torch", "default"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("FEDMEZO_NOISE", request.param)
    monkeypatch.setattr("fedmezo.zo.lazy.BLOCK", 16)


def params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return Params({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()})


def lazy(dtype=torch.float32, law="gaussian"):
    return LazyParams(params(dtype).tensors, law=law)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_late_steps_are_steps(dtype, law, steps):
    now, later = params(dtype), lazy(dtype, law)
    for seed, coefficient in steps:
        step_(now, seed, coefficient=coefficient, law=law)
        step_(later, seed, coefficient=coefficient, law=law)
    assert later.digest() == now.digest() == later.clone().digest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_before_it_is_looked_at(dtype):
    later = lazy(dtype)
    step_(later, 3, coefficient=0.1, law="gaussian")
    assert all(torch.equal(later.tensors[name], tensor) for name, tensor in params(dtype))
    assert not torch.equal(later["a"], params(dtype)["a"])
    assert torch.equal(later.tensors["b"], params(dtype)["b"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, more=STEPS)
def test_a_visit_is_the_steps_and_then_the_lanes(dtype, law, steps, more):
    now, later = params(dtype), lazy(dtype, law)
    for batch in (steps, more):
        for seed, coefficient in batch:
            step_(now, seed, coefficient=coefficient, law=law)
            step_(later, seed, coefficient=coefficient, law=law)
        for rows in blocks(now["a"]):
            wanted = [torch.empty_like(now["a"]) for _ in range(2)]
            lanes_(*wanted, now["a"], name="a", seed=8, offset=0.01, law=law)
            got = [torch.empty_like(now["a"][rows]) for _ in range(2)]
            visit_(got, later, name="a", rows=rows, seed=8, offset=0.01, law=law)
            assert torch.equal(got[0], wanted[0][rows]) and torch.equal(got[1], wanted[1][rows])
            visit_(got[:1], later, name="a", rows=rows, seed=8, offset=-0.01, law=law)
            assert torch.equal(got[0], wanted[1][rows])
    assert later.digest() == now.digest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_made_without_writing_any(dtype):
    now, later = params(dtype), lazy(dtype)
    for seed in (1, 2, 3):
        step_(now, seed, coefficient=0.03, law="gaussian")
        step_(later, seed, coefficient=0.03, law="gaussian")
    before = {name: tensor.clone() for name, tensor in later.tensors.items()}
    wanted = [torch.empty_like(now["a"]) for _ in range(2)]
    lanes_(*wanted, now["a"], name="a", seed=8, offset=0.01, law="gaussian")
    for row in (0, 15, 16, 49):
        got = [torch.empty(7, dtype=dtype) for _ in range(2)]
        row_(got, later, name="a", row=row, seed=8, offset=0.01, law="gaussian")
        assert torch.equal(got[0], wanted[0][row]) and torch.equal(got[1], wanted[1][row])
        row_(got[:1], later, name="a", row=row, seed=8, offset=0.0, law="gaussian")
        assert torch.equal(got[0], now["a"][row])
    assert all(torch.equal(tensor, before[name]) for name, tensor in later.tensors.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalar_and_dense_updates_give_the_same_bits(dtype):
    walks = (Walk((1, 2), (0.5, -0.25)), Walk((3,), (1e-3,)))
    scalar, dense = params(dtype), params(dtype)
    apply_(scalar, Update(walks, (0.25, 0.75), 4), law="gaussian")
    deltas = tuple(walk_delta(dense, walk, law="gaussian") for walk in walks)
    assert all(tensor.dtype == torch.float32 for delta in deltas for tensor in delta.tensors.values())
    apply_(dense, Update(deltas, (0.25, 0.75), 4), law="gaussian")
    assert scalar.digest() == dense.digest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_updates_arrive_although_each_is_below_a_unit(dtype):
    """Rounding to nearest would leave every one of these weights where it is."""
    step = 1e-3 * torch.finfo(dtype).eps
    moving = Params({"w": torch.ones(20_000, dtype=dtype)})
    for round in range(40):
        apply_(moving, Update((Walk((7,), (step,)),), (1.0,), round), law="rademacher")
    still = Params({"w": torch.ones(20_000)})
    apply_(still, Update((Walk((7,), (1.0,)),), (1.0,)), law="rademacher")
    signs = still["w"] - 1
    moved = float(((moving["w"].float() - 1) * signs).mean())
    assert moved == pytest.approx(40 * step, rel=0.35)
    assert float((torch.ones(4, dtype=dtype) + step)[0]) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_weights_come_back(dtype):
    held = params(dtype)
    before = held.digest()
    with kept(held):
        step_(held, 1, coefficient=0.5, law="gaussian")
        assert held.digest() != before
    assert held.digest() == before and held.nbytes == held.dim * torch.finfo(dtype).bits // 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_length_zero_changes_no_bit_not_even_of_minus_zero(dtype):
    held = Params({"w": torch.full((40,), -0.0, dtype=dtype)})
    before = held.digest()
    step_(held, 3, coefficient=0.0, law="gaussian")
    assert held.digest() == before
