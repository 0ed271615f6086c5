"""Estimators: exactness, mean and second moment, clipping."""

import math
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmezo.zo.estimate import (
    clip_slope,
    coefficient,
    forward_difference,
    momentum_powers,
    momentum_sums,
    robust_scale,
    slope_limit,
    step_coefficients,
    two_point,
)
from fedmezo.zo.noise import noise

SLOPES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=20)


def quadratic(dim: int):
    """A loss 1/2 (x-t)'H(x-t) with eigenvalues 0.1..3 and its gradient, float64."""
    curvature = torch.linspace(0.1, 3, dim, dtype=torch.float64)
    target = torch.linspace(-1, 1, dim, dtype=torch.float64)
    return lambda x: 0.5 * float(curvature @ (x - target) ** 2), lambda x: curvature * (x - target), curvature


def samples(loss, point, *, mu, count, estimate):
    """Returns (count, dim) estimates slope * z with independent directions."""
    rows = []
    for seed in range(count):
        z = noise(seed, "x", size=point.numel()).double()
        if estimate is two_point:
            slope = two_point(loss(point + mu * z), loss(point - mu * z), mu=mu)
        else:
            slope = estimate(loss(point + mu * z), loss(point), mu=mu)
        rows.append(slope * z)
    return torch.stack(rows)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0])
def test_two_point_is_exact_on_quadratics_for_every_mu(mu):
    loss, gradient, _ = quadratic(30)
    x = torch.full((30,), 0.3, dtype=torch.float64)
    z = noise(5, "x", size=30).double()
    assert two_point(loss(x + mu * z), loss(x - mu * z), mu=mu) == pytest.approx(float(gradient(x) @ z), rel=1e-5)


def test_the_mean_is_the_gradient_and_the_second_moment_is_d_plus_2_on_a_quadratic():
    dim, count = 20, 20_000
    loss, gradient, _ = quadratic(dim)
    x = torch.full((dim,), 0.5, dtype=torch.float64)
    e = samples(loss, x, mu=1e-2, count=count, estimate=two_point)
    g = gradient(x)
    # Five standard errors: each component of slope * z has variance at most 2 |g|^2 around g.
    assert (e.mean(0) - g).abs().max() < 5 * math.sqrt(2 * float(g @ g) / count)
    squares = (e**2).sum(1)
    error = 5 * float(squares.std()) / math.sqrt(count)
    assert abs(float(squares.mean()) - (dim + 2) * float(g @ g)) < error


