"""The in-process engine: resume, replay, bytes, guards; on quadratics, so every law is checked in milliseconds."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from toys import ToyBench, quadratic_bench, quadratic_loss, quadratic_params

from fedmezo.errors import RunError
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.pool import pool_seed
from fedmezo.fl.rates import Personal, with_personal_rates
from fedmezo.runtime.guard import Guard
from fedmezo.runtime.journal import Header, Journal, replay, update_of
from fedmezo.runtime.pull import Downlink
from fedmezo.runtime.simulate import START, Simulation, simulate

SETTINGS = Settings(rate=0.01, mu=1e-2, steps=6, clip=3.0)


def header(bench: ToyBench) -> Header:
    return Header("{}", "base", bench.params.layout(), "gaussian", 1, "0", "2026-01-01T00:00:00+00:00")


def go(path: Path, *, rounds=8, settings=SETTINGS, bench=None, clients=5, cohort=3, stop=None, **options):
    """Runs or goes on; returns (params digest, reports)."""
    bench = bench or quadratic_bench()
    algorithm = fedmezo(settings, seed=11, cohort=cohort)
    with Journal.open(path) if path.exists() else Journal.create(path, header(bench)) as journal:
        reports = []
        for report in simulate(algorithm, bench, journal=journal, clients=range(clients), rounds=rounds, **options):
            reports.append(report)
            if stop is not None and len(reports) == stop:
                break
    return bench.params.digest(), reports


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resume_equals_uninterrupted(tmp_path, stop):
    whole, all_reports = go(tmp_path / "a")
    go(tmp_path / "b", stop=stop)
    resumed, rest = go(tmp_path / "b")
    assert resumed == whole
    assert [r.round for r in rest] == list(range(stop, 8))
    assert [r.loss for r in rest] == [r.loss for r in all_reports[stop:]]
    assert [r.clip for r in rest] == [r.clip for r in all_reports[stop:]]


def test_replay_equals_the_live_model(tmp_path):
    live, _ = go(tmp_path / "a")
    rebuilt = quadratic_params()
    with Journal.open(tmp_path / "a") as journal:
        replay(rebuilt, journal)
    assert rebuilt.digest() == live


def test_scalar_transport_equals_dense_transport(tmp_path):
    scalar, _ = go(tmp_path / "a")
    dense, reports = go(tmp_path / "b", settings=replace(SETTINGS, dense=True))
    assert scalar == dense
    dim = quadratic_params().dim
    assert all(r.bytes_up >= 3 * 4 * dim and r.bytes_down >= 3 * 4 * dim for r in reports)


def test_a_dense_run_resumes_to_the_same_bits(tmp_path):
    settings = replace(SETTINGS, dense=True)
    whole, _ = go(tmp_path / "a", settings=settings)
    go(tmp_path / "b", settings=settings, stop=4)
    assert go(tmp_path / "b", settings=settings)[0] == whole


@pytest.mark.parametrize("steps", [1, 6, 30, 200])
def test_bytes_up_are_four_per_step_and_a_header(tmp_path, steps):
    _, reports = go(tmp_path / "a", rounds=2, settings=replace(SETTINGS, steps=steps, rate=1e-4))
    for report in reports:
        for client in report.clients.values():
            assert client["bytes_up"] <= 4 * steps + 64
    assert reports[0].bytes_up == sum(c["bytes_up"] for c in reports[0].clients.values())


def test_a_client_is_sent_what_the_model_gained_since_it_last_walked(tmp_path):
    # The toy model is smaller than a few walks; only told to pull pairs does a client do so.
    every_pair = Downlink(quadratic_params().dim, "pairs")
    _, reports = go(tmp_path / "a", rounds=12, clients=6, cohort=2, downlink=every_pair)
    known: dict[int, int] = {}
    for report in reports:
        for client, numbers in report.clients.items():
            missed = report.round - known.get(client, 0)
            known[client] = report.round
            assert numbers["bytes_down"] >= missed * 2 * 4 * SETTINGS.steps
            assert numbers["bytes_down"] <= 96 + missed * (2 * (4 * SETTINGS.steps + 64) + 128)


def test_results_do_not_depend_on_the_order_of_clients(tmp_path):
    bench = quadratic_bench()
    algorithm = fedmezo(SETTINGS, seed=11, cohort=3)
    with Journal.create(tmp_path / "b", header(bench)) as journal:
        list(simulate(algorithm, bench, journal=journal, clients=[4, 2, 0, 1, 3], rounds=8))
    assert bench.params.digest() == go(tmp_path / "a")[0]


def test_the_untrained_model_is_judged_once_and_the_last_round_always(tmp_path):
    calls = []

    def evaluate():
        calls.append(1)
        return {"eval": {"loss": float(len(calls))}}

    go(tmp_path / "a", rounds=7, every=3, evaluate=evaluate, stop=2)
    go(tmp_path / "a", rounds=7, every=3, evaluate=evaluate)
    with Journal.open(tmp_path / "a") as journal:
        assert [number for number, _, _ in journal.evaluations()] == [START, 2, 5, 6]
    assert len(calls) == 4


def test_a_loss_that_is_never_finite_is_counted_and_reported_and_moves_nothing(tmp_path):
    bench = ToyBench(quadratic_params(), lambda *_: math.nan)
    digest, reports = go(tmp_path / "a", rounds=2, bench=bench, on_surge="warn")
    assert digest == quadratic_params().digest()
    assert reports[0].skipped == 3 * SETTINGS.steps
    assert {kind for kind, _ in reports[0].events} == {"skipped", "surge"}


def test_one_client_that_is_never_finite_does_not_hurt_the_others(tmp_path):
    def loss(tensors, client, round_number, step):
        return math.inf if client == 2 else quadratic_loss(tensors, client, round_number, step)

    bench = ToyBench(quadratic_params(), loss)
    _, reports = go(tmp_path / "a", rounds=30, bench=bench)
    assert math.isfinite(reports[-1].loss)
    assert all(t.isfinite().all() for _, t in bench.params)
    assert max(float(t.abs().max()) for _, t in bench.params) < 5


def test_a_loss_without_slope_is_reported(tmp_path):
    _, reports = go(tmp_path / "a", rounds=1, bench=ToyBench(quadratic_params(), lambda *_: 1.0))
    assert "zero-slope" in dict(reports[0].events)


def test_a_rate_of_zero_is_reported_and_changes_no_bit(tmp_path):
    digest, reports = go(tmp_path / "a", settings=replace(SETTINGS, rate=0.0))
    assert digest == quadratic_params().digest()
    assert "zero-rate" in dict(reports[0].events)


def test_a_client_that_writes_to_the_shared_model_is_caught(tmp_path):
    class Leaky(ToyBench):
        def losses(self, points):
            self.params["b"][0, 0] += 1
            return super().losses(points)

    with pytest.raises(RunError, match="changed the shared model"):
        go(tmp_path / "a", bench=Leaky(quadratic_params(), quadratic_loss))


def surging(tmp_path: Path, on_surge: str, rounds: int = 25):
    """A rate far beyond stability, without a clip: the loss explodes within rounds."""
    wild = replace(SETTINGS, rate=0.2, clip=math.inf)
    return go(tmp_path / on_surge, rounds=rounds, settings=wild, clients=3, on_surge=on_surge)


def test_a_surge_is_noticed_and_only_warned_about_when_asked(tmp_path):
    _, reports = surging(tmp_path, "warn")
    assert any(kind == "surge" for r in reports for kind, _ in r.events)
    assert len({r.rate for r in reports}) == 1


def test_a_surge_halves_the_rate_until_the_run_is_stable(tmp_path):
    _, reports = surging(tmp_path, "halve", rounds=40)
    rates = [r.rate for r in reports]
    assert rates[-1] < rates[0]
    assert all(b in (a, a / 2) for a, b in pairwise(rates))
    assert reports[-1].loss < max(r.loss for r in reports)


def test_a_surge_rolls_back_to_the_best_round_and_the_result_replays(tmp_path):
    digest, reports = surging(tmp_path, "rollback", rounds=25)
    assert any(b.round <= a.round for a, b in pairwise(reports))
    assert list(tmp_path.glob("*before-rollback*"))
    rebuilt = quadratic_params()
    with Journal.open(tmp_path / "rollback") as journal:
        assert journal.last == 25
        journal.verify_chain()
        replay(rebuilt, journal)
    assert rebuilt.digest() == digest
    assert reports[-1].loss < reports[0].loss


@pytest.mark.parametrize("on_surge", ["halve", "rollback"])
@pytest.mark.parametrize("stop", [4, 9, 14])
def test_resume_equals_uninterrupted_across_guard_actions(tmp_path, on_surge, stop):
    whole, _ = surging(tmp_path, on_surge)
    wild = replace(SETTINGS, rate=0.2, clip=math.inf)
    go(tmp_path / "b", rounds=25, settings=wild, clients=3, on_surge=on_surge, stop=stop)
    resumed, _ = go(tmp_path / "b", rounds=25, settings=wild, clients=3, on_surge=on_surge)
    assert resumed == whole


def pooled(kind: str, *, rounds: int):
    """Returns a pool whose rate falls over `rounds`."""
    settings = replace(SETTINGS, decay="linear", rounds=rounds)
    plain = fedkseed(settings, Pool(16, pro=kind == "pro"), seed=11, cohort=3)
    if kind != "personal":
        return plain
    return with_personal_rates(plain, Personal("round-loss"), seed=11, rate=SETTINGS.rate)


def sums_told_by(journal: Journal, *, pool: int = 16) -> list[float]:
    """Returns the sums of coefficients of a journal's walks, candidate by candidate."""
    place = {pool_seed(11, j): j for j in range(pool)}
    sums = [0.0] * pool
    for done in journal.rounds():
        update = update_of(done)
        for walk, weight in zip(update.parts, update.weights, strict=True):
            for seed, coefficient in zip(walk.seeds, walk.coefficients, strict=True):
                sums[place[seed]] += weight * coefficient
    return sums


