"""The curious server of scripts/leak.py: its scores find what is planted, and nothing where there is nothing."""

import json
import math
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.zo.params import Params

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import leak  # noqa: E402
import leak_gradient  # noqa: E402
import leak_scores  # noqa: E402
import leak_world  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return leak.tiny(batch=2, clients=1, steps=2)


def planted(*, batch, width, count=24, seed=0):
    """Slopes of candidates, and the mean of the first `batch` of them."""
    own = np.random.default_rng(seed).normal(size=(count, width))
    return own, own[:batch].mean(0), {"weights": np.full(count, 1 / batch), "batch": batch, "error": 1e-4}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_auc_is_the_share_of_pairs_in_order(members, others):
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    assert leak_scores.auc(np.array(members), np.array(others)) == pytest.approx(sum(pairs) / len(pairs))


def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        _, low, high = leak_scores.mean_of(rng.normal(1.0, 1.0, 40).tolist())
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.99


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0, 12.0))
def test_the_bound_of_pure_privacy_is_the_logistic_function(epsilon):
    assert leak_scores.bound(epsilon, 0.0) == pytest.approx(1 / (1 + math.exp(-epsilon)), abs=1e-4)
    assert leak_scores.bound(epsilon, 0.1) > leak_scores.bound(epsilon, 0.0)


def test_a_batch_of_one_is_known_by_one_slope():
    for seed in range(20):
        own, seen, known = planted(batch=1, width=1, seed=seed)
        assert leak_scores.alone(seen, own, **known).argmax() == 0


def test_scores_of_a_slope_of_nobody_tell_nothing():
    rng, found = np.random.default_rng(3), []
    for seed in range(200):
        own, _, known = planted(batch=4, width=2, seed=seed)
        score = leak_scores.alone(rng.normal(size=2) / 2, own, **known)
        found.append(leak_scores.auc(score[:4], score[4:]))
    assert abs(np.mean(found) - 0.5) < 3 * np.std(found) / math.sqrt(len(found))


def test_alone_is_the_ratio_of_two_normal_densities():
    own, seen, known = planted(batch=4, width=1)
    centre, spread, floor = own.mean(), own.var(ddof=1), (known["error"] ** 2 + 0) * np.mean(own**2)
    spread += 1e-6 * np.mean(own**2)

    def density(x, variance):
        return -0.5 * x**2 / variance - 0.5 * np.log(variance)

    inside = density(seen - own[:, 0] / 4 - 0.75 * centre, spread * 3 / 16 + floor)
    expected = inside - density(seen - centre, spread / 4 + floor)
    np.testing.assert_allclose(leak_scores.alone(seen, own, **known), expected, rtol=1e-9)


def test_as_many_directions_as_candidates_give_the_batch_away():
    own, seen, known = planted(batch=6, width=30)
    score = leak_scores.joint(seen, own, **known)
    assert set(np.argsort(-score)[:6]) == set(range(6))


def test_sets_give_every_candidate_its_chance():
    rng = np.random.default_rng(2)
    own, sizes = rng.normal(size=(9, 1)), rng.integers(1, 4, 9).astype(float)
    seen = np.array([sizes[:3] @ own[:3, 0] / sizes[:3].sum() + 0.05])
    found = leak_scores.subset(seen, own, sizes=sizes, batch=3, error=0.1)
    unit = 2 * 0.1**2 * np.mean(own**2)
    likely = {
        some: math.exp(-((sizes[list(some)] @ own[list(some), 0] / sizes[list(some)].sum() - seen[0]) ** 2) / unit)
        for some in combinations(range(9), 3)
    }
    total = sum(likely.values())
    np.testing.assert_allclose(found, [sum(p for s, p in likely.items() if at in s) / total for at in range(9)])
    assert found.sum() == pytest.approx(3)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 100))
def test_noise_without_end_hides_a_run(seed):
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(40, 64))
    found = []
    for _ in range(40):
        scores = leak_scores.poisson_scores(1e4 * rng.normal(size=40), own, rate=0.25, kept=32, deviation=1e4)
        found.append(leak_scores.auc(scores[:32], scores[32:]))
    assert abs(np.mean(found) - 0.5) < 4 * np.std(found) / math.sqrt(len(found))


