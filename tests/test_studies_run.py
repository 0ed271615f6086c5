"""A run from Python, end to end on the built-in model: its result, its files, and going on after any stop."""

import json
import logging
import shutil
import sys
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tiny_runs import FILES, Notes, StopAfter, StopError, asked, small, write_records

from fedmezo.errors import ConfigError, DataError, JournalError
from fedmezo.runtime.journal import Journal
from fedmezo.studies.build import build
from fedmezo.studies.config import load_config, parse_config
from fedmezo.studies.run import Summary, evaluate, export, resume, rollback, run, verify

KEYS = [
    "run_dir", "rounds", "clients", "dim", "mu", "rate", "eval", "bytes", "forwards", "looks", "taken_back",
    "tokens", "seconds", "peak_rss_mb", "skipped_steps", "digest", "privacy",
]  # fmt: skip
BYTES = ["up_per_client_round", "down_per_client_round", "up_total", "down_total"]
HOT = {"algorithm": {"rate": 2e-2}}  # moves the model far enough that every round shows in the loss


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, Summary]:
    """A run of four rounds with all its files; for reading only."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    kept = dict.fromkeys(FILES, True)
    return folder, run(small(data, output=kept, **HOT), out=folder)


@pytest.fixture
def own(finished, tmp_path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(finished[0], tmp_path / "own"))


@pytest.fixture(scope="module")
def digest(finished) -> str:
    return finished[1].digest


def plain_loss(model, config) -> float:
    """The evaluation loss by transformers alone: nats per label token, one row at a time."""
    total, count = 0.0, 0
    for example in build(config).data.evaluation["eval"]:
        row = example.rows[0]
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            log = model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(row.start, len(row.ids)):
            total -= log[position - 1, row.ids[position]].item()
            count += 1
    return total / count


def packaged() -> Path:
    return Path(str(files("fedmezo") / "assets" / "tiny"))


def hugging_face(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


# What a run returns and leaves behind


def test_a_summary_has_exactly_the_promised_keys(finished):
    summary = finished[1].as_dict()
    assert list(summary) == KEYS == [field.name for field in fields(Summary)]
    assert list(summary["bytes"]) == BYTES
    assert {"start", "end"} == set(summary["eval"])
    assert {"loss", "tokens", "examples", "token_accuracy"} <= set(summary["eval"]["start"])


def test_a_summary_counts_what_was_done(finished):
    folder, summary = finished
    assert (summary.run_dir, summary.rounds, summary.clients, summary.mu) == (str(folder), 4, 3, 1e-3)
    assert summary.forwards == 4 * 3 * 2 * 2  # rounds, clients, steps, points
    assert summary.bytes["up_total"] == 4 * 3 * summary.bytes["up_per_client_round"]
    assert summary.bytes["up_per_client_round"] <= 4 * 2 + 64
    assert summary.eval["start"]["examples"] == 8
    assert summary.skipped_steps == 0
    assert summary.eval["start"]["loss"] != summary.eval["end"]["loss"]


def test_a_run_leaves_its_files(finished):
    folder, summary = finished
    names = {path.name for path in folder.iterdir()} - {"journal.sqlite.lock"}
    kept = {"journal.sqlite", "config.toml", "data.sha256", "start.json", "summary.json", "MANIFEST.json"}
    assert names == kept | {"adapter", "report.html", "tensorboard"}
    kept = json.loads((folder / "summary.json").read_text())
    split = kept.pop("split")
    assert kept == summary.as_dict()
    assert sum(split["sizes"]) == 60 - 8


def test_the_report_holds_the_numbers_of_the_run(finished):
    page = (finished[0] / "report.html").read_text()
    assert finished[1].digest in page
    assert f"{finished[1].dim:,}" in page
    assert f"{finished[1].eval['end']['loss']:.3f}"[:4] in page


def test_tensorboard_curves_hold_every_round(finished):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in (finished[0] / "tensorboard").iterdir():
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    assert found["train/loss"] == [1, 2, 3, 4]
    assert found["eval/eval/loss"] == [2, 4]


def test_the_configuration_left_behind_gives_the_same_run_again(finished, digest, tmp_path):
    again = load_config(finished[0] / "config.toml")
    assert again.algorithm.rate == finished[1].rate
    assert run(again, out=tmp_path / "again").digest == digest


def test_a_run_without_the_optional_packages_says_so_and_goes_on(data, tmp_path, digest, monkeypatch):
    for name in ("plotly", "plotly.offline", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    watch = Notes()
    kept = {"export": False, "report": True, "tensorboard": True}
    assert run(small(data, output=kept, **HOT), out=tmp_path / "bare", watch=watch).digest == digest
    assert sum("pip install" in note for note in watch.notes) == 2


# The same bits, however a run comes about


@pytest.mark.parametrize("last", [-1, 0, 1, 2, 3])
def test_resume_after_any_stop_equals_the_uninterrupted_run(data, digest, tmp_path, last):
    with pytest.raises(StopError):
        run(small(data, **HOT), out=tmp_path / "r", watch=StopAfter(last))
    watch = Notes()
    summary = resume(tmp_path / "r", watch=watch)
    assert summary.digest == digest
    assert watch.info["done"] == last + 1
    assert [report.round for report in watch.reports] == list(range(last + 1, 4))


def test_resume_with_more_rounds_equals_the_longer_run(own, data, tmp_path):
    longer = run(small(data, federation={"rounds": 6}, **HOT), out=tmp_path / "longer")
    summary = resume(own, rounds=6)
    assert (summary.rounds, summary.digest) == (6, longer.digest)


def test_resume_of_a_finished_run_changes_nothing(own, digest):
    watch = Notes()
    assert resume(own, watch=watch).digest == digest
    assert watch.reports == []


def test_resume_to_fewer_rounds_than_there_are_is_refused(own):
    with pytest.raises(ConfigError, match=r"4 rounds already, got 2.*rollback .* --round 2"):
        resume(own, rounds=2)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_rollback_then_resume_equals_the_original_run(own, digest, kept):
    told = rollback(own, round=kept)
    assert told["rounds"] == kept
    assert Path(str(told["backup"])).exists()
    assert verify(own)["rounds"] == kept
    assert resume(own).digest == digest


def test_dense_and_scalar_transport_give_the_same_model(data, digest, tmp_path):
    summary = run(small(data, federation={"transport": "dense"}, **HOT), out=tmp_path / "dense")
    assert summary.digest == digest
    assert summary.bytes["up_per_client_round"] > 4 * summary.dim


def test_lanes_change_the_result_by_rounding_only_and_repeat_to_the_bit(data, tmp_path):
    ends, digests = {}, {}
    for lanes in (1, 2, "auto"):
        for turn in (1, 2):
            config = small(data, runtime={"threads": 1, "lanes": lanes})
            done = run(config, out=tmp_path / f"{lanes}-{turn}")
            digests.setdefault(lanes, set()).add(done.digest)
            ends[lanes] = done.eval["end"]["loss"]
    assert all(len(found) == 1 for found in digests.values())
    assert ends[1] == pytest.approx(ends[2], rel=1e-3) == pytest.approx(ends["auto"], rel=1e-3)


@pytest.mark.parametrize("change", ["one more", "another answer"])
def test_resume_on_changed_data_is_refused_and_changes_nothing(data, tmp_path, change):
    mine = Path(shutil.copy(data, tmp_path / "mine.jsonl"))
    with pytest.raises(StopError):
        run(small(mine), out=tmp_path / "r", watch=StopAfter(1))
    before = (tmp_path / "r" / "journal.sqlite").read_bytes()
    text = mine.read_text()
    mine.write_text(text + text.splitlines()[0] + "\n" if change == "one more" else text.replace("red", "black"))
    with pytest.raises(JournalError, match="data has changed"):
        resume(tmp_path / "r")
    assert (tmp_path / "r" / "journal.sqlite").read_bytes() == before
    mine.write_text(text)
    assert resume(tmp_path / "r").rounds == 4


def test_a_run_whose_loss_is_not_finite_ends_and_says_so(data, tmp_path):
    wild = {"rate": 1e36, "clip": "none"}
    watch = Notes()
    summary = run(small(data, algorithm=wild, guard={"on_surge": "warn"}), out=tmp_path / "r", watch=watch)
    assert summary.skipped_steps > 0
    assert any(kind == "skipped" for report in watch.reports for kind, _ in report.events)
    kept = json.loads((tmp_path / "r" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert kept["eval"]["end"]["loss"] is None
    assert verify(tmp_path / "r")["digest"] == summary.digest


# Verify


def test_verify_compares_every_digest(finished, digest):
    told = verify(finished[0])
    assert len(str(told.pop("seal"))) == 64
    assert told == {"ok": True, "digest": digest, "rounds": 4, "compared": 2, "run_dir": str(finished[0])}


def test_verify_and_export_need_no_training_data(data, tmp_path):
    mine = Path(shutil.copy(data, tmp_path / "mine.jsonl"))
    summary = run(small(mine), out=tmp_path / "r")
    mine.unlink()
    assert verify(tmp_path / "r")["digest"] == summary.digest
    assert (export(tmp_path / "r") / "adapter_model.safetensors").exists()


def flip(path: Path, *, round_number: int) -> None:
    """Flips one bit of a reply in a closed journal."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(path)) as db:
        reply = db.execute("SELECT reply FROM replies WHERE round = ? AND client = 1", (round_number,)).fetchone()[0]
    content = bytearray(path.read_bytes())
    content[content.index(reply) + len(reply) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("number", [0, 2])
def test_verify_names_the_round_of_a_flipped_bit(own, number):
    flip(own / "journal.sqlite", round_number=number)
    with pytest.raises(JournalError, match=f"round {number} is damaged, the {number} before it are sound"):
        verify(own)


def test_a_damaged_journal_can_be_rolled_back_to_its_sound_rounds_and_resumed(own, digest):
    flip(own / "journal.sqlite", round_number=2)
    with pytest.raises(JournalError, match="damaged"):
        resume(own)
    rollback(own, round=2)
    assert resume(own).digest == digest


def test_another_base_model_is_noticed_by_every_verb(data, tmp_path):
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(packaged(), tmp_path / "base"))
    run(small(data, model={"name": str(base)}), out=tmp_path / "r")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for verb in (verify, resume, export, evaluate):
        with pytest.raises(JournalError, match="base model has changed"):
            verb(tmp_path / "r")


