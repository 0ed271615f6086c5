"""The verb `bench`: rows of one form, ratios that make sense, and an in-place scheme that does what is said of it."""

import json
import math
import socket
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedmezo.errors import ConfigError, ModelError, RunError
from fedmezo.models import plain
from fedmezo.models.load import load_model
from fedmezo.studies.bench import BenchOptions, bench, memory, probe, read_list, rows, simulate, step, timing
from fedmezo.studies.bench.inplace import InPlace
from fedmezo.studies.bench.subjects import batch_of, open_model, subjects

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedmezo.cli import main

KEYS = ["name", "dtype", "tokens", "clients", "value", "unit", "ratio_two_forwards", "ratio_inplace"]
TINY = BenchOptions(model="builtin:tiny", rank=4, repeats=1, tokens=(24,))
SHORT = ["--model", "builtin:tiny", "--rank", "4", "--repeats", "1", "--tokens", "24"]

SILENT = {"say": lambda text: None}


def here(mode, asked, *, dtype, tokens):
    """Answers as a process of its own would, in this one: quick, and its megabytes are worth nothing."""
    question = {"mode": mode, "asked": asdict(asked), "dtype": dtype, "tokens": tokens}
    return json.loads(probe.main(json.dumps(question)))


@pytest.mark.parametrize("what", ["noise", "step", "simulate", "replay", "memory"])
def test_every_benchmark_prints_rows_of_the_promised_form(what, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "probe", here)
    file = tmp_path / "result.json"
    assert main(["bench", what, *SHORT, "--json", "--out", str(file)]) == 0
    out = capfd.readouterr().out
    result = json.loads(out)
    assert out.count("\n") == 1 and result == json.loads(file.read_text())
    assert result["rows"] and result["failed"] == [] and result["notes"] == []
    assert {row["name"].partition(":")[0] for row in result["rows"]} == {what}
    for row in result["rows"]:
        assert list(row) == KEYS
        for ratio in (row["ratio_two_forwards"], row["ratio_inplace"]):
            assert ratio is None or (math.isfinite(ratio) and ratio > 0)
        assert row["value"] is not None and math.isfinite(row["value"])
    compared = [row for row in result["rows"] if row["unit"] in ("s", "ns")]
    assert all(row["ratio_two_forwards"] and row["ratio_inplace"] for row in compared)


def test_all_runs_every_benchmark_and_the_table_shows_each(capfd, monkeypatch):
    called = []
    for name in ("noise", "step", "simulate", "replay", "memory"):
        module = __import__(f"fedmezo.studies.bench.{name}", fromlist=["_"])
        frame = rows.Frame(name, "float32", 8, base=2.0, inplace=4.0)
        monkeypatch.setattr(
            module,
            f"{name}_rows",
            lambda asked, say, name=name, frame=frame: called.append(name) or [frame.row("x", 1.0)],
        )
    assert main(["bench", "--model", "builtin:tiny"]) == 0
    out = capfd.readouterr().out
    assert called == ["noise", "step", "simulate", "replay", "memory"]
    assert all(name.capitalize() in out for name in called)
    assert out.count("0.500") == out.count("0.250") == 5


def test_the_result_names_no_machine_and_no_path(tmp_path):
    load_model("builtin:tiny").model.save_pretrained(tmp_path / "mine")
    load_model("builtin:tiny").tokenizer.save_pretrained(tmp_path / "mine")
    result = bench(replace(TINY, kinds=("replay",), model=str(tmp_path / "mine")), **SILENT)
    text = json.dumps(result)
    assert str(tmp_path) not in text and result["settings"]["model"] == "mine"
    assert socket.gethostname() not in text
    assert {"cpu", "cores", "threads", "ram_gb", "gpu", "versions"} <= set(result["machine"])
    assert {"torch", "numba", "transformers"} <= set(result["machine"]["versions"])


