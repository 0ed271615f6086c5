"""B1 and B2 hold on federated quadratics, whose expectations are exact; the printed bounds do not."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import Federation, own_step, random_federation, sampled, trajectory

from fedmezo.theory.beside import global_bounds, step_bounds
from fedmezo.theory.caps import b1_caps, b2_caps, paper_caps
from fedmezo.theory.chain import drift_bound
from fedmezo.theory.constants import Setting
from fedmezo.theory.corrected import b1, b1_step, b2, b2_step
from fedmezo.theory.printed import corollary_3_2, corollary_3_5

ROUNDING = 1 + 1e-9
MANY = settings(max_examples=250, deadline=None, derandomize=True)


@st.composite
def federations(draw):
    """Returns a federation, a start, and a share of the cap."""
    federation, start = random_federation(
        draw(st.integers(0, 10**6)),
        dim=draw(st.integers(1, 5)),
        clients=draw(st.integers(1, 4)),
        spread=draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
        tilt=draw(st.sampled_from([0.0, 0.02, 0.2])),
        wobble=draw(st.sampled_from([0.0, 0.5])),
        noise=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )
    start = federation.optimum if draw(st.integers(0, 4)) == 0 else start
    return federation, start, draw(st.floats(0.02, 1))


def within(values, bounds):
    """Whether values <= bounds, up to the rounding of sums of squares."""
    values, bounds = np.asarray(values), np.asarray(bounds)
    return bool((values <= bounds + 1e-9 * np.abs(bounds) + 1e-10).all())


@MANY
@given(federations(), st.integers(1, 6), st.integers(1, 20), st.sampled_from([1, 3]))
def test_b1_holds_in_every_round_and_on_average(drawn, steps, rounds, directions):
    federation, start, share = drawn
    constants, clients = federation.constants(), len(federation.pulls)
    rate = share * b1_caps(constants, steps=steps).rate
    setting = Setting(clients, steps, rounds, rate, 0.0, directions)
    losses, squares = trajectory(federation, start, rate=rate, steps=steps, rounds=rounds, directions=directions)
    assert np.mean(squares[:-1]) <= b1(constants, setting, gap=federation.gap(start)).total * ROUNDING + 1e-10
    promised = [b1_step(constants, setting, gradient2=square).total for square in squares[:-1]]
    assert within(np.diff(losses), promised)


@MANY
@given(federations(), st.integers(1, 20), st.sampled_from([1, 2, 5]), st.sampled_from(["gaussian", "sphere"]))
def test_b2_holds_in_every_round_and_on_average(drawn, rounds, directions, kind):
    federation, start, share = drawn
    constants, clients = federation.constants(), len(federation.pulls)
    rate = share * b2_caps(constants, clients=clients, directions=directions, kind=kind).rate
    setting = Setting(clients, 1, rounds, rate, 0.0, directions)
    losses, squares = trajectory(federation, start, rate=rate, steps=1, rounds=rounds, directions=directions, kind=kind)
    bound = b2(constants, setting, gap=federation.gap(start), kind=kind)
    assert np.mean(squares[:-1]) <= bound.total * ROUNDING + 1e-10
    promised = [b2_step(constants, setting, gradient2=square, kind=kind).total for square in squares[:-1]]
    assert within(np.diff(losses), promised)


@given(federations(), st.floats(1, 50))
def test_one_round_of_b2_holds_above_its_cap_too(drawn, times):
    federation, start, _ = drawn
    constants, clients = federation.constants(), len(federation.pulls)
    rate = times * b2_caps(constants, clients=clients).rate
    losses, squares = trajectory(federation, start, rate=rate, steps=1, rounds=1)
    promised = b2_step(constants, Setting(clients, 1, 1, rate, 0.0), gradient2=squares[0])
    assert within(np.diff(losses), [promised.total])
    assert not promised.vacuous


def isotropic(spread, *, dim=4, clients=3, noise=0.0):
    """Clients with curvature 1 whose optima lie `spread` away from their mean."""
    angles = np.arange(clients) * 2 * math.pi / clients
    pulls = np.zeros((clients, dim))
    pulls[:, 0], pulls[:, 1] = spread * np.cos(angles), spread * np.sin(angles)
    return Federation(np.tile(np.eye(dim), (clients, 1, 1)), pulls, noise=noise)


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_b2_is_nearly_reached_after_many_rounds(spread):
    federation, start = isotropic(spread), np.full(4, 1.0)
    constants = federation.constants()
    rate = 0.1 * b2_caps(constants, clients=3).rate
    setting = Setting(3, 1, 3000, rate, 0.0)
    bound = b2(constants, setting, gap=federation.gap(start))
    _, squares = trajectory(federation, start, rate=rate, steps=1, rounds=3000)
    # gamma = r + 2 keeps a gradient part that the exact moment r + 1 has not: 6 / 5 here.
    assert 0.4 * bound.total < np.mean(squares[:-1]) <= bound.total
    assert not bound.vacuous


@pytest.mark.parametrize("left_out", ["initial gap", "heterogeneity", "noise"])
@pytest.mark.parametrize("bound_of", [b1, b2])
def test_no_term_can_be_left_out(left_out, bound_of):
    federation = isotropic(1.0 if left_out == "heterogeneity" else 0.0, noise=1.0 if left_out == "noise" else 0.0)
    start = np.ones(4) if left_out == "initial gap" else federation.optimum
    constants = federation.constants()
    caps = b1_caps(constants, steps=1) if bound_of is b1 else b2_caps(constants, clients=3)
    setting = Setting(3, 1, 50, caps.rate, 0.0)
    bound = bound_of(constants, setting, gap=federation.gap(start))
    _, squares = trajectory(federation, start, rate=caps.rate, steps=1, rounds=50)
    exact = np.mean(squares[:-1])
    assert exact <= bound.total
    assert exact > bound.total - bound.terms[left_out] + 1e-9


def test_b2_fails_far_above_its_cap_and_says_so():
    federation, start = isotropic(0.0), np.ones(4)
    constants = federation.constants()
    rate = 2.5 * b2_caps(constants, clients=3).rate
    bound = b2(constants, Setting(3, 1, 40, rate, 0.0), gap=federation.gap(start))
    _, squares = trajectory(federation, start, rate=rate, steps=1, rounds=40)
    assert np.mean(squares[:-1]) > bound.total
    assert "above the cap" in bound.reason


@MANY
@given(federations(), st.integers(1, 6))
def test_the_corrected_drift_bound_holds(drawn, steps):
    federation, start, share = drawn
    constants, clients = federation.constants(), len(federation.pulls)
    rate = share * b1_caps(constants, steps=steps).caps[0].value
    gradient = federation.curvature @ start - federation.pull
    drift = 0.0
    for own, pull in zip(federation.curvatures, federation.pulls, strict=True):
        # A client alone, in coordinates where it starts at 0 and its distance to the start is a loss.
        alone = Federation(own[None], (pull - own @ start)[None], federation.wobble, federation.noise)
        drift += sum(squared_distance(alone, rate=rate, steps=k) for k in range(steps)) / clients
    bound = drift_bound(constants, Setting(clients, steps, 1, rate, 0.0), gradient2=float(gradient @ gradient))
    assert drift <= bound * ROUNDING + 1e-12


def squared_distance(alone, *, rate, steps):
    """Returns E|x - 0|^2 of one client after `steps` steps from 0, by one round per step."""
    dim = alone.pulls.shape[1]
    means, moments = np.zeros((1, dim)), np.zeros((1, dim, dim))
    for _ in range(steps):
        moments = own_step(alone, means, moments, rate=rate, directions=1, kind="gaussian")
        means = means - rate * ((alone.curvatures @ means[..., None])[..., 0] - alone.pulls)
    return float(np.trace(moments[0]))


def bent(x, optima):
    """Losses sum_j s(x_j - optimum_j), s(u) = u^2 / 2 for u > 0 and u^2 / 4 below: 1-smooth, not quadratic."""
    away = x - optima
    return (np.where(away > 0, 0.5, 0.25) * away**2).sum(-1)


def bent_gradient(x, optima):
    away = x - optima
    return np.where(away > 0, 1.0, 0.5) * away


def test_b1_holds_with_a_large_mu_on_losses_that_are_not_quadratic():
    rng, runs, clients, steps, rounds, mu = np.random.default_rng(5), 4000, 3, 4, 15, 0.5
    optima = np.array([[1.0, 0.0], [-1.0, 0.5], [0.0, -0.5]])
    # The slopes of s differ from their mean over clients by no more than this; c_h = 0.
    grid = np.stack(np.meshgrid(np.linspace(-9, 9, 181), np.linspace(-9, 9, 181)), -1).reshape(-1, 2)
    gradients = np.stack([bent_gradient(grid, o) for o in optima])
    sigma_h2 = float(((gradients - gradients.mean(0)) ** 2).sum(-1).max())
    constants = replace(isotropic(0.0, dim=2).constants(), sigma_h2=1.05 * sigma_h2)
    rate = b1_caps(constants, steps=steps).rate
    start = np.array([2.0, -1.5])
    setting = Setting(clients, steps, rounds, rate, mu)
    lowest = min(np.mean([bent(p, o) for o in optima]) for p in grid[np.abs(grid).max(1) < 1.5])
    bound = b1(constants, setting, gap=float(np.mean([bent(start, o) for o in optima]) - lowest))
    x, means = np.tile(start, (runs, 1)), []
    for _ in range(rounds):
        squares = (np.mean([bent_gradient(x, o) for o in optima], axis=0) ** 2).sum(-1)
        means.append(squares.mean() + 5 * squares.std() / math.sqrt(runs))
        ends = []
        for own in optima:
            walk = x.copy()
            for _ in range(steps):
                z = rng.normal(size=walk.shape)
                slope = (bent(walk + mu * z, own) - bent(walk - mu * z, own)) / (2 * mu)
                walk -= rate * slope[:, None] * z
            ends.append(walk)
        x = np.mean(ends, axis=0)
    assert 0 < np.mean(means) <= bound.total


def test_the_exact_recursion_is_the_mean_of_sampled_runs():
    federation, start = random_federation(3, dim=3, clients=3, spread=1.0, tilt=0.2, wobble=0.5, noise=0.2)
    losses, _ = trajectory(federation, start, rate=0.05, steps=3, rounds=4)
    ends = sampled(federation, start, rate=0.05, steps=3, rounds=4, runs=40_000, seed=1)
    error = ends.std() / math.sqrt(len(ends))
    assert abs(ends.mean() - losses[-1]) < 5 * error
    # The interval is tight: it excludes the value one round earlier.
    assert abs(ends.mean() - losses[-2]) > 10 * error


def test_the_federations_keep_their_assumptions():
    rng = np.random.default_rng(0)
    for seed in range(50):
        federation, _ = random_federation(seed, dim=3, clients=3, spread=1.0, tilt=0.2, wobble=0.5, noise=0.1)
        constants = federation.constants()
        for x in rng.normal(size=(20, 3)) * 10 ** rng.uniform(-1, 2, (20, 1)):
            gradient = federation.curvature @ x - federation.pull
            apart = federation.curvatures @ x - federation.pulls - gradient
            allowed = constants.c_h * gradient @ gradient + constants.sigma_h2
            assert (apart**2).sum(1).max() <= allowed * ROUNDING


def test_the_printed_bounds_beside_them_are_impossible_where_clients_differ():
    impossible = 0
    for seed in range(25):
        federation, start = random_federation(seed, dim=4, clients=3, spread=2.0)
        constants, gap = federation.constants(), federation.gap(start)
        rate = paper_caps(constants, clients=3, steps=5, variant="paper_main").rate
        _, squares = trajectory(federation, start, rate=rate, steps=5, rounds=200)
        least = min(squares[:-1])
        held, *printed = global_bounds(constants, Setting(3, 5, 200, rate, 1e-3), gap=gap)
        assert least <= held.total
        for bound in printed:
            assert bound.total == sum(bound.terms.values())
            assert bound.vacuous == (bound.total <= 0 or bound.total >= 2 * constants.smoothness * gap)
            impossible += bound.total <= 0
    assert impossible > 20


def test_the_printed_bounds_are_false_though_not_impossible_where_batches_are_noisy():
    federation, start = isotropic(0.0, noise=2.0), np.full(4, 0.5)
    constants, gap = federation.constants(), federation.gap(start)
    rate = paper_caps(constants, clients=3, steps=5).rate
    _, squares = trajectory(federation, start, rate=rate, steps=5, rounds=300)
    held, *printed = global_bounds(constants, Setting(3, 5, 300, rate, 1e-3), gap=gap)
    assert min(squares[:-1]) <= held.total
    for bound in printed:
        assert not bound.vacuous
        assert 0 < bound.total < 0.7 * min(squares[:-1])


def test_bounds_beside_each_other_are_those_that_apply():
    same, apart = isotropic(0.0).constants(), isotropic(1.0).constants()
    one, five = Setting(3, 1, 10, 1e-3, 1e-3), Setting(3, 5, 10, 1e-3, 1e-3)
    assert [b.name for b in global_bounds(same, one, gap=1.0)] == [
        "B1",
        "B2",
        "Corollary 3.2, paper_appendix",
        "Corollary 3.2, paper_main",
    ]
    assert [b.name.split(",")[0] for b in global_bounds(apart, five, gap=1.0)] == ["B1", *["Corollary 3.5"] * 2]
    assert [b.name.split(",")[0] for b in step_bounds(apart, one, gradient2=1.0)] == ["B1", "B2", *["Theorem 3.4"] * 2]
    assert [b.name.split(",")[0] for b in step_bounds(same, five, gradient2=1.0)] == ["B1", *["Theorem 3.1"] * 2]
    assert global_bounds(same, one, gap=1.0)[2] == corollary_3_2(same, one, gap=1.0)
    assert global_bounds(apart, five, gap=1.0)[2] == corollary_3_5(apart, five, gap=1.0, variant="paper_main")