def test_nobody_beats_the_bound_of_privacy_and_everybody_who_knows_all_the_rest_beats_a_guess(monkeypatch):
    # The quicker accountant asks for a little more noise, so the bound holds all the more.
    monkeypatch.setattr(leak, "sigma_for", partial(leak.sigma_for, accountant="rdp"))
    drops = np.random.default_rng(1).choice([-1.0, 1.0], size=(16, 128))  # every difference is as large as the clip
    server, worst = leak.private_rows(drops, 1.0)
    assert server["sigma"] == worst["sigma"] > 0
    assert worst["high"] <= worst["bound"] + 0.02
    assert worst["low"] > 0.55
    assert server["auc"] < worst["auc"]
    (plain,) = leak.private_rows(drops, math.inf)
    assert plain["epsilon"] is None
    assert plain["sigma"] == 0
    assert plain["auc"] > server["auc"]


def test_a_slope_is_the_mean_of_the_slopes_of_its_examples(world):
    for seen in leak.looks(world, 0):
        for look in seen:
            own = world.own(look.params, look.seeds, look.members, mu=look.task.mu)[:, 0]
            sizes = world.sizes(look.members)
            assert look.slopes[0] == pytest.approx(sizes @ own / sizes.sum(), rel=2e-4, abs=2e-3)


def test_candidates_are_no_members_and_no_two_are_the_same(world):
    members = world.batches(0, 0, 0)
    drawn = world.distinct(members, 40, np.random.default_rng(0))
    keys = {leak_world.example_key(world.examples[at]) for at in drawn}
    assert len(keys) == len(drawn) == 40
    assert not keys & {leak_world.example_key(world.examples[at]) for at in members}


def test_slopes_are_read_off_a_walk_that_is_written_out():
    assert leak.walk_row()["error"] < 1e-5


def test_a_sum_along_directions_of_ones_own_shows_more_the_larger_the_pool():
    shown = [leak.unshared_row(pool)["read"] for pool in (16, 256, 4096)]
    assert shown == sorted(shown)
    assert shown[0] < 0.05
    assert shown[-1] > 0.9


def test_a_secret_sum_of_shared_directions_tells_less_than_single_slopes():
    world = leak.tiny(batch=1, clients=3, steps=1, algorithm={"shared": True, "clip_at": 50.0})
    hidden = leak.sums_row(world, rounds=2)
    single = next(leak.steps_of(world, rounds=1, most=1))
    assert single["auc"] == 1.0
    assert hidden["auc"] < 0.95


def test_slopes_give_a_gradient_away_in_proportion_to_their_number():
    params = Params({"a": torch.zeros(150), "b": torch.zeros(10, 5)})
    gradient = np.random.default_rng(0).normal(size=200)
    rows = leak_world.matrix(params, range(220))
    for count in (10, 50, 100):
        solved = np.linalg.lstsq(rows[:count], rows[:count] @ gradient, rcond=None)[0]
        assert leak_scores.cosine(solved, gradient) == pytest.approx(math.sqrt(count / 200), abs=0.15)
    solved = np.linalg.lstsq(rows, rows @ gradient, rcond=None)[0]
    assert leak_scores.cosine(solved, gradient) == pytest.approx(1.0, abs=1e-9)


def test_the_mean_of_slopes_and_directions_nears_the_gradient(monkeypatch):
    monkeypatch.setattr(leak_gradient, "COUNTS", (10, 40))
    model = leak.tiny(batch=1, clients=1, adapter={"kind": "full"})
    seeds, slopes, truth = leak_gradient.many_slopes(model, 40, 0)
    table, cosines = leak_gradient.estimates(model, seeds, slopes, truth)
    assert table["backpropagation"].shape == table[40].shape
    expected = math.sqrt(40 / model.built.bench.params.dim)
    assert cosines[40] == pytest.approx(expected, abs=0.6 * expected)


def test_every_recorded_part_is_of_this_script_and_keeps_to_its_bound():
    rows = leak.read(leak.RESULTS)
    assert {row["part"] for row in rows} == set(leak.PARTS)
    assert all(row["auc"] <= row["bound"] + 0.02 for row in rows if "bound" in row)
    ones = [row for row in rows if row.get("view") == "single slopes" and row["batch"] == 1 and row["score"] == "alone"]
    assert ones
    assert all(row["auc"] > (0.99 if row["model"] == "tiny" else 0.9) for row in ones)


def test_what_a_row_lacks_is_a_dash_in_the_table(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + json.dumps({"a": 2, "b": 0.12345}) + "\n")
    assert leak.table(leak.read(path), ["a", "b"]).splitlines()[2:] == ["| 1 | - |", "| 2 | 0.123 |"]
