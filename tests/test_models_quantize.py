"""Frozen weights in 8 and 4 bits: close to the weights, smaller, the same on every machine, and as smooth a loss."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import answers, tiny
from tiny_runs import StopAfter, StopError, small, write_records
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedmezo.cli import main
from fedmezo.errors import ConfigError, ModelError
from fedmezo.fl.algorithm import Point, Task
from fedmezo.fl.walk import take_walks
from fedmezo.models import quantize as module
from fedmezo.models.adapters import load_adapter, make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.models.linear import linear
from fedmezo.models.load import load_model
from fedmezo.models.quantize import FORMATS, format_of, quantize_, require_unquantised
from fedmezo.models.read import fingerprint
from fedmezo.studies.config import load_config, parse_config
from fedmezo.studies.run import evaluate, export, resume, run, verify
from fedmezo.studies.signal import signal_rows, signal_table
from fedmezo.zo.params import Params

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = ["llama", "gpt2", "opt", "qwen2", "neox"]
# What makes a quantised base another base: sha256 of its codes. Two machines must agree on it.
FINGERPRINTS = {"int8": "a7240273d52fc0d9", "int4": "3be217613ef684fa"}


def quantised(name, kind, *, dtype=torch.float32):
    loaded = tiny(name, dtype=dtype)
    quantize_(loaded.model, kind)
    return loaded


def bench_of(loaded, *, spread=0.1):
    adapter = make_adapter(loaded.model, kind="lora", rank=4)
    params = adapter.start(loaded.model, seed=0).clone()
    for site in adapter.sites:
        params[site.b].normal_(0, spread, generator=torch.Generator().manual_seed(3))
    return ModelBench(loaded, adapter, params=params, batches=lambda *_: answers(4))


def layer(weight, kind):
    """One quantised linear layer with these weights."""
    rows, columns = weight.shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    model[0].weight.data = weight.clone()
    model.get_output_embeddings = lambda: None
    quantize_(model.eval().requires_grad_(False), kind)
    return model[0]


def bytes_of(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_quantised_model_predicts_nearly_what_the_whole_one_does(name):
    whole = bench_of(tiny(name)).evaluate(answers(8)).loss
    int8, int4 = (abs(bench_of(quantised(name, kind)).evaluate(answers(8)).loss - whole) for kind in FORMATS)
    assert 0 < int8 < 0.01 * whole and int8 < int4 < 0.1 * whole


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.floats(-3, 3), st.integers(0, 99), st.sampled_from(FORMATS))
def test_no_weight_moves_more_than_half_a_step(rows, columns, shift, seed, kind):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1 + shift
    weight[0] = shift  # a row of equal weights
    new = layer(weight, kind)
    scales = new.scales.float().amax(dim=tuple(range(1, new.scales.dim())))[:, None]
    # The minimum and the scale of int4 are float16 numbers: 11 bits.
    slack = 0 if kind == "int8" else (weight.abs().amax(1, keepdim=True) + 15 * scales) / 2048
    assert new.weight.shape == weight.shape
    assert ((new.weight - weight).abs() <= 0.5001 * scales + slack + 1e-7).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 99), st.sampled_from(FORMATS))
def test_what_is_on_the_grid_stays_there(rows, columns, seed, kind):
    first = layer(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), kind)
    again = layer(first.weight, kind)
    assert torch.equal(again.codes, first.codes)
    assert (again.weight - first.weight).abs().max() <= (2e-3 if kind == "int4" else 1e-6)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_by_the_weights_it_shows(kind, dtype, monkeypatch):
    draw = torch.Generator().manual_seed(1)
    new = layer(torch.randn(200, 300, generator=draw).to(dtype), kind)
    x = torch.randn(2, 9, 300, generator=draw).to(dtype)
    assert new.weight.dtype == new(x).dtype == dtype
    assert torch.equal(new(x), linear(x, new.weight))
    whole = new(x).float()
    monkeypatch.setattr(module, "_CHUNK", 7 * 300)  # seven rows at a time
    torch.testing.assert_close(new(x).float(), whole, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_gradient_of_a_chain_of_layers_is_that_of_their_weights(kind):
    draw = torch.Generator().manual_seed(2)
    layers = [layer(torch.randn(48, 48, generator=draw), kind) for _ in range(3)]
    start = torch.randn(20, 48, generator=draw)
    ours, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    out, wanted = ours, plain
    for new in layers:
        out, wanted = new(out).tanh(), functional.linear(wanted, new.weight).tanh()
    (out**2).sum().backward()
    (wanted**2).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_slope_agrees_with_the_gradient(name):
    bench = bench_of(quantised(name, "int8"))
    _, gradient = bench.gradient(Point(bench.params, 0, 0.0, 0, 0, 0))
    bare = ModelBench(bench._loaded, bench.adapter, params=bench.params, batches=lambda *_: answers(4))
    shifted = [Params({n: t + side * 1e-3 * gradient[n] for n, t in bench.params}) for side in (1, -1)]
    plus, minus = bare.losses([Point(params, 0, 0.0, 0, 0, 0) for params in shifted])
    squared = sum(float((part**2).sum()) for part in gradient.values())
    assert (plus - minus) / 2e-3 == pytest.approx(squared, rel=2e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "share"), [("int8", 0.30), ("int4", 0.22)])
def test_linear_layers_shrink_and_nothing_else_changes(name, kind, share):
    whole, small_ = tiny(name).model, quantised(name, kind).model
    left = {n: p for n, p in small_.named_parameters() if not n.endswith((".codes", ".scales", ".lows"))}
    own = dict(whole.named_parameters())
    gone = own.keys() - left.keys()
    assert left.keys() <= own.keys() and all(torch.equal(left[n], own[n]) for n in left)
    assert gone and all(own[n].dim() == 2 and "emb" not in n and "lm_head" not in n for n in gone)
    assert bytes_of(small_) - sum(4 * p.numel() for p in left.values()) < share * sum(4 * own[n].numel() for n in gone)
    assert format_of(small_) == kind and format_of(whole) is None


def test_a_conv1d_stays_one_for_peft():
    loaded = quantised("gpt2", "int8")
    assert isinstance(loaded.model.transformer.h[0].attn.c_attn, Conv1D)
    assert make_adapter(loaded.model, kind="lora").config.fan_in_fan_out


def test_two_loads_agree_and_no_two_formats_do():
    marks = {kind: load_model("builtin:tiny", quantize=kind).fingerprint for kind in FORMATS}
    assert {kind: mark[:16] for kind, mark in marks.items()} == FINGERPRINTS
    again = load_model("builtin:tiny", quantize="int4")
    assert marks["int4"] == again.fingerprint == fingerprint(again.model)
    assert len({*marks.values(), load_model("builtin:tiny").fingerprint}) == 3


@pytest.mark.parametrize("kind", FORMATS)
def test_walking_over_a_quantised_base_lowers_its_loss(kind):
    bench = bench_of(quantised("llama", kind), spread=0.0)
    start = bench.evaluate(answers(4)).loss
    task = Task(round=0, client=0, seed=1, rate=3e-2, mu=1e-3, steps=40, dense=True)
    (reply,) = take_walks([task], bench)
    end = Params({name: tensor + reply.delta.tensors[name] for name, tensor in bench.params})
    assert bench.evaluate(answers(4), params=end).loss < start - 0.02


def test_a_run_resumes_replays_and_merges_into_the_unquantised_weights(tmp_path):
    hot = {"model": {"name": "builtin:tiny", "quantize": "int4"}, "algorithm": {"rate": 2e-2}}
    config = small(write_records(tmp_path), **hot)
    summary = run(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, out=tmp_path / "cut", watch=StopAfter(1))
    assert resume(tmp_path / "cut").digest == summary.digest
    assert verify(tmp_path / "whole")
    folder = export(tmp_path / "whole", to="merged", out=tmp_path / "merged")
    merged, base = load_model(str(folder)).model, load_model("builtin:tiny").model
    adapter, params = load_adapter(export(tmp_path / "whole", out=tmp_path / "peft"), base)
    site = adapter.sites[0]
    wanted = base.get_submodule(site.module).weight + site.scale * params[site.b] @ params[site.a]
    assert torch.equal(merged.get_submodule(site.module).weight, wanted)
    # The whole weights predict about what the codes did.
    judged = evaluate(tmp_path / "whole")["loss"]
    whole = config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder)})})
    assert judged == pytest.approx(_loss(whole), rel=0.1)


def _loss(config):
    from fedmezo.studies.build import build

    plain = parse_config(config.model_dump(mode="json") | {"model": {"name": config.model.name}})
    built = build(plain)
    return built.bench.evaluate(built.data.evaluation["eval"]).loss


def test_plan_counts_the_smaller_weights(tmp_path):
    from fedmezo.studies.plan import plan

    records = write_records(tmp_path)
    whole, less = (
        plan(small(records, model={"name": "builtin:tiny", "quantize": kind}))["memory_mb"]["weights"]
        for kind in ("none", "int8")
    )
    assert less < 0.6 * whole


def test_quantising_weights_adds_no_rounding_noise_and_bfloat16_does():
    rows = signal_rows("builtin:tiny", quantize=("none", "int8"), mus=(1e-4, 1e-2), directions=4, spreads=(0.01,))
    found = {(row.dtype, row.quantize, row.mu): row for row in rows}
    assert len(rows) == len(found) == 8
    for mu in (1e-4, 1e-2):
        assert found["float32", "none", mu].noise == 0 and found["float32", "none", mu].ratio is None
        assert found["float32", "int8", mu].ratio > 20 and found["float32", "int8", mu].correlation > 0.99
        assert found["float32", "int8", mu].rounding is None
    # The changed base differs as much at either mu, rounding a hundred times as much at the smaller one.
    small_, large = (found["float32", "int8", mu].noise for mu in (1e-4, 1e-2))
    assert small_ == pytest.approx(large, rel=0.2)
    for kind in ("none", "int8"):
        small_, large = (found["bfloat16", kind, mu] for mu in (1e-4, 1e-2))
        assert small_.rounding > 20 * large.rounding and small_.ratio < 1 < large.ratio
    assert found["float32", "int8", 1e-4].weights_mb < found["float32", "none", 1e-4].weights_mb
    assert signal_table(rows).row_count == 8


@pytest.mark.parametrize("options", [{"directions": 1}, {"source": parse_config({"adapter": {"kind": "full"}})}])
def test_the_signal_is_that_of_a_lora_adapter_along_several_directions(options):
    with pytest.raises(ConfigError, match="LoRA adapter along at least 2 directions"):
        signal_rows(**({"source": "builtin:tiny"} | options))


def test_what_cannot_be_is_said_in_a_sentence(monkeypatch):
    with pytest.raises(ModelError, match="expected one of int8, int4, or None, got 'int3'"):
        load_model("builtin:tiny", quantize="int3")
    with pytest.raises(ModelError, match="need device cpu or cuda, got 'meta'"):
        load_model("builtin:tiny", quantize="int8", device="meta")
    with pytest.raises(ModelError, match=r"Training all parameters needs the weights themselves.*int8"):
        require_unquantised(quantised("llama", "int8").model, what="Training all parameters")
    require_unquantised(tiny("llama").model, what="Training all parameters")
    for value, kind in ((math.nan, "int8"), (math.inf, "int4"), (1e5, "int4")):
        with pytest.raises(ModelError, match=r"'0' has weights beyond .* cannot be quantised"):
            layer(torch.full((2, 40), value), kind)
    bare = nn.Sequential(nn.Embedding(3, 3))
    bare.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="no linear layer"):
        quantize_(bare, "int8")


def test_the_configuration_knows_the_key():
    assert load_config().model.quantize == "none"
    assert load_config(None, ["model.quantization=int4"]).model.quantize == "int4"
    assert load_config(None, ["model.quantize=int8"]).digest() != load_config().digest()
    with pytest.raises(ConfigError, match="int8"):
        load_config(None, ["model.quantize=int3"])
    with pytest.raises(ConfigError, match=r'adapter\.kind = "full" trains the weights themselves'):
        load_config(None, ["model.quantize=int8", "adapter.kind=full"])


def test_weights_that_modules_share_are_left_alone():
    loaded = replace(tiny("qwen2"))  # its output embeddings are its input embeddings
    quantize_(loaded.model, "int8")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.model.lm_head.weight.dtype == torch.float32


def test_the_signal_is_measured_from_the_command_line(capfd):
    asked = ["analyze", "noise", "--set", "model.name=builtin:tiny", "--set", "federation.batch_size=1", "-q"]
    asked += ["--dtype", "float32,bfloat16", "--quantize", "none", "--mu", "1e-3,1e-2", "--directions", "4"]
    assert main([*asked, "--spread", "0", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [(row["dtype"], row["mu"]) for row in rows] == [
        (dtype, mu) for dtype in ("float32", "bfloat16") for mu in (1e-3, 1e-2)
    ]
    plain, fine, coarse = rows[0], rows[2], rows[3]
    assert plain["noise"] == 0 and plain["signal"] > 0
    assert fine["noise"] > 3 * coarse["noise"] > 0  # rounding grows as 1 / mu
    assert main([*asked, "--spread", "0"]) == 0
    told = capfd.readouterr().out
    assert "alike" in told and "…" not in told
    assert main([*asked, "--mu", "many"]) == 2
