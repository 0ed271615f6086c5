"""Constants measured from forward passes are those that were planted, and their intervals hold them."""

import math

import numpy as np
import pytest
import torch
from quadratics import Federation
from tiny_runs import small, write_records
from toys import ToyBench

from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Point
from fedmezo.studies.build import build
from fedmezo.studies.config import changed
from fedmezo.studies.constants import estimate, measure_built, measure_constants
from fedmezo.studies.measured import load_measured
from fedmezo.studies.moments import cover_line, fit_line, moments, spearman
from fedmezo.studies.run import run
from fedmezo.studies.sampling import Sampled, SamplingOptions, exact_config, led_on, places, sample, steps_apart
from fedmezo.theory.constants import Constants
from fedmezo.theory.rank import from_curvatures
from fedmezo.zo.noise import derive_seed, noise
from fedmezo.zo.params import Params

DIM = 24
ANISOTROPY = 0.15


def federation(*, tilt=0.6, apart=3.0, wobble=0.5, noise=0.05):
    """Returns four clients with |grad f_i - grad f|^2 = tilt^2 |grad f|^2 + apart^2, on the mean over clients.

    Their cross terms cancel, for each sign of the tilt comes with each sign of the pull.
    """
    rng = np.random.default_rng(5)
    matrix = np.diag(1 + ANISOTROPY * rng.uniform(-1, 1, DIM))
    pull = rng.normal(size=DIM)
    pull *= apart / np.linalg.norm(pull)
    signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    curvatures = np.stack([(1 + tilt * turn) * matrix for turn, _ in signs])
    return Federation(curvatures, np.stack([side * pull for _, side in signs]), wobble, noise)


PLANTED = {"c_g": 1.25, "sigma_g2": 0.05 * DIM, "c_h": 0.36, "sigma_h2": 9.0}


def starts():
    """Returns three points with gradients of the lengths 1, 4 and 8."""
    rng = np.random.default_rng(6)
    found = []
    for length in (1, 4, 8):
        x = rng.normal(size=DIM)
        found.append(x * length / np.linalg.norm(federation().curvature @ x))
    return found


def batch_gradient(fed, x, client, sign, jitter):
    return (1 + fed.wobble * sign) * (fed.curvatures[client] @ x - fed.pulls[client]) + jitter


