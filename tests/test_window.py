"""The usable window of mu: planted errors are found again, and what a build does with it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import Notes, StopAfter, StopError, small

from fedmezo.cli import main
from fedmezo.errors import ConfigError
from fedmezo.studies import window_table as choosing
from fedmezo.studies.build import build
from fedmezo.studies.run import evaluate, resume, run, verify
from fedmezo.studies.window import (
    Window,
    customary_mu,
    ladder,
    measure_window,
    spread_batches,
    window_of,
)
from fedmezo.studies.window_table import moved_words, window_dict, window_table, window_words
from fedmezo.zo.params import Params

BF16 = {"name": "builtin:tiny", "dtype": "bfloat16"}


class Toy:
    """A loss 3 + s x + c x^2 + b x^3 along each direction, rounded to a grid."""

    def __init__(self, *, slope=1.0, curve=0.0, bend=0.0, grid=0.0, largest=math.inf):
        self.params = Params({"w": torch.zeros(1)})
        self.slope, self.curve, self.bend, self.grid, self.largest = slope, curve, bend, grid, largest
        self.calls = []

    def losses(self, points):
        self.calls.append(points)
        return [self._loss(point) for point in points]

    def _loss(self, point):
        if abs(point.offset) > self.largest:
            return math.nan
        draw = np.random.default_rng(point.seed)
        start, slope, bend = draw.uniform(2, 4), self.slope * draw.normal(), self.bend * draw.normal()
        x = point.offset
        loss = start + slope * x + self.curve * x**2 + bend * x**3
        return round(loss / self.grid) * self.grid if self.grid else loss


def look(toy, *, count=16, dtype="float32", **more) -> Window:
    batches = spread_batches(3, local_steps=2, count=count)
    return measure_window(toy, batches=batches, mus=ladder(dtype), **more)


# The law of the two errors


@pytest.mark.parametrize("grid", [1e-6, 1e-5])
@pytest.mark.parametrize("bend", [100.0, 1000.0])
def test_planted_errors_are_found_again(grid, bend):
    window = look(Toy(grid=grid, bend=bend), seed=5)
    # Rounding a loss to a grid errs by grid / sqrt(12); two such errors, over 2 mu.
    rounding = grid / math.sqrt(24)
    assert rounding / 2 < window.rounding < rounding * 2
    assert bend / 2 < window.bend < bend * 2
    optimum = (rounding**2 / (2 * bend**2)) ** (1 / 6)
    assert optimum / 2 < window.best < optimum * 2
    assert 0.6 < window.signal < 1.5


@pytest.mark.parametrize("seed", range(8))
def test_four_directions_find_the_optimum_within_a_factor_of_two(seed):
    grid, bend = 1e-5, 300.0
    optimum = ((grid**2 / 24) / (2 * bend**2)) ** (1 / 6)
    assert optimum / 2 < look(Toy(grid=grid, bend=bend), count=4, seed=seed).best < optimum * 2


def test_a_forward_difference_bends_by_the_curvature():
    window = look(Toy(grid=1e-5, curve=2.0), seed=3, estimator="forward")
    assert window.power == 1
    assert window.bend == pytest.approx(2.0, rel=0.1)
    assert 1 / 2 < window.rounding / (1e-5 / math.sqrt(6)) < 2  # one loss in the middle, one above, over mu
    # Two points see no curvature at all.
    assert look(Toy(curve=2.0), seed=3).bend == pytest.approx(0, abs=1e-6)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_a_window_does_not_depend_on_the_unit_of_the_loss(scale, seed):
    one = look(Toy(grid=1e-5, bend=300.0), count=4, seed=seed)
    toy = Toy(grid=1e-5, bend=300.0)
    toy._loss = lambda point: scale * Toy._loss(toy, point)
    other = look(toy, count=4, seed=seed)
    assert other.best == pytest.approx(one.best, rel=1e-4)
    assert other.signal == pytest.approx(scale * one.signal, rel=1e-4)
    assert [rung.usable for rung in other.rungs] == [rung.usable for rung in one.rungs]


@given(
    grid=st.sampled_from([0.0, 1e-7, 1e-4, 1e-1]),
    bend=st.sampled_from([0.0, 1.0, 1e4, 1e8]),
    slope=st.sampled_from([0.0, 1.0, 50.0]),
    largest=st.sampled_from([0.0, 2e-4, 2e-3, math.inf]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_loss_a_window_is_in_order(grid, bend, slope, largest, seed):
    window = look(Toy(grid=grid, bend=bend, slope=slope, largest=largest), count=4, seed=seed)
    assert min(window.signal, window.rounding, window.bend) >= 0
    low, high = window.rungs[0].mu, window.rungs[-1].mu
    if window.best is not None:
        assert low <= window.best <= high
    assert (window.lowest is None) == (window.highest is None) == (not any(map(window.holds, [window.best or low])))
    if window.lowest is not None:
        assert low <= window.lowest <= window.best <= window.highest <= high
        assert window.holds(window.lowest) and window.holds(window.highest)
    assert all(
        window.error(rung.mu) >= window.error(window.best) * 0.999
        for rung in window.rungs
        if window.best and rung.mu <= window.reach
    )
    assert window_words(window, dtype="bfloat16").endswith(".")
    json.dumps(window_dict(window) | {"rungs": None}, allow_nan=False)


def test_without_any_error_every_mu_is_usable():
    window = look(Toy())
    assert all(rung.usable for rung in window.rungs)
    assert (window.lowest, window.highest) == (window.rungs[0].mu, window.rungs[-1].mu)
    assert window.holds(1e-7)


def test_without_a_bend_the_largest_mu_is_best_and_without_rounding_the_smallest():
    coarse = look(Toy(grid=1e-3), count=64)
    assert coarse.best > 1e-2
    assert look(Toy(bend=1e3)).best == pytest.approx(1e-4, rel=1e-3)


def test_a_flat_loss_has_no_signal_and_says_so():
    window = look(Toy(slope=0.0))
    assert (window.best, window.signal, window.lowest) == (None, 0.0, None)
    assert "the losses do not change" in window_words(window, dtype="float32")


def test_a_slope_that_is_all_rounding_has_no_usable_mu():
    window = look(Toy(slope=1e-2, grid=1e-3, bend=1e5))
    assert window.lowest is None and not window.holds(1e-3)
    told = window_words(window, dtype="bfloat16")
    assert told.startswith("No mu from 0.0001 to 0.032 gives a usable slope here")
    assert 'set model.dtype = "float32" or average more algorithm.directions.' in told
    assert "model.dtype" not in window_words(window, dtype="float32")


def test_losses_that_are_not_finite_end_the_window():
    whole, cut = look(Toy(grid=1e-6, bend=10.0)), look(Toy(grid=1e-6, bend=10.0, largest=2e-2))
    assert math.isnan(cut.rungs[-1].slope) and not cut.rungs[-1].usable
    assert whole.rungs[-1].usable and cut.rungs[-2].usable
    assert cut.highest < 2e-2 < whole.highest
    assert "is not finite" in window_words(cut, dtype="float32", asked=0.04)
    nothing = look(Toy(largest=0.0))
    assert nothing.best is None and nothing.reach == 0
    assert "not finite already near the start" in window_words(nothing, dtype="float32")


def test_a_loss_that_saturates_does_not_pass_for_noise():
    class Wave(Toy):
        draw = np.random.default_rng(0)

        def _loss(self, point):
            return 3 + math.sin(100 * point.offset) + 1e-6 * self.draw.normal()

    window = look(Wave(), dtype="bfloat16")
    assert window.signal == pytest.approx(100, rel=0.1)
    # The slope at mu is sin(100 mu) / mu: 100, 84 and 0 from 1e-3 to 3e-2.
    assert window.holds(1e-2) and not window.holds(3e-2)
    assert window.bend == pytest.approx(100**3 / 6, rel=0.4)


def test_all_points_are_handed_over_at_once_and_few():
    for dtype, estimator, count in (
        ("float32", "two-point", 48),
        ("bfloat16", "two-point", 48),
        ("float32", "forward", 28),
    ):
        toy = Toy()
        window = look(toy, count=4, dtype=dtype, estimator=estimator)
        assert [len(points) for points in toy.calls] == [count] == [window.forwards]


@given(clients=st.integers(1, 50), steps=st.integers(1, 5), count=st.integers(1, 40))
def test_batches_are_different_and_of_many_clients(clients, steps, count):
    batches = spread_batches(clients, local_steps=steps, count=count)
    assert len(set(batches)) == count
    assert all(0 <= client < clients and step < steps for client, _, step in batches)
    assert len({client for client, _, _ in batches}) == min(clients, count)


@pytest.mark.parametrize("mus", [(1e-3, 1e-2), (0.0, 1e-3, 1e-2), (1e-3, 1e-3, 1e-3)])
def test_a_ladder_needs_three_rungs(mus):
    with pytest.raises(ConfigError, match="three mus above 0"):
        measure_window(Toy(), batches=[(0, 0, 0)], mus=mus)


def test_the_customary_mu_is_a_rung():
    for dtype in ("float32", "bfloat16", "float16"):
        assert customary_mu(dtype) in ladder(dtype)


# What a build does with it


@pytest.fixture
def measured(monkeypatch):
    """Counts the measurements of builds."""
    windows = []

    def spy(*given, **more):
        windows.append(window_of(*given, **more))
        return windows[-1]

    monkeypatch.setattr(choosing, "window_of", spy)
    return windows


def test_the_customary_mu_stays_where_it_is_usable(data, measured):
    built = build(small(data))
    assert (built.config.algorithm.mu, built.notes, len(measured)) == (1e-3, (), 1)
    assert measured[0].holds(1e-3)
    assert (built.bench.forwards, built.bench.tokens) == (0, 0)


def test_measuring_changes_no_bit_of_the_model(data):
    assert build(small(data)).bench.params.digest() == build(small(data), measure=False).bench.params.digest()


def test_a_bfloat16_slope_is_noisier_and_its_mu_usable(data, measured):
    exact, narrow = build(small(data)), build(small(data, model=BF16))
    assert narrow.config.algorithm.mu == 1e-2 and exact.config.algorithm.mu == 1e-3
    assert measured[1].rounding > 1e3 * measured[0].rounding
    assert not measured[1].holds(1e-3)


def test_an_unusable_mu_is_moved_and_told(data, monkeypatch, tmp_path):
    def narrow(*given, **more):
        found = window_of(*given, **more)
        return replace(found, lowest=0.011, best=0.0312345, rounding=0.2, bend=1e-9, signal=30.0)

    monkeypatch.setattr(choosing, "window_of", narrow)
    built = build(small(data))
    assert built.config.algorithm.mu == 0.031
    assert built.notes == ("mu is 0.031: at 0.001 a float32 slope here is mostly rounding (signal 30, noise 2e+02).",)
    tasks = built.algorithm.plan(built.algorithm.init(), range(3))
    assert {task.mu for task in tasks} == {0.031}
    told = Notes()
    assert run(small(data), out=tmp_path / "run", watch=told).mu == 0.031
    assert told.notes[0] == built.notes[0]


def test_a_customary_mu_beyond_a_loss_that_is_not_finite_is_left(data, monkeypatch):
    near = look(Toy(grid=1e-7, bend=10.0, largest=5e-4))
    # Only the reach speaks against it: by the two errors a slope there would be mostly signal.
    assert near.best <= near.reach < 1e-3 and near.error(1e-3) < near.signal
    monkeypatch.setattr(choosing, "window_of", lambda *_, **__: near)
    built = build(small(data))
    assert built.config.algorithm.mu == float(f"{near.best:.2g}") < 5e-4
    assert built.notes == (f"mu is {near.best:.2g}: at 0.001 a loss here is not finite.",)


def test_a_mu_in_the_configuration_is_never_changed_nor_measured(data, measured):
    for mu in (1e-7, 1e-3, 1.0):
        built = build(small(data, algorithm={"mu": mu}))
        assert (built.config.algorithm.mu, built.notes) == (mu, ())
    build(small(data, algorithm={"name": "fedavg"}))
    assert measured == []


def test_a_mu_that_is_lost_in_bfloat16_is_told_not_changed(data):
    built = build(small(data, model=BF16, algorithm={"mu": 1e-3}))
    assert built.config.algorithm.mu == 1e-3
    assert built.notes == (
        "mu 0.001 is small for bfloat16: slopes are mostly rounding there, and the run may be lost. Leave algorithm.mu "
        "out for 0.01 or what suits, or look with fedmezo analyze mu.",
    )
    for fine in (
        {"algorithm": {"mu": 5e-3}},
        {"algorithm": {"mu": 1e-3}, "adapter": {"kind": "full"}},
        {"algorithm": {"mu": 1e-3, "name": "fedavg"}},
    ):
        assert build(small(data, model=BF16, **fine)).notes == ()


def test_only_the_start_of_a_run_measures(data, measured, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(StopError):
        run(small(data), out=folder, watch=StopAfter(1))
    assert len(measured) == 1
    resume(folder)
    verify(folder)
    evaluate(folder)
    assert len(measured) == 1


def test_an_exported_model_is_judged_without_measuring(data, measured, tmp_path):
    whole = small(data, output={"export": True}, federation={"rounds": 1})
    run(whole, out=tmp_path / "run")
    evaluate(tmp_path / "run" / "adapter", config=whole)
    assert len(measured) == 1


def test_where_nothing_can_be_judged_the_customary_mu_stays(data, monkeypatch):
    flat = look(Toy(slope=0.0))
    monkeypatch.setattr(choosing, "window_of", lambda *_, **__: flat)
    built = build(small(data))
    assert built.config.algorithm.mu == 1e-3
    assert "the losses do not change" in built.notes[0]


# In words


def test_words_name_the_larger_error():
    window = look(Toy(grid=1e-5, bend=300.0))
    assert "has too much rounding" in moved_words(
        replace(window, rounding=6e-4, signal=1.0), usual=1e-3, dtype="float16"
    )
    assert "is mostly bend" in moved_words(replace(window, bend=1e7, signal=1.0), usual=1e-3, dtype="float32")
    assert '"auto" is 0.001, which is usable.' in window_words(window, dtype="float32")
    assert "algorithm.mu is 0.5: there a slope here is mostly bend" in window_words(window, dtype="float32", asked=0.5)


def test_the_table_has_a_line_per_rung():
    assert window_table(look(Toy())).row_count == 6


def test_the_command_prints_the_window(data, capsys, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(small(data, model=BF16).to_toml())
    assert main(["analyze", "mu", str(path), "--directions", "4"]) == 0
    told = capsys.readouterr().out
    assert "usable" in told and '"auto" is 0.01, which is usable.' in told
    assert main(["analyze", "mu", str(path), "--directions", "4", "--set", "algorithm.mu=0.001", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forwards"] == 48 and found["rungs"][0]["usable"] is False
    assert "algorithm.mu is 0.001: there" in found["advice"]
    assert found["lowest"] < 1e-2 < found["highest"]
