"""`analyze rank`: forward passes and backpropagation measure the same Hessian, of the same loss, layer by layer."""

import json
import math
import warnings
from dataclasses import replace
from importlib.util import find_spec
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from tiny_models import answers, candidates, multiple_choice, tiny
from tiny_runs import small

from fedmezo.errors import ConfigError, ModelError
from fedmezo.fl.algorithm import Point
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.models.hessian import plain_loss, product
from fedmezo.studies.curvature import curvature_samples, default_mu, flaws
from fedmezo.studies.rank import RankOptions, layer_of, rank_rows, rank_words
from fedmezo.zo.noise import noise
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedmezo.cli import main

# PEFT's own warnings, when the plain twin is built with it.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

backprop = pytest.mark.skipif(find_spec("curvlinops") is None, reason="needs the extra analyze")


def late(example):
    """The same choice after two more labels, which do not count."""
    row = example.rows[0]
    return replace(example, rows=(replace(row, start=row.start - 2),))


CHOICES = multiple_choice(3, seed=1)
BATCHES = (answers(3, seed=1), (*candidates(2, seed=1), *answers(1, seed=2)), (*CHOICES[:2], late(CHOICES[2])))
KEYS = [(0, 0, 0), (0, 1, 0), (0, 2, 0)]


def bench_of(name, kind, *, spread=0.05, rank=4):
    loaded = tiny(name)
    targets = {"gpt2": ["c_attn"], "neox": ["query_key_value"]}.get(name, ["q_proj", "v_proj"])
    adapter = make_adapter(loaded.model, kind=kind, rank=rank, alpha=2 * rank, targets=targets)
    made = ModelBench(loaded, adapter, batches=lambda client, round, step: BATCHES[round])
    if spread and kind == "lora":
        step_(made.params, 9, coefficient=spread, law="gaussian")
    return loaded, made


def loss_at(bench, params):
    return fmean(bench.losses([Point(params, 0, 0.0, *key) for key in KEYS]))


def flat(params, seed):
    return np.concatenate([noise(seed, name, size=tensor.numel()).numpy() for name, tensor in params])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "granite", "qwen2"])
def test_the_plain_loss_is_the_bench_s(name, kind):
    loaded, bench = bench_of(name, kind)
    plain = plain_loss(loaded, bench.adapter, params=bench.params, batches=BATCHES)
    assert plain.value() == pytest.approx(loss_at(bench, bench.params), rel=1e-5)
    assert tuple(plain.parameters) == bench.params.names


def test_the_plain_loss_is_taken_at_the_parameters_given():
    loaded, bench = bench_of("llama", "full")
    moved = bench.params.clone()
    step_(moved, 3, coefficient=0.05, law="gaussian")
    plain = plain_loss(loaded, bench.adapter, params=moved, batches=BATCHES)
    assert plain.value() == pytest.approx(loss_at(bench, moved), rel=1e-5)
    assert abs(plain.value() - loss_at(bench, bench.params)) > 1e-3


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "neox"])
@backprop
def test_a_second_difference_is_the_hessian_s_quadratic_form(name, kind):
    loaded, bench = bench_of(name, kind)
    apply = product(plain_loss(loaded, bench.adapter, params=bench.params, batches=BATCHES), matrix="hessian")
    seeds = [11, 12, 13, 14]
    got = curvature_samples(bench, params=bench.params, seeds=seeds, batches=KEYS, mu=3e-3)
    wanted = [float(z @ apply(z)) for z in (flat(bench.params, seed) for seed in seeds)]
    assert got == pytest.approx(wanted, abs=0.03 * max(map(abs, wanted)))


@pytest.mark.parametrize("kind", ["lora", "full"])
@backprop
def test_a_second_difference_in_one_layer_is_that_block_s(kind):
    loaded, bench = bench_of("llama", kind)
    names = [name for name in bench.params.names if layer_of(name) == "model.layers.1"]
    before = bench.params.digest()
    plain = plain_loss(loaded, bench.adapter, params=bench.params, batches=BATCHES)
    apply = product(plain, matrix="hessian", names=names)
    part = Params({name: bench.params[name] for name in names})
    got = curvature_samples(bench, params=bench.params, seeds=[5, 6], batches=KEYS, mu=5e-3, names=names)
    wanted = [float(z @ apply(z)) for z in (flat(part, seed) for seed in (5, 6))]
    assert got == pytest.approx(wanted, abs=0.05 * max(map(abs, wanted)))
    assert bench.params.digest() == before


