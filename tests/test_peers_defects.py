"""Defects found in the peers' published code, each as a law that holds here; named after what went wrong there."""

import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import StopAfter, StopError, small
from toys import ToyBench, quadratic_bench, quadratic_loss, quadratic_params

from fedmezo.cli import main
from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.algorithm import Task
from fedmezo.fl.fedavg import Settings as GradientSettings
from fedmezo.fl.fedavg import fedavg
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.pool import direction_seed, directions_of
from fedmezo.runtime.guard import Guard
from fedmezo.runtime.journal import Header, Journal
from fedmezo.runtime.pull import Downlink
from fedmezo.runtime.simulate import simulate
from fedmezo.studies.config import load_config, parse_config
from fedmezo.studies.run import resume, run
from fedmezo.zo.perturb import apply_

ROOT = Path(__file__).parents[1]
SETTINGS = Settings(rate=0.01, mu=1e-2, steps=4)
CLIENTS = range(6)
FAMILY = {
    "fedmezo": lambda **options: fedmezo(SETTINGS, **options),
    "fedkseed": lambda **options: fedkseed(SETTINGS, Pool(64), **options),
    "fedkseed-pro": lambda **options: fedkseed(SETTINGS, Pool(64, pro=True), **options),
    "fedavg": lambda **options: fedavg(GradientSettings(0.01, 4), **options),
}
WALKS = [name for name in FAMILY if name != "fedavg"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_fedkseed_readme_commands_do_not_start(path):
    # There the printed command ended in "expected one argument". Here every committed configuration is understood.
    assert load_config(path).federation.rounds > 0
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/compare.md"))
    blocks = "".join(re.findall(r"```bash\n(.*?)```", pages, re.DOTALL))
    verbs = set(re.findall(r"^fedmezo (\w+)", blocks, re.MULTILINE))
    assert verbs >= {"run", "compare", "resume", "export"}
    for verb in verbs:
        assert main([verb, "--help"]) == 0


@pytest.mark.parametrize("name", WALKS)
def test_fedkseed_clipping_a_slope_crashes(name):
    def steep(tensors, client, round_number, step):
        return (1e6 if step == 2 else 1.0) * quadratic_loss(tensors, client, round_number, step)

    algorithm, bench = FAMILY[name](seed=1, cohort=2), ToyBench(quadratic_params(), steep)
    tasks = algorithm.plan(algorithm.init(), CLIENTS)
    replies = algorithm.client(tasks, bench)
    state, update = algorithm.aggregate(algorithm.init(), tasks, replies)
    assert max(abs(s) for s in replies[0].slopes) > 1e5
    assert all(abs(c) < 10 for walk in update.parts for c in walk.coefficients)
    assert all(math.isfinite(t.clip) for t in algorithm.plan(state, CLIENTS))


def test_fedkseed_best_model_is_the_worst_so_far():
    guard = Guard()
    for number, loss in enumerate([5.0, 4.0, 3.0, 2.0, 2.1, 30.0, 30.0]):
        guard, surged = guard.observe(number, loss)
    assert surged
    assert guard.best == 3


@pytest.mark.parametrize("name", ["fedkseed", "fedavg"])
def test_fedkseed_loss_is_understated_when_the_batch_is_larger(name, records):
    def loss(batch):
        config = small(
            records,
            algorithm={"name": name, "rate": 1e-12},
            federation={"clients": 1, "rounds": 1, "batch_size": batch, "local_steps": 48 // batch},
        )
        watch = Losses()
        run(config, out=records.parent / f"{name}-{batch}", watch=watch)
        return watch.losses[0]

    # One walk over the same 48 examples, in batches of 2 or of 8; their answers are about equally long.
    assert loss(2) == pytest.approx(loss(8), rel=0.05)


class Losses(StopAfter):
    """Keeps the training losses and never stops a run."""

    def __init__(self):
        super().__init__(10**9)
        self.losses = []

    def round(self, report):
        self.losses.append(report.loss)


def test_fedkseed_weight_decay_is_applied_once_per_seed_at_every_rebuild():
    for name in ("fedkseed", "fedkseed-pro", "fedmezo"):
        with pytest.raises(ConfigError, match="weight_decay is for fedavg only"):
            parse_config({"algorithm": {"name": name, "weight_decay": 0.1}})
    with pytest.raises(RunError, match="backpropagation only"):
        Task(0, 0, 0, 1.0, 1.0, 1, weight_decay=0.1)
    assert parse_config({"algorithm": {"name": "fedavg", "weight_decay": 0.1}}).algorithm.weight_decay == 0.1


def test_fedkseed_rate_must_be_constant():
    # Sums are of coefficients, so a decaying rate is no obstacle: the model stays base plus sums.
    algorithm = fedkseed(replace(SETTINGS, decay="linear", rounds=5), Pool(8), seed=1, cohort=2)
    state, rates = algorithm.init(), []
    for _ in range(3):
        tasks = algorithm.plan(state, CLIENTS)
        state, _ = algorithm.aggregate(state, tasks, algorithm.client(tasks, quadratic_bench()))
        rates.append(tasks[0].rate)
    assert rates == pytest.approx([0.01, 0.008, 0.006])


def test_fedkseed_pro_history_grows_with_every_step_and_is_shared_by_reference():
    algorithm = fedkseed(SETTINGS, Pool(16, pro=True), seed=1, cohort=2)
    first = state = algorithm.init()
    for _ in range(20):
        tasks = algorithm.plan(state, CLIENTS)
        state, _ = algorithm.aggregate(state, tasks, algorithm.client(tasks, quadratic_bench()))
    assert state.scores.nbytes + state.counts.nbytes + state.sums.nbytes == 3 * 8 * 16
    assert first.scores.sum() == 0
    assert first.counts.sum() == 16


def test_fedmezo_mu_is_hard_wired_and_a_schedule_breaks_the_step(records):
    config = small(records, algorithm={"mu": 0.03, "decay": "cosine", "rate": 1e-4}, federation={"rounds": 3})
    run(config, out=records.parent / "decay")
    with Journal.open(records.parent / "decay" / "journal.sqlite", readonly=True) as journal:
        tasks = [done.entries[0].task for done in journal.rounds()]
    assert {task.mu for task in tasks} == {0.03}
    assert tasks[0].rate > tasks[1].rate > tasks[2].rate > 0


@pytest.mark.parametrize("name", ["fedkseed", "fedkseed-pro"])
def test_fate_every_client_and_round_draws_the_same_seeds(name):
    drawn = set()
    for seed in (1, 2):
        algorithm = FAMILY[name](seed=seed, cohort=3)
        state = algorithm.init()
        for _ in range(3):
            tasks = algorithm.plan(state, CLIENTS)
            drawn |= {directions_of(task).seeds for task in tasks}
            state, _ = algorithm.aggregate(state, tasks, algorithm.client(tasks, quadratic_bench()))
    assert len(drawn) == 2 * 3 * 3


@pytest.mark.parametrize("name", FAMILY)
def test_fate_the_step_grows_with_the_number_of_clients(name, gradient_bench):
    # All clients have the same loss, so their mean step is as long as one client's, not N times as long.
    def length(cohort, seed):
        bench = gradient_bench()
        algorithm = FAMILY[name](seed=seed, cohort=cohort)
        tasks = algorithm.plan(algorithm.init(), range(cohort))
        replies = algorithm.client(tasks, bench)
        apply_(bench.params, algorithm.aggregate(algorithm.init(), tasks, replies)[1], law="gaussian")
        moved = torch.cat([(t - quadratic_params()[n]).view(-1) for n, t in bench.params])
        pull = torch.cat([t.view(-1) for _, t in quadratic_params()])
        return -float(moved @ pull / (pull @ pull))

    one, many = (np.mean([length(c, seed) for seed in range(20)]) for c in (1, 12))
    assert many == pytest.approx(one, rel=0.5)
    assert one > 0.02


@pytest.fixture
def gradient_bench():
    class Same(ToyBench):
        def gradient(self, point):
            tensors = dict(point.params)
            return quadratic_loss(tensors, 0, 0, 0), {name: t.clone() for name, t in tensors.items()}

    return lambda: Same(quadratic_params(), lambda tensors, client, r, s: quadratic_loss(tensors, 0, r, s))


@pytest.mark.parametrize("algorithm", [{"momentum": 0.9}, {"name": "fedkseed-pro", "pool": 8, "momentum": 0.9}])
def test_zo_llm_momentum_is_lost_at_resume(records, tmp_path, algorithm):
    config = small(records, algorithm=algorithm, federation={"rounds": 4})
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, out=tmp_path / "part", watch=StopAfter(1))
    assert resume(tmp_path / "part").digest == whole.digest
    plain = run(small(records, algorithm=algorithm | {"momentum": 0.0}), out=tmp_path / "plain")
    assert plain.digest != whole.digest


def test_decomfl_direction_seeds_collide():
    fresh = Task(0, 0, 1, 1.0, 1.0, 40, directions=5)
    tasks = [replace(fresh, round=r, client=c, seed=s) for r in range(4) for c in range(4) for s in (1, 18, 19)]
    names = [seed for task in tasks for seed in directions_of(task).seeds]
    assert len(set(names)) == len(names)
    assert direction_seed(fresh, 1, 0) != direction_seed(fresh, 0, 17)
    pool = [directions_of(replace(fresh, pool=2**20, steps=1000, directions=1, seed=s)).seeds for s in (1, 2)]
    assert not set(pool[0]) & set(pool[1])


@pytest.mark.parametrize("name", WALKS)
def test_decomfl_a_client_never_drawn_makes_the_history_grow_without_bound(name, tmp_path):
    # Client 5 is never there; what is kept for it stops growing.
    bench, algorithm = quadratic_bench(), FAMILY[name](seed=1, cohort=2)
    down, kept = Downlink(bench.params.dim), []
    header = Header("{}", "base", bench.params.layout(), "gaussian", 1, "0", "2026-01-01T00:00:00+00:00")
    with Journal.create(tmp_path / "j", header) as journal:
        for report in simulate(algorithm, bench, journal=journal, clients=range(5), rounds=30):
            down.remember(journal.round(report.round))
            kept.append(down.kept)
    assert kept[-1] == kept[9] < 10


@pytest.mark.parametrize("name", FAMILY)
def test_openfedllm_the_same_clients_whatever_the_seed_and_the_global_generator_reset(name):
    cohorts = {
        tuple(
            task.client
            for task in FAMILY[name](seed=seed, cohort=3).plan(FAMILY[name](seed=seed, cohort=3).init(), range(30))
        )
        for seed in range(8)
    }
    assert len(cohorts) == 8


@pytest.mark.parametrize("name", FAMILY)
def test_openfedllm_a_run_resets_the_global_generators(name, records, tmp_path):
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    run(small(records, algorithm={"name": name, "pool": 16}, federation={"rounds": 1}), out=tmp_path / "r")
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after
