"""Processes that walk: the same bits as one process, nothing lost when one dies, nobody left behind."""

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_runtime_simulate import SETTINGS, go, header
from tiny_runs import StopAfter, StopError, small, write_records
from toys import (
    broken_recipe,
    endless_recipe,
    failing_recipe,
    foreign_recipe,
    leaky_recipe,
    quadratic_bench,
    quadratic_recipe,
)

from fedmezo.errors import DataError, RunError
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import fedmezo
from fedmezo.fl.walk import take_walks
from fedmezo.runtime import pull, simulate, wire
from fedmezo.runtime.journal import Journal
from fedmezo.runtime.pull import Downlink
from fedmezo.runtime.walkers import walk
from fedmezo.runtime.workers import Workers
from fedmezo.studies.build import threads_of
from fedmezo.studies.plan import plan
from fedmezo.studies.run import resume, run, verify

WILD = {"settings": replace(SETTINGS, rate=0.2, clip=math.inf), "clients": 3, "rounds": 25}
HOT = {"algorithm": {"rate": 2e-2}}


@pytest.fixture(scope="module")
def workers():
    with Workers(quadratic_recipe, 2) as found:
        yield found


def written(path: Path) -> list:
    """Returns everything a journal holds but the seconds, in the order it was written."""
    with Journal.open(path) as journal:
        rounds = [replace(done, seconds=0) for done in journal.rounds()]
        return [rounds, journal.evaluations(), journal.events()]


def weight_of(bench):
    """Returns an evaluation that tells one model from another."""
    return lambda: {"eval": {"sum": sum(float(tensor.double().sum()) for _, tensor in bench.params)}}


# The same run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cohort": 1},
        {"clients": 9, "cohort": 8, "every": 1},
        {"settings": replace(SETTINGS, dense=True)},
        {**WILD, "on_surge": "halve"},
        {**WILD, "on_surge": "rollback"},
        {**WILD, "on_surge": "warn"},
        {"budget": {"forwards": 100}, "every": 3},
    ],
    ids=str,
)
def test_the_journal_is_the_same_whoever_walks(tmp_path, workers, options):
    bench, own = quadratic_bench(), quadratic_bench()
    alone, reports = go(tmp_path / "a", bench=bench, evaluate=weight_of(bench), **options)
    shared, others = go(tmp_path / "b", bench=own, evaluate=weight_of(own), walkers=workers, **options)
    assert shared == alone
    assert [replace(r, seconds=0) for r in reports] == [replace(r, seconds=0) for r in others]
    one, other = written(tmp_path / "a"), written(tmp_path / "b")
    assert [str(part).replace("a.before", "b.before") for part in one] == [str(part) for part in other]