@backprop
def test_the_gauss_newton_matrix_has_no_negative_eigenvalue_and_the_hessian_has():
    loaded, bench = bench_of("llama", "lora", rank=1)
    plain = plain_loss(loaded, bench.adapter, params=bench.params, batches=BATCHES)
    lowest = {}
    for matrix in ("hessian", "ggn"):
        apply = product(plain, matrix=matrix)
        dense = apply(np.eye(bench.params.dim, dtype=np.float32))
        assert np.abs(dense - dense.T).max() < 1e-4 * np.abs(dense).max()
        values = np.linalg.eigvalsh(dense.astype(np.float64))
        lowest[matrix] = values[0] / values[-1]
    assert lowest["ggn"] > -1e-5
    assert lowest["hessian"] < -1e-2


def test_rounding_grows_and_the_bend_shrinks_with_a_smaller_mu():
    _, bench = bench_of("llama", "lora")
    asked = {"params": bench.params, "seeds": [1, 2, 3, 4], "batches": KEYS}
    (near, _), (middle, small_bend), (_, bend) = (flaws(bench, mu=mu, **asked) for mu in (1e-4, 1e-2, 0.2))
    assert near > 30 * middle
    assert middle < 0.02
    assert abs(bend) > 3 * abs(small_bend)


def test_rank_refuses_a_model_that_is_not_float32():
    loaded, bench = bench_of("llama", "lora")
    loaded.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match="float32"):
        plain_loss(loaded, bench.adapter, params=bench.params, batches=BATCHES)


@pytest.fixture(scope="module")
def rows(data):
    torch.set_num_threads(1)
    asked = RankOptions("both", 24, 8, layers=True, spread=0.02)
    return rank_rows(small(data, adapter={"rank": 2, "alpha": 4}), asked)


def by(rows, **wanted):
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


@backprop
def test_rows_are_the_whole_and_its_layers_by_every_method(rows):
    parts = ["all", *(f"model.layers.{n}" for n in range(4))]
    assert [(row.method, row.part) for row in rows] == [
        (method, part) for method in ("forward", "hessian", "ggn") for part in parts
    ]
    assert {row.adapter for row in rows} == {"lora 2"}
    assert {(row.batches, row.after, row.spread) for row in rows} == {(3, 0, 0.02)}


@backprop
def test_layers_sum_to_the_whole(rows):
    for method in ("hessian", "ggn"):
        whole, *layers = by(rows, method=method)
        assert math.fsum(row.trace for row in layers) == pytest.approx(whole.trace, rel=1e-4)
        assert sum(row.dim for row in layers) == whole.dim


@backprop
def test_the_ends_of_a_layer_lie_inside_those_of_the_whole(rows):
    whole, *layers = by(rows, method="hessian")
    slack = whole.intervals["lambda_max"][1] - whole.lambda_max + 1e-3 * whole.norm
    assert all(row.lambda_max <= whole.lambda_max + slack for row in layers)


@backprop
def test_forward_passes_and_backpropagation_agree_on_the_trace(rows):
    (forward,), (back,) = by(rows, method="forward", part="all"), by(rows, method="hessian", part="all")
    spans = [row.intervals["trace"] for row in (forward, back)]
    assert max(low for low, _ in spans) <= min(high for _, high in spans)
    assert forward.frobenius2 == pytest.approx(back.frobenius2, rel=0.6)
    assert forward.loss == back.loss


@backprop
def test_the_hessian_at_the_start_of_lora_is_zero_in_a_and_indefinite(data):
    row = by(rank_rows(small(data), RankOptions("backprop", 6, 10)), method="hessian")[0]
    assert row.lambda_min < 0 < row.lambda_max
    assert row.spread == row.after == 0


def test_after_measures_the_start_and_the_trained_model(data):
    config = small(data, algorithm={"rate": 0.01})
    rows = rank_rows(config, RankOptions("forward", 6, batches=2, after=2))
    assert [row.after for row in rows] == [0, 2]
    assert rows[0].loss != rows[1].loss
    alone = rank_rows(config, RankOptions("forward", 6, batches=2))
    assert replace(alone[0], intervals={}, rank=0, norm=0) == replace(rows[0], intervals={}, rank=0, norm=0)


def test_quantised_and_rademacher_configurations_are_measured_plain(data):
    plain = rank_rows(small(data), RankOptions("forward", 4, batches=1))
    other = small(data, model={"name": "builtin:tiny", "dtype": "bfloat16"}, algorithm={"law": "rademacher"})
    assert rank_rows(other, RankOptions("forward", 4, batches=1))[0].trace == plain[0].trace