# Export and evaluation


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize("upto", [0, 2, 4])
def test_an_exported_adapter_gives_plain_peft_the_same_loss(finished, upto, tmp_path):
    from peft import PeftModel

    folder = export(finished[0], round=upto, out=tmp_path / "peft")
    judged = evaluate(finished[0], round=upto)
    model = PeftModel.from_pretrained(hugging_face(packaged()), folder).eval()
    config = load_config(finished[0] / "config.toml")
    assert plain_loss(model, config) == pytest.approx(judged["loss"], rel=1e-5)
    assert judged["round"] == upto


def test_rounds_differ_in_their_loss(finished):
    losses = [evaluate(finished[0], round=upto)["loss"] for upto in (0, 2, 4)]
    assert losses[0] == finished[1].eval["start"]["loss"]
    assert losses[2] == finished[1].eval["end"]["loss"]
    assert len(set(losses)) == 3


def test_a_merged_export_gives_plain_transformers_the_same_loss(finished, tmp_path):
    folder = export(finished[0], to="merged", out=tmp_path / "merged")
    config = load_config(finished[0] / "config.toml")
    assert plain_loss(hugging_face(folder), config) == pytest.approx(finished[1].eval["end"]["loss"], rel=1e-5)
    assert evaluate(folder)["loss"] == pytest.approx(finished[1].eval["end"]["loss"], rel=1e-5)


