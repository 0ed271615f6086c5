"""Planted spectra come back by every estimator with the samples its docstring asks for: trace, norm, rank."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh

from fedmezo.errors import ConfigError
from fedmezo.theory.rank import Extremes, from_curvatures, from_spectrum, lanczos, verdict

DIM = 2000

SPECTRA = {
    "one": np.r_[5.0, np.zeros(DIM - 1)],
    "ten equal": np.r_[np.full(10, 3.0), np.zeros(DIM - 10)],
    "geometric": 4 * 0.9 ** np.arange(DIM),
    "power law": 7 / np.arange(1, DIM + 1) ** 1.2,
    "a spike over a floor": np.r_[50.0, np.full(DIM - 1, 0.5)],
    "flat": np.full(DIM, 2.0),
}


def rank_of(values):
    return values.sum() / np.abs(values).max()


def gaussian(values, *, count, seed=0):
    draw = np.random.default_rng(seed)
    return [float(draw.standard_normal(len(values)) ** 2 @ values) for _ in range(count)]


def mixed(values, *, seed=3):
    """A dense matrix with these eigenvalues: a diagonal one would hide mistakes that only its off-diagonal shows."""
    draw = np.random.default_rng(seed)
    flips = [draw.standard_normal(len(values)) for _ in range(2)]

    def turn(vector, order):
        for flip in order:
            vector = vector - 2 * flip * (flip @ vector) / (flip @ flip)
        return vector

    return lambda vector: turn(values * turn(vector, flips), flips[::-1])


def spectrum(values, *, count, steps=40, seed=0):
    draw, product = np.random.default_rng(seed), mixed(values)
    samples, squares = [], []
    for _ in range(count):
        signs = draw.integers(2, size=len(values)) * 2.0 - 1
        found = product(signs)
        samples.append(float(signs @ found))
        squares.append(float(found @ found))
    extremes = lanczos(product, draw.standard_normal(len(values)), steps=steps)
    return from_spectrum(samples, extremes=extremes, squares=squares)


@pytest.mark.parametrize("name", SPECTRA)
def test_spectrum_recovers_a_planted_rank(name):
    values = SPECTRA[name]
    found = spectrum(values, count=300)
    assert found.rank == pytest.approx(rank_of(values), rel=0.1)
    assert found.trace == pytest.approx(values.sum(), rel=0.1)
    assert found.frobenius2 == pytest.approx((values**2).sum(), rel=0.1)
    assert found.lambda_max == found.norm == pytest.approx(values.max(), rel=1e-3)
    low, high = found.intervals["rank"]
    assert low <= found.rank <= high
    assert not found.note


@pytest.mark.parametrize("name", SPECTRA)
def test_curvatures_recover_a_planted_stable_rank(name):
    """Ten times the samples at which the docstring promises 10 % as one standard error."""
    values = SPECTRA[name]
    found = from_curvatures(gaussian(values, count=6000))
    assert found.trace == pytest.approx(values.sum(), rel=0.1)
    assert found.frobenius2 == pytest.approx((values**2).sum(), rel=0.1)
    assert found.rank == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=0.1)


@pytest.mark.parametrize("name", ["one", "ten equal", "flat"])
def test_curvatures_equal_the_rank_where_the_eigenvalues_are_equal(name):
    values = SPECTRA[name]
    assert from_curvatures(gaussian(values, count=6000, seed=4)).rank == pytest.approx(rank_of(values), rel=0.1)


@pytest.mark.parametrize("name", SPECTRA)
def test_curvatures_bound_the_rank_from_above_and_the_norm_from_below(name):
    values = SPECTRA[name]
    found = from_curvatures(gaussian(values, count=6000, seed=1))
    assert found.intervals["rank"][1] >= rank_of(values)
    assert found.intervals["norm"][0] <= values.max()


@pytest.mark.parametrize(("equal", "promised"), [(1, math.sqrt(6)), (4, math.sqrt(3)), (400, math.sqrt(2))])
def test_the_standard_error_is_what_the_docstring_says(equal, promised):
    values = np.ones(equal)
    found = [from_curvatures(gaussian(values, count=256, seed=seed), resamples=2).rank for seed in range(200)]
    assert np.std(found) / equal == pytest.approx(promised / math.sqrt(256), rel=0.25)


@pytest.mark.parametrize("name", ["ten equal", "geometric", "flat"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(name):
    values = SPECTRA[name][:50]
    truth = {"trace": values.sum(), "rank": values.sum() ** 2 / (values**2).sum()}
    found = [from_curvatures(gaussian(values, count=64, seed=seed), resamples=300) for seed in range(200)]
    for key, wanted in truth.items():
        held = np.mean([one.intervals[key][0] <= wanted <= one.intervals[key][1] for one in found])
        assert 0.8 <= held <= 0.99, key


def test_lanczos_agrees_with_arpack():
    values = np.random.default_rng(0).standard_normal(300) * np.linspace(0.1, 4, 300)
    product = mixed(values)
    operator = LinearOperator((300, 300), matvec=product, dtype=np.float64)
    wanted = np.sort(eigsh(operator, k=2, which="BE", return_eigenvectors=False))
    found = lanczos(product, np.random.default_rng(1).standard_normal(300), steps=80)
    assert (found.smallest, found.largest) == pytest.approx(tuple(wanted), rel=1e-6)


@given(st.integers(1, 30), st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_lanczos_stays_inside_and_its_error_reaches_an_eigenvalue(steps, seed):
    values = np.random.default_rng(seed).standard_normal(60) ** 3
    found = lanczos(mixed(values), np.random.default_rng(seed + 1).standard_normal(60), steps=steps)
    slack = 1e-9 * np.abs(values).max()
    assert values.min() - slack <= found.smallest <= found.largest <= values.max() + slack
    assert np.abs(values - found.largest).min() <= found.largest_error + slack
    assert np.abs(values - found.smallest).min() <= found.smallest_error + slack


def test_lanczos_stops_when_the_space_is_exhausted():
    values = np.r_[np.full(10, 3.0), np.zeros(90)]
    found = lanczos(mixed(values), np.random.default_rng(0).standard_normal(100), steps=50)
    assert found.steps < 5
    assert (found.smallest, found.largest) == pytest.approx((0, 3), abs=1e-6)


def test_lanczos_in_float32_keeps_its_type():
    values = SPECTRA["geometric"].astype(np.float32)
    seen = []

    def product(vector):
        seen.append(vector.dtype)
        return values * vector

    found = lanczos(product, np.random.default_rng(0).standard_normal(DIM, dtype=np.float32), steps=60)
    assert set(seen) == {np.dtype(np.float32)}
    assert found.largest == pytest.approx(4, rel=1e-3)


def test_the_larger_absolute_eigenvalue_is_the_norm_of_an_indefinite_matrix():
    values = np.r_[-8.0, np.full(100, 1.0), np.zeros(DIM - 101)]
    found = spectrum(values, count=300)
    assert found.norm == pytest.approx(8, rel=1e-3)
    assert found.lambda_min == pytest.approx(-8, rel=1e-3)
    assert found.lambda_max == pytest.approx(1, rel=0.01)
    assert found.rank == pytest.approx(92 / 8, rel=0.1)


@pytest.mark.parametrize("values", [np.r_[-8.0, np.ones(3)], -np.ones(50)])
def test_a_negative_trace_is_no_rank_and_says_so(values):
    for found in (from_curvatures(gaussian(values, count=400)), spectrum(values, count=400, steps=5)):
        assert math.isnan(found.rank)
        assert "not positive" in found.note
        assert found.trace == pytest.approx(values.sum(), rel=0.3)
        assert verdict(found.rank, found.intervals.get("rank"), limit=200) == "open"


def test_a_trace_that_may_be_zero_is_no_rank_by_curvatures():
    values = np.r_[np.full(50, 5.0), np.full(49, -5.0)]
    made = [gaussian(values, count=40, seed=seed) for seed in range(60)]
    found = [from_curvatures(samples) for samples in made if np.mean(samples) > 0]
    without = [one for one in found if math.isnan(one.rank) and math.isnan(one.norm)]
    assert len(without) > 0.8 * len(found) > 20
    assert all("may be 0" in one.note for one in without)


def test_a_rank_below_one_by_curvatures_tells_of_negative_eigenvalues():
    values = np.r_[np.full(20, 5.0), np.full(17, -5.0)]
    found = from_curvatures(gaussian(values, count=6000))
    assert found.rank < 1 and "negative" in found.note
    assert not from_curvatures(gaussian(SPECTRA["ten equal"], count=200)).note


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_finite_give_no_number_but_a_sentence(bad):
    ends = Extremes(1.0, 0.0, 0.0, 0.0, 3)
    for found in (from_curvatures([1.0, 2.0, bad, 3.0]), from_spectrum([1.0, 2.0, bad, 3.0], extremes=ends)):
        assert math.isnan(found.trace) and math.isnan(found.rank)
        assert "1 of 4 samples" in found.note


def test_a_product_that_is_not_finite_gives_no_number():
    ends = lanczos(lambda vector: vector * math.nan, np.ones(5), steps=3)
    found = from_spectrum([1.0, 2.0, 3.0], extremes=ends)
    assert math.isnan(found.rank) and "not finite" in found.note


def test_equal_samples_and_a_zero_matrix_are_told():
    assert "equal" in from_curvatures([2.0] * 5).note
    found = from_spectrum([1e-9] * 3, extremes=Extremes(0.0, 0.0, 0.0, 0.0, 1))
    assert math.isnan(found.rank) and found.note == "H is zero."


def test_the_interval_of_the_rank_has_the_residual_in_it():
    samples = [10.0, 11.0, 9.0, 10.0]
    sure = from_spectrum(samples, extremes=Extremes(2.0, 0.0, 0.0, 0.0, 9))
    loose = from_spectrum(samples, extremes=Extremes(2.0, 0.0, 2.0, 0.0, 2))
    assert loose.rank == sure.rank == 5
    assert loose.intervals["rank"][0] == pytest.approx(sure.intervals["rank"][0] / 2)
    assert loose.intervals["rank"][1] == sure.intervals["rank"][1]


def test_too_few_samples_are_refused():
    with pytest.raises(ConfigError, match="at least 3"):
        from_curvatures([1.0, 2.0])
    with pytest.raises(ConfigError, match="one square per sample"):
        from_spectrum([1.0, 2.0, 3.0], extremes=Extremes(1.0, 0.0, 0.0, 0.0, 1), squares=[1.0])
    with pytest.raises(ConfigError, match="at least one step"):
        lanczos(lambda vector: vector, np.ones(3), steps=0)


@pytest.mark.parametrize(
    ("interval", "wanted"), [((1, 200), "holds"), ((201, 300), "fails"), ((150, 250), "open"), (None, "open")]
)
def test_a_claim_is_judged_by_the_whole_interval(interval, wanted):
    assert verdict(180.0, interval, limit=200) == wanted