def test_clients_that_pull_rounded_sums_walk_from_the_model_these_make(tmp_path, workers):
    algorithm = fedkseed(SETTINGS, Pool(32), seed=11, cohort=3)
    digests = {}
    for name, walkers in (("alone", None), ("shared", workers)):
        bench, coarse = quadratic_bench(), Downlink(10**6, "sums", "bfloat16")
        with Journal.create(tmp_path / name, header(bench)) as journal:
            run_ = simulate.simulate(
                algorithm, bench, journal=journal, clients=range(5), rounds=8, downlink=coarse, walkers=walkers
            )
            list(run_)
        digests[name] = bench.params.digest()
    assert digests["alone"] == digests["shared"]
    plain = quadratic_bench()
    with Journal.create(tmp_path / "plain", header(plain)) as journal:
        list(simulate.simulate(algorithm, plain, journal=journal, clients=range(5), rounds=8))
    assert plain.params.digest() != digests["shared"]


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("first", ["alone", "shared"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, workers, stop, first):
    whole, _ = go(tmp_path / "whole")
    here = {"alone": None, "shared": workers}
    there = {"alone": workers, "shared": None}
    go(tmp_path / "b", stop=stop, walkers=here[first])
    assert go(tmp_path / "b", walkers=there[first])[0] == whole
    assert str(written(tmp_path / "b")) == str(written(tmp_path / "whole"))


class Late:
    """Walks when it is asked for the replies, from the model as it was; keeps the order of things."""

    apart, distant = True, False

    def __init__(self) -> None:
        self.told = []

    def there(self, clients):
        return clients

    def start(self, tasks, params, tell):
        self.told.append(("start", tasks[0].round))
        bench = quadratic_bench()
        bench.params.copy_(params)

        def wait():
            self.told.append(("wait", tasks[0].round))
            return walk(take_walks, bench, tasks)

        return wait


def test_the_next_round_begins_before_this_one_is_judged_and_shown(tmp_path):
    late, bench = Late(), quadratic_bench()
    algorithm = fedmezo(SETTINGS, seed=11, cohort=3)

    def evaluate():
        late.told.append(("judge", journal.last))
        return {"eval": {"loss": 1.0}}

    with Journal.create(tmp_path / "a", header(bench)) as journal:
        for report in simulate.simulate(
            algorithm, bench, journal=journal, clients=range(5), rounds=3, every=1, evaluate=evaluate, walkers=late
        ):
            assert journal.last == report.round + 1
            late.told.append(("show", report.round))
    of_a_round = [("wait", 0), ("start", 1), ("judge", 0), ("show", 0), ("wait", 1), ("start", 2), ("judge", 1)]
    assert late.told[:2] == [("judge", 0), ("start", 0)]
    assert late.told[2:9] == of_a_round
    assert late.told[9:] == [("show", 1), ("wait", 2), ("judge", 2), ("show", 2)]
    assert bench.params.digest() == go(tmp_path / "b", rounds=3)[0]


# What can go wrong


def test_a_process_that_is_killed_is_named_and_nothing_is_lost(tmp_path, workers):
    whole, _ = go(tmp_path / "whole")
    with Workers(quadratic_recipe, 2) as own:
        calls = itertools.count()

        def kill_one():
            if next(calls) == 3:
                os.kill(own.pids[1], signal.SIGKILL)
            return {"eval": {"loss": 1.0}}

        with pytest.raises(RunError, match=r"Worker process 2 of 2 was killed by signal 9.*fedmezo resume"):
            go(tmp_path / "b", walkers=own, every=1, evaluate=kill_one)
    with Journal.open(tmp_path / "b") as journal:
        assert journal.last == 3
    assert go(tmp_path / "b", walkers=workers)[0] == whole


@pytest.mark.parametrize(
    ("recipe", "kind", "sentence"),
    [
        pytest.param(broken_recipe, DataError, "There is no data here; give some.", marks=pytest.mark.slow),
        pytest.param(foreign_recipe, RunError, "has other trained parameters", marks=pytest.mark.slow),
        pytest.param(leaky_recipe, RunError, "no longer has the model it was sent", marks=pytest.mark.slow),
        (failing_recipe, RunError, "Worker process 2 of 2: ZeroDivisionError: no such number"),
    ],
)
def test_what_fails_in_a_process_is_told_in_one_sentence(tmp_path, recipe, kind, sentence):
    with Workers(recipe, 2) as own, pytest.raises(kind, match=sentence) as caught:
        go(tmp_path / "a", walkers=own)
    assert "\n" not in str(caught.value)
    with Journal.open(tmp_path / "a") as journal:
        assert journal.last == (3 if recipe is failing_recipe else 0)


def gone(pids, seconds=10.0) -> bool:
    """Whether all processes end within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if all("\nState:\tZ" in status(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def status(pid: int) -> str:
    """What the system says of a process; one that is gone is as good as a zombie."""
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "\nState:\tZ"


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")


@needs_proc
@pytest.mark.slow
def test_an_exception_ends_processes_in_the_middle_of_a_walk(tmp_path):
    class MyError(Exception):
        pass

    with pytest.raises(MyError), Workers(endless_recipe, 2) as own:
        go(tmp_path / "a", rounds=2, walkers=own)
        algorithm = fedmezo(SETTINGS, seed=11, cohort=3)
        tasks = [replace(task, round=2) for task in algorithm.plan(algorithm.init(), range(3))]
        own.start(tasks, quadratic_bench().params)
        time.sleep(0.1)
        assert not gone(own.pids, seconds=0.1)
        began = time.monotonic()
        raise MyError
    assert time.monotonic() - began < 4
    assert gone(own.pids, seconds=0.1)


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_runtime_simulate import go
from toys import endless_recipe
from fedmezo.runtime.workers import Workers
with Workers(endless_recipe, 2) as own:
    print(*own.pids, flush=True)
    go(Path({path!r}), walkers=own)
"""


@needs_proc
@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_nobody_outlives_the_parent_however_it_ends(tmp_path, how):
    path = tmp_path / "a"
    code = PARENT.format(tests=str(Path(__file__).parent), path=str(path))
    # A script from standard input, without a main guard: what starts by importing the main module cannot do that.
    parent = subprocess.Popen(
        [sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True, text=True,
    )  # fmt: skip
    parent.stdin.write(code)
    parent.stdin.close()
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    until = time.monotonic() + 30
    while time.monotonic() < until and rounds_of(path) != 2:
        time.sleep(0.05)
    assert rounds_of(path) == 2
    os.killpg(parent.pid, how)
    assert parent.wait(20) != 0
    parent.stdout.close()
    assert gone(pids)


def rounds_of(path: Path) -> int:
    if not path.exists():
        return 0
    with Journal.open(path, readonly=True) as journal:
        return journal.last


# Whole runs


@pytest.mark.parametrize(
    "changed",
    [
        {},
        pytest.param({"algorithm": {"name": "fedkseed-pro", "pool": 16}}, marks=pytest.mark.slow),
        pytest.param({"algorithm": {"name": "fedavg", "rate": 0.1}}, marks=pytest.mark.slow),
        pytest.param({"adapter": {"kind": "full"}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_with_two_lanes_the_number_of_workers_changes_no_bit(data, tmp_path, changed):
    wanted = {**HOT, **changed, "runtime": {"threads": 1, "lanes": 2}, "federation": {"clients": 5, "cohort": 3}}
    done = [run(small(data, **with_workers(wanted, n)), out=tmp_path / str(n)) for n in (1, 2)]
    same = [replace(one, seconds=0, run_dir="", peak_rss_mb=0) for one in done]
    assert same[0] == same[1]
    assert str(written(tmp_path / "1" / "journal.sqlite")) == str(written(tmp_path / "2" / "journal.sqlite"))


def with_workers(wanted: dict, number: int) -> dict:
    return {**wanted, "runtime": {**wanted["runtime"], "workers": number}}


@pytest.mark.slow
def test_a_run_of_many_workers_goes_on_with_few(data, tmp_path):
    wanted = {**HOT, "runtime": {"threads": 1, "lanes": 2}}
    whole = run(small(data, **wanted), out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(small(data, **with_workers(wanted, 2)), out=tmp_path / "b", watch=StopAfter(1))
    assert resume(tmp_path / "b", workers=1).digest == whole.digest
    assert verify(tmp_path / "b")["ok"]


def test_workers_share_the_cores_unless_threads_are_given(data):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = {"threads": None}
    assert threads_of(small(data, runtime={"workers": 3, "threads": 5})) == 5
    assert threads_of(small(data, runtime={"workers": 1, **free})) is None
    assert threads_of(small(data, runtime={"workers": 2, **free})) == max(1, cores // 2)
    assert threads_of(small(data, runtime={"workers": 1000, **free})) == 1


def test_a_plan_counts_the_models_of_all_processes_and_shares_their_time(data):
    alone, shared = (plan(small(data, runtime={"threads": 1, "workers": n})) for n in (1, 3))
    assert alone["memory_mb"]["processes"] == 1
    assert shared["memory_mb"]["processes"] == 4
    assert shared["memory_mb"]["weights"] == 4 * alone["memory_mb"]["weights"]
    assert shared["bytes"] == alone["bytes"]


# A thousand clients


def test_what_the_server_packs_grows_with_the_replies_and_not_with_their_square(tmp_path, monkeypatch):
    packed = [0]

    def counting(task, news=()):
        data = wire.encode_task(task, news)
        packed[0] += len(data)
        return data

    monkeypatch.setattr(pull, "encode_task", counting)
    monkeypatch.setattr(simulate, "encode_task", counting)
    sizes = {}
    for clients in (25, 100):
        packed[0] = 0
        everything = Downlink(10**6, "pairs")
        _, reports = go(tmp_path / str(clients), rounds=4, clients=clients, cohort=clients, downlink=everything)
        sizes[clients] = packed[0]
        assert reports[-1].bytes_down > clients * clients * 4 * SETTINGS.steps  # each is told of all others' walks
    assert sizes[100] < 4.2 * sizes[25]


@pytest.mark.slow
def test_a_thousand_clients_run_in_the_memory_of_ten(tmp_path):
    records = write_records(tmp_path, count=4000)
    code = (
        "import sys; from fedmezo.studies.config import load_config; from fedmezo.studies.run import run;"
        "c = load_config(sys.argv[1]); print(run(c, out=sys.argv[2]).peak_rss_mb)"
    )
    peaks = {}
    for clients in (10, 1000):
        changed = {"federation": {"clients": clients, "rounds": 2}, "eval": {"every": 9}}
        path = tmp_path / f"{clients}.toml"
        path.write_text(small(records, **changed).to_toml())
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / f"r{clients}")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peaks[clients] = float(done.stdout)
    assert peaks[1000] < 1.1 * peaks[10]
