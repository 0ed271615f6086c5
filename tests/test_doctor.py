"""The doctor: each symptom is found in a journal that has it, and in no healthy one."""

import json
import math
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import main, stdout_object
from tiny_runs import StopAfter, StopError, small
from toys import quadratic_bench

from fedmezo import __version__, diagnose
from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.runtime.journal import Entry, Header, Journal, Round
from fedmezo.runtime.simulate import simulate
from fedmezo.studies import run as study
from fedmezo.studies.doctor.finding import SEVERITIES
from fedmezo.studies.doctor.screen import diagnosis_text
from fedmezo.studies.doctor.trend import rise, trend
from fedmezo.studies.doctor.vitals import read
from fedmezo.studies.watch import NullWatch
from fedmezo.zo.noise import NOISE_VERSION

DIM = 90_000  # 0.3 / sqrt(d) = 1e-3
HEADER = Header("", "ab" * 32, "cd" * 32, "gaussian", NOISE_VERSION, __version__, "2026-01-02T03:04:05+00:00")
ROOT = Path(__file__).parent.parent


def falling(client, at, rng):
    return 4 - 0.05 * at + 0.2 * client / 3 + rng.normal(0, 0.1)


def level(client, at, rng):
    return 4 + rng.normal(0, 0.1)


class Made:
    """A made-up run: what its clients report, as functions of (client, round, rng); the rest is healthy."""

    def __init__(self, loss=falling, *, rounds=24, clients=3, cohort=None, seed=0, planned=None, **config):
        self.loss, self.rounds, self.clients, self.cohort = loss, rounds, clients, cohort or clients
        self.rng = np.random.default_rng(seed)
        self.planned = planned or rounds
        self.config, self.task, self.summary, self.header = config, {}, {"dim": DIM}, {}
        self.scale = lambda client, at: 2.0
        self.events = lambda at: ()
        self.weight = lambda client: 1 / self.cohort
        self.slope = None
        self.evaluation = lambda at: 4 - 0.05 * at
        self.seconds = lambda at: 1.0
        self.down = lambda client, at: 400
        self.skips = lambda client, at: 0

    def write(self, folder, **changed):
        for name, value in changed.items():
            setattr(self, name, value)
        sections = {
            "model": {"dtype": "float32"},
            "federation": {"clients": self.clients, "rounds": self.planned, "batch_size": 2},
            "algorithm": {"name": "fedmezo", "rate": 1e-3, "clip": 3.0, "decay": "constant"},
            "eval": {"every": 4},
        }
        for name, section in self.config.items():
            sections[name] = sections.get(name, {}) | section
        folder.mkdir(parents=True, exist_ok=True)
        with Journal.create(
            folder / "journal.sqlite", replace(HEADER, config=json.dumps(sections), **self.header)
        ) as j:
            if self.evaluation is not None:
                j.record_evaluation(-1, "eval", {"loss": self.evaluation(0)})
            for at in range(self.rounds):
                j.append(self.round(at))
        (folder / "summary.json").write_text(json.dumps(self.summary))
        return folder

    def round(self, at):
        crowd = sorted(self.rng.choice(self.clients, self.cohort, replace=False))
        entries = tuple(self.entry(int(client), at) for client in crowd)
        losses = [entry.reply.loss for entry in entries if math.isfinite(entry.reply.loss)]
        judged = self.evaluation is not None and (at + 1) % 4 == 0
        return Round(
            round=at,
            entries=entries,
            loss=float(np.mean(losses)) if losses else math.nan,
            rate=entries[0].task.rate,
            slowed=1.0,
            seconds=self.seconds(at),
            forwards=100,
            tokens=1000,
            digest="ef" * 32 if judged else None,
            evaluations={"eval": {"loss": self.evaluation(at + 1)}} if judged else {},
            events=tuple(self.events(at)),
        )

    def entry(self, client, at):
        given = {"rate": 1e-3, "mu": 1e-3, "steps": 10, "clip": 3 * self.scale(client, at)} | self.task
        given = {name: value(at) if callable(value) else value for name, value in given.items()}
        task = Task(at, client, 7, **given)
        slopes = self.rng.normal(0, self.scale(client, at), task.steps) if task.method == "walk" else []
        slopes = [float(np.float32(s)) for s in slopes] if self.slope is None else [self.slope] * task.steps
        lost = self.skips(client, at)
        slopes[:lost] = [math.nan] * min(lost, len(slopes))
        loss = self.loss(client, at, self.rng)
        return Entry(task, Reply(at, client, 20, loss, tuple(slopes)), self.weight(client), self.down(client, at), 76)


