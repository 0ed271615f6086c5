"""Runs that start from an adapter that somebody has tuned before: its own tensors, its own settings, no other one."""

import json
import shutil
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from fake_line import FakeLine
from safetensors.torch import load_file, save_file
from tiny_runs import Notes, StopAfter, StopError, small, write_records

from fedmezo.cli import main
from fedmezo.errors import ConfigError, ModelError
from fedmezo.models.adapters import SETTINGS, WEIGHTS
from fedmezo.models.starts import find_adapter
from fedmezo.runtime.journal import Journal
from fedmezo.studies.appconfig import app_config, config_of
from fedmezo.studies.build import build
from fedmezo.studies.config import load_config, parse_config
from fedmezo.studies.doctor import diagnose
from fedmezo.studies.plan import plan
from fedmezo.studies.resident import ClientOptions, build_resident
from fedmezo.studies.run import evaluate, export, resume, run, verify
from fedmezo.studies.signal import signal_rows

BASE = Path(str(files("fedmezo") / "assets" / "tiny"))
HOT = {"rate": 2e-2}


def made_by_peft(folder: Path, *, seed: int = 7, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """Writes an adapter whose two matrices are both far from zero, by PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    told = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    with warnings.catch_warnings():  # of transformers, about a name that peft uses
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(**told))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_((0.05 * torch.randn(tensor.shape)).to(dtype).float())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return made_by_peft(tmp_path_factory.mktemp("adapters") / "start")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"))


def config_of_run(data: Path, start: Path, **sections):
    """Returns a small run that says nothing of rank and alpha."""
    adapter = {"start": str(start)} | sections.pop("adapter", {})
    return parse_config(small(data, algorithm=HOT, **sections).model_dump(mode="json") | {"adapter": adapter})


@pytest.fixture(scope="module")
def finished(data, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(config_of_run(data, start), out=folder)


def test_no_round_leaves_the_adapters_own_tensors(finished, start, tmp_path):
    written = load_file(export(finished[0], round=0, out=tmp_path / "zero") / WEIGHTS)
    given = load_file(start / WEIGHTS)
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], given[name]) for name in given)
    moved = load_file(export(finished[0], out=tmp_path / "all") / WEIGHTS)
    assert not any(torch.equal(moved[name], given[name]) for name in given)


def test_the_start_is_judged_like_plain_peft(finished, start, data):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    built = build(config_of_run(data, start), measure=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), start).eval()
    total, count = 0.0, 0
    for example in built.data.evaluation["eval"]:
        ids = torch.tensor([example.rows[0].ids])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        for at in range(example.rows[0].start, ids.shape[1]):
            total, count = total - float(logs[at - 1, ids[0, at]]), count + 1
    assert finished[1].eval["start"]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_rank_alpha_and_targets_are_the_adapters_and_stand_in_the_header(finished, start):
    with Journal.open(finished[0] / "journal.sqlite", readonly=True) as journal:
        told = json.loads(journal.header.config)["adapter"]
    assert (told["rank"], told["alpha"], told["targets"]) == (4, 12, ["down_proj", "q_proj"])
    assert told["start"] == str(start) and len(told["start_digest"]) == 64
    assert load_config(finished[0] / "config.toml").adapter.start_digest == told["start_digest"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"use_rslora": True}, (4, 12, ("down_proj", "q_proj"))),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, (4, 12, ("down_proj", "q_proj"))),
        ({"target_modules": r".*\.0\..*q_proj"}, (4, 12, None)),
        ({"lora_dropout": 0.5}, (4, 12, ("down_proj", "q_proj"))),
    ],
    ids=["rslora", "patterns", "regex", "dropout"],
)
def test_what_peft_can_say_of_an_adapter_is_kept(data, tmp_path, settings, kept):
    folder = made_by_peft(tmp_path / "adapter", **settings)
    built = build(config_of_run(data, folder), measure=False)
    adapter = built.config.adapter
    assert (adapter.rank, adapter.alpha, adapter.targets) == kept
    again = build(built.config, measure=False)
    assert again.bench.params.digest() == built.bench.params.digest() and again.config == built.config


def test_sixteen_bit_adapters_start_from_the_same_numbers(data, tmp_path):
    folder = made_by_peft(tmp_path / "adapter", dtype=torch.bfloat16)
    whole = build(config_of_run(data, folder), measure=False)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    half = build(config_of_run(data, folder), measure=False)
    assert half.config.adapter.start_digest == whole.config.adapter.start_digest


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rank": 8}, r"adapter\.rank = 8 contradicts adapter\.start: .* has 4; leave adapter\.rank out\."),
        ({"alpha": 16}, r"adapter\.alpha = 16 contradicts adapter\.start: .* has 12; leave"),
        ({"targets": ["v_proj"]}, r"adapter\.targets = \['v_proj'\] contradicts adapter\.start: .*'q_proj'\]; leave"),
        ({"preset": "paper"}, r"adapter\.rank = 128 contradicts adapter\.start"),
    ],
)
def test_a_contradiction_is_one_sentence(data, start, given, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        build(config_of_run(data, start, adapter={"start": str(start), **given}), measure=False)
    assert "\n" not in str(caught.value)


def test_what_agrees_is_no_contradiction(data, start):
    given = {"start": str(start), "rank": 4, "alpha": 12, "targets": ["q_proj", "down_proj"]}
    build(config_of_run(data, start, adapter=given), measure=False)


def test_keys_that_cannot_stand_together_are_refused_when_read():
    with pytest.raises(ConfigError, match="trains the weights; delete one of them"):
        load_config(None, ["adapter.start=x", "adapter.kind=full"])
    with pytest.raises(ConfigError, match="expected 12 to 64 digits of 0-9a-f"):
        load_config(None, ["adapter.start=x", "adapter.start_digest=nothing"])
    with pytest.raises(ConfigError, match=r"must be numbers where there is no adapter\.start"):
        parse_config({"adapter": {"rank": None}})


def test_a_configuration_with_a_start_survives_every_way_it_travels(start, tmp_path):
    config = load_config(None, [f"adapter.start={start}"])
    (tmp_path / "c.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "c.toml") == config == parse_config(config.model_dump(mode="json"))
    assert config_of(app_config(config, folder="x")) == config
    assert config.adapter.rank is None and config.digest() != load_config().digest()


def test_a_resumed_run_equals_an_uninterrupted_one(finished, data, start, tmp_path):
    with pytest.raises(StopError):
        run(config_of_run(data, start), out=tmp_path / "r", watch=StopAfter(1))
    assert resume(tmp_path / "r").digest == finished[1].digest
    assert verify(tmp_path / "r")["digest"] == finished[1].digest


@pytest.mark.slow
def test_workers_start_from_it_too(finished, data, start, tmp_path):
    both = {"threads": 1, "lanes": 2, "workers": 2}
    one = run(config_of_run(data, start, runtime={**both, "workers": 1}), out=tmp_path / "one")
    assert run(config_of_run(data, start, runtime=both), out=tmp_path / "two").digest == one.digest


def test_another_start_is_refused_wherever_the_model_is_rebuilt(data, tmp_path):
    own = made_by_peft(tmp_path / "own")
    run(config_of_run(data, own, federation={"rounds": 1}), out=tmp_path / "r")
    made_by_peft(own, seed=8)
    sentence = (
        r"adapter\.start: the adapter in '.*own' is not the one that is wanted: digest \w{12}, not \w{12}; restore"
    )
    for use in (verify, resume, evaluate, export):
        with pytest.raises(ModelError, match=sentence):
            use(tmp_path / "r")
    shutil.rmtree(own)
    with pytest.raises(ModelError, match="There is no adapter folder"):
        verify(tmp_path / "r")


def test_another_scale_is_another_start(data, tmp_path):
    own = made_by_peft(tmp_path / "own")
    known = build(config_of_run(data, own), measure=False).config.adapter.start_digest
    told = json.loads((own / SETTINGS).read_text())
    (own / SETTINGS).write_text(json.dumps({**told, "lora_alpha": 24}))
    with pytest.raises(ModelError, match="is not the one that is wanted"):
        build(config_of_run(data, own, adapter={"start": str(own), "start_digest": known}), measure=False)


def test_a_pinned_digest_may_be_its_first_digits(data, start):
    digest = build(config_of_run(data, start), measure=False).config.adapter.start_digest
    build(config_of_run(data, start, adapter={"start": str(start), "start_digest": digest[:12]}), measure=False)
    with pytest.raises(ModelError, match="is not the one that is wanted"):
        build(config_of_run(data, start, adapter={"start": str(start), "start_digest": "0" * 12}), measure=False)


def test_an_exported_adapter_needs_nothing_of_what_it_started_from(data, tmp_path):
    own = made_by_peft(tmp_path / "own")
    done = run(config_of_run(data, own, output={"export": True}, federation={"rounds": 2}), out=tmp_path / "r")
    shutil.rmtree(own)
    assert evaluate(tmp_path / "r" / "adapter")["loss"] == done.eval["end"]["loss"]


def test_a_runs_adapter_starts_the_next_run(data, tmp_path):
    first = run(small(data, algorithm=HOT, output={"export": True}), out=tmp_path / "first")
    second = run(config_of_run(data, tmp_path / "first" / "adapter"), out=tmp_path / "second")
    assert second.eval["start"]["loss"] == first.eval["end"]["loss"]


def test_an_adapter_for_another_model_is_refused(data, tmp_path):
    own = made_by_peft(tmp_path / "own")
    weights = {name: tensor[:, :-1].contiguous() for name, tensor in load_file(own / WEIGHTS).items()}
    save_file(weights, own / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="belong to another adapter"):
        build(config_of_run(data, own), measure=False)


def test_pickled_weights_are_refused(data, tmp_path):
    own = made_by_peft(tmp_path / "own")
    torch.save(load_file(own / WEIGHTS), own / "adapter_model.bin")
    (own / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="holds pickled weights, which can run code"):
        build(config_of_run(data, own), measure=False)


def test_a_hub_id_is_pinned_to_its_commit_and_brings_two_files_only(start, data, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    copy = Path(shutil.copytree(start, tmp_path / "0123abcd"))

    def snapshot(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    config = config_of_run(data, start, adapter={"start": "someone/adapter"})
    assert build(config, measure=False).config.adapter.start == "someone/adapter@0123abcd"
    find_adapter("someone/adapter@main")
    assert asked == [
        ("someone/adapter", None, [SETTINGS, WEIGHTS]),
        ("someone/adapter", "main", [SETTINGS, WEIGHTS]),
    ]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    with pytest.raises(ModelError, match="the hub cannot be reached and left no copy here"):
        find_adapter("someone/adapter")


def test_what_it_starts_from_is_said_before_and_during_the_run(start, data, tmp_path, capsys):
    notes = Notes()
    run(config_of_run(data, start, federation={"rounds": 1}), out=tmp_path / "r", watch=notes)
    assert any("starts from the adapter in" in note and "rank 4, alpha 12" in note for note in notes.notes)
    assert any("starts from the adapter in" in said for said in plan(config_of_run(data, start))["advice"])
    assert diagnose(tmp_path / "r").as_dict()
    assert main(["report", str(tmp_path / "r")]) == 0 and capsys.readouterr()
    assert str(start) in (tmp_path / "r" / "report.html").read_text()


def test_an_adapter_of_another_base_is_told(data, tmp_path):
    own = made_by_peft(tmp_path / "own")
    told = json.loads((own / SETTINGS).read_text())
    (own / SETTINGS).write_text(json.dumps({**told, "base_model_name_or_path": "someone/other-7b"}))
    built = build(config_of_run(data, own), measure=False)
    assert "made for the base model 'someone/other-7b', and this run tunes 'builtin:tiny'" in " ".join(built.notes)


def test_the_signal_is_measured_at_the_start(data, start):
    rows = signal_rows(config_of_run(data, start), dtypes=("float32",), quantize=("none",), mus=(1e-3,), directions=2)
    plain = signal_rows(small(data, algorithm=HOT), dtypes=("float32",), quantize=("none",), mus=(1e-3,), directions=2)
    assert rows[0].loss != plain[0].loss


# --- over a network ---------------------------------------------------------------------------------------------------


def line_of(*settings: str, trusting: bool = False):
    heard = []
    made = [build_resident(ClientOptions(n, settings=settings, trusting=trusting), say=heard.append) for n in range(3)]
    return FakeLine({10 + n: one.answer for n, one in enumerate(made)}), heard


def networked(data, start, **sections):
    return config_of_run(data, start, runtime={"threads": 1, "lanes": 1}, **sections)


def test_clients_with_the_same_start_walk_to_the_simulations_bits(data, start, tmp_path):
    alone = run(networked(data, start), out=tmp_path / "alone")
    copy = shutil.copytree(start, tmp_path / "copy")
    line, _ = line_of(f"data.path={data}", f"adapter.start={copy}")
    assert run(networked(data, start), out=tmp_path / "far", line=line).digest == alone.digest
    line, _ = line_of(trusting=True)
    assert run(networked(data, start), out=tmp_path / "trusting", line=line).digest == alone.digest


def hello_to(data, start, *settings: str, trusting: bool = False) -> str:
    """Returns what a client answers to a server's greeting."""
    from fedmezo import __version__
    from fedmezo.runtime.calls import PROTOCOL, Hello, decode_answer, encode_request
    from fedmezo.runtime.wire import WIRE_VERSION
    from fedmezo.zo.noise import NOISE_VERSION

    built = build(networked(data, start), measure=False)
    hello = Hello(
        "r" * 64, __version__, WIRE_VERSION, NOISE_VERSION, built.loaded.fingerprint, built.bench.params.layout(),
        built.config.model_dump_json(),
    )  # fmt: skip
    assert hello.protocol == PROTOCOL
    own = build_resident(ClientOptions(0, settings=settings, trusting=trusting))
    return str(decode_answer(own.answer(encode_request(hello))))


def test_a_client_with_another_start_is_refused_at_the_handshake(data, start, tmp_path):
    other = made_by_peft(tmp_path / "other", seed=9)
    answer = hello_to(data, start, f"data.path={data}", f"adapter.start={other}")
    assert "is not the one that is wanted: digest" in answer and "Refused" in answer


def test_a_start_that_a_server_names_needs_the_persons_word(data, start):
    answer = hello_to(data, start, f"data.path={data}")
    assert "names adapter.start" in answer and "which nobody here has confirmed" in answer and "Refused" in answer