def mlp_loss():
    """A two-layer perceptron's squared error as a function of 16 parameters, float64, differentiable."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(16, 3, generator=generator).double(), torch.randn(16, generator=generator).double()
    first = torch.randn(4, 3, generator=generator).double()
    return lambda x: ((torch.tanh(inputs @ (first + x[:12].view(4, 3)).T) @ x[12:] - labels) ** 2).mean()


def mlp_gradient(x):
    at = x.clone().requires_grad_(True)
    return torch.autograd.grad(mlp_loss()(at), at)[0]


def test_the_mean_is_the_gradient_of_the_smoothed_loss_on_an_mlp():
    loss, dim, mu, count = mlp_loss(), 16, 1.0, 20_000
    x = torch.linspace(-0.5, 0.5, dim, dtype=torch.float64)
    e = samples(lambda v: float(loss(v)), x, mu=mu, count=count, estimate=two_point)
    # grad F_mu(x) = E grad F(x + mu z), by backpropagation, over directions the estimate did not use.
    others = range(count, count + 4000)
    smoothed = torch.stack([mlp_gradient(x + mu * noise(seed, "x", size=dim).double()) for seed in others])
    spread = 5 * (e.std(0) / math.sqrt(count) + smoothed.std(0) / math.sqrt(len(others)))
    assert ((e.mean(0) - smoothed.mean(0)).abs() < spread).all()
    # The interval is tight enough to tell the smoothed gradient from the plain one.
    assert not ((e.mean(0) - mlp_gradient(x)).abs() < spread).all()


def test_the_second_moment_is_d_plus_2_on_an_mlp():
    loss, dim, count = mlp_loss(), 16, 20_000
    x = torch.linspace(-0.5, 0.5, dim, dtype=torch.float64)
    squares = (samples(lambda v: float(loss(v)), x, mu=1e-4, count=count, estimate=two_point) ** 2).sum(1)
    g = mlp_gradient(x)
    error = 5 * float(squares.std()) / math.sqrt(count)
    assert error < 0.1 * float(squares.mean())
    assert abs(float(squares.mean()) - (dim + 2) * float(g @ g)) < error


def test_forward_difference_has_the_gradient_as_mean_and_half_of_it_as_printed():
    loss, gradient, _ = quadratic(20)
    x = torch.full((20,), 0.5, dtype=torch.float64)
    g, mu, count = gradient(x), 1e-3, 20_000
    full = samples(loss, x, mu=mu, count=count, estimate=forward_difference).mean(0)
    half = samples(
        loss, x, mu=mu, count=count, estimate=lambda a, c, *, mu: forward_difference(a, c, mu=mu, paper_eq2_scale=True)
    ).mean(0)
    noise_level = 5 * math.sqrt(2 * float(g @ g) / count)
    assert (full - g).abs().max() < noise_level
    assert float(half @ g / (g @ g)) == pytest.approx(0.5, abs=0.05)
    assert torch.allclose(2 * half, full)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_either_loss_not_finite_skips_the_step(bad):
    for pair in ((bad, 1.0), (1.0, bad), (bad, bad)):
        assert math.isnan(two_point(*pair, mu=1e-3))
        assert math.isnan(forward_difference(*pair, mu=1e-3))
    assert coefficient(math.nan, rate=1.0) == 0.0


def test_a_slope_too_large_for_float32_is_skipped_not_infinite():
    assert math.isnan(two_point(1e38, -1e38, mu=1e-3))


def all_steps(slopes, *, directions=1, **options):
    """Returns the coefficients of every step of a walk."""
    ends = range(directions, len(slopes) + 1, directions)
    return [c for end in ends for c in step_coefficients(slopes[:end], directions=directions, **options)]


@given(SLOPES, st.floats(1e-6, 10))
def test_clipped_coefficients_stay_inside_the_limit(slopes, clip):
    for value in all_steps(slopes, rate=2.0, clip=clip, multiple=3.0):
        assert abs(value) <= 2.0 * clip


@given(SLOPES)
def test_an_infinite_clip_is_the_plain_method(slopes):
    got = all_steps(slopes[: len(slopes) // 2 * 2], rate=0.5, directions=2, clip=math.inf, multiple=1.0)
    assert got == [0.0 if math.isnan(s) else -0.5 * s / 2 for s in slopes[: len(slopes) // 2 * 2]]


@given(SLOPES)
def test_the_running_limit_uses_only_slopes_seen_so_far(slopes):
    short = all_steps(slopes[:-1], rate=1.0, clip=0, multiple=3.0)
    assert all_steps(slopes, rate=1.0, clip=0, multiple=3.0)[: len(short)] == short


FREE = {"rate": 0.5, "clip": math.inf, "multiple": 1.0}


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8).filter(any), st.sampled_from([0.25, 8.0]))
def test_a_normalised_step_has_the_length_of_the_rate_whatever_the_scale_of_the_loss(slopes, scale):
    n = len(slopes)
    got = step_coefficients(slopes, directions=n, normalise=True, **FREE)
    assert math.hypot(*got) == pytest.approx(0.5 / math.sqrt(n), rel=1e-6)
    scaled = step_coefficients([scale * s for s in slopes], directions=n, normalise=True, **FREE)
    assert scaled == pytest.approx(got, rel=1e-9)


def test_normalising_unit_slopes_changes_nothing_and_skipped_ones_do_not_count():
    unit = [1.0, -1.0, 1.0, -1.0]
    assert step_coefficients(unit, directions=4, normalise=True, **FREE) == step_coefficients(
        unit, directions=4, **FREE
    )
    with_skip = step_coefficients([3.0, math.nan, -3.0], directions=3, normalise=True, **FREE)
    assert with_skip == pytest.approx([-0.5 / 3, 0.0, 0.5 / 3])
    assert step_coefficients([0.0, 0.0], directions=2, normalise=True, **FREE) == [0.0, 0.0]


def test_factors_multiply_each_coefficient():
    got = step_coefficients([1.0, 2.0], directions=2, factors=(2.0, 0.5), **FREE)
    assert got == [-0.25 * 2, -0.5 * 0.5]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.sampled_from([0.0, 0.3, 0.9]))
def test_momentum_sums_are_the_heavy_ball(pushes, momentum):
    velocity, place = [0.0] * len(pushes), [0.0] * len(pushes)
    for k, push in enumerate(pushes):
        velocity = [momentum * v for v in velocity]
        velocity[k] += push
        place = [p + v for p, v in zip(place, velocity, strict=True)]
    got = momentum_sums(pushes, directions=1, momentum=momentum)
    assert got == pytest.approx(place, rel=2**-11 / (1 - momentum), abs=1e-12)


def test_no_momentum_is_the_plain_walk():
    assert momentum_sums([1.0, 2.0, 3.0, 4.0], directions=2, momentum=0.0) == [1.0, 2.0, 3.0, 4.0]
    assert momentum_powers(0.0) == [1.0]
    powers = momentum_powers(0.9)
    assert powers[-1] >= 2**-12 > 0.9 * powers[-1]


def test_the_running_limit_is_three_robust_deviations():
    slopes = [1.0, -2.0, 3.0, math.nan, 100.0]
    assert robust_scale(slopes) == pytest.approx(1.4826 * median([1, 2, 3, 100]))
    assert slope_limit(slopes, clip=0, multiple=3) == pytest.approx(3 * 1.4826 * 2.5)
    assert slope_limit(slopes, clip=7.0, multiple=3) == 7.0
    assert clip_slope(100.0, limit=7.0) == 7.0
    assert clip_slope(-100.0, limit=7.0) == -7.0
    assert robust_scale([math.nan]) == 0.0


@pytest.mark.parametrize("clip", [0.0, 2.0, math.inf])
def test_a_skipped_direction_stays_skipped_whatever_the_limit(clip):
    numbers = {"rate": 0.1, "directions": 1, "clip": clip, "multiple": 3.0}
    assert step_coefficients([1.0, math.nan], **numbers) == [0.0]
    assert math.isnan(clip_slope(math.nan, limit=2.0))


def test_a_normal_sample_has_a_robust_scale_of_one():
    assert robust_scale(noise(1, "x", size=20_000).tolist()) == pytest.approx(1, abs=0.03)
