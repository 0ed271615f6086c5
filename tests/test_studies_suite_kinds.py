"""What the cells of the studies do, each on the built-in model in a second or two."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmezo.errors import ConfigError
from fedmezo.studies.suite.cells import Cell
from fedmezo.studies.suite.kind_gradient import follow, squared_length
from fedmezo.studies.suite.kind_quadratic import descend, estimate
from fedmezo.studies.suite.kind_run import config_of, tune
from fedmezo.studies.suite.kind_storage import store
from fedmezo.studies.suite.kinds import KINDS, perform, probe_settings
from fedmezo.studies.suite.measures import measure
from fedmezo.studies.suite.quadratics import course, plant
from fedmezo.theory.constants import Setting

DOCS = Path(__file__).parents[1] / "docs" / "studies" / "README.md"
LINEARS = ["q_proj", "v_proj"]


def settings(**sections):
    basis = {
        "model": {"name": "builtin:tiny"},
        "adapter": {"rank": 2, "alpha": 4, "targets": LINEARS},
        "data": {"name": "builtin:skills/routing", "limit": 120, "template": "{instruction}\n{input} ",
                 "max_tokens": 96, "eval_examples": 12},
        "federation": {"clients": 2, "rounds": 2, "local_steps": 2, "batch_size": 1},
        "algorithm": {"rate": 1e-4, "mu": 1e-3, "clip": "none", "adapt": False},
        "eval": {"every": 1, "examples": 12, "metrics": ["loss"]},
        "guard": {"on_surge": "warn", "batches": 0},
        "runtime": {"threads": 1},
    }  # fmt: skip
    return {name: {**basis.get(name, {}), **sections.get(name, {})} for name in {**basis, **sections}}


def cell(kind, given, seed=0):
    return Cell("s", "g", "tiny", kind, {}, seed, given)


class TestRun:
    def test_a_run_has_its_evaluations_with_their_cost(self):
        points, values = tune(settings(), 0)
        assert [point["rounds"] for point in points] == [0, 1, 2]
        assert points[-1]["forwards"] == 2 * 2 * 2 * 2 and points[-1]["bytes"] > 0
        assert all(math.isfinite(point["loss"]) for point in points)
        assert values["dim"] > 0 and values["rate_low"] == values["rate_high"] == 1e-4

    def test_a_seed_names_data_and_directions(self):
        config = config_of(settings(), 7)
        assert config.federation.seed == config.data.seed == 7

    def test_an_update_of_n_clients_is_n_times_shorter(self):
        alone = tune(settings(federation={"clients": 1, "rounds": 1, "local_steps": 30}, data={"limit": 240}), 0)[1]
        eight = tune(settings(federation={"clients": 8, "rounds": 1, "local_steps": 30}, data={"limit": 240}), 0)[1]
        assert eight["update2_first"] / alone["update2_first"] == pytest.approx(1 / 8, rel=0.5)

    def test_an_adapter_that_is_written_tells_its_lengths(self):
        _, values = tune(settings(output={"export": True}), 0)
        assert values["norm_lora_A"] > values["norm_lora_B"] > 0

    def test_an_impossible_setting_is_an_error_of_the_record(self):
        record = perform(cell("run", settings(federation={"clients": 0})))
        assert "clients" in record.error and not record.points and math.isnan(measure(record, "end"))

    def test_an_unknown_kind_or_probe_is_told(self):
        assert "kind" in perform(cell("nonsense", {})).error
        with pytest.raises(ConfigError, match=r"probe\.odd"):
            probe_settings({"probe": {"odd": 1}}, even=2)

    @pytest.mark.parametrize("name", sorted(KINDS))
    def test_every_kind_is_there(self, name):
        from fedmezo.studies.suite.kinds import _kind

        assert callable(_kind(name))

    @pytest.mark.parametrize("name", sorted(set(KINDS) - {"run"}))
    def test_the_documentation_names_the_settings_of_every_kind(self, name):
        told = perform(cell(name, settings(probe={"odd": 1}))).error.partition("this kind knows ")[2].rstrip(".")
        row = re.search(rf"^\| `{name}` \|.*\|(.*)\|$", DOCS.read_text(encoding="utf-8"), re.M)
        assert re.findall(r"`(\w+)`", row[1]) == told.split(", ")


class TestStorage:
    def found(self, method, storage, rate=1e-5):
        whole = {"adapter": {"kind": "full"}, "federation": {"clients": 1, "rounds": 1, "local_steps": 3}}
        given = settings(**whole, algorithm={"rate": rate}, probe={"method": method, "storage": storage})
        return store(given, 0)[1]

    def test_small_gradient_steps_are_rounded_away_in_half_precision(self):
        assert self.found("sgd", "bfloat16")["moved"] < 0.1 * self.found("sgd", "float32")["moved"]

    def test_the_walk_moves_nearly_all_weights_in_half_precision(self):
        assert self.found("walk", "float16")["moved"] > 5 * self.found("sgd", "float16")["moved"]

    def test_without_a_rate_to_speak_of_nothing_moves(self):
        assert self.found("sgd", "float16", rate=1e-30)["moved"] == 0


class TestGradient:
    def test_the_squared_length_is_of_the_mean_without_the_noise(self):
        torch.manual_seed(0)
        mean = torch.tensor([3.0, 4.0, 0.0, 0.0])
        found = [squared_length([mean + 5 * torch.randn(4) for _ in range(8)]) for _ in range(4000)]
        assert np.mean(found) == pytest.approx(25, abs=1.5)  # the mean's own square would be 37.5

    def test_a_run_is_followed_at_its_gradient(self):
        points, values = follow(settings(probe={"examples": 8, "points": 2}), 0)
        assert [point["rounds"] for point in points] == [0, 1, 2]
        assert values["measured"] == pytest.approx(np.mean([point["gradient2"] for point in points[:2]]))
        assert values["measured"] > 0 and values["rate"] == 1e-4

    def test_a_gain_makes_the_rate_that_the_corollaries_recommend(self):
        _, values = follow(settings(probe={"examples": 4, "points": 1, "gain": 1e-3}), 0)
        assert values["rate"] == pytest.approx(1e-3 * math.sqrt(2 / (2 * 2)))

    def test_bounds_are_told_with_constants_measured_at_the_start(self):
        given = settings(federation={"local_steps": 1}, probe={"examples": 8, "points": 2, "bounds": True})
        _, values = follow(given, 0)
        assert values["over_b2"] == pytest.approx(values["measured"] / values["bound_b2"])
        assert values["broken_b2"] == 0 and values["smoothness"] > 0


class TestQuadratic:
    def test_what_is_planted_is_there(self):
        problem, start = plant(0, dim=20, rank=5.0, clients=4, apart=3.0, wobble=0.5, noise=2.0)
        known = problem.constants()
        assert known.effective_rank == pytest.approx(5) and known.sigma_g2 == pytest.approx(2)
        assert known.sigma_h2 == pytest.approx(3) and known.c_g == pytest.approx(1.25)
        assert problem.gap(start, np.zeros(20)) == pytest.approx(1)

    @pytest.mark.parametrize("directions", [1, 3])
    def test_the_course_is_the_mean_of_sampled_runs(self, directions):
        problem, start = plant(1, dim=5, rank=3.0, clients=3, apart=0.5, wobble=0.3, noise=0.2)
        setting = Setting(clients=3, steps=2, rounds=4, rate=0.05, mu=0.0, directions=directions)
        gaps, squares = course(problem, start, setting=setting)
        generator, runs = np.random.default_rng(0), 20_000
        x = np.tile(start, (runs, 1))
        for _ in range(4):
            ends = []
            for pull in problem.pulls:
                walk = x.copy()
                for _ in range(2):
                    sign = generator.choice([-1.0, 1.0], size=(runs, 1))
                    gradient = (1 + 0.3 * sign) * (walk * problem.spectrum - pull)
                    gradient += math.sqrt(problem.noise) * generator.normal(size=walk.shape)
                    z = generator.normal(size=(directions, runs, 5))
                    walk -= 0.05 * (z * (z * gradient).sum(-1, keepdims=True)).mean(0)
                ends.append(walk)
            x = np.mean(ends, axis=0)
        away = x - problem.optimum
        assert gaps[-1] == pytest.approx(float((away**2 * problem.spectrum).sum(1).mean() / 2), rel=0.03)
        assert squares[-1] == pytest.approx(float((away**2 * problem.spectrum**2).sum(1).mean()), rel=0.03)

    def test_the_corrected_bound_holds_and_the_printed_one_is_impossible_with_unlike_clients(self):
        probe = {"dim": 100, "rank": 4.0, "apart": 10.0, "rounds": 200}
        for rate, name in (("b2", "b2"), ("paper", "printed")):
            _, values = descend({"probe": {**probe, "rate": rate}}, 0)
            assert values[f"broken_{name}"] == (name == "printed")
        assert values["bound_printed"] < 0

    def test_the_measured_gradient_falls_with_the_root_of_the_rounds(self):
        probe = {"dim": 60, "rank": 8.0, "noise": 1.0, "rate": "best"}
        few, many = (descend({"probe": {**probe, "rounds": t}}, 0)[1]["measured"] for t in (400, 1600))
        assert math.log(many / few) / math.log(4) == pytest.approx(-0.5, abs=0.1)

    def test_an_estimate_is_as_long_as_gaussian_directions_make_it(self):
        _, values = estimate({"probe": {"dim": 20, "samples": 20_000}}, 0)
        assert values["length2_over_gaussian"] == pytest.approx(1, abs=0.05)
        assert values["length2_over_printed"] > 50
