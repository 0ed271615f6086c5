"""Comparisons: the terms, the choice of rates, what is run again and what is not, and what the verdicts may say."""

import json
import math
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_runs import asked, write_records

from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.journal import Entry, Header, Journal, Round
from fedmezo.studies.compare import Terms, compare, parse_budget, parse_grids, parse_seeds, read_arms
from fedmezo.studies.compare import runs as compare_runs
from fedmezo.studies.compare.arms import ENDLESS, arm_notes, variant
from fedmezo.studies.compare.charts import curve_charts, log_axes
from fedmezo.studies.compare.curves import Point, band, read_curve
from fedmezo.studies.compare.rows import MEASURES, aggregate, row_of, spread_text
from fedmezo.studies.compare.runs import Job, Onlooker, Outcome, execute, launch
from fedmezo.studies.compare.screen import CompareScreen, compare_table
from fedmezo.studies.compare.tune import MOST_STEPS, tune
from fedmezo.studies.compare.verdicts import paired_interval, t_limit, verdicts
from fedmezo.studies.config import load_config, parse_config
from fedmezo.studies.facts import gather
from fedmezo.studies.page import DASH
from fedmezo.studies.run import run

with warnings.catch_warnings():
    # typer 0.20 still imports names that click 8.5 calls deprecated; neither is ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedmezo.cli import main

FORWARDS = {"forwards": 100.0}
ARMS = {name: parse_config({"algorithm": {"name": name}}) for name in ("fedmezo", "fedavg")}


# --- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_budget, "forwards=2000", {"forwards": 2000.0}),
        (parse_budget, " seconds = 1.5e1 ", {"seconds": 15.0}),
        (parse_seeds, "0, 1,7", (0, 1, 7)),
        (parse_grids, ["1e-3,1e-2", "fedavg=1e-1,1"], {"": (1e-3, 1e-2), "fedavg": (0.1, 1.0)}),
    ],
)
def test_good_terms_are_read(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "named"),
    [
        (parse_budget, "epochs=3", "--budget: expected rounds | forwards"),
        (parse_budget, "2000", "as in forwards=2000"),
        (parse_budget, "forwards=many", "expected numbers"),
        (parse_budget, "forwards=", "one number"),
        (parse_budget, "forwards=1,2", "one number"),
        (parse_budget, "forwards=-1", "above 0"),
        (parse_budget, "forwards=nan", "above 0"),
        (parse_budget, "forwards=inf", "above 0"),
        (parse_seeds, "", "got none"),
        (parse_seeds, "1,two", "whole numbers"),
        (parse_seeds, "1,1", "1 twice"),
        (parse_seeds, "-1", "at least 0"),
        (parse_grids, ["a,b"], "expected numbers"),
        (parse_grids, ["1e-3"], "at least two different rates"),
        (parse_grids, ["1e-3,1e-3"], "at least two different rates"),
        (parse_grids, ["0,1"], "above 0"),
        (parse_grids, ["fedavg=1,2", "fedavg=3,4"], "fedavg was given twice"),
        (parse_grids, ["1,2", "3,4"], "grid for all was given twice"),
    ],
)
def test_impossible_terms_are_told_in_one_sentence(parse, text, named):
    with pytest.raises(ConfigError, match=re.escape(named)) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{"budget": {}}, {"rate": -1.0}, {"rate": math.nan}, {"jobs": 0}, {"seeds": ()}])
def test_terms_made_in_python_are_checked_alike(given):
    with pytest.raises(ConfigError):
        Terms(**({"budget": FORWARDS} | given))


def test_a_grid_is_found_by_arm_then_by_algorithm_then_for_all():
    terms = Terms(FORWARDS, tune={"mine": (1, 2), "fedavg": (4, 3), "": (5, 6)})
    assert terms.grid("mine", ARMS["fedavg"]) == (1, 2)
    assert terms.grid("other", ARMS["fedavg"]) == (3, 4)
    assert terms.grid("other", ARMS["fedmezo"]) == (5, 6)


