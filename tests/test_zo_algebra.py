"""The update algebra and the module that writes weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.errors import ModelError
from fedmezo.zo.noise import noise, round_coefficient
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_, lane_, lanes_, step_, walk_delta
from fedmezo.zo.seedsum import SeedSum, Update, Walk

SEEDS = st.integers(0, 2**64 - 1)
COEFFICIENTS = st.floats(-1e3, 1e3, allow_nan=False)
SUMS = st.lists(st.tuples(SEEDS, COEFFICIENTS), max_size=8).map(SeedSum.of)
WALKS = st.lists(st.tuples(SEEDS, COEFFICIENTS), min_size=1, max_size=5).map(
    lambda pairs: Walk(tuple(s for s, _ in pairs), tuple(c for _, c in pairs))
)
LAWS = st.sampled_from(["gaussian", "rademacher"])


def params() -> Params:
    return Params({"b": torch.linspace(-1, 1, 3000), "a": torch.linspace(0, 2, 35).view(5, 7)})


@given(SUMS, SUMS)
def test_sum_commutes(a, b):
    assert a + b == b + a


@given(SUMS)
def test_zero_is_neutral_and_scaling_by_one_too(a):
    assert a + SeedSum() == a
    assert a.scale(1.0) == a


@given(SUMS)
def test_a_sum_minus_itself_is_zero(a):
    assert all(c == 0 for _, c in a + a.scale(-1.0))


@given(st.lists(st.tuples(st.integers(0, 3), COEFFICIENTS), max_size=12), st.randoms())
def test_a_sum_does_not_depend_on_the_order_of_its_terms(terms, random):
    shuffled = list(terms)
    random.shuffle(shuffled)
    assert SeedSum.of(terms) == SeedSum.of(shuffled)


@pytest.mark.parametrize(
    ("seeds", "coefficients", "message"),
    [((1,), (), "length"), ((1,), (math.nan,), "finite"), ((-1,), (1.0,), "seeds"), ((2**64,), (1.0,), "seeds")],
)
def test_a_bad_walk_is_refused(seeds, coefficients, message):
    with pytest.raises(ValueError, match=message):
        Walk(seeds, coefficients)


def test_an_unsorted_sum_is_refused():
    with pytest.raises(ValueError, match="increasing"):
        SeedSum((2, 1), (1.0, 1.0))


@given(st.lists(st.tuples(WALKS, st.floats(0, 1)), min_size=1, max_size=4), LAWS)
@settings(max_examples=30, deadline=None)
def test_scalar_and_dense_updates_give_the_same_bits(parts, law):
    walks, weights = tuple(w for w, _ in parts), tuple(w for _, w in parts)
    scalar, dense, mixed = params(), params(), params()
    apply_(scalar, Update(walks, weights), law=law)
    deltas = tuple(walk_delta(dense, walk, law=law) for walk in walks)
    apply_(dense, Update(deltas, weights), law=law)
    apply_(mixed, Update((deltas[0], *walks[1:]), weights), law=law)
    assert scalar.digest() == dense.digest() == mixed.digest()


@given(WALKS, LAWS)
@settings(max_examples=20, deadline=None)
def test_an_update_is_the_float64_sum_rounded_once(walk, law):
    got = params()
    apply_(got, Update((walk,), (1.0,)), law=law)
    for name, start in params():
        total = torch.zeros(start.numel(), dtype=torch.float64)
        for seed, c in zip(walk.seeds, walk.coefficients, strict=True):
            total += round_coefficient(c) * noise(seed, name, size=start.numel(), law=law).double()
        expected = (start.view(-1).double() + total.float().double()).float()
        assert torch.equal(got[name].view(-1), expected)


def test_one_step_of_one_client_is_the_local_step():
    walked, applied = params(), params()
    step_(walked, 9, coefficient=-0.0123, law="gaussian")
    apply_(applied, Update((Walk((9,), (-0.0123,)),), (1.0,)), law="gaussian")
    assert walked.digest() == applied.digest()


@given(SEEDS, st.floats(1e-4, 1e-1), LAWS)
@settings(max_examples=20, deadline=None)
def test_a_lane_is_a_step_on_a_copy(seed, mu, law):
    source = params()
    for name, tensor in source:
        above, below, alone = (torch.empty_like(tensor) for _ in range(3))
        lanes_(above, below, tensor, name=name, seed=seed, offset=mu, law=law)
        lane_(alone, tensor, name=name, seed=seed, offset=-mu, law=law)
        stepped = Params({name: tensor.clone()})
        step_(stepped, seed, coefficient=mu, law=law)
        assert torch.equal(above, stepped[name])
        assert torch.equal(below, alone)
    assert source.digest() == params().digest()


def test_the_torch_backend_walks_to_the_same_model(monkeypatch):
    update = Update((Walk((1, 2), (0.5, -0.25)), Walk((3,), (1e-3,))), (1 / 3, 2 / 3))
    fast, plain = params(), params()
    apply_(fast, update, law="gaussian")
    step_(fast, 5, coefficient=0.3, law="rademacher")
    monkeypatch.setenv("FEDMEZO_NOISE", "torch")
    apply_(plain, update, law="gaussian")
    step_(plain, 5, coefficient=0.3, law="rademacher")
    assert fast.digest() == plain.digest()


def test_params_are_named_in_order_and_digests_see_names_shapes_and_values():
    p = params()
    assert p.names == ("a", "b")
    assert p.dim == 3035
    assert p.layout() != Params({"a": p["a"], "c": p["b"]}).layout()
    assert p.layout() != Params({"a": p["a"].view(7, 5), "b": p["b"]}).layout()
    assert p.layout() != Params({"a": p["a"].bfloat16(), "b": p["b"]}).layout()
    other = p.clone()
    assert other.digest() == p.digest()
    other["b"][17] = torch.nextafter(other["b"][17], torch.tensor(9.0))
    assert other.digest() != p.digest()
    other.copy_(p)
    assert other.digest() == p.digest()


def test_other_types_and_colliding_names_are_refused(monkeypatch):
    with pytest.raises(ModelError, match="float32"):
        Params({"a": torch.zeros(3, dtype=torch.float64)})
    monkeypatch.setattr("fedmezo.zo.params.tensor_id", lambda name: 7)
    with pytest.raises(ModelError, match="share a tensor id"):
        Params({"a": torch.zeros(3), "b": torch.zeros(3)})