def test_threads_are_set_for_the_run_and_put_back():
    before = torch.get_num_threads()
    result = bench(replace(TINY, kinds=("replay",), threads=before + 1), **SILENT)
    assert result["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


class Toy(nn.Module):
    """A loss of two tensors, called as Hugging Face models are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.bias = nn.Parameter(torch.tensor([0.25]))
        self.seen = []

    def forward(self, x):
        self.seen.append((self.weight.detach().clone(), self.bias.detach().clone()))
        logits = self.weight * x + self.bias
        return SimpleNamespace(loss=(logits**2).sum(), logits=logits)


def test_the_inplace_scheme_equals_a_reference_written_by_hand():
    x, seed, mu, rate, decay = torch.tensor([0.5, 1.0, -1.0]), 3, 1e-2, 1e-1, 0.1
    toy = Toy()
    scheme = InPlace(toy, dict(toy.named_parameters()), mu=mu, rate=rate, weight_decay=decay)
    weight, bias = toy.weight.detach().clone(), toy.bias.detach().clone()
    addresses = [toy.weight.data_ptr(), toy.bias.data_ptr()]

    slope = scheme.step({"x": x}, seed=seed)

    made = torch.Generator().manual_seed(seed)
    z, zb = (torch.normal(0.0, 1.0, (size,), generator=made) for size in (3, 1))
    sides = [(weight + s * mu * z, bias + s * mu * zb) for s in (1, -1)]
    above, below = ((((w * x + b) ** 2).sum()).item() for w, b in sides)
    expected = (above - below) / (2 * mu)
    assert slope == pytest.approx(expected, rel=1e-4)
    for seen, side in zip(toy.seen, sides, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen, side, strict=True))
    # Decay is for weights, not for biases.
    assert torch.allclose(toy.weight.data, weight - rate * (expected * z + decay * weight), atol=1e-5)
    assert torch.allclose(toy.bias.data, bias - rate * expected * zb, atol=1e-5)
    assert [toy.weight.data_ptr(), toy.bias.data_ptr()] != addresses  # out of place, as the scheme is
    assert scheme.logits.shape == (3,)


def test_the_inplace_scheme_draws_in_the_parameters_own_dtype():
    toy = Toy().to(torch.bfloat16)
    scheme = InPlace(toy, dict(toy.named_parameters()), mu=1e-2, rate=0.0)
    scheme.step({"x": torch.ones(3, dtype=torch.bfloat16)}, seed=1)
    made = torch.Generator().manual_seed(1)
    z = torch.normal(0.0, 1.0, (3,), generator=made, dtype=torch.bfloat16)
    assert torch.equal(toy.seen[0][0], torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16) + 1.0 * z * 1e-2)
    assert toy.weight.dtype == torch.bfloat16


def test_works_take_turns_and_the_first_turn_is_not_counted():
    order, ticks = [], iter(range(1000))
    works = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), next(ticks))}
    samples = timing.interleaved(works, repeats=2, device="cpu", clock=lambda: float(next(ticks)))
    assert order == ["a", "b"] * 3
    assert samples == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_a_step_costs_the_difference_of_two_rounds():
    assert timing.marginal([1.0, 1.0, 9.0], [2.0, 3.0, 11.0], more=2) == 1.0
    assert timing.marginal([2.0], [1.0], more=2) is None


def test_packed_losses_equal_those_of_plain_forwards():
    lengths = (16, 32, 24)
    loaded = load_model("builtin:tiny")
    three = subjects(loaded, replace(TINY, rank=8), train="lora", lengths=lengths)
    batches = [batch_of(length, three.plain) for length in lengths]
    start = three.ours.params.clone()
    own, other = simulate.largest_differences(three, batches)
    assert own <= 2e-6 and other <= 1e-5
    assert any(not torch.equal(tensor, start[name]) for name, tensor in three.ours.params)
    # And it would show: other tokens have other losses.
    own, other = simulate.largest_differences(three, batches[::-1])
    assert own <= 2e-6 and other > 1e-2


def test_a_twin_shares_weights_and_an_attached_adapter_changes_nothing_yet():
    model = load_model("builtin:tiny").model
    other = plain.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert len(list(other.parameters())) == len(list(model.parameters()))  # tied weights stay one
    attached = plain.with_peft(plain.twin(model), rank=4, alpha=8, targets=["q_proj", "v_proj"])
    batch = batch_of(16, model)
    assert torch.equal(model(**batch).logits, attached(**batch).logits)
    assert sum(p.requires_grad for p in attached.parameters()) == len(plain.trained_names(attached)) == 16
    with pytest.raises(ModelError, match="PEFT cannot put LoRA"):
        plain.with_peft(plain.twin(model), rank=4, alpha=8, targets=["nothing"])


def test_a_combination_that_cannot_be_trained_is_told_and_the_rest_goes_on(capfd, monkeypatch):
    real = step.subjects

    def refuse(loaded, asked, *, train, lengths):
        if train == "full":
            raise ModelError("No such thing here.")
        return real(loaded, asked, train=train, lengths=lengths)

    monkeypatch.setattr(step, "subjects", refuse)
    assert main(["bench", "step", *SHORT, "--dtype", "float32"]) == 0
    out = capfd.readouterr().out
    assert "full, one step" in out and "not available: No such thing here." in " ".join(out.split())
    assert "lora, round of 10" in out


def test_a_step_that_needs_too_much_memory_fails_with_a_sentence(capfd, monkeypatch):
    def answer(mode, asked, *, dtype, tokens):
        peak = 1300.0 if mode == "step-lora" else 1000.0
        return {"start_mb": 900.0, "peak_mb": peak, "trained_mb": 30.0, "model_mb": 500.0}

    monkeypatch.setattr(memory, "probe", answer)
    assert main(["bench", "memory", "--tokens", "256", "--dtype", "float32", "--json"]) == 1
    told = capfd.readouterr()
    assert json.loads(told.out)["failed"] and told.out.count("\n") == 1
    assert "1.262 times the memory of a plain forward" in told.err
    # Short batches are not judged: there the compiler weighs more than the batch.
    assert main(["bench", "memory", "--tokens", "64", "--dtype", "float32", "--json"]) == 0


def test_memory_ratios_are_to_what_a_plain_forward_adds(monkeypatch):
    extras = {"forward": 100.0, "step-lora": 40.0, "inplace-lora": 200.0}

    def answer(mode, asked, *, dtype, tokens):
        return {"start_mb": 900.0, "peak_mb": 900.0 + extras.get(mode, 0.0), "trained_mb": 30.0, "model_mb": 500.0}

    monkeypatch.setattr(memory, "probe", answer)
    found = {row.name: row for row in memory.memory_rows(replace(TINY, kinds=("memory",), train=("lora",)), **SILENT)}
    extra = found["memory: lora, our step, extra over loaded"]
    assert (extra.value, extra.unit) == (40.0, "MB")
    assert (extra.ratio_two_forwards, extra.ratio_inplace) == (0.4, 0.2)
    assert found["memory: plain forward, extra over loaded"].ratio_two_forwards == 1.0
    assert not any("full" in name for name in found)


def test_a_process_of_its_own_answers_or_its_end_is_told(monkeypatch):
    asked = replace(TINY, shape="tiny", kinds=("memory",))
    found = memory.probe("forward", asked, dtype="float32", tokens=24)
    assert found["peak_mb"] >= found["start_mb"] > 50
    monkeypatch.setattr(memory.sys, "executable", "false")
    with pytest.raises(RunError, match="ended with code 1"):
        memory.probe("forward", asked, dtype="float32", tokens=24)
    # A mode that nothing is compared with may run out of memory; its row says so.
    assert "ended with code 1" in memory.probe("adamw-full", asked, dtype="float32", tokens=24)["error"]


def test_a_system_without_a_peak_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "_STATUS", tmp_path / "nothing")
    with pytest.raises(RunError, match="needs Linux"):
        probe.peak("cpu")


def test_a_shape_is_random_and_measured_like_a_model(capfd):
    assert main(["bench", "step", *SHORT, "--shape", "tiny", "--dtype", "bfloat16", "--train", "lora", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["settings"]["model"] == "random tiny"
    assert {row["dtype"] for row in result["rows"]} == {"bfloat16"}
    first, second = (plain.random_llama("tiny", dtype="float32", device="cpu").model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_large_shape_has_the_published_size(monkeypatch):
    monkeypatch.setattr(plain, "_free_bytes", lambda device: 0.0)
    with pytest.raises(ModelError, match=r"Shape '3b' in bfloat16 needs 8.2 GB on cpu, where 0.0 GB are free"):
        plain.random_llama("3b", dtype="bfloat16", device="cpu")


def test_mistakes_are_told_before_anything_is_measured(capfd, tmp_path):
    for arguments, said in (
        (["noise", "--shape", "3b"], "--shape is for step and memory only"),
        (["step", "--shape", "4c", "--tokens", "8"], "expected one of 3b, tiny"),
        (["step", "--dtype", "int3"], "--dtype: expected names out of float32"),
        (["step", "--train", "half"], "--train: expected names out of lora, full"),
        (["step", "--tokens", "3"], "a batch needs 4 tokens"),
        (["step", "--tokens", "many"], "--tokens: expected numbers"),
        (["step", "--tokens", ","], "--tokens: expected something"),
        (["step", "--out", str(tmp_path / "no" / "file.json")], "there is no folder"),
        (["memory", "--model", "nosuch/model/here"], "There is no model folder"),
    ):
        assert main(["bench", *arguments]) == 2
        assert said in " ".join(capfd.readouterr().err.split()), arguments


def test_lists_are_read_and_defaults_depend_on_the_device():
    assert read_list("64, 256", option="--tokens", of=int) == (64, 256)
    assert read_list(None, option="--tokens") is None
    assert BenchOptions().dtypes_or("float32") == ("float32",)
    assert BenchOptions(device="cuda").dtypes_or("float32") == ("float32", "float16")
    assert BenchOptions(dtypes=("bfloat16",)).dtypes_or("float32") == ("bfloat16",)
    with pytest.raises(ConfigError):
        BenchOptions(kinds=("replay",), shape="tiny")


def test_weights_are_out_of_the_mapped_file():
    loaded = open_model(TINY, "float32")
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in loaded.model.parameters())