@pytest.mark.parametrize(
    ("arms", "tuned", "named"),
    [
        (dict([*ARMS.items()][:1]), {}, "at least two arms"),
        (ARMS, {"fedprox": (1, 2)}, "no arm is called so"),
        (ARMS, {"fedavg": (1, 2)}, "fedmezo got no grid"),
    ],
)
def test_terms_that_do_not_fit_the_arms_are_refused(arms, tuned, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        compare(arms, Terms(FORWARDS, tune=tuned), out=tmp_path / "new", launch=None)
    assert not (tmp_path / "new").exists()


@given(st.sets(st.integers(0, 9), min_size=1), st.integers(0, 9))
def test_tuning_never_uses_a_reported_seed_or_draw_of_data(seeds, data_seed):
    arms = {"a": parse_config({"data": {"seed": data_seed}}), "b": parse_config({})}
    found = Terms(FORWARDS, seeds=tuple(seeds)).tuning_seed(arms)
    assert found >= 0 and found not in {*seeds, data_seed, 0}


# --- arms ------------------------------------------------------------------------------------------------------------


def write(path: Path, **sections) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(parse_config(sections).to_toml())
    return path


def test_labels_are_stems_and_get_their_folder_when_stems_are_alike(tmp_path):
    one, two = write(tmp_path / "x" / "run.toml"), write(tmp_path / "y" / "run.toml")
    assert list(read_arms([one, write(tmp_path / "plain.toml")])) == ["run", "plain"]
    assert list(read_arms([one, two])) == ["x/run", "y/run"]


def test_the_same_arm_twice_is_refused(tmp_path):
    one = write(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="Two arms are called"):
        read_arms([one, one])
    with pytest.raises(ConfigError, match="Two arms are called fedavg"):
        read_arms([one], algorithms=["fedavg", "fedavg"])
    with pytest.raises(ConfigError, match="same folder"):
        compare({"a b": ARMS["fedavg"], "a/b": ARMS["fedavg"]}, Terms(FORWARDS), out=tmp_path / "o", launch=None)


def test_algorithms_make_arms_of_one_file_and_settings_reach_all_of_them(tmp_path):
    one = write(tmp_path / "run.toml", federation={"clients": 7})
    arms = read_arms([one], algorithms=["fedmezo", "fedkseed"], settings=["eval.every=9"])
    assert {label: config.algorithm.name for label, config in arms.items()} == dict(
        fedmezo="fedmezo", fedkseed="fedkseed"
    )
    assert all(config.federation.clients == 7 and config.eval.every == 9 for config in arms.values())
    with pytest.raises(ConfigError, match="one configuration, got 2"):
        read_arms([one, one], algorithms=["fedmezo"])
    with pytest.raises(ConfigError, match="'fedprox'"):
        read_arms([one], algorithms=["fedprox"])


def test_only_the_budget_ends_a_run_and_no_decay_counts_rounds():
    config = parse_config({"algorithm": {"decay": "cosine"}, "federation": {"rounds": 8}, "data": {"seed": 4}})
    made = variant(config, budget={"tokens": 10}, seed=3, rate=0.5, data_seed=6)
    assert (made.federation.budget, made.federation.rounds, made.federation.seed) == ({"tokens": 10}, ENDLESS, 3)
    assert (made.algorithm.decay, made.algorithm.rate, made.data.seed) == ("constant", 0.5, 6)
    rounds = variant(config, budget={"rounds": 5}, seed=3)
    assert (rounds.federation.rounds, rounds.algorithm.decay, rounds.algorithm.rate, rounds.data.seed) == (
        5,
        "cosine",
        None,
        4,
    )


@pytest.mark.parametrize(
    ("changed", "terms", "told"),
    [
        ({"data": {"seed": 5}}, {}, "not judged alike.*data.seed"),
        ({"model": {"dtype": "bfloat16"}}, {}, "not judged alike.*model.dtype"),
        ({"eval": {"examples": 5}}, {}, "not judged alike.*eval.examples"),
        ({"runtime": {"threads": 3}}, {}, r"differ in \[runtime\]"),
        ({"runtime": {"device": "cuda"}}, {}, "memory of a GPU is not in it"),
        ({"federation": {"budget": {"rounds": 3}}}, {}, "takes the place of federation.budget in b"),
        ({}, {"rate": 1e-3}, "All arms ran at one rate"),
        ({}, {}, "rate of its configuration"),
        ({}, {"jobs": 2}, "2 runs went on at once"),
        ({"data": {"eval_path": "x.jsonl"}}, {"tune": {"": (1, 2)}}, "b: data.eval_path is one fixed file"),
    ],
)
def test_what_limits_a_comparison_is_said(changed, terms, told):
    arms = {"a": parse_config({}), "b": parse_config(changed)}
    assert any(re.search(told, note) for note in arm_notes(arms, Terms(FORWARDS, **terms)))
    same = arm_notes({"a": arms["a"], "b": arms["a"]}, Terms(FORWARDS, tune={"": (1, 2)}))
    assert same == []


LINEAR = {"algorithm": {"decay": "linear", "rate": 1e-3}, "guard": {"batches": 6}}


@pytest.mark.parametrize(
    ("changed", "terms", "told"),
    [
        (LINEAR, {}, "decay is constant here instead of what b asked for.*a budget of tokens does not tell"),
        ({}, {}, "Rates are constant here, where a run of b alone would adapt and then decay them"),
        ({"algorithm": {"rate": 1e-3, "adapt": True}}, {"rate": 1e-3}, "Rates are constant here, where a run of b"),
        ({}, {"rate": 1e-3}, "Only the training loss of b is watched for surges"),
    ],
)
def test_what_a_budget_without_a_number_of_rounds_leaves_out_is_said(changed, terms, told):
    arms = {"a": parse_config(LINEAR | {"algorithm": {"decay": "constant", "rate": 1e-3}}), "b": parse_config(changed)}
    blind = [Terms({"tokens": 9.0}, **terms), Terms(FORWARDS, tune_budget={"seconds": 9.0}, **terms)]
    for which, kind in zip(blind, ("tokens", "seconds"), strict=True):
        said = told.replace("tokens", kind)
        assert len([note for note in arm_notes(arms, which) if re.search(said, note)]) == 1
    for known in (FORWARDS, {"rounds": 3.0}):
        assert not any(re.search(told, note) for note in arm_notes(arms, Terms(known, **terms)))


def test_a_budget_of_forwards_is_said_to_leave_the_looks_out_where_they_set_the_rate():
    told = "The rates of fedmezo are adapted; the forward passes that takes come on top of the budget"
    assert any(told in note for note in arm_notes(ARMS, Terms(FORWARDS)))
    for other in (Terms(FORWARDS, rate=1e-3), Terms({"tokens": 9.0})):
        assert not any("are adapted" in note for note in arm_notes(ARMS, other))


@pytest.mark.parametrize(
    "algorithm",
    [{}, {"rate": 2e-3, "decay": "cosine"}, {"estimator": "forward", "directions": 2}, {"name": "fedavg"}],
    ids=lambda given: " ".join(map(str, given.values())) or "auto",
)
def test_an_arm_with_a_budget_of_forwards_has_the_bits_of_a_run_of_so_many_rounds(records, tmp_path, algorithm):
    config = parse_config(asked(records, algorithm=algorithm, federation={"rounds": 99, "cohort": 2}))
    made = variant(config, budget={"forwards": 90.0}, seed=3)
    alone = parse_config(asked(records, algorithm=algorithm, federation={
        "rounds": made.federation.rounds, "cohort": 2, "seed": 3,
    }))  # fmt: skip
    ran, known = run(made, out=tmp_path / "arm"), run(alone, out=tmp_path / "alone")
    assert ran.rounds == made.federation.rounds and ran.forwards >= 90 > ran.forwards * (1 - 1 / ran.rounds)
    assert (ran.digest, ran.looks) == (known.digest, known.looks)
    decay = algorithm.get("decay") or ("constant" if "name" in algorithm else "wsd")
    assert f'decay = "{decay}"' in (tmp_path / "arm" / "config.toml").read_text()


def test_an_arm_without_a_number_of_rounds_has_a_constant_rate_and_judges_nothing(records, tmp_path):
    config = parse_config(asked(records))
    made = variant(config, budget={"tokens": 2000.0}, seed=3)
    assert (made.algorithm.adapt, made.algorithm.decay, made.guard.batches) == (False, "constant", 0)
    ran = run(made, out=tmp_path / "arm")
    with Journal.open(tmp_path / "arm" / "journal.sqlite", readonly=True) as journal:
        assert len({done.rate for done in journal.rounds()}) == 1 and ran.rounds > 2
    assert ran.looks == 0
    told = parse_config(asked(records, guard={"batches": 7}))
    assert variant(told, budget={"tokens": 2000.0}, seed=3).guard.batches == 7


def test_a_budget_of_tokens_is_said_to_leave_backward_passes_out():
    found = [note for note in arm_notes(ARMS, Terms({"tokens": 9.0})) if "backward" in note]
    assert len(found) == 1 and not any("backward" in note for note in arm_notes(ARMS, Terms(FORWARDS)))


@pytest.mark.parametrize("section", [{"eval": {"every": 3}}, {"adapter": {"rank": 3}}, {"federation": {"clients": 2}}])
def test_arms_that_differ_in_method_only_are_judged_alike(section):
    notes = arm_notes({"a": parse_config({}), "b": parse_config(section)}, Terms(FORWARDS))
    assert not any("judged alike" in note for note in notes)


# --- rates -----------------------------------------------------------------------------------------------------------


def outcome(arm="a", *, loss=1.0, seed=0, rate=0.1, column="tuning", error="", **summary) -> Outcome:
    config = SimpleNamespace(algorithm=SimpleNamespace(name=f"alg-{arm}", rate=rate))
    end = {"loss": loss, **{k: summary.pop(k) for k in ("accuracy",) if k in summary}}
    found = {
        "eval": {"start": {"loss": 5.0}, "end": end},
        "bytes": {"up_total": 10, "down_total": 20, "up_per_client_round": 1.0, "down_per_client_round": 2.0},
        **dict.fromkeys(("rounds", "forwards", "tokens"), 100),
        "seconds": 4.0,
        "peak_rss_mb": 500.0,
    }
    return Outcome(Job(arm, column, seed, config, Path("run", arm, str(rate), str(seed))), found | summary, error)


def search(landscape, grid):
    asked_for = []

    def run(wanted):
        asked_for.append([rate for _, rate in wanted])
        return [outcome(arm, loss=landscape(rate), rate=rate) for arm, rate in wanted]

    (found,) = tune({"a": grid}, run)
    return found, asked_for


def test_the_rate_of_the_lowest_loss_inside_the_grid_is_taken_without_more_runs():
    found, asked_for = search({1e-3: 3.0, 1e-2: 1.0, 1e-1: 2.0}.get, (1e-3, 1e-2, 1e-1))
    assert found.rate == 1e-2 and asked_for == [[1e-3, 1e-2, 1e-1]] and found.notes() == []
    assert [point["chosen"] for point in found.points()] == [False, True, False]


@pytest.mark.parametrize(
    ("best", "tried", "taken", "told"),
    [
        (0.4, [0.4], 0.4, "highest of its grid, so 0.4 and 0.8 were tried as well; 0.4 was taken"),
        (9.0, [0.4, 0.8], 0.8, "at the edge still: a higher one"),
        (0.025, [0.025], 0.025, "lowest of its grid, so 0.0125 and 0.025 were tried as well; 0.025 was taken"),
        (1e-9, [0.025, 0.0125], 0.0125, "at the edge still: a lower one"),
    ],
)
def test_a_best_rate_at_the_edge_extends_the_grid_by_its_last_ratio_twice_at_most(best, tried, taken, told):
    found, asked_for = search(lambda rate: abs(math.log(rate / best)), (0.05, 0.1, 0.2))
    steps = [rate for rates in asked_for[1:] for rate in rates]
    assert steps[: len(tried)] == pytest.approx(tried) and len(steps) <= MOST_STEPS
    assert found.rate == pytest.approx(taken)
    assert re.search(told, found.notes()[0])


def test_a_rate_that_diverges_ends_the_search_and_is_told():
    found, asked_for = search(lambda rate: math.nan if rate > 0.15 else -rate, (0.05, 0.1, 0.2))
    assert found.rate == 0.1 and len(asked_for) == 1
    assert "rate 0.2 failed or diverged" in found.notes()[0]
    broken, asked_for = search(lambda rate: math.nan, (0.1, 0.2))
    assert broken.rate is None and len(asked_for) == 1 and "every rate of its grid failed" in broken.notes()[0]


def test_of_two_rates_alike_the_lower_one_is_taken():
    assert search(lambda rate: 1.0 if rate < 0.3 else 2.0, (0.05, 0.1, 0.4))[0].rate == pytest.approx(0.0125)


# --- verdicts --------------------------------------------------------------------------------------------------------


def rows(values: dict[str, list[float | None]], *, column="equal", field="loss", seeds=None):
    return [
        row_of(outcome(arm, seed=seed, column=column, error="it broke" if value is None else "", **{field: value}))
        for arm, listed in values.items()
        for seed, value in zip(seeds or range(9), listed, strict=False)
    ]


def verdict(values, *, field="loss", measure=None, budget="forwards", **more):
    found = verdicts(rows(values, field=field, **more), budget=budget)
    return next(entry for entry in found if entry["measure"] == (measure or field))


@pytest.mark.parametrize(
    ("freedom", "limit"),
    [(1, 12.706), (2, 4.303), (9, 2.262), (10, 2.228), (11, 2.201), (20, 2.086), (30, 2.042), (120, 1.980)],
)
def test_the_t_limits_are_those_of_the_tables(freedom, limit):
    assert t_limit(freedom) == pytest.approx(limit, abs=6e-4)


def test_the_paired_interval_of_a_worked_example():
    mean, low, high = paired_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert paired_interval([0.5]) == (0.5, -math.inf, math.inf)


def test_a_difference_that_every_seed_shows_is_separated_though_the_seeds_differ_more():
    found = verdict({"a": [1.0, 2.0, 3.0], "b": [1.25, 2.26, 3.24]})
    assert found["separated"] and found["best"] == "a" and found["difference"] == pytest.approx(0.25)
    assert found["text"].startswith("Final loss: a 2.000, 0.250 lower than b 2.250; 95 % interval")
    assert "3 seeds" in found["text"]


def test_an_interval_with_0_in_it_separates_nothing():
    found = verdict({"a": [1.0, 2.0, 3.0], "b": [1.5, 1.9, 3.3]})
    assert not found["separated"] and found["best"] is None and "not separated" in found["text"]
    assert found["interval"][0] < 0 < found["interval"][1]


@pytest.mark.parametrize(("seeds", "told"), [(1, "one seed only"), (2, "two seeds only")])
def test_fewer_than_three_seeds_rank_nothing_however_large_the_difference(seeds, told):
    found = verdict({"a": [1.0] * seeds, "b": [100.0] * seeds})
    assert not found["separated"] and found["best"] is None
    assert told in found["text"] and "lower" not in found["text"]


def test_a_higher_accuracy_is_better_and_a_lower_cost_is():
    assert verdict({"a": [0.5, 0.5, 0.51], "b": [0.6, 0.6, 0.62]}, field="accuracy")["best"] == "b"
    memory = verdict({"a": [500.0] * 3, "b": [2000.0, 2001.0, 2002.0]}, field="peak_rss_mb")
    assert memory["best"] == "a" and "(4 times)" in memory["text"].replace("4.00", "4")


def test_the_last_of_three_is_told_when_it_is_clearly_behind():
    close = {"a": [1.0, 2.0, 3.0], "b": [1.5, 1.9, 3.3]}
    found = verdict(close | {"c": [5.0, 6.1, 7.0]})
    assert "not separated" in found["text"]
    assert found["text"].endswith(" Last: c 6.033, 4.03 higher than a.")
    assert "Last" not in verdict(close | {"c": [0.5, 9.0, 4.0]})["text"]
    right = verdict({"a": [0.1, 0.1, 0.12], "b": [0.6, 0.6, 0.62], "c": [0.5, 0.5, 0.52]}, field="accuracy")
    assert "points lower than b." in right["text"]
    assert "Last" not in verdict({"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [9.0, 9.0]})["text"]


def test_arms_with_the_very_same_numbers_are_told_together():
    bytes_of = {"a": [1.0] * 3, "b": [2.0] * 3}
    assert verdict(bytes_of, measure="bytes")["text"] == "Bytes both ways: 30 B for a and b alike, 3 seeds."
    found = verdict({"a": [1.0] * 3, "b": [2.0] * 3, "c": [1.0] * 3})
    assert found["text"] == "Final loss: a and c 1.000, 1.00 lower than b 2.000 (2.00 times); the same in all 3 seeds."
    assert found["alike"] == ["c"] and found["best"] == "a" and found["runner_up"] == "b"
    assert "one seed only" in verdict({"a": [1.0], "b": [1.0]})["text"]


@pytest.mark.parametrize(
    ("values", "field", "shown"),
    [
        ([455.2, 455.9, 454.5], "peak_rss_mb", "455 ± 0.70 MB"),
        ([0.2, 0.3, 0.25], "accuracy", "25.0 ± 5.0%"),
        ([4000.0, 4200.0, 4100.0], "tokens", "4,100 ± 100"),
        ([130.0, 150.0], "seconds", "2 min 20 s ± 14.1 s"),
        ([1.5, 1.5], "loss", "1.500"),
        ([1.5, None], "loss", "1.500"),
        ([None], "loss", DASH),
    ],
)
def test_a_spread_has_the_unit_of_its_mean(values, field, shown):
    (found,) = aggregate(rows({"a": values}, field=field))
    assert spread_text(found[field], next(m for m in MEASURES if m.name == field)) == shown


def test_nobody_is_ranked_by_what_the_budget_counts():
    listed = rows({"a": [1.0] * 3, "b": [2.0] * 3})
    assert "seconds" in {entry["measure"] for entry in verdicts(listed, budget="bytes")}
    assert "bytes" not in {entry["measure"] for entry in verdicts(listed, budget="bytes")}
    assert "seconds" not in {entry["measure"] for entry in verdicts(listed, budget="seconds")}


def test_failed_runs_are_told_and_only_shared_seeds_are_compared():
    listed = rows({"a": [1.0, None, 3.0, 4.0], "b": [2.0, 9.0, 4.1, 5.0]})
    found = verdicts(listed, budget="forwards")
    assert "a failed in 1 of 4 runs (seed 1)" in found[0]["text"] and "it broke." in found[0]["text"]
    loss = next(entry for entry in found if entry["measure"] == "loss")
    assert loss["seeds"] == [0, 2, 3] and loss["best"] == "a"
    assert "b 3.700" in loss["text"]


def test_an_arm_that_is_ahead_by_its_easy_seeds_only_is_not_called_best():
    """a has failed on the hard seed; on the seeds both have, b is better."""
    found = verdict({"a": [1.1, 1.2, 1.1, None], "b": [1.0, 1.1, 1.02, 9.0]})
    assert found["best"] == "b" and found["difference"] > 0


def test_it_is_said_when_the_rates_decide_and_when_they_do_not():
    equal = rows({"a": [1.0, 1.1, 1.2], "b": [2.0, 2.11, 2.2]})
    other = rows({"a": [0.9, 0.91, 0.92], "b": [0.5, 0.52, 0.5]}, column="tuned")
    first = verdicts([*equal, *other], budget="forwards")[0]["text"]
    assert first == "At one equal rate a has the lowest final loss; with rates tuned alike b has it."
    same = rows({"a": [0.5, 0.52, 0.5], "b": [0.9, 0.91, 0.92]}, column="tuned")
    assert "does not hang on the rates" in verdicts([*equal, *same], budget="forwards")[0]["text"]
    assert all(entry["column"] == "equal" for entry in verdicts(equal, budget="forwards"))


def test_means_are_over_the_runs_that_did_not_fail():
    (found,) = aggregate(rows({"a": [1.0, None, 3.0]}))
    assert found["loss"] == {"mean": 2.0, "sd": pytest.approx(math.sqrt(2)), "min": 1.0, "max": 3.0, "n": 2}
    assert found["seeds"] == [0, 2] and found["failed"] == {"1": "it broke"}
    (alone,) = aggregate(rows({"a": [1.0]}))
    assert alone["loss"]["sd"] is None


# --- runs ------------------------------------------------------------------------------------------------------------


def header(config) -> Header:
    return Header(
        config=config.model_dump_json(), fingerprint="ab" * 32, layout="cd" * 32, law="gaussian", noise_version=1,
        package="0", created="2026-01-01",
    )  # fmt: skip


def a_round(number: int, loss: float) -> Round:
    task = Task(number, 0, 7, rate=1e-3, mu=1e-3, steps=1)
    entry = Entry(task, Reply(number, 0, 1, loss, (0.5,)), weight=1.0, bytes_down=20, bytes_up=10)
    return Round(
        number, (entry,), loss=loss, rate=1e-3, slowed=1.0, seconds=0.5, forwards=2, tokens=30, digest=None,
        evaluations={"eval": {"loss": loss, "accuracy": 0.5}}, events=(),
    )  # fmt: skip


class Machine:
    """Starts "processes" that end at once, or after some polls: each writes the folder of a run."""

    def __init__(self, loss=lambda job: 1.0, *, polls=0, code=lambda job: 0) -> None:
        self.loss, self.polls, self.code = loss, polls, code
        self.started: list[Job] = []
        self.running: set[Path] = set()
        self.most = 0
        self.killed: list[Path] = []

    def __call__(self, job):
        self.started.append(job)
        self.running.add(job.folder)
        self.most = max(self.most, len(self.running))
        left = iter([None] * self.polls)
        return SimpleNamespace(
            poll=lambda: next(left, self._end(job)) if job.folder in self.running else self.code(job),
            terminate=lambda: self.killed.append(job.folder),
            wait=lambda timeout=None: 0,
        )

    def _end(self, job):
        if self.polls and not self.most:
            return None
        self.running.discard(job.folder)
        loss = self.loss(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        with Journal.create(job.folder / "journal.sqlite", header(job.config)) as journal:
            journal.record_evaluation(-1, "eval", {"loss": 5.0, "accuracy": 0.1})
            for number, value in enumerate((4.0, loss)):
                journal.append(a_round(number, value))
        if self.code(job) == 0:
            summary = outcome(loss=loss, accuracy=0.5, rate=job.config.algorithm.rate or 0.1).summary
            (job.folder / "summary.json").write_text(json.dumps(summary).replace("NaN", "null"))
        return self.code(job)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(compare_runs, "_PAUSE", 0)


def landscape(job):
    """fedmezo is best at 1e-2, fedavg at 1e-1; the seed matters less than the rate."""
    best = {"fedmezo": 1e-2, "fedavg": 1e-1}[job.arm]
    return 1.0 + abs(math.log10(job.config.algorithm.rate / best)) + 0.01 * (job.seed % 3) * (job.arm == "fedavg")


TERMS = Terms(FORWARDS, seeds=(0, 1, 2), rate=1e-2, tune={"": (1e-3, 1e-2, 1e-1)})


def test_a_comparison_runs_every_arm_column_and_seed_and_writes_what_it_returns(tmp_path):
    machine = Machine(landscape)
    result = compare(ARMS, TERMS, out=tmp_path, launch=machine)
    assert Counter((row["arm"], row["column"]) for row in result["rows"]) == dict.fromkeys(
        [(arm, column) for arm in ARMS for column in ("equal", "tuned")], 3
    )
    assert {(row["arm"], row["rate"]) for row in result["rows"] if row["column"] == "tuned"} == {
        ("fedmezo", 1e-2),
        ("fedavg", 1e-1),
    }
    assert {row["rate"] for row in result["rows"] if row["column"] == "equal"} == {1e-2}
    assert json.loads((tmp_path / "compare.json").read_text()) == result
    assert len(result["tuning"]) == 6 + 1  # fedavg's best is the highest of its grid: one step more
    assert any("fedavg: the best rate was the highest" in note for note in result["notes"])
    assert result["verdicts"][0]["text"].startswith("At one equal rate fedmezo has the lowest final loss")
    tuned = {(job.seed, job.config.data.seed) for job in machine.started if job.column == "tuning"}
    assert tuned == {(3, 3)} and all(job.config.data.seed == 0 for job in machine.started if job.column != "tuning")
    assert all(job.config.federation.budget == FORWARDS for job in machine.started)


def test_runs_at_one_rate_are_the_same_in_both_columns_and_run_once(tmp_path):
    machine = Machine(landscape)
    compare(ARMS, TERMS, out=tmp_path, launch=machine)
    assert len({job.folder for job in machine.started}) == len(machine.started)
    assert sum(job.arm == "fedmezo" and job.column != "tuning" for job in machine.started) == 3


def test_a_finished_comparison_is_only_read_again_and_may_grow(tmp_path):
    first = compare(ARMS, TERMS, out=tmp_path, launch=Machine(landscape))
    again = Machine(landscape)
    assert compare(ARMS, TERMS, out=tmp_path, launch=again) == first and again.started == []
    more = Machine(landscape)
    compare(ARMS, Terms(FORWARDS, seeds=(0, 1, 2), rate=1e-1, tune=TERMS.tune), out=tmp_path, launch=more)
    assert {(job.arm, job.column) for job in more.started} == {("fedmezo", "equal")}


class Stopped(Onlooker):
    """Interrupts after some runs."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def ended(self, outcome):
        self.runs -= 1
        if not self.runs:
            raise KeyboardInterrupt


@pytest.mark.parametrize("runs", [1, 4, 9])
def test_a_comparison_stopped_anywhere_goes_on_where_it_was(tmp_path, runs):
    whole = compare(ARMS, TERMS, out=tmp_path / "whole", launch=Machine(landscape))
    machine = Machine(landscape)
    with pytest.raises(KeyboardInterrupt):
        compare(ARMS, TERMS, out=tmp_path / "cut", launch=machine, watch=Stopped(runs))
    rest = Machine(landscape)
    result = compare(ARMS, TERMS, out=tmp_path / "cut", launch=rest)
    assert not {job.folder for job in machine.started} & {job.folder for job in rest.started}
    assert [row["loss"] for row in result["rows"]] == [row["loss"] for row in whole["rows"]]


def job_in(folder, *, seed=0, **algorithm) -> Job:
    return Job("a", "equal", seed, parse_config({"algorithm": algorithm}), folder / f"seed-{seed}")


def test_no_more_processes_than_allowed_and_all_are_ended_on_a_stop(tmp_path):
    jobs = [job_in(tmp_path, seed=seed) for seed in range(5)]
    machine = Machine(polls=3)
    assert [found.job for found in execute(jobs, at_once=2, launch=machine, watch=Onlooker())] == jobs
    assert machine.most == 2
    machine = Machine()
    machine._end = lambda job: None
    jobs = [job_in(tmp_path / "other", seed=seed) for seed in range(3)]
    watch = SimpleNamespace(begun=lambda job: (_ for _ in ()).throw(KeyboardInterrupt) if job.seed == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        execute(jobs, at_once=3, launch=machine, watch=watch)
    assert machine.killed == [jobs[0].folder, jobs[1].folder]


def test_a_run_that_goes_on_is_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_runs, "_LOOK", 0)
    job, heard = job_in(tmp_path), []
    job.folder.mkdir()
    job.asked.write_text(job.config.to_toml())
    with Journal.create(job.folder / "journal.sqlite", header(job.config)) as journal:
        journal.append(a_round(0, 2.5))
    watch = Onlooker()
    watch.heard = lambda job, *, rounds, loss: heard.append((rounds, loss))
    left = iter([None, None, 1])
    process = SimpleNamespace(poll=lambda: next(left), terminate=None)
    (found,) = execute([job], at_once=1, launch=lambda job: process, watch=watch)
    assert (1, 2.5) in heard and found.error == "exit code 1"
    assert compare_runs.so_far(tmp_path) == (0, pytest.approx(math.nan, nan_ok=True))


def test_an_unfinished_run_is_resumed_and_a_new_one_begun_from_the_file_beside_it(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: commands.append(command[3:]))
    job = job_in(tmp_path)
    launch(job)
    (job.folder).mkdir()
    (job.folder / "journal.sqlite").touch()
    launch(job)
    begun, resumed = commands
    assert begun == ["run", str(job.asked), "--out", str(job.folder), "--json", "--quiet"]
    assert resumed == ["resume", str(job.folder), "--json", "--quiet"]


def test_a_folder_with_a_run_of_another_configuration_is_refused_before_anything_runs(tmp_path):
    (first,) = execute([job_in(tmp_path, rate=0.1)], at_once=1, launch=Machine(), watch=Onlooker())
    assert load_config(first.job.asked) == first.job.config
    machine = Machine()
    for changed in ({"rate": 0.2}, {"rate": 0.1, "clip": 1.0}):
        with pytest.raises(ConfigError, match="run of another configuration"):
            execute(
                [job_in(tmp_path, **changed), job_in(tmp_path, seed=1)], at_once=1, launch=machine, watch=Onlooker()
            )
    assert machine.started == []
    first.job.asked.unlink()
    with pytest.raises(ConfigError, match="run of another configuration"):
        execute([first.job], at_once=1, launch=machine, watch=Onlooker())


def test_a_foreign_run_that_would_be_met_late_is_met_before_anything_runs(tmp_path):
    compare(ARMS, Terms(FORWARDS, rate=1e-2), out=tmp_path, launch=Machine(landscape))
    machine = Machine(landscape)
    with pytest.raises(ConfigError, match="run of another configuration"):
        compare(ARMS, Terms({"forwards": 7.0}, rate=1e-2, tune=TERMS.tune), out=tmp_path, launch=machine)
    assert machine.started == []


def test_a_budget_for_tuning_is_for_tuning_only(tmp_path):
    machine = Machine(landscape)
    compare(ARMS, Terms(FORWARDS, tune=TERMS.tune, tune_budget={"rounds": 3.0}), out=tmp_path, launch=machine)
    spent = {(job.column, *job.config.federation.budget.items()) for job in machine.started}
    assert spent == {("tuning", ("rounds", 3.0)), ("tuned", ("forwards", 100.0))}


def test_data_that_changed_between_the_runs_of_an_arm_is_told(tmp_path):
    machine = Machine(landscape)

    def start(job):
        job.folder.mkdir(parents=True)
        (job.folder / "data.sha256").write_text("other" if (job.arm, job.seed) == ("fedavg", 1) else "same")
        return machine(job)

    result = compare(ARMS, Terms(FORWARDS, rate=1e-2), out=tmp_path, launch=start)
    assert [note for note in result["notes"] if "changed" in note] == [
        "The training data changed between the runs of fedavg; remove these runs and start anew."
    ]


def test_another_budget_needs_another_folder(tmp_path):
    compare(ARMS, TERMS, out=tmp_path, launch=Machine(landscape))
    with pytest.raises(ConfigError, match="run of another configuration"):
        compare(ARMS, Terms({"forwards": 7}, rate=1e-2), out=tmp_path, launch=None)


@pytest.mark.parametrize("name", ["notes.txt", "journal.sqlite"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="choose another --out"):
        compare(ARMS, TERMS, out=tmp_path, launch=None)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("code", "printed", "told"),
    [
        (1, "noise\nerror: The disk is full.\n{}\n", "The disk is full."),
        (1, "Traceback\nboom\n", "boom"),
        (3, "", "exit code 3"),
        (-signal.SIGKILL, "", "signal 9; perhaps out of memory"),
        (-signal.SIGTERM, "", "signal 15"),
    ],
)
def test_a_run_that_fails_is_a_row_with_its_error_and_the_others_go_on(tmp_path, code, printed, told):
    machine = Machine(landscape, code=lambda job: code if job.arm == "fedavg" and job.seed == 1 else 0)

    def start(job):
        job.log.write_text(printed)
        return machine(job)

    result = compare(ARMS, Terms(FORWARDS, rate=1e-2), out=tmp_path, launch=start)
    failed = [row for row in result["rows"] if row["error"]]
    assert [(row["arm"], row["seed"], row["loss"]) for row in failed] == [("fedavg", 1, None)]
    assert told in failed[0]["error"] and told.rstrip(".") in result["verdicts"][0]["text"]
    assert len(result["rows"]) == 6 and Path(result["page"]).exists()


def test_a_run_that_diverged_counts_as_failed_and_is_not_run_again(tmp_path):
    def loss(job):
        return math.nan if job.arm == "fedavg" else 1.0

    result = compare(ARMS, Terms(FORWARDS, rate=1e-2), out=tmp_path, launch=Machine(loss))
    failed = [row for row in result["rows"] if "diverged" in (row["error"] or "")]
    assert {row["arm"] for row in failed} == {"fedavg"} and {row["bytes"] for row in failed} == {None}
    again = Machine(loss)
    compare(ARMS, Terms(FORWARDS, rate=1e-2), out=tmp_path, launch=again)
    assert again.started == []


def test_an_arm_without_any_good_rate_has_no_tuned_runs(tmp_path):
    machine = Machine(lambda job: math.nan if job.arm == "fedavg" else landscape(job))
    result = compare(ARMS, Terms(FORWARDS, tune=TERMS.tune), out=tmp_path, launch=machine)
    assert {row["arm"] for row in result["rows"]} == {"fedmezo"}
    assert any("fedavg: every rate of its grid failed" in note for note in result["notes"])
    assert {point["error"] is None for point in result["tuning"] if point["arm"] == "fedavg"} == {False}


def test_spending_more_than_the_budget_is_told(tmp_path):
    result = compare(ARMS, Terms({"bytes": 10.0}, rate=1e-2), out=tmp_path / "a", launch=Machine(landscape))
    assert any("fedavg spent up to 3 times the budget of 10 B" in note for note in result["notes"])
    result = compare(ARMS, Terms({"forwards": 500.0}, rate=1e-2), out=tmp_path / "b", launch=Machine(landscape))
    assert any("ended with 20% of the budget of 500 forward passes" in note for note in result["notes"])


# --- curves and page -------------------------------------------------------------------------------------------------


def curve(*points: tuple[float, float]) -> list[Point]:
    spent = ("rounds", "forwards", "tokens", "seconds", "bytes")
    return [Point(dict.fromkeys(spent, at) | {"bytes": 100 * at}, {"loss": loss}) for at, loss in points]


def test_a_band_is_the_mean_and_the_range_of_the_seeds():
    found = band([curve((0, 5), (2, 3)), curve((0, 5), (2, 1))], "loss")
    assert (found.mean, found.low, found.high, found.seeds) == ([5, 2], [5, 1], [5, 3], 2)
    assert found.spent["bytes"] == [0, 200]
    assert band([curve((0, 5))], "accuracy") is None and band([], "loss") is None


def test_last_evaluations_belong_together_though_the_budget_ended_the_seeds_at_other_rounds():
    found = band([curve((0, 5), (2, 4), (3, 3)), curve((0, 5), (2, 4), (4, 2), (5, 1))], "loss")
    assert found.mean == [5, 4, 2] and found.spent["rounds"] == [0, 2, 4]


def test_an_axis_on_which_the_arms_end_far_apart_is_logarithmic():
    near = {"a": [curve((0, 5), (4, 1))], "b": [curve((0, 5), (5, 1))]}
    far = {"a": [curve((0, 5), (4, 1))], "b": [curve((0, 5), (400, 1))]}
    assert log_axes([near]) == set() and "bytes" in log_axes([far]) and log_axes([{}]) == set()


@pytest.mark.parametrize("axis", ["rounds", "bytes"])
def test_a_logarithmic_axis_has_no_point_at_0_and_a_linear_one_has(axis):
    curves, named = {"a": [curve((0, 5), (4, 1))]}, {"a": "#111111"}
    (chart,) = curve_charts(curves, column="equal", axis=axis, named=named, logs={"bytes"})
    (trace,) = chart.traces
    assert trace["meta"]["bytes"] == [None, 400] and trace["meta"]["rounds"] == [0, 4]
    assert trace["x"] == trace["meta"][axis]
    assert (chart.layout["xaxis"].get("type") == "log") == (axis == "bytes")


def test_an_arm_that_surged_is_cut_off_and_the_chart_says_so():
    calm, wild = curve((0, 5), (4, 1)), curve((0, 5), (4, 900))
    named = {"a": "#111111", "b": "#222222"}
    (chart,) = curve_charts({"a": [calm], "b": [wild]}, column="equal", axis="rounds", named=named)
    assert chart.layout["yaxis"]["range"][1] == 7.5 and "above 7.5 are cut off" in chart.note
    (plain,) = curve_charts({"a": [calm]}, column="equal", axis="rounds", named=named)
    assert "range" not in plain.layout["yaxis"] and len(plain.traces) == 1


def test_the_page_says_what_the_result_says_and_needs_no_network(tmp_path):
    result = compare(ARMS, TERMS, out=tmp_path / "<b>&", launch=Machine(landscape))
    page = Path(result["page"]).read_text()
    body = page[: page.index('<script type="application/json"')]
    for entry in result["verdicts"]:
        assert entry["text"].partition(": ")[2] in body or entry["text"] in body
    assert all(note in body for note in result["notes"])
    assert "<b>&/" not in body and not re.search(r"(src|href)=", body)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page)[1])
    assert set(figures) == {f"curve-{c}-{m}" for c in ("equal", "tuned") for m in ("loss", "accuracy")} | {"tuning"}
    for name, figure in figures.items():
        assert f"<div class=chart id={name}>" in body
        for trace in figure["data"] if name != "tuning" else ():
            assert set(trace["meta"]) == {"rounds", "forwards", "tokens", "seconds", "bytes"}
    means = [trace for trace in figures["curve-tuned-loss"]["data"] if trace["line"]["width"]]
    assert [trace["y"][-1] for trace in means] == pytest.approx([1.0, 1.01])
    assert re.search(r"value=forwards [^>]*checked", body)


def test_no_label_and_no_error_can_write_into_the_page(tmp_path):
    evil = "<img src=x>"
    machine = Machine(code=lambda job: 1 if job.seed == 2 else 0)

    def start(job):
        job.log.write_text(f"error: {evil}\n")
        return machine(job)

    arms = {evil: parse_config({"algorithm": {"decay": "linear"}}), "plain": ARMS["fedavg"]}
    result = compare(arms, Terms(FORWARDS, tune={"": (1, 2)}), out=tmp_path, launch=start)
    assert any(evil in note for note in result["notes"]) and any(row["error"] == evil for row in result["rows"])
    page = Path(result["page"]).read_text()
    assert evil not in page and page.count("&lt;img src=x&gt;") > 10


def test_a_comparison_without_plotly_has_no_page_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    notes = []
    watch = Onlooker()
    watch.note = notes.append
    result = compare(ARMS, Terms(FORWARDS, rate=1e-2), out=tmp_path, launch=Machine(landscape), watch=watch)
    assert result["page"] is None and any("plotly" in note for note in notes)


# --- terminal --------------------------------------------------------------------------------------------------------


def test_the_terminal_shows_numbers_verdicts_and_notes(tmp_path, capsys):
    with CompareScreen() as watch:
        result = compare(ARMS, TERMS, out=tmp_path, launch=Machine(landscape), watch=watch)
    told = capsys.readouterr()
    assert told.out == "" and "fedavg, tuned rates, rate 0.1, seed 2: loss 1.020" in told.err
    assert re.search(r"\[19/19\]", told.err)
    console = Console(width=100, highlight=False)
    with console.capture() as shown:
        console.print(compare_table(result))
    text = " ".join(shown.get().split())
    assert "fedavg" in text and "1.010 ± 0.010" in text and "500 MB" in text and "1.000" in text
    assert all(" ".join(entry["text"].split()) in text for entry in result["verdicts"])


def test_the_terminal_tells_of_a_failure_and_of_limits(tmp_path, capsys):
    machine = Machine(code=lambda job: 4)
    with CompareScreen() as watch:
        result = compare(ARMS, Terms(FORWARDS, rate=1e-2), out=tmp_path, launch=machine, watch=watch)
    told = capsys.readouterr().err
    assert "fedavg, equal rate, rate 0.01, seed 2: failed: exit code 4" in told and "All arms ran at one rate" in told
    console = Console(width=80)
    with console.capture() as shown:
        console.print(compare_table(result))
    assert "0, 3 failed" in shown.get()


def test_quiet_is_quiet(tmp_path, capsys):
    with CompareScreen(quiet=True) as watch:
        compare(ARMS, Terms(FORWARDS, rate=1e-2), out=tmp_path, launch=Machine(landscape), watch=watch)
    assert capsys.readouterr() == ("", "")


def test_a_mistake_in_the_command_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    assert main(["compare", "--algorithms", "fedmezo,fedavg", "--budget", "epochs=1", "--out", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: --budget: expected rounds \| [^\n]*\n", capsys.readouterr().err)


def command(tmp_path: Path, *, budget: str, out: str) -> list[str]:
    sections = asked(write_records(tmp_path), runtime={"threads": 1}, federation={"local_steps": 1})
    path = write(tmp_path / "small.toml", **sections)
    arguments = ["compare", str(path), "--algorithms", "fedmezo,fedavg", "--budget", budget, "--seeds", "1"]
    return [*arguments, "--rate", "1e-3", "--out", str(tmp_path / out), "--jobs", "2", "--json", "--quiet"]


def test_the_command_compares_real_runs_each_a_process(tmp_path, capfd):
    assert main(command(tmp_path, budget="forwards=10", out="out")) == 0
    result = json.loads(capfd.readouterr().out)
    # A gradient counts as three forward passes, two points as two; a round is three clients.
    spent = [(row["arm"], row["forwards"], row["rounds"]) for row in result["rows"]]
    assert spent == [("fedmezo", 12, 2), ("fedavg", 18, 2)]
    assert all(row["peak_rss_mb"] > 100 and row["error"] is None for row in result["rows"])
    for row in result["rows"]:
        folder = Path(row["run_dir"])
        with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
            facts = gather(journal)
        points = read_curve(folder)
        assert points[-1].spent == {axis: facts.spent()[1][axis] for axis in points[-1].spent}
        assert points[-1].metrics["loss"] == row["loss"] and points[0].spent["forwards"] == 0


@pytest.mark.slow
def test_a_killed_command_ends_its_runs_and_goes_on_to_the_same_bits(tmp_path, capfd):
    assert main(command(tmp_path, budget="rounds=60", out="whole")) == 0
    whole = json.loads(capfd.readouterr().out)
    cut = command(tmp_path, budget="rounds=60", out="cut")
    process = subprocess.Popen([sys.executable, "-m", "fedmezo", *cut], stdout=subprocess.PIPE, text=True)
    folder = tmp_path / "cut" / "fedmezo" / "rate-0.001" / "seed-1"
    while compare_runs.so_far(folder)[0] < 3:
        time.sleep(0.05)
    process.terminate()
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Go on with the same command" in json.loads(told)["error"]["message"]
    done = compare_runs.so_far(folder)[0]
    assert 3 <= done < 60
    assert main(cut) == 0
    result = json.loads(capfd.readouterr().out)
    assert [row["digest"] for row in result["rows"]] == [row["digest"] for row in whole["rows"]]
    assert (folder.parent / "seed-1.log").read_text().count("run_dir") == 1
