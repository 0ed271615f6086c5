"""All four algorithms through the study verbs: the promises of a run hold for each of them."""

import pytest
from tiny_runs import StopAfter, StopError, small

from fedmezo.fl.algorithm import Reply
from fedmezo.runtime.journal import Journal
from fedmezo.studies.build import build
from fedmezo.studies.plan import plan
from fedmezo.studies.run import evaluate, export, resume, run, verify

FAMILY = {
    "fedmezo": {"name": "fedmezo"},
    "fedkseed": {"name": "fedkseed", "pool": 32},
    "fedkseed-pro": {"name": "fedkseed-pro", "pool": 32, "coding": "float16", "importance": True},
    "fedavg": {"name": "fedavg", "rate": 0.02, "momentum": 0.5, "weight_decay": 0.01},
    "fedavg-adamw": {"name": "fedavg", "optimizer": "adamw", "gradient_checkpointing": True},
}
TAKING_PART = {"clients": 5, "cohort": 2, "rounds": 4, "local_steps": 3}


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(asked(records, name), out=folder / name) for name in FAMILY}


def asked(records, name, **federation):
    return small(records, algorithm=FAMILY[name], federation=TAKING_PART | federation, guard={"batches": 0})


@pytest.mark.parametrize("name", FAMILY)
def test_resume_equals_uninterrupted(records, whole, tmp_path, name):
    with pytest.raises(StopError):
        run(asked(records, name), out=tmp_path / "r", watch=StopAfter(1))
    assert resume(tmp_path / "r").digest == whole[name].digest


@pytest.mark.parametrize("name", FAMILY)
def test_the_journal_rebuilds_the_model_and_its_adapter_is_judged_alike(whole, tmp_path, name):
    folder = whole[name].run_dir
    assert verify(folder)["digest"] == whole[name].digest
    adapter = export(folder, out=tmp_path / "adapter")
    assert evaluate(adapter)["loss"] == pytest.approx(whole[name].eval["end"]["loss"], abs=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_a_plan_foretells_bytes_and_forward_passes(records, whole, name):
    foretold = plan(asked(records, name))
    assert foretold["bytes"]["up_total"] == whole[name].bytes["up_total"]
    assert foretold["bytes"]["down_total"] == whole[name].bytes["down_total"]
    assert foretold["forwards"] == whole[name].forwards


@pytest.mark.parametrize("name", FAMILY)
def test_a_sound_run_has_no_event(whole, name):
    with Journal.open(whole[name].run_dir + "/journal.sqlite", readonly=True) as journal:
        assert journal.events() == []


@pytest.mark.parametrize("name", FAMILY)
def test_every_algorithm_learns_something(records, tmp_path, name):
    rate = {"rate": 3e-3} if not name.startswith("fedavg") else {"rate": 0.05} if name == "fedavg" else {"rate": 3e-3}
    config = small(
        records,
        algorithm=FAMILY[name] | rate,
        adapter={"rank": 8, "alpha": 16},
        federation=TAKING_PART | {"rounds": 12, "local_steps": 10, "batch_size": 4, "seed": 2},
        eval={"every": 12, "examples": 8},
    )
    summary = run(config, out=tmp_path / "r")
    assert summary.eval["end"]["loss"] < summary.eval["start"]["loss"] - 0.1


def test_the_same_seed_draws_the_same_cohorts_for_all(whole):
    def cohorts(summary):
        with Journal.open(summary.run_dir + "/journal.sqlite", readonly=True) as journal:
            return [tuple(entry.task.client for entry in done.entries) for done in journal.rounds()]

    assert len({str(cohorts(summary)) for summary in whole.values()}) == 1


def test_only_the_baseline_sends_parameters(whole):
    dense = 4 * whole["fedavg"].dim
    for name, summary in whole.items():
        assert (summary.bytes["up_per_client_round"] > dense) == name.startswith("fedavg")


def test_a_budget_ends_a_run_and_a_resumed_one_too(records, tmp_path):
    config = asked(records, "fedkseed", rounds=50, budget={"forwards": 30})
    summary = run(config, out=tmp_path / "r")
    assert summary.rounds == 3
    assert summary.forwards == 36
    assert summary.eval["end"]["loss"] > 0
    assert resume(tmp_path / "r").digest == summary.digest


@pytest.mark.parametrize("pull", [{"pull": "pairs"}, {"pull": "sums"}, {"pull": "sums", "sums_coding": "float16"}])
def test_fedkseed_trains_all_parameters_however_they_are_pulled(records, tmp_path, pull):
    config = small(
        records,
        adapter={"kind": "full"},
        algorithm={"name": "fedkseed", "pool": 16, "rate": 1e-4},
        federation=TAKING_PART | pull,
    )
    summary = run(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, out=tmp_path / "part", watch=StopAfter(1))
    assert resume(tmp_path / "part").digest == summary.digest
    assert verify(tmp_path / "whole")["digest"] == summary.digest
    assert summary.dim > 800_000
    assert summary.bytes["down_per_client_round"] < 400
    merged = export(tmp_path / "whole", to="merged", out=tmp_path / "model")
    assert evaluate(merged)["loss"] == pytest.approx(summary.eval["end"]["loss"], abs=1e-5)


def test_every_key_of_pro_reaches_the_algorithm(records):
    def second_round(**keys):
        algorithm = build(small(records, algorithm=FAMILY["fedkseed-pro"] | keys, federation=TAKING_PART)).algorithm
        state = algorithm.init()
        tasks = algorithm.plan(state, range(5))
        replies = [Reply(0, task.client, 1, 1.0, (1.0, 2.0, 8.0), coding="float16") for task in tasks]
        return algorithm.plan(algorithm.aggregate(state, tasks, replies)[0], range(5))[0]

    usual = second_round()
    assert usual.importance
    assert not second_round(importance=False).importance
    for change in ({"temperature": 0.2}, {"score_clip": 1.5}, {"score_prior": False}):
        assert second_round(**change).odds != usual.odds


def test_every_key_of_the_downlink_reaches_the_run(records, whole, tmp_path):
    dense = run(asked(records, "fedkseed", pull="dense"), out=tmp_path / "dense")
    assert dense.digest == whole["fedkseed"].digest
    assert dense.bytes["down_per_client_round"] > 4 * dense.dim > whole["fedkseed"].bytes["down_per_client_round"]
    half = run(asked(records, "fedkseed", pull="sums", sums_coding="float16"), out=tmp_path / "half")
    assert half.digest != whole["fedkseed"].digest
    fast = plan(asked(records, "fedkseed", bandwidth=1e9))
    assert fast["bytes"]["down_total"] > whole["fedkseed"].bytes["down_total"]