def kinds(folder):
    return {finding.kind: finding for finding in diagnose(folder).findings}


def grave(folder):
    return {f.kind for f in diagnose(folder).findings if f.severity in ("problem", "warning")}


# Healthy runs.


SHAPES = {
    "falling": {},
    "many clients, few a round": {"clients": 20, "cohort": 4, "rounds": 60},
    "long and levelling off": {
        "rounds": 100,
        "loss": lambda c, at, rng: 2 + 2 * math.exp(-at / 20) + rng.normal(0, 0.1),
    },
    "unlike clients": {"clients": 6, "loss": lambda c, at, rng: 3 + 0.4 * c - 0.04 * at + rng.normal(0, 0.2)},
    "heavy tails": {"loss": lambda c, at, rng: 4 - 0.05 * at + 0.1 * rng.standard_t(3), "rounds": 40},
    "short": {"rounds": 4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_healthy_runs_show_no_warning(tmp_path, name):
    for seed in range(4):
        made = Made(**SHAPES[name], seed=seed)
        made.evaluation = lambda at: 4 - 0.6 * (1 - math.exp(-at / 20))
        folder = made.write(tmp_path / str(seed))
        assert grave(folder) == set(), seed
        assert diagnose(folder).healthy


def test_findings_come_gravest_first_and_are_plain_values(tmp_path):
    made = Made(loss=lambda c, at, rng: 4 + 0.2 * at, task={"mu": 1.0})
    found = diagnose(made.write(tmp_path / "r", task={"mu": 1.0}))
    order = [SEVERITIES.index(f.severity) for f in found.findings]
    assert order == sorted(order) and order[0] == 0 and not found.healthy
    assert json.loads(json.dumps(found.as_dict()))["findings"][0]["kind"] == found.findings[0].kind


# Diverging.


def turning(client, at, rng):
    return (4 - 0.05 * at if at < 12 else 3.4 + 0.4 * (at - 12)) + rng.normal(0, 0.05)


def test_a_run_that_turns_is_diverging_since_the_round_it_turned(tmp_path):
    made = Made(turning, algorithm={"clip": "none"})
    folder = made.write(tmp_path / "r", scale=lambda c, at: 2.0 if at < 12 else 10.0)
    found = kinds(folder)["diverging"]
    assert found.severity == "problem"
    assert found.numbers["began_round"] in (12, 13, 14)
    assert found.numbers["slope_growth"] == pytest.approx(5, rel=0.3)
    rate = float(re.search(r"algorithm.rate=([\d.e-]+)", found.advice)[1])
    assert rate == pytest.approx(1e-3 / found.numbers["slope_growth"], rel=0.05)
    assert "algorithm.clip=3.0" in found.advice
    assert found.command.startswith(f"fedmezo rollback {folder} --round ")


def test_the_advised_rollback_keeps_the_best_round(tmp_path):
    folder = Made(turning).write(tmp_path / "r", evaluation=lambda at: 4 - 0.05 * min(at, 12) + 0.3 * max(at - 12, 0))
    command = kinds(folder)["diverging"].command.split()
    assert command[-2:] == ["--round", "12"]
    study.rollback(folder, round=12)
    assert "diverging" not in kinds(folder)


def test_a_model_worse_than_untrained_is_diverging_whatever_the_training_loss(tmp_path):
    folder = Made(level).write(tmp_path / "r", evaluation=lambda at: 4 + 0.02 * (at - 6))
    assert "worse than untrained" in kinds(folder)["diverging"].sentence
    assert kinds(folder)["diverging"].numbers["worse_since"] == 4


def test_a_surge_that_a_guard_caught_is_a_warning_with_a_lower_rate(tmp_path):
    events = {9: (("surge", "training loss surged to 9"), ("slow", "0.5"))}
    folder = Made().write(tmp_path / "r", events=lambda at: events.get(at, ()))
    found = kinds(folder)
    assert found["surges"].severity == "warning" and "diverging" not in found
    assert found["surges"].numbers["surges"] == [9] and found["surges"].numbers["slowed"] == 0.5
    assert "algorithm.rate=0.0005" in found["surges"].advice


def test_slopes_that_grow_tenfold_warn_before_the_loss_turns(tmp_path):
    folder = Made().write(tmp_path / "r", scale=lambda c, at: 2.0 * 1.15**at)
    assert kinds(folder)["growing-slopes"].numbers["slope_growth"] > 10


def test_pure_noise_hardly_ever_counts_as_a_rise():
    rng = np.random.default_rng(1)
    draws = [rng.standard_t(4, size=n) + 10 for n in (10, 20, 60, 200) for _ in range(100)]
    assert sum(rise(list(draw)).real for draw in draws) <= 8


def test_a_rise_needs_four_values():
    assert rise([1.0, 2.0, 3.0]) is None


# Trend.


def test_the_interval_of_a_trend_holds_the_truth_19_times_of_20():
    rng, held = np.random.default_rng(2), 0
    for _ in range(300):
        courses = {
            client: [(at, 3 * client - 0.01 * at + rng.normal(0, 0.3)) for at in range(30) if rng.random() < 0.4]
            for client in range(5)
        }
        found = trend(courses)
        held += found.low <= -0.01 <= found.high
    assert 0.91 <= held / 300 <= 0.99


def test_a_trend_does_not_mind_who_was_drawn_when():
    courses = {0: [(at, 1.0) for at in range(10)], 1: [(at, 9.0) for at in range(20, 30)]}
    assert trend(courses).slope == pytest.approx(0)


def test_rounds_to_see_is_where_the_interval_ends_at_zero():
    courses = {c: [(at, -0.01 * at + (-1) ** at * 0.5) for at in range(50)] for c in range(2)}
    found = trend(courses)
    rounds = found.rounds_to_see(slope=0.01)
    times = np.arange(round(rounds)) - (round(rounds) - 1) / 2
    assert found.width * found.noise / math.sqrt(2 * np.sum(times**2)) == pytest.approx(0.01, rel=0.02)
    assert found.rounds_to_see(slope=0.01, noise=0.5) == pytest.approx(rounds * 0.63, rel=0.01)


def test_a_trend_lost_in_noise_says_how_many_rounds_would_show_it(tmp_path):
    def slow(client, at, rng):
        return 4 - 0.002 * at + rng.normal(0, 0.3)

    # The first seed whose estimate falls: what is said depends on the estimate, not on the truth.
    for seed in range(9):
        folder = Made(slow, seed=seed).write(tmp_path / str(seed), evaluation=lambda at: 4.0)
        found = kinds(folder)["unseen"]
        assert found.severity == "warning" and found.numbers["low"] < 0 < found.numbers["high"]
        if found.numbers["rounds_needed"] < 200:
            assert f"{found.numbers['rounds_needed'] - 24:,.0f} more round" in found.advice
            return
    raise AssertionError("no seed fell")


def test_a_trend_lost_in_noise_is_a_note_when_the_evaluation_falls(tmp_path):
    assert kinds(Made(level).write(tmp_path / "r"))["unseen"].severity == "note"


def test_a_run_that_rises_again_or_stands_still_in_its_second_half_is_told(tmp_path):
    turned = Made(
        lambda c, at, rng: 4 - 0.1 * at + (0.13 * (at - 15) if at > 15 else 0) + rng.normal(0, 0.01), rounds=30
    )
    assert kinds(turned.write(tmp_path / "turned"))["turned"].severity == "warning"
    still = Made(lambda c, at, rng: max(4 - 0.1 * at, 2.8) + rng.normal(0, 0.05), rounds=30)
    assert kinds(still.write(tmp_path / "still"))["level"].severity == "note"


# The ceiling.


def test_the_loss_falls_to_first_order_by_the_ceiling(tmp_path):
    bench, folder = quadratic_bench(), tmp_path / "r"
    folder.mkdir()
    header = replace(HEADER, config="{}", layout=bench.params.layout())
    algorithm = fedmezo(Settings(rate=2e-4, mu=1e-3, steps=20, clip=math.inf), seed=3, cohort=1)
    with Journal.create(folder / "journal.sqlite", header) as journal:
        list(simulate(algorithm, bench, journal=journal, clients=(0,), rounds=30))
    run = read(folder)
    ceiling = sum(pulse.visits[0].ceiling for pulse in run.pulses[:-1])
    assert run.losses[0][1] - run.losses[-1][1] == pytest.approx(ceiling, rel=0.15)


def test_a_rate_that_cannot_lower_the_loss_by_one_percent_is_told_with_its_factor(tmp_path):
    folder = Made(level).write(tmp_path / "r", task={"rate": 1e-6})
    found = kinds(folder)["out-of-reach"]
    assert found.severity == "problem" and "rate-low" not in kinds(folder)
    enough = 1e-6 * found.numbers["factor"]
    assert found.numbers["rate"] == pytest.approx(enough)
    assert "out-of-reach" not in kinds(Made(level).write(tmp_path / "more", task={"rate": 1.05 * enough}))


def test_a_sign_has_no_size_so_no_ceiling(tmp_path):
    folder = Made(level).write(tmp_path / "r", task={"rate": 1e-9}, slope=1.0)
    assert "out-of-reach" in kinds(folder)
    made = Made(level)
    made.entry = lambda client, at: Entry(
        Task(at, client, 7, 1e-9, 1e-3, 2, coding="sign"),
        Reply(at, client, 2, 4.0, (1.0, -1.0), coding="sign"),
        1 / 3,
        9,
        9,
    )
    assert "out-of-reach" not in kinds(made.write(tmp_path / "sign"))


# Steps.


@pytest.mark.parametrize(("dtype", "cure"), [("float16", "bfloat16"), ("float32", "algorithm.rate=0.00033")])
def test_losses_that_are_not_finite_are_counted_and_the_cure_fits_the_format(tmp_path, dtype, cure):
    made = Made(model={"dtype": dtype})
    folder = made.write(tmp_path / "r", skips=lambda c, at: 3 if at >= 10 else 0, task={"mu": 1e-2})
    found = kinds(folder)["not-finite"]
    assert found.severity == "problem" and found.numbers["skipped"] == 14 * 3 * 3
    assert found.numbers["first_round"] == 10 and not found.numbers["one"] and cure in found.advice


def test_skips_of_one_client_point_at_its_data_and_old_ones_are_a_warning(tmp_path):
    folder = Made().write(tmp_path / "r", skips=lambda c, at: 4 if c == 1 and at < 5 else 0)
    found = kinds(folder)["not-finite"]
    assert found.severity == "warning" and found.numbers["one"] and "client 1 first" in found.advice


def test_backpropagation_without_a_loss_is_told_too(tmp_path):
    made = Made(lambda c, at, rng: math.nan if at > 8 else 4 - at / 10, algorithm={"name": "fedavg"})
    made.entry = lambda client, at: Entry(
        Task(at, client, 7, 0.05, 1e-3, 2, method="sgd"),
        Reply(at, client, 2, made.loss(client, at, None), ()),
        1 / 3,
        9,
        9,
    )
    found = kinds(made.write(tmp_path / "r", events=lambda at: (("zero-slope", ""),)))
    assert found["not-finite"].severity == "problem" and "mu" not in found and "zero-slope" not in found


def test_rounds_that_cannot_move_the_model_are_told(tmp_path):
    still = Made(level).write(tmp_path / "rate", task={"rate": 0.0}, evaluation=lambda at: 4.0)
    assert kinds(still)["zero-rate"].severity == "problem"
    flat = Made(level).write(tmp_path / "flat", slope=0.0, events=lambda at: (("zero-slope", "every slope was 0"),))
    assert kinds(flat)["zero-slope"].severity == "problem"


def test_rates_far_from_the_usual_start_are_told(tmp_path):
    low = kinds(Made().write(tmp_path / "low", task={"rate": 2e-5}, scale=lambda c, at: 90.0))
    assert low["rate-low"].numbers["ratio"] == pytest.approx(0.02)
    bare = Made(algorithm={"clip": "none"}).write(tmp_path / "high", task={"rate": 5e-3})
    assert kinds(bare)["rate-high"].numbers["ratio"] == pytest.approx(5)
    assert "rate-high" not in kinds(Made().write(tmp_path / "clipped", task={"rate": 5e-3}))
    unknown = Made(algorithm={"clip": "none"}).write(tmp_path / "unknown", task={"rate": 5e-3}, summary={})
    assert "rate-high" not in kinds(unknown) and diagnose(unknown).facts["dim"] is None


def test_a_rate_that_decayed_or_was_cut_by_guards_is_told(tmp_path):
    made = Made(algorithm={"decay": "linear"})
    folder = made.write(tmp_path / "decay", task={"rate": lambda at: 1e-3 * (1 - at / 24)})
    assert kinds(folder)["decayed"].command == f"fedmezo resume {folder} --rounds 48"
    made = Made()
    whole = made.round
    made.round = lambda at: replace(whole(at), slowed=0.125 if at > 15 else 1.0)
    assert kinds(made.write(tmp_path / "cut"))["slowed"].numbers["slowed"] == 0.125


@pytest.mark.parametrize(
    ("dtype", "mu", "told"),
    [
        ("bfloat16", 1e-3, True),
        ("bfloat16", 1e-2, False),
        ("float16", 4e-3, True),
        ("float32", 1e-6, True),
        ("float32", 1e-5, False),
        ("float32", 1e-2, False),
        ("float32", 5e-2, True),
    ],
)
def test_mu_outside_the_window_of_its_format_is_told(tmp_path, dtype, mu, told):
    folder = Made(model={"dtype": dtype}).write(tmp_path / "r", task={"mu": mu})
    assert ("mu" in kinds(folder)) == told


def test_a_clip_that_sets_the_pace_is_a_note_while_the_loss_falls_and_else_a_warning(tmp_path):
    well = Made().write(tmp_path / "well", task={"clip": 1.0})
    assert kinds(well)["clipped"].severity == "note"
    ill = Made(level).write(tmp_path / "ill", task={"clip": 1.0}, evaluation=lambda at: 4.0)
    assert kinds(ill)["clipped"].severity == "warning"


# Clients.


def test_a_client_far_from_all_others_is_named(tmp_path):
    folder = Made(lambda c, at, rng: falling(c, at, rng) * (3 if c == 4 else 1), clients=6).write(tmp_path / "loss")
    assert kinds(folder)["odd-client"].numbers | {"value": 0, "median": 0} == {
        "client": 4, "what": "loss", "value": 0, "median": 0,
    }  # fmt: skip
    folder = Made(clients=6).write(tmp_path / "slopes", scale=lambda c, at: 0.2 if c == 2 else 2.0)
    assert (kinds(folder)["odd-client"].numbers["client"], kinds(folder)["odd-client"].numbers["what"]) == (2, "slopes")


def test_a_client_that_often_does_not_answer_is_named_with_its_last_reason(tmp_path):
    late = ("absent", "client 5 did not answer within 600 s")
    often = Made().write(tmp_path / "often", events=lambda at: [late] * (at < 6))
    found = kinds(often)["silent-client"]
    assert found.numbers == {"client": 5, "missed": 6, "asked": 6}
    assert found.severity == "warning" and "did not answer within 600 s" in found.sentence
    assert "network.deadline" in found.advice
    seldom = Made().write(tmp_path / "seldom", events=lambda at: [("absent", "client 1 failed (x)")] * (at in (3, 9)))
    assert "silent-client" not in kinds(seldom)  # 2 of the 26 rounds it was asked in


def test_why_a_client_was_turned_away_is_told(tmp_path):
    said = "A client cannot take part: Client 2 has another base model."
    folder = Made().write(tmp_path / "r", events=lambda at: [("network", said), ("network", "Client 1 is there.")])
    assert kinds(folder)["turned-away"].sentence == said


def test_a_client_that_outweighs_all_others_is_named(tmp_path):
    folder = Made().write(tmp_path / "r", weight=lambda c: 0.8 if c == 2 else 0.1)
    assert kinds(folder)["heavy-client"].numbers == {"client": 2, "weight": pytest.approx(0.8)}


def test_clients_without_a_turn_are_counted_beside_what_is_expected(tmp_path):
    found = kinds(Made(clients=50, cohort=2, rounds=20).write(tmp_path / "r"))["absent"]
    assert found.severity == "note" and found.numbers["expected"] == pytest.approx(50 * 0.96**20)
    assert len(found.numbers["absent"]) == pytest.approx(found.numbers["expected"], abs=10)


def test_clients_smaller_than_a_batch_are_counted(tmp_path):
    folder = Made().write(tmp_path / "r", summary={"dim": DIM, "split": {"sizes": [9, 1, 30]}})
    assert kinds(folder)["small-clients"].numbers["clients"] == [1]


# Evaluation, traffic, time.


def test_overfitting_is_told_from_a_model_that_is_merely_past_its_best(tmp_path):
    worse = {"evaluation": lambda at: 4 - 0.05 * min(at, 8) + 0.02 * max(at - 8, 0)}
    folder = Made().write(tmp_path / "over", **worse)
    found = kinds(folder)["overfitting"]
    assert found.severity == "warning" and found.command == f"fedmezo export {folder} --round 8"
    past = Made(lambda c, at, rng: max(4 - 0.1 * at, 3.2) + rng.normal(0, 0.1)).write(tmp_path / "past", **worse)
    assert kinds(past)["best-earlier"].severity == "warning" and "overfitting" not in kinds(past)


def test_a_run_that_is_never_judged_is_told(tmp_path):
    assert kinds(Made().write(tmp_path / "end", evaluation=None))["not-judged"].severity == "warning"
    assert kinds(Made(planned=90).write(tmp_path / "going", evaluation=None))["not-judged"].severity == "note"


def test_clients_that_come_back_late_and_pull_much_are_told(tmp_path):
    folder = Made().write(tmp_path / "r", down=lambda c, at: 90_000 if c == 1 and at % 3 == 0 else 400)
    assert kinds(folder)["catching-up"].numbers["largest"] == 90_000
    assert "catching-up" not in kinds(Made().write(tmp_path / "even", down=lambda c, at: 400 + 300 * at))


def test_a_machine_that_became_slower_is_told(tmp_path):
    folder = Made().write(tmp_path / "r", seconds=lambda at: 1.0 if at < 12 else 3.0)
    assert kinds(folder)["slower"].numbers["last"] == pytest.approx(0.03)


# The journal itself.


def test_a_run_that_died_says_how_to_go_on_and_one_in_progress_does_not(tmp_path):
    folder = Made(planned=60).write(tmp_path / "r")
    assert kinds(folder)["stopped"].command == f"fedmezo resume {folder}"
    with Journal.open(folder / "journal.sqlite"):
        found = kinds(folder)
    assert "stopped" not in found and found["running"].numbers["planned"] == 60


def test_a_run_whose_budget_is_spent_is_complete(tmp_path):
    folder = Made(planned=1000, federation={"budget": {"forwards": 2400}}).write(tmp_path / "r")
    assert diagnose(folder).facts["finished"] and diagnose(folder).facts["planned"] == 24


def test_a_journal_damaged_on_the_way_is_told_and_the_rounds_before_are_looked_at(tmp_path):
    folder = Made().write(tmp_path / "r")
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        db.execute("UPDATE replies SET loss = loss + 1 WHERE round = 17")
        db.commit()
    found = diagnose(folder)
    assert found.findings[0].kind == "unreadable" and "round 17" in found.findings[0].sentence
    assert found.facts["rounds"] == 17 and "falling" in kinds(folder)


def test_other_versions_are_told(tmp_path):
    folder = Made().write(tmp_path / "package", header={"package": "0.0.9"})
    assert kinds(folder)["version"].severity == "note"
    folder = Made().write(tmp_path / "noise", header={"noise_version": NOISE_VERSION + 1})
    assert kinds(folder)["noise-version"].severity == "problem"


def test_a_run_without_a_round_is_no_error(tmp_path):
    folder = Made(rounds=0, planned=9).write(tmp_path / "r")
    assert list(kinds(folder)) == ["empty"] and str(folder) in diagnosis_text(diagnose(folder), width=80).plain
    with pytest.raises(ConfigError, match="holds no run"):
        diagnose(tmp_path)


def test_a_long_run_is_read_in_a_second(tmp_path):
    folder = Made(lambda c, at, rng: 4 - 0.005 * at + rng.normal(0, 0.1), rounds=300).write(
        tmp_path / "r", task={"steps": 60}, evaluation=lambda at: 4 - 0.005 * at
    )
    began = time.perf_counter()
    assert diagnose(folder).healthy
    assert time.perf_counter() - began < 1.0


def test_the_doctor_loads_no_model_library():
    code = "import sys, fedmezo.studies.doctor.screen; print({'transformers', 'peft', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The command, and real runs.


def test_every_line_fits_the_terminal_and_commands_stay_whole(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    Made(turning, algorithm={"clip": "none"}, planned=90).write(Path("r"), task={"mu": 1.0})
    assert main(["doctor", "r"]) == 0
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith("r: fedmezo, 24 of 90 rounds, 3 of 3 clients a round, 10 steps each\n")
    assert "\n            fedmezo resume r\n" in out
    assert out.index("PROBLEM") < out.index("WARNING")


def test_json_is_one_object_and_a_sick_run_is_no_failed_command(tmp_path, capfd):
    folder = Made(turning).write(tmp_path / "r", skips=lambda c, at: 1)
    assert main(["doctor", str(folder), "--json"]) == 0
    found, err = stdout_object(capfd)
    assert not err and not found["healthy"] and found["facts"]["rounds"] == 24
    assert {"kind", "severity", "sentence", "advice", "command", "numbers"} == set(found["findings"][0])
    assert main(["doctor", str(tmp_path)]) == 2


def tuned(records, folder, *, seed=1, rounds=12, watch=None, **algorithm):
    settings = {"rounds": rounds, "local_steps": 4, "batch_size": 4, "seed": seed}
    guard = {"on_surge": "warn", "batches": 0}  # the runs shall show what they have
    config = small(records, federation=settings, algorithm=algorithm, eval={"every": 4, "examples": 8}, guard=guard)
    study.run(config, out=folder, watch=watch)
    return folder


@pytest.mark.parametrize(
    "algorithm",
    [
        {"rate": 2.5e-3, "seed": 1},
        {"rate": 5e-3, "seed": 3},
        {"rate": 5e-3, "name": "fedkseed-pro", "decay": "linear"},
        {"name": "fedavg"},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_a_real_run_that_learns_is_healthy(records, tmp_path, algorithm):
    found = diagnose(tuned(records, tmp_path / "r", **algorithm))
    assert {"falling", "judged"} <= {f.kind for f in found.findings}
    assert found.healthy, found.findings
    assert found.facts["dim"] == 3584 and found.facts["digest"]["round"] == 12


def test_a_real_run_at_thirty_times_the_rate_is_diverging(records, tmp_path):
    assert {"diverging", "rate-high"} <= grave(tuned(records, tmp_path / "r", rate=0.15, clip="none", rounds=20))


def test_a_real_run_at_a_thousandth_of_the_rate_is_out_of_reach(records, tmp_path):
    found = kinds(tuned(records, tmp_path / "r", rate=5e-6))
    assert found["out-of-reach"].numbers["factor"] > 5 and "unseen" not in found


def test_a_real_run_that_died_is_told_how_to_go_on(records, tmp_path):
    with pytest.raises(StopError):
        tuned(records, tmp_path / "r", rate=2.5e-3, watch=StopAfter(2))
    found = kinds(tmp_path / "r")
    assert set(found) == {"stopped", "not-judged"} and found["stopped"].numbers["rounds"] == 3


class Ask(NullWatch):
    """Asks the doctor about a run that goes on."""

    def __init__(self, folder):
        self.folder, self.found = folder, []

    def round(self, report):
        self.found.append(diagnose(self.folder))


def test_the_trained_dimension_is_known_while_a_run_goes_on_and_after_it_died(records, tmp_path):
    watch = Ask(tmp_path / "r")
    tuned(records, watch.folder, rate=2.5e-3, rounds=3, watch=watch)
    assert [found.facts["dim"] for found in watch.found] == [3584] * 3
    with pytest.raises(StopError):
        tuned(records, tmp_path / "dead", rate=1.0, clip="none", rounds=5, watch=StopAfter(3))
    assert not (tmp_path / "dead" / "summary.json").exists()
    assert diagnose(tmp_path / "dead").facts["dim"] == 3584
    assert kinds(tmp_path / "dead")["rate-high"].numbers["ratio"] == pytest.approx(1 / 0.3 * math.sqrt(3584))


# Private runs.


def test_a_private_run_says_what_it_has_spent_and_what_makes_that_worth_less(records, tmp_path):
    private = {"mode": "example", "clip": 0.05, "epsilon": 4.0}
    study.run(small(records, algorithm={"rate": 2e-3}, privacy=private), out=tmp_path / "kept")
    found = kinds(tmp_path / "kept")
    assert found["privacy"].severity == "note" and 3.9 < found["privacy"].numbers["epsilon"] <= 4
    assert diagnose(tmp_path / "kept").facts["privacy"]["budget"] == 4
    assert not {"noise-known", "delta-large"} & set(found)
    loose = {"mode": "example", "clip": 0.05, "sigma": 0.0, "delta": 0.2, "noise_seed": 1}
    study.run(small(records, algorithm={"rate": 2e-3}, privacy=loose), out=tmp_path / "loose")
    assert {"privacy", "noise-known", "delta-large"} <= grave(tmp_path / "loose")


# The documentation.


def test_every_kind_of_finding_is_documented_and_tested():
    package = ROOT / "src" / "fedmezo" / "studies" / "doctor"
    source = "".join(path.read_text() for path in sorted(package.glob("*.py")))
    known = set(re.findall(r'Finding\(\s*"([a-z-]+)"', source)) | {"overfitting", "best-earlier"}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "doctor.md").read_text(), re.MULTILINE)
    documented = set(re.findall(r"`([a-z-]+)`", " ".join(rows)))
    assert documented == known and len(known) > 25
    tests = Path(__file__).read_text()
    assert not [kind for kind in known if f'"{kind}"' not in tests]