@pytest.mark.parametrize("kind", ["uniform", "pro", "personal"])
def test_more_rounds_at_other_rates_leave_the_sums_those_of_the_walks_that_were_taken(tmp_path, kind):
    def going_on(rounds):
        return Simulation(pooled(kind, rounds=rounds), quadratic_bench(), journal, range(5), rounds, dict)

    bench = quadratic_bench()
    with Journal.create(tmp_path / "a", header(bench)) as journal:
        short = Simulation(pooled(kind, rounds=4), bench, journal, range(5), 4, dict)
        rates = [report.rate for report in short.run()]
        told = sums_told_by(journal)
        longer = going_on(12)
        assert longer.algorithm.sums(longer.state).tolist() == told == short.algorithm.sums(short.state).tolist()
        rates += [report.rate for report in longer.run()]
        assert longer.algorithm.sums(longer.state).tolist() == sums_told_by(journal) != told
        # The second half of the run walked at the rates of a longer one.
        assert rates[4] > rates[3] > 0
        # Stopped again, it is where it was.
        again = going_on(12)
        assert again.algorithm.sums(again.state).tolist() == longer.algorithm.sums(longer.state).tolist()
        assert again.bench.params.digest() == longer.bench.params.digest()


def test_a_falling_loss_never_trips_the_guard():
    guard = Guard()
    for number in range(200):
        guard, surged = guard.observe(number, 6 - number / 50 + 0.1 * math.sin(number))
        assert not surged


def test_noise_around_a_level_does_not_trip_the_guard_and_a_jump_does():
    guard = Guard()
    for number in range(60):
        guard, surged = guard.observe(number, 2 + 0.2 * math.sin(7 * number))
        assert not surged
    surges = []
    for number in range(60, 64):
        guard, surged = guard.observe(number, 4.0)
        surges.append(surged)
    assert any(surges)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_runtime_simulate import go
go(Path({path!r}), rounds=400)
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    whole, _ = go(tmp_path / "whole", rounds=400)
    path = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path))
    kills = 0
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.time() + 60
        before = path.stat().st_mtime if path.exists() else 0
        wal = Path(f"{path}-wal")
        while child.poll() is None and time.time() < deadline:
            if wal.exists() and wal.stat().st_mtime > before and wal.stat().st_size > 0:
                break
            time.sleep(0.05)
        time.sleep(0.1 + 0.13 * kills)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills >= 1
    resumed, _ = go(path, rounds=400)
    assert resumed == whole