@backprop
def test_words_judge_the_paper_s_claims_and_warn(rows):
    row = by(rows, method="ggn", part="all")[0]
    span = {"rank": (3.0, 7.0)}
    (told,) = rank_words([replace(row, rank=5.0, intervals=span, lora_rank=8)])
    assert "r <= 200 holds here" in told and "LoRA rank of 8, holds here" in told
    (told,) = rank_words([replace(row, rank=5.0, intervals=span, lora_rank=2)])
    assert "LoRA rank of 2, does not hold here" in told
    told, warning = rank_words([replace(row, rank=900.0, intervals={"rank": (800.0, 990.0)}, lora_rank=0)])
    assert "r <= 200 does not hold" in told and "Conjecture" not in told and "above 500" in warning
    (told,) = rank_words([replace(row, rank=math.nan, note="No.", intervals={})])
    assert "no rank. No." in told and "absolute" not in told
    ends = {"norm": (1.5, 2.0), "frobenius2": (120.0, 150.0)}
    indefinite = replace(row, method="hessian", norm=2.0, lambda_min=-2.0, intervals=ends)
    assert "in absolute ones, r is at least 30" in rank_words([indefinite])[0]
    assert "absolute" not in rank_words([replace(indefinite, lambda_min=-0.01)])[0]


def test_layers_are_named_by_their_path():
    assert layer_of("base_model.model.model.layers.11.self_attn.q_proj.lora_A.weight") == "model.layers.11"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_of("transformer.h.3.ln_1.bias") == "transformer.h.3"


@pytest.mark.parametrize(
    "wrong",
    [{"method": "sideways"}, {"directions": 2}, {"batches": 0}, {"mu": 0.0}, {"spread": math.nan}, {"steps": 0}],
)
def test_what_cannot_be_asked_is_refused(wrong):
    with pytest.raises(ConfigError):
        RankOptions(**wrong)


def _words(data, *more):
    config = data.parent / "rank.toml"
    config.write_text(small(data).to_toml())
    return ["analyze", "rank", str(config), "-q", "--directions", "6", "--batches", "2", *more]


@backprop
def test_command_prints_rows_or_a_table(data, capfd):
    assert main([*_words(data), "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["rows"]
    assert row["method"] == "forward" and row["directions"] == 6
    assert main([*_words(data), "--method", "both", "--steps", "4", "--layers"]) == 0
    out = capfd.readouterr().out
    assert "the paper's r <= 200" in out
    table = out[: out.index("\n\n")].splitlines()
    assert len(table) == 16 and max(map(len, table)) <= 100 and "…" not in out


def test_without_the_library_a_sentence_says_what_to_do(data, capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "curvlinops", None)
    assert main(_words(data, "--method", "backprop")) == 2
    assert "pip install 'fedmezo[analyze]'" in capfd.readouterr().err
    assert main(_words(data)) == 0


def test_default_radius_is_smaller_for_a_whole_model():
    assert default_mu("full") < default_mu("lora")


@backprop
def test_samples_have_the_variance_that_the_theory_uses():
    loaded, bench = bench_of("llama", "lora", rank=1)
    samples = curvature_samples(bench, params=bench.params, seeds=range(150), batches=KEYS[:1], mu=1e-2)
    apply = product(plain_loss(loaded, bench.adapter, params=bench.params, batches=BATCHES[:1]), matrix="hessian")
    dense = apply(np.eye(bench.params.dim, dtype=np.float32)).astype(np.float64)
    assert stdev(samples) ** 2 == pytest.approx(2 * float((dense**2).sum()), rel=0.35)
    assert abs(fmean(samples) - np.trace(dense)) < 3 * stdev(samples) / math.sqrt(150)


@backprop
def test_the_hessian_of_a_fresh_lora_adapter_is_its_gradient_once_per_rank():
    """What docs/rank.md says of the start: no A block, each singular value of the A-B block as often as the rank."""
    loaded, bench = bench_of("llama", "lora", spread=0.0, rank=2)
    apply = product(plain_loss(loaded, bench.adapter, params=bench.params, batches=BATCHES), matrix="hessian")
    dense = apply(np.eye(bench.params.dim, dtype=np.float32))
    is_a = np.concatenate([np.full(tensor.numel(), "lora_A" in name) for name, tensor in bench.params])
    size = np.abs(dense).max()
    assert np.abs(dense[np.ix_(is_a, is_a)]).max() < 1e-5 * size
    found = np.linalg.svd(dense[np.ix_(is_a, ~is_a)].astype(np.float64), compute_uv=False)
    assert found[0] > 1e-2 * size
    assert found[0:40:2] == pytest.approx(found[1:40:2], abs=1e-4 * found[0])
    assert found[0] > 1.01 * found[2]
