"""A plan says beforehand what the run then does."""

import json

import pytest
import torch
from tiny_runs import asked, small, write_records

from fedmezo.studies.config import parse_config
from fedmezo.studies.plan import plan
from fedmezo.studies.run import run

KEYS = {"forwards", "tokens", "bytes", "memory_mb", "seconds", "advice"}


@pytest.fixture(autouse=True, scope="module")
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"federation": {"cohort": 2, "rounds": 5}},
        {"federation": {"transport": "dense"}},
        {"algorithm": {"directions": 3}},
        {"algorithm": {"estimator": "forward"}},
        {"federation": {"clients": 1, "local_steps": 5}},
    ],
    ids=str,
)
def test_forwards_and_bytes_up_are_those_the_run_measures(data, tmp_path, changed):
    config = small(data, **changed)
    planned, done = plan(config), run(config, out=tmp_path / "r")
    assert planned["forwards"] == done.forwards
    assert planned["bytes"]["up_total"] == done.bytes["up_total"]
    assert planned["bytes"]["down_total"] == done.bytes["down_total"]
    assert planned["bytes"]["up_per_client_round"] == done.bytes["up_per_client_round"]
    assert (planned["dim"], planned["rate"], planned["mu"]) == (done.dim, done.rate, done.mu)
    assert planned["tokens"] == pytest.approx(done.tokens, rel=0.1)


def test_a_plan_has_the_promised_keys_and_is_plain_json(data):
    planned = plan(small(data))
    assert set(planned) >= KEYS
    assert json.loads(json.dumps(planned)) == planned
    assert planned["examples"] == {"train": 52, "eval": 8}


def test_a_plan_starts_nothing_and_leaves_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan(small(data, output={"dir": "here"}))
    assert list(tmp_path.iterdir()) == []


def test_seconds_are_a_sum_and_grow_with_the_rounds(data):
    few, many = (plan(small(data, federation={"rounds": n}))["seconds"] for n in (10, 10_000))
    assert few["total"] == pytest.approx(few["train"] + few["evaluation"], abs=0.11)
    assert many["train"] > 20 * few["train"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"algorithm": {"rate": 1.0, "clip": "none"}}, "nothing clips the slopes"),
        ({"algorithm": {"rate": 1e-6}}, "progress will hardly show"),
        ({"algorithm": {"mu": 0.1}}, "outside the usable window"),
        ({"model": {"dtype": "bfloat16"}, "algorithm": {"mu": 1e-3}}, "measures mostly rounding"),
        ({"federation": {"rounds": 1}}, "6 client steps in all are few"),
        ({"federation": {"batch_size": 40}}, "fewer examples than a batch"),
        ({"data": {"max_tokens": 9999}}, "this model takes no longer input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_advice_tells_what_to_change(data, changed, sentence):
    assert any(sentence in line for line in plan(small(data, **changed))["advice"])


def test_a_sound_run_gets_no_advice(data):
    wanted = asked(data, federation={"rounds": 100})
    assert plan(parse_config(wanted))["advice"] == []