def test_an_adapter_folder_is_judged_like_its_run(finished):
    beside = evaluate(finished[0] / "adapter")
    whole = evaluate(finished[0])
    assert {**beside, "target": None, "round": None} == {**whole, "target": None, "round": None}
    assert evaluate(finished[0], examples=3)["examples"] == 3


def test_an_adapter_names_a_base_that_peft_can_load(data, tmp_path):
    base = Path(shutil.copytree(packaged(), tmp_path / "base"))
    run(small(data, model={"name": str(base)}, federation={"rounds": 1}), out=tmp_path / "r")
    told = json.loads((export(tmp_path / "r") / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base)


def test_an_adapter_without_its_settings_is_judged_on_a_given_configuration(finished, data, tmp_path):
    folder = Path(shutil.copytree(finished[0] / "adapter", tmp_path / "adapter"))
    (folder / "fedmezo.toml").unlink()
    with pytest.raises(ConfigError, match="give --config"):
        evaluate(folder)
    assert evaluate(folder, config=small(data, **HOT))["loss"] == finished[1].eval["end"]["loss"]
    with pytest.raises(ConfigError, match="is a run and knows its data"):
        evaluate(finished[0], config=small(data))


def test_export_refuses_what_cannot_be(finished, own):
    with pytest.raises(ConfigError, match="--round: expected 0 to 4"):
        export(finished[0], round=5)
    with pytest.raises(ConfigError, match="peft or merged"):
        export(finished[0], to="onnx")
    with pytest.raises(ConfigError, match="is the folder of a run"):
        export(finished[0], out=own)


def test_training_all_parameters_runs_resumes_and_exports(data, tmp_path):
    config = small(data, adapter={"kind": "full"}, federation={"rounds": 2}, algorithm={"rate": 1e-4})
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, out=tmp_path / "r", watch=StopAfter(0))
    assert resume(tmp_path / "r").digest == whole.digest == verify(tmp_path / "r")["digest"]
    with pytest.raises(ConfigError, match="use --to merged"):
        export(tmp_path / "r")
    folder = export(tmp_path / "r", to="merged")
    assert plain_loss(hugging_face(folder), config) == pytest.approx(whole.eval["end"]["loss"], rel=1e-5)
    assert evaluate(folder)["loss"] == whole.eval["end"]["loss"]
    assert whole.dim > 800_000