def drawn(fed, points, *, directions, seed, batches=2):
    """Returns the exact slopes of a quadratic federation, along the same directions and on the same batches."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(directions, DIM))
    shape = (directions, len(fed.pulls), batches)
    signs = rng.choice([-1.0, 1.0], size=shape)
    jitters = rng.normal(size=(*shape, DIM)) * math.sqrt(fed.noise)
    bends = ((z @ fed.curvature) * z).sum(1)
    found = []
    for number, x in enumerate(points):
        own = np.stack([fed.curvatures[i] @ x - fed.pulls[i] for i in range(len(fed.pulls))])
        slopes = (1 + fed.wobble * signs) * (z @ own.T)[..., None] + np.einsum("jd,jibd->jib", z, jitters)
        found.append(Sampled(str(number), slopes, np.zeros(shape[:2]), bends, from_curvatures(list(bends))))
    return found


def test_every_constant_is_the_planted_one_within_ten_percent_of_8000_directions():
    measured = estimate(drawn(federation(), starts(), directions=8000, seed=1), dim=DIM, asked=SamplingOptions())
    for name, planted in PLANTED.items():
        assert getattr(measured.constants, name) == pytest.approx(planted, rel=0.1), name
    truth = Constants(DIM, np.trace(federation().curvature) / 1.1, 1.05)
    assert measured.constants.effective_rank == pytest.approx(DIM, rel=0.1)  # nearly equal eigenvalues
    assert measured.constants.smoothness == pytest.approx(truth.smoothness, rel=0.1)


def test_squares_and_cosines_of_each_client_are_the_true_ones():
    fed, points = federation(), starts()
    measured = estimate(drawn(fed, points, directions=8000, seed=2), dim=DIM, asked=SamplingOptions())
    for row in measured.clients:
        x = points[int(row.point)]
        own, whole = fed.curvatures[row.client] @ x - fed.pulls[row.client], fed.curvature @ x
        assert row.gradient2 == pytest.approx(own @ own, rel=0.1)
        assert row.batch2 == pytest.approx(1.25 * own @ own + 0.05 * DIM, rel=0.1)
        assert row.apart2 == pytest.approx((own - whole) @ (own - whole), rel=0.1)
        assert row.cosine == pytest.approx(own @ whole / math.sqrt(own @ own * (whole @ whole)), abs=0.1)
    assert [row.gradient2 for row in measured.rows] == pytest.approx([1, 16, 64], rel=0.1)


def test_bends_along_the_gradient_and_along_the_steps_are_the_true_ones():
    fed, points = federation(), starts()
    measured = estimate(drawn(fed, points, directions=8000, seed=3), dim=DIM, asked=SamplingOptions(resamples=200))
    for row, x in zip(measured.rows, points, strict=True):
        whole, matrix = fed.curvature @ x, fed.curvature
        low, high = row.intervals["along"]
        assert low <= whole @ matrix @ whole <= high
        own = np.stack([one @ x - pull for one, pull in zip(fed.curvatures, fed.pulls, strict=True)])
        bend = 1.25 * ((own @ matrix) * own).sum(1).mean() + fed.noise * np.trace(matrix)
        square = 1.25 * (own**2).sum(1).mean() + fed.noise * DIM
        assert row.stretch == pytest.approx(2 * bend + np.trace(matrix) * square, rel=0.1)


def test_intervals_hold_the_planted_constants_in_nine_of_ten_draws():
    held = dict.fromkeys(PLANTED, 0)
    for seed in range(100):
        measured = estimate(drawn(federation(), starts(), directions=128, seed=seed), dim=DIM, asked=SamplingOptions())
        for name, planted in PLANTED.items():
            low, high = measured.intervals[name]
            held[name] += low <= planted <= high
    assert min(held.values()) >= 90, held


def test_equal_clients_have_no_heterogeneity():
    fed = federation(tilt=0, apart=0)
    held = 0
    for seed in range(20):
        measured = estimate(drawn(fed, starts(), directions=64, seed=seed), dim=DIM, asked=SamplingOptions())
        low, _ = measured.intervals["sigma_h2"]
        held += low == 0
    assert held >= 19


def test_batches_without_noise_have_a_c_g_of_one():
    measured = estimate(
        drawn(federation(wobble=0, noise=0), starts(), directions=64, seed=0), dim=DIM, asked=SamplingOptions()
    )
    assert (measured.constants.c_g, measured.constants.sigma_g2) == pytest.approx((1, 0), abs=1e-9)


def test_covering_constants_lie_above_every_row():
    measured = estimate(drawn(federation(), starts(), directions=100, seed=4), dim=DIM, asked=SamplingOptions())
    over, whole = measured.covering, {row.point: row.gradient2 for row in measured.rows}
    for row in measured.clients:
        assert over.c_g * row.gradient2 + over.sigma_g2 >= row.batch2 * (1 - 1e-9)
        assert over.c_h * whole[row.point] + over.sigma_h2 >= row.apart2 * (1 - 1e-9)


def test_an_indefinite_hessian_gets_a_smoothness_that_no_eigenvalue_passes():
    values = np.concatenate([np.full(12, -2.0), np.full(12, 1.5)])
    z = np.random.default_rng(0).normal(size=(4000, DIM))
    slopes = z[:, :4, None].repeat(2, 2)
    bends = (z**2) @ values
    one = Sampled("here", slopes, np.zeros((4000, 4)), bends, from_curvatures(list(bends)))
    found = estimate([one, one], dim=DIM, asked=SamplingOptions())
    assert found.constants.smoothness == pytest.approx(math.sqrt(values @ values), rel=0.1)
    assert found.constants.effective_rank == 1
    assert math.isnan(found.intervals["effective_rank"][0])


def toy(fed, x):
    def loss(tensors, client, number, _step):
        rng = np.random.default_rng([client, number])
        sign, jitter = rng.choice([-1.0, 1.0]), rng.normal(size=DIM) * math.sqrt(fed.noise)
        at = tensors["x"].double().numpy()
        base = at @ fed.curvatures[client] @ at / 2 - fed.pulls[client] @ at
        return float((1 + fed.wobble * sign) * base + jitter @ at)

    return ToyBench(Params({"x": torch.tensor(x, dtype=torch.float32)}), loss)


def test_slopes_of_a_bench_are_the_derivatives_along_named_directions():
    fed, x = federation(), starts()[1]
    asked, bench = SamplingOptions(directions=8), toy(fed, x)
    found = sample(
        bench, ("here", bench.params), clients=range(4), names=lambda _, number: (number, 0), asked=asked, seed=3
    )
    assert bench.forwards == asked.passes(4)
    for direction, client, batch in np.ndindex(8, 4, 2):
        rng = np.random.default_rng([client, 2 * direction + batch])
        gradient = batch_gradient(fed, x, client, rng.choice([-1.0, 1.0]), rng.normal(size=DIM) * math.sqrt(fed.noise))
        z = noise(derive_seed("constants", 3, direction), "x", size=DIM).double().numpy()
        assert found.slopes[direction, client, batch] == pytest.approx(z @ gradient, rel=1e-3, abs=1e-3)


def test_a_bench_gives_intervals_that_hold_what_was_planted():
    fed, points = federation(), starts()
    asked = SamplingOptions(directions=100)
    bench = toy(fed, points[0])
    named = [(str(n), Params({"x": torch.tensor(x, dtype=torch.float32)})) for n, x in enumerate(points)]
    how = {"clients": range(4), "names": lambda _, number: (number, 0), "asked": asked, "seed": 0}
    found = [sample(bench, place, **how) for place in named]
    measured = estimate(found, dim=bench.params.dim, asked=asked, forwards=bench.forwards)
    for name, planted in PLANTED.items():
        low, high = measured.intervals[name]
        assert low <= planted <= high, name
    assert measured.forwards == 3 * asked.passes(4)


def test_batches_of_one_direction_never_share_a_pass_through_the_data():
    for size, batch, local_steps in [(10, 3, 4), (2, 4, 3), (7, 7, 1), (100, 1, 30), (5, 2, 2)]:
        names = steps_apart([size], batch=batch, local_steps=local_steps, count=6)
        seen = set()
        for number in range(6):
            round_number, step = names(0, number)
            assert 0 <= step < local_steps
            first = (round_number * local_steps + step) * batch
            passes = {place // size for place in range(first, first + batch)}
            assert not passes & seen
            seen |= passes


def test_a_square_is_a_product_of_different_batches():
    one = moments([[[1.0, 3.0], [2.0, 5.0]]])
    assert one.own.tolist() == [[3.0, 10.0]]
    assert one.batch.tolist() == [[5.0, 14.5]]
    assert one.whole.tolist() == [pytest.approx((3 + 10 + 2 * 2 * 3.5) / 4)]


def test_a_fitted_line_keeps_its_borders():
    x, ones = np.array([1.0, 2.0, 3.0]), np.ones(3)
    assert fit_line(x, 2 * x + 1, weights=ones) == pytest.approx((2, 1))
    assert fit_line(x, 4 - x, weights=ones) == pytest.approx((0, 2))
    assert fit_line(x, 3 * x - 1, weights=ones) == pytest.approx((np.dot(x, 3 * x - 1) / 14, 0))
    assert fit_line(x, 0.5 * x, weights=ones, least=1) == pytest.approx((1, 0))
    assert fit_line(ones, ones * 3, weights=ones) == pytest.approx((0, 3))


def test_fits_are_those_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.normal(size=(2, 7))
        want, _ = optimize.nnls(np.stack([x, np.ones(7)], 1), y)
        assert np.array(fit_line(x, y, weights=np.ones(7))) == pytest.approx(want, abs=1e-9)
        ties = rng.integers(3, size=(2, 7))
        if ties[0].std() and ties[1].std():
            assert spearman(*ties) == pytest.approx(stats.spearmanr(*ties).statistic)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_a_cover_touches_and_is_the_lowest():
    assert cover_line([1, 2, 3], [2, 4, 6]) == pytest.approx((2, 0))
    factor, floor = cover_line([1, 2, 3], [5, 4, 3])
    assert (factor, floor) == (0, 5)
    assert cover_line([1, 2, 4], [3, 4, 6]) == pytest.approx((1, 2))
    assert cover_line([1, 2], [1, 1], least=1) == (1, 0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small(write_records(tmp_path_factory.mktemp("data")), algorithm={"law": "rademacher"})


def test_constants_are_saved_and_loaded(config, tmp_path):
    said = []
    measured = measure_constants(config, asked=SamplingOptions(directions=8, rounds=1, resamples=100), say=said.append)
    assert [row.point for row in measured.rows] == ["start", "start + 0.01 z", "after 1 round"]
    assert len(measured.clients) == 9 and len(said) == 3
    assert measured.constants.dim == build(config).bench.params.dim
    measured.save(tmp_path / "c.json")
    again = load_measured(tmp_path / "c.json")
    assert (again.constants, again.covering, again.of) == (measured.constants, measured.covering, measured.of)
    assert [row.loss for row in again.clients] == [row.loss for row in measured.clients]
    assert again.rows[0].intervals["loss"] == measured.rows[0].intervals["loss"]


def test_the_places_leave_from_the_same_start(config):
    built = build(exact_config(config))
    assert built.config.algorithm.law == "gaussian"
    start = built.bench.params.digest()
    digests = {label: params.digest() for label, params in places(built, SamplingOptions(points=4, rounds=1))}
    assert digests["start"] == start
    assert len(set(digests.values())) == 4 and list(digests)[-1] == "after 2 rounds"


def test_the_places_lead_where_a_run_does(config, tmp_path):
    exact = changed(exact_config(config), {"algorithm": {"rate": 1e-2}, "guard": {"batches": 0}})
    built = build(exact)
    assert list(led_on(built, rounds=2)) == [1, 2]
    shorter = changed(exact, {"federation": {"rounds": 2}})
    assert run(shorter, out=tmp_path / "r").digest == built.bench.params.digest()


def test_files_that_hold_something_else_are_refused(tmp_path):
    for text in ("{}", "[]", "nonsense", '{"format": 1}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ConfigError, match="does not hold constants"):
            load_measured(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_measured(tmp_path / "none.json")


def test_unusable_slopes_are_refused():
    for shape in ((4, 2), (4, 2, 1)):
        with pytest.raises(ConfigError, match="at least 2 batches"):
            moments(np.ones(shape))
    with pytest.raises(ConfigError, match="not finite"):
        moments(np.full((4, 2, 2), np.nan))
    flat = Sampled("flat", np.zeros((8, 2, 2)), np.zeros((8, 2)), np.ones(8), from_curvatures([1.0, 2.0, 3.0]))
    with pytest.raises(ConfigError, match="Every slope was 0"):
        estimate([flat, flat], dim=4, asked=SamplingOptions())


@pytest.mark.parametrize("wrong", [{"directions": 4}, {"batches": 1}, {"points": 1}, {"mu": 0.0}, {"spread": -1.0}])
def test_too_little_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingOptions(**wrong)


def test_intervals_of_a_language_model_hold_what_backpropagation_finds(config):
    few = config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": 24})})
    built = build(exact_config(few))
    bench, batch, steps = built.bench, built.config.federation.batch_size, built.config.federation.local_steps
    mean, squares = [], []
    for client, size in built.data.sizes.items():
        names = [divmod(number, steps) for number in range(2 * size // batch)]
        found = [bench.gradient(Point(bench.params, 0, 0.0, client, *name))[1] for name in names]
        gradients = torch.stack([torch.cat([found_in.flatten() for _, found_in in sorted(g.items())]) for g in found])
        mean.append(gradients.double().mean(0))
        squares.append(float((gradients.double() ** 2).sum(1).mean()))
    own = torch.stack(mean)
    whole = own.mean(0)
    start = measure_built(built, asked=SamplingOptions(directions=64, points=2, resamples=200)).rows[0]
    truth = {
        "gradient2": float(whole @ whole),
        "batch2": sum(squares) / len(squares),
        "apart2": float(((own - whole) ** 2).sum(1).mean()),
    }
    for name, value in truth.items():
        low, high = start.intervals[name]
        assert low <= value <= high, (name, value, start)
