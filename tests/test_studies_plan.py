"""A plan says beforehand what the run then does."""

import json

import pytest
from tiny_runs import asked, small

from fedmezo.cli import main
from fedmezo.studies.config import parse_config
from fedmezo.studies.constants import measure_constants
from fedmezo.studies.measured import load_measured
from fedmezo.studies.plan import plan
from fedmezo.studies.run import run
from fedmezo.studies.sampling import SamplingOptions

SETTINGS = (
    "model.name=builtin:tiny", "adapter.rank=2", "adapter.alpha=4", "data.template={instruction} {input} is",
    "data.max_tokens=32", "data.eval_examples=8", "federation.batch_size=2", "federation.local_steps=2",
    "eval.examples=8", "runtime.threads=1",
)  # fmt: skip
TINY = [part for setting in SETTINGS for part in ("--set", setting)]
KEYS = {"forwards", "tokens", "bytes", "memory_mb", "seconds", "advice"}


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
        ({"algorithm": {"mu": 3.0}}, "algorithm.mu is 3: there a slope here is mostly bend"),
        (
            {"model": {"dtype": "bfloat16"}, "algorithm": {"mu": 1e-4}},
            "algorithm.mu is 0.0001: there a slope here is mostly rounding",
        ),
        ({"federation": {"rounds": 1}}, "6 client steps in all are few"),
        ({"federation": {"batch_size": 40}}, "fewer examples than a batch"),
        ({"data": {"max_tokens": 9999}}, "this model takes no longer input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_advice_tells_what_to_change(data, changed, sentence):
    assert any(sentence in line for line in plan(small(data, **changed))["advice"])


@pytest.mark.parametrize("algorithm", [{}, {"mu": 1e-3}], ids=["auto", "a usable mu"])
def test_a_sound_run_gets_no_advice(data, algorithm):
    wanted = asked(data, federation={"rounds": 100}, guard={"batches": 0}, algorithm=algorithm)
    assert plan(parse_config(wanted))["advice"] == []


def test_with_measured_constants_a_plan_tells_what_the_theory_says(data, tmp_path, capsys):
    config = small(data)
    known = measure_constants(config, asked=SamplingOptions(directions=8, points=2, resamples=100))
    bare, full = plan(config), plan(config, measured=known)
    assert set(full) - set(bare) == {"theory"}
    assert full["theory"]["constants"]["smoothness"] == known.constants.smoothness
    assert set(full["theory"]["caps"]) == {"printed", "B1", "B2, one step"}
    assert any("under B1" in line for line in full["advice"]) and not any("B1" in line for line in bare["advice"])
    known.save(tmp_path / "c.json")
    records = ["--set", f"data.path={data}", *TINY]
    assert main(["plan", *records, "--constants", str(tmp_path / "c.json")]) == 0
    shown = capsys.readouterr().out
    assert "theory.largest rate, B1" in shown and "printed without a valid proof" in shown
    assert main(["plan", *records, "--constants", str(tmp_path / "c.json"), "--measure"]) == 2
    assert main(["plan", *records, "--set", "adapter.rank=3", "--constants", str(tmp_path / "c.json")]) == 2
    assert "measured with trained numbers" in capsys.readouterr().err


def test_the_theory_says_nothing_of_backpropagation(data):
    config = small(data)
    known = measure_constants(config, asked=SamplingOptions(directions=8, points=2, resamples=100))
    planned = plan(small(data, algorithm={"name": "fedavg"}), measured=known)
    assert "theory" not in planned and any("nothing about fedavg" in line for line in planned["advice"])


@pytest.mark.parametrize(("verb", "key"), [("constants", "constants"), ("heterogeneity", "correlations")])
def test_what_a_verb_measures_is_printed_and_is_json(data, tmp_path, capsys, verb, key):
    few = ["--directions", "8", "--points", "2"]
    given = ["analyze", verb, "--set", f"data.path={data}", *TINY, *few]
    assert main([*given, "--json"]) == 0
    told = capsys.readouterr()
    assert key in json.loads(told.out) and "start: " in told.err
    if verb == "constants":
        (tmp_path / "c.json").write_text(told.out)
        assert load_measured(tmp_path / "c.json").of["clients"] == 3
    assert main([*given, "--quiet"]) == 0
    told = capsys.readouterr()
    assert "apart^2" in told.out and told.err == ""
    assert max(map(len, told.out.splitlines())) < 160