# Every way to run


def test_a_tokenizer_without_a_padding_token_is_enough(data):
    assert build(small(data)).loaded.tokenizer.pad_token is None


@pytest.mark.parametrize(
    "changed",
    [
        {"algorithm": {"law": "rademacher"}},
        {"algorithm": {"estimator": "forward"}},
        {"algorithm": {"estimator": "forward", "paper_eq2_scale": True}},
        {"algorithm": {"directions": 2}},
        {"algorithm": {"clip": "none", "decay": "linear"}},
        {"federation": {"cohort": 2}},
        {"federation": {"weighting": "samples"}},
        {"guard": {"on_surge": "rollback"}},
    ],
    ids=str,
)
def test_every_setting_runs_and_its_journal_rebuilds_the_model(data, tmp_path, changed):
    summary = run(small(data, **changed), out=tmp_path / "r")
    assert verify(tmp_path / "r")["digest"] == summary.digest
    directions = changed.get("algorithm", {}).get("directions", 1)
    cohort = changed.get("federation", {}).get("cohort", 3)
    assert summary.forwards == 4 * cohort * 2 * 2 * directions


@pytest.mark.parametrize("kind", ["iid", "lda", "meta"])
def test_every_split_deals_all_records(data, tmp_path, kind):
    run(small(data, split={"kind": kind}, federation={"rounds": 1}), out=tmp_path / "r")
    split = json.loads((tmp_path / "r" / "summary.json").read_text())["split"]
    assert sum(split["sizes"]) == 52
    if kind == "meta":
        owners = [set(histogram) for histogram in split["histograms"]]
        assert sorted(label for own in owners for label in own) == ["blue", "green", "grey", "red"]


def test_dataset_weights_follow_the_clients_sizes(data, tmp_path):
    config = small(data, split={"kind": "meta"}, federation={"rounds": 1, "weighting": "dataset"})
    run(config, out=tmp_path / "r")
    sizes = build(config).data.sizes
    with Journal.open(tmp_path / "r" / "journal.sqlite", readonly=True) as journal:
        weights = {entry.task.client: entry.weight for entry in journal.round(0).entries}
    assert weights == pytest.approx({client: size / sum(sizes.values()) for client, size in sizes.items()}, rel=1e-6)
    assert len(set(weights.values())) > 1


def test_a_cohort_lets_only_some_clients_work(data, tmp_path):
    watch = Notes()
    run(small(data, federation={"cohort": 1, "rounds": 6}), out=tmp_path / "r", watch=watch)
    took_part = [tuple(report.clients) for report in watch.reports]
    assert all(len(clients) == 1 for clients in took_part)
    assert len(set(took_part)) > 1


def test_clients_own_evaluations_appear_as_splits(data, tmp_path):
    config = small(data, eval={"every": 2, "per_client": True}, federation={"rounds": 1})
    watch = Notes()
    run(config, out=tmp_path / "r", watch=watch)
    assert set(watch.reports[-1].evaluations) == {"eval", "client/0", "client/1", "client/2"}
    judged = evaluate(tmp_path / "r")
    assert set(judged["splits"]) == {"client/0", "client/1", "client/2"}
    assert "loss" in judged["splits"]["client/0"]


