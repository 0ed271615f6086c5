"""The forecast of a round is what a round does, and advice comes when it must and not otherwise."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quadratics import random_federation, trajectory
from test_studies_constants import federation, starts

from fedmezo.channels import plain
from fedmezo.errors import ConfigError
from fedmezo.studies.build import build
from fedmezo.studies.config import parse_config
from fedmezo.studies.constants import measure_built
from fedmezo.studies.descent import build_algorithm
from fedmezo.studies.forecast import (
    advise,
    best_rate,
    check_fit,
    forecast,
    in_words,
    predicted_change,
    setting_of,
)
from fedmezo.studies.measured import Measured, PointRow
from fedmezo.studies.sampling import SamplingOptions, exact_config
from fedmezo.theory.caps import b1_caps, paper_caps
from fedmezo.theory.constants import Constants, Setting
from fedmezo.zo.perturb import apply_


def truth(fed, x):
    """Returns the exact |grad f|^2, g'Hg and E e'He of a federation of quadratics."""
    matrix = fed.curvature
    own = np.stack([one @ x - pull for one, pull in zip(fed.curvatures, fed.pulls, strict=True)])
    bend = (1 + fed.wobble**2) * ((own @ matrix) * own).sum(1).mean() + fed.noise * np.trace(matrix)
    square = (1 + fed.wobble**2) * (own**2).sum(1).mean() + fed.noise * len(x)
    whole = own.mean(0)
    sizes = {"gradient2": whole @ whole, "along": whole @ matrix @ whole}
    return sizes | {"stretch": 2 * bend + np.trace(matrix) * square}


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.floats(0.05, 3))
def test_a_forecast_of_one_step_of_equal_clients_is_what_it_does(seed, clients, directions, share):
    fed, x = random_federation(seed, dim=6, clients=clients, wobble=0.0 if directions > 1 else 0.3)
    sizes = truth(fed, x)
    asked = Setting(clients=clients, steps=1, rounds=1, rate=1.0, mu=1e-3, directions=directions)
    asked = replace(asked, rate=share * best_rate(asked, **sizes))
    losses, _ = trajectory(fed, x, rate=asked.rate, steps=1, rounds=1, directions=directions)
    assert predicted_change(asked, **sizes).total == pytest.approx(
        losses[1] - losses[0], rel=1e-6, abs=1e-9 * asked.rate * sizes["gradient2"] + 1e-12
    )


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_forecast_of_many_steps_of_clients_that_differ_is_a_tenth_of_the_descent_off_at_most(steps, share):
    fed, x = federation(tilt=0.2), starts()[2]
    sizes = truth(fed, x)
    asked = Setting(clients=4, steps=steps, rounds=1, rate=1.0, mu=1e-3)
    asked = replace(asked, rate=share * best_rate(asked, **sizes))
    losses, _ = trajectory(fed, x, rate=asked.rate, steps=steps, rounds=1)
    change = predicted_change(asked, **sizes)
    assert change.total == pytest.approx(losses[1] - losses[0], abs=0.1 * -change.descent)


@given(st.floats(0.1, 100), st.floats(1, 10), st.integers(1, 30), st.integers(1, 9))
def test_the_best_rate_is_best_and_at_twice_it_nothing_falls(gradient2, ratio, steps, clients):
    sizes = {"gradient2": gradient2, "along": 2 * gradient2, "stretch": 40 * ratio * gradient2}
    asked = Setting(clients=clients, steps=steps, rounds=1, rate=1.0, mu=1e-3)
    best = best_rate(asked, **sizes)

    def change(rate):
        return predicted_change(replace(asked, rate=rate), **sizes).total

    assert change(best) <= min(change(0.9 * best), change(1.1 * best))
    assert change(2 * best) == pytest.approx(0, abs=1e-9 * steps * gradient2)


def test_a_loss_that_bends_down_sets_no_limit():
    assert best_rate(setting(1.0), gradient2=1.0, along=-1.0, stretch=-2.0) == float("inf")


def measured(*, gradient2=10.0, batch2=50.0, low=5.0, **constants):
    known = Constants(**{"dim": 10_000, "effective_rank": 20.0, "smoothness": 5.0, "sigma_g2": 40.0} | constants)
    names = ("smoothness", "effective_rank", "c_g", "sigma_g2", "c_h", "sigma_h2")
    spans = {"gradient2": (low, 12.0), "along": (8.0, 12.0), "stretch": (4000.0, 6000.0)}
    start = PointRow("start", 3.0, gradient2, batch2, 0.0, 100.0, 5.0, 20.0, 10.0, 5000.0, spans)
    return Measured(known, known, dict.fromkeys(names, (0.5, 2.0)), (start,), ())


def setting(rate, *, steps=10, clients=3):
    return Setting(clients=clients, steps=steps, rounds=100, rate=rate, mu=1e-3)


def practical():
    return best_rate(setting(1.0), gradient2=10.0, along=10.0, stretch=5000.0)


def test_a_rate_below_every_cap_is_only_told_to_be_low():
    rate = b1_caps(measured().constants, steps=10).rate
    (only,) = advise(measured(), setting(rate))
    assert "is far below" in only
    assert forecast(measured(), setting(rate))["caps"]["B1"]["rate"] == rate


def test_b1_is_told_to_be_too_careful_just_above_its_cap():
    rate = 1.01 * b1_caps(measured().constants, steps=10).rate
    said = advise(measured(), setting(rate))
    assert any(line.startswith("H = 10 forces rate <= ") and "far below what works" in line for line in said)
    assert not any("printed condition" in line or "B2" in line for line in said)


def test_fewer_steps_are_named_when_they_meet_the_printed_condition():
    known = measured().constants
    rate = 0.999 * paper_caps(known, clients=3, steps=4).rate
    (said,) = [line for line in advise(measured(), setting(rate, steps=10)) if "printed" in line]
    assert said.endswith("try H = 4.") and "1 / (3 H L sqrt(c_g d))" in said
    assert not any("printed" in line for line in advise(measured(), setting(rate, steps=4)))
    assert any("no H meets it" in line for line in advise(measured(), setting(0.1, steps=10)))


def test_a_rate_in_its_window_is_neither_high_nor_low_and_one_above_is():
    def about(rate):
        return [line for line in advise(measured(), setting(rate)) if "forecast" in line]

    best = forecast(measured(), setting(1.0))["best_rate"]
    low, high = best["interval"]
    assert low < best["rate"] == practical() < high
    assert about(practical()) == about(low / 9) == about(1.9 * high) == []
    assert "outweigh the descent" in about(2.1 * high)[0]
    assert "far below" in about(low / 11)[0]


def test_noise_is_told_when_it_rules():
    def about(**changed):
        return " ".join(advise(measured(**changed), setting(practical())))

    assert "mostly batch noise" in about(batch2=250.0) and "mostly batch noise" not in about()
    assert "not told from noise" in about(low=-1.0) and "not told from noise" not in about()


def test_an_indefinite_hessian_is_told():
    nan = float("nan")
    bent = replace(measured(), intervals=measured().intervals | {"effective_rank": (nan, nan)})
    for known, said in [(bent, True), (measured(), False)]:
        assert any("looks indefinite" in line for line in advise(known, setting(practical()))) == said


def test_vacuous_bounds_are_said_to_be_vacuous_and_others_are_not():
    high, low = (
        forecast(measured(), setting(rate))["bounds"]["B1"]
        for rate in (1e-3, 0.9 * b1_caps(measured().constants, steps=10).rate)
    )
    assert "above the cap" in high["vacuous"]
    assert "above the cap" not in low["vacuous"]
    words = in_words(forecast(measured(), setting(1e-3)))
    assert words["mean |grad f|^2 by B1, which holds"].startswith("vacuous. The rate")


def test_b2_bounds_a_run_of_one_step_only():
    assert "B2" in forecast(measured(), setting(1e-4, steps=1))["bounds"]
    assert "B2" not in forecast(measured(), setting(1e-4, steps=2))["bounds"]


def test_a_forecast_is_plain_json_and_words_say_every_part():
    for rate in (practical(), 100 * practical()):
        found = forecast(measured(), setting(rate))
        assert json.loads(json.dumps(plain(found), allow_nan=False)).keys() == found.keys()
        words = in_words(found)
        assert len(words) == 6 + 3 + 1 + len(found["bounds"]) + 3 + 1
        never = found["rounds"]["forecast"] is None
        assert never == (found["first_round"]["change"] >= 0) == (rate > practical())
        low, high = found["first_round"]["interval"]
        assert low < found["first_round"]["change"] < high
    assert in_words(None) == {}


def test_a_gradient_lost_in_noise_gives_no_rounds():
    found = forecast(measured(gradient2=-1.0), setting(1e-3))
    assert found["rounds"] == {"forecast": None} and found["best_rate"]["rate"] == 0


def test_constants_of_another_run_are_refused():
    config = parse_config({"federation": {"clients": 3, "batch_size": 2}, "algorithm": {"rate": 1e-3, "mu": 1e-3}})
    fitting = replace(measured(), of={"clients": 3, "batch_size": 2})
    check_fit(fitting, config, dim=10_000)
    for of, dim, word in [
        ({"clients": 4, "batch_size": 2}, 10_000, "federation.clients = 4"),
        ({"clients": 3, "batch_size": 1}, 10_000, "federation.batch_size = 1"),
        (fitting.of, 9_999, "trained numbers = 10000"),
    ]:
        with pytest.raises(ConfigError, match=word):
            check_fit(replace(fitting, of=of), config, dim=dim)


def test_a_cohort_counts_as_the_clients_of_a_round():
    told = {"federation": {"clients": 30, "cohort": 4}, "algorithm": {"rate": 1e-3, "mu": 1e-3, "directions": 2}}
    asked = setting_of(parse_config(told))
    assert (asked.clients, asked.directions, asked.rate) == (4, 2, 1e-3)


@pytest.mark.slow
def test_the_forecast_of_a_language_models_round_holds_what_sixteen_rounds_do_on_average():
    told = {
        "model": {"name": "builtin:tiny"},
        "data": {"max_tokens": 40, "template": "{input} is"},
        "split": {"kind": "lda"},
        "federation": {"clients": 3, "local_steps": 10, "batch_size": 4},
        "algorithm": {"clip": "none"},
        "runtime": {"threads": 1},
    }
    built = build(exact_config(parse_config(told)))
    params, config = built.bench.params, built.config
    start = params.clone()
    known = measure_built(built, asked=SamplingOptions(points=2))
    params.copy_(start)

    def loss():
        return fmean(built.bench.evaluate(part[:150]).loss for part in built.data.parts)

    before = loss()
    for rate in (2e-4, 4e-4, 8e-4):
        changes = []
        for seed in range(16):
            federation = config.federation.model_copy(update={"seed": seed})
            settings = config.algorithm.model_copy(update={"rate": rate})
            changed = config.model_copy(update={"federation": federation, "algorithm": settings})
            algorithm = build_algorithm(changed, built.data.sizes)
            state = algorithm.init()
            tasks = algorithm.plan(state, range(3))
            replies = algorithm.client(tasks, built.bench)
            apply_(params, algorithm.aggregate(state, tasks, replies)[1], law="gaussian")
            changes.append(loss() - before)
            params.copy_(start)
        first = forecast(known, replace(setting_of(config), rate=rate))["first_round"]
        low, high = first["interval"]
        assert low <= fmean(changes) <= high
        assert first["change"] == pytest.approx(fmean(changes), abs=2 * stdev(changes) / 4)


@pytest.mark.slow
def test_the_example_tells_caps_and_advice():
    path = Path(__file__).parent.parent / "examples" / "know_before.py"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert "largest rate, B1" in done.stdout and "- H = 10 forces rate <= " in done.stdout
