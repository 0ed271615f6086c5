"""One question to a run, an adapter or a merged model: the same words as the run's own evaluation writes."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from test_studies_origin import made_by_peft
from tiny_runs import small, write_records

import fedmezo
from fedmezo.cli import main
from fedmezo.data.prompt import encode
from fedmezo.data.records import Record
from fedmezo.errors import ConfigError, DataError, SealError
from fedmezo.runtime.journal import Journal, replay
from fedmezo.studies.ask import ask
from fedmezo.studies.build import build
from fedmezo.studies.config import load_config, parse_config
from fedmezo.studies.run import evaluate, export, run

BASE = Path(str(files("fedmezo") / "assets" / "tiny"))
HOT = {"algorithm": {"rate": 2e-2}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    kept = {"export": True, "report": False, "tensorboard": False}
    sections = {"output": kept, "eval": {"max_new_tokens": 6}, "data": {"template": "auto", "max_tokens": 256}}
    run(small(write_records(home), **sections, **HOT), out=home / "run")
    return home / "run"


def by_hand(folder: Path, instruction: str, given: str = "", *, most: int, rounds: int = 4) -> str:
    """Returns the answer as `generate` gives it to the prompt on which such a record would be trained."""
    built = build(load_config(folder / "config.toml"), measure=False)
    with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
        replay(built.bench.params, journal, upto=rounds)
    record, tokenizer = Record(instruction, given, "an answer"), built.loaded.tokenizer
    (example,) = encode([record], tokenizer, template="alpaca", max_tokens=256).examples
    return tokenizer.decode(built.bench.generate(example.prompt, max_new_tokens=most), skip_special_tokens=True).strip()


def test_the_answer_is_greedy_decoding_of_the_runs_template(finished):
    wanted = by_hand(finished, "Which colour?", "lamp 3", most=6)
    assert ask(finished, "Which colour?", given="lamp 3") == wanted != ""
    assert fedmezo.ask(str(finished), "Repeat.", max_tokens=1) == by_hand(finished, "Repeat.", most=1)


def test_run_adapter_and_merged_model_answer_alike(finished, tmp_path):
    merged = export(finished, to="merged", out=tmp_path / "merged")
    answers = {ask(place, "Which colour?", given="lamp 3") for place in (finished, finished / "adapter", merged)}
    assert len(answers) == 1


def test_rounds_may_answer_otherwise_and_a_round_is_a_runs_only(finished):
    assert ask(finished, "Which colour?", round=0) == by_hand(finished, "Which colour?", most=6, rounds=0) != ""
    with pytest.raises(ConfigError, match="--round: expected 0 to 4"):
        ask(finished, "x", round=5)
    with pytest.raises(ConfigError, match="is no run, so it holds one model only"):
        ask(finished / "adapter", "x", round=1)


def test_an_adapter_of_peft_alone_answers_by_its_own_base(tmp_path):
    folder = made_by_peft(tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(BASE)
    assert isinstance(ask(folder, "Hello", max_tokens=3), str)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not name its base model"):
        ask(folder, "Hello")


def test_a_plain_model_folder_answers_without_any_adapter():
    assert isinstance(ask(BASE, "Hello", max_tokens=3), str)


def test_a_model_merged_from_a_start_holds_it_once(tmp_path):
    start = made_by_peft(tmp_path / "start")
    config = small(write_records(tmp_path), **HOT).model_dump(mode="json") | {"adapter": {"start": str(start)}}
    done = run(parse_config(config), out=tmp_path / "run")
    merged = export(tmp_path / "run", to="merged", out=tmp_path / "merged")
    shutil.rmtree(start)
    assert evaluate(merged)["loss"] == pytest.approx(done.eval["end"]["loss"], rel=1e-5)
    assert isinstance(ask(merged, "Which colour?", given="lamp 3"), str)


def test_what_cannot_be_asked_is_said(finished, tmp_path):
    with pytest.raises(ConfigError, match="The prompt is empty"):
        ask(finished, "  ")
    with pytest.raises(ConfigError, match="--max-tokens: expected at least 1"):
        ask(finished, "x", max_tokens=0)
    with pytest.raises(ConfigError, match=r"is neither a run .* nor an adapter .* nor a model"):
        ask(tmp_path, "x")
    with pytest.raises(DataError, match="Cannot generate from"):
        ask(finished, "word " * 5000)
    spoilt = Path(shutil.copytree(finished / "adapter", tmp_path / "adapter"))
    (spoilt / "fedmezo.toml").write_text((spoilt / "fedmezo.toml").read_text() + "\n")
    with pytest.raises(SealError):
        ask(spoilt, "x")


def test_the_command_prints_the_answer_and_nothing_else(finished, capfd):
    wanted = ask(finished, "Which colour?", given="lamp 3")
    asked = ["ask", str(finished), "Which colour?", "--input", "lamp 3"]
    assert main(asked) == 0
    assert capfd.readouterr().out == wanted + "\n"
    assert main([*asked, "--json", "--max-tokens", "6", "--round", "4"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told == {
        "target": str(finished), "prompt": "Which colour?", "input": "lamp 3", "round": 4, "answer": wanted,
    }  # fmt: skip
    assert main(["ask", "nowhere", "x"]) == 2 and "neither a run" in capfd.readouterr().err