def test_clients_with_too_few_records_for_an_evaluation_of_their_own_have_none(data, tmp_path):
    config = small(data, eval={"per_client": True}, federation={"clients": 10, "rounds": 1})
    watch = Notes()
    run(config, out=tmp_path / "r", watch=watch)
    assert set(watch.reports[-1].evaluations) == {"eval"}


def test_an_evaluation_file_is_judged_by_and_nothing_is_kept_back(data, tmp_path):
    apart = write_records(tmp_path, count=12)
    wanted = asked(data, federation={"rounds": 1}, eval={"metrics": ["loss", "exact_match"], "max_new_tokens": 3})
    del wanted["data"]["eval_examples"]
    wanted["data"]["eval_path"] = str(apart)
    summary = run(parse_config(wanted), out=tmp_path / "r")
    assert summary.eval["end"]["examples"] == 8  # eval.examples
    # Twelve training prompts are in that file, so nobody trains on them.
    assert sum(build(parse_config(wanted)).data.sizes.values()) == 48
    with pytest.raises(ConfigError, match=r"leave data\.eval_path out"):
        build(parse_config(wanted | {"eval": {"per_client": True}}))


def test_written_metrics_appear_when_asked_for(data, tmp_path):
    metrics = {"metrics": ["loss", "rouge_l", "exact_match"], "max_new_tokens": 3, "examples": 4}
    summary = run(small(data, eval=metrics, federation={"rounds": 1}), out=tmp_path / "r")
    for moment in ("start", "end"):
        assert 0 <= summary.eval[moment]["rouge_l"] <= 1
        assert 0 <= summary.eval[moment]["exact_match"] <= 1
    without = build(small(data))
    assert "rouge_l" not in without.config.eval.metrics


def test_choices_are_judged_by_accuracy(data, tmp_path):
    chosen = {"objective": "choices", "choices": ["red", "green", "blue", "grey"]}
    summary = run(small(data, data=chosen, federation={"rounds": 1}), out=tmp_path / "r")
    assert 0 <= summary.eval["end"]["accuracy"] <= 1


# The window, and too little data


def test_max_tokens_beyond_the_models_window_is_lowered_with_a_note(data, tmp_path):
    watch = Notes()
    run(small(data, data={"max_tokens": 100_000}, federation={"rounds": 1}), out=tmp_path / "r", watch=watch)
    window = build(small(data)).loaded.window
    assert any(f"data.max_tokens is {window} instead of 100000" in note for note in watch.notes)
    assert load_config(tmp_path / "r" / "config.toml").data.max_tokens == window


def test_records_that_are_all_too_long_are_refused_with_the_reason(data, tmp_path):
    with pytest.raises(DataError, match=r"None of the 60 records .* longer than max_tokens.*\(now 3\)"):
        run(small(data, data={"max_tokens": 3}), out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_record_beyond_the_window_is_dropped_and_counted_without_other_noise(data, tmp_path):
    said, logger = [], logging.getLogger("transformers")
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(listener)
    long = json.dumps({"instruction": "word " * 2000, "input": "", "output": "red", "category": "red"})
    mine = tmp_path / "mine.jsonl"
    mine.write_text(data.read_text() + long + "\n")
    watch = Notes()
    run(small(mine, federation={"rounds": 1}), out=tmp_path / "r", watch=watch)
    logger.removeHandler(listener)
    assert watch.info["dropped"] == {"prompt longer than max_tokens": 1}
    assert said == []


def test_one_record_cannot_be_both_trained_on_and_judged_by(tmp_path):
    with pytest.raises(DataError, match="Only 1 record can be used"):
        run(small(write_records(tmp_path, count=1)), out=tmp_path / "r")


def test_a_run_of_two_records_works(tmp_path):
    config = small(write_records(tmp_path, count=2), federation={"clients": 1, "rounds": 1})
    assert run(config, out=tmp_path / "r").eval["end"]["examples"] == 1


def test_more_metrics_can_be_asked_for_afterwards_and_unknown_ones_are_refused(finished):
    folder, _ = finished
    judged = evaluate(folder, examples=3, metrics=["exact_match"])
    assert 0 <= judged["exact_match"] <= 1
    assert "exact_match" not in evaluate(folder, examples=3)
    with pytest.raises(ConfigError, match="--metric: expected one of"):
        evaluate(folder, metrics=["bleu"])
