"""Lanes: a packed forward of many settings equals plain Hugging Face and PEFT forwards of each."""

import copy
import math
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from tiny_models import Row, answers, candidates, multiple_choice, tiny

from fedmezo.errors import ModelError
from fedmezo.fl.algorithm import Point
from fedmezo.models.adapters import full_adapter, load_adapter, lora_adapter, merge, save_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.models.engine import Engine, Unit
from fedmezo.models.lanes import Lane, lay_out
from fedmezo.models.loss import Piece, label_scores
from fedmezo.zo.noise import noise, round_coefficient
from fedmezo.zo.params import Params

# PEFT's own warnings, when the reference model is built with it.
pytestmark = [
    pytest.mark.usefixtures("both_libraries", "one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

TOLERANCE = 1e-6  # relative, float32; the largest difference seen is 3.1e-7

PACKED = ["llama", "gpt2", "opt", "qwen2", "neox", "qwen3", "granite"]
ALONE = ["gemma2", "bloom"]
TARGETS = {"granite": ["q_proj", "v_proj"], "mamba": ["in_proj"], "mixtral": ["q_proj", "v_proj"]}


def config(name, **options):
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(name), **options)


def adapter_of(loaded, kind):
    return full_adapter(loaded.model) if kind == "full" else lora_adapter(loaded.model, config(loaded.source))


def start_of(loaded, adapter):
    """LoRA matrices with a B that is not zero; for full, a copy of the weights."""
    params = adapter.start(loaded.model, seed=0).clone()
    generator = torch.Generator().manual_seed(11)
    if adapter.kind == "lora":
        for _, tensor in params:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return params


def batches(client, round, step):
    return (answers(3, seed=client), candidates(2, seed=client), multiple_choice(2, seed=client))[round]


def bench_of(loaded, kind, **options):
    adapter = adapter_of(loaded, kind)
    return ModelBench(loaded, adapter, params=start_of(loaded, adapter), **{"batches": batches, **options})


def moved(point, *, law="gaussian"):
    offset = round_coefficient(point.offset)
    return {n: t + offset * noise(point.seed, n, size=t.numel(), law=law).view(t.shape) for n, t in point.params}


def plain_model(loaded, kind, tensors, *, attention="sdpa"):
    """The model a user of transformers and peft would have with these values."""
    model = copy.deepcopy(loaded.model)
    model.set_attn_implementation(attention)
    if kind == "lora":
        model = get_peft_model(model, config(loaded.source)).eval()
        set_peft_model_state_dict(model, tensors)
        return model
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(tensors[name])
    return model


def plain_loss(model, batch):
    total, weight = 0.0, 0
    for example in batch:
        scores = []
        for row in example.rows:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
            spans = logits[row.start - 1 : -1].log_softmax(-1)
            scores.append(spans[range(len(spans)), list(row.ids[row.start :])])
        if example.options:
            total -= logits[-2, list(example.options)].log_softmax(0)[example.answer].item()
            weight += 1
        elif len(scores) == 1:
            total -= scores[0].sum().item()
            weight += len(scores[0])
        else:
            total -= torch.stack([s.mean() for s in scores]).log_softmax(0)[example.answer].item()
            weight += 1
    return total / weight


def points_of(bench, *, offsets=(0.01, -0.01, 0.0), clients=(1, 2), rounds=(0, 1, 2)):
    return [Point(bench.params, 70 + c, o, c, r, 0) for c in clients for r in rounds for o in offsets]


def assert_close(got, wanted, *, tolerance=TOLERANCE):
    assert got == [pytest.approx(value, rel=tolerance) for value in wanted]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", PACKED + ALONE)
def test_lanes_equal_plain_forwards(name, kind):
    loaded = tiny(name)
    attention = "eager" if name == "gemma2" else "sdpa"
    bench = bench_of(loaded, kind)
    points = points_of(bench)
    got = bench.losses(points)
    assert bench.engine.packs == (name in PACKED), bench.engine.why
    wanted = []
    for point in points:
        model = plain_model(loaded, kind, moved(point), attention=attention)
        wanted.append(plain_loss(model, batches(point.client, point.round, 0)))
    assert_close(got, wanted)
    assert len({round(value, 4) for value in got}) > 6  # the lanes and batches differ by more than the tolerance


def test_one_packed_forward_does_it_all():
    bench = bench_of(tiny("llama"), "lora")
    before = bench.engine.passes
    bench.losses(points_of(bench))
    assert bench.engine.passes == before + 1


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_the_law_is_the_benchs(law):
    loaded = tiny("llama")
    bench = bench_of(loaded, "lora", law=law)
    point = Point(bench.params, 3, 0.02, 1, 0, 0)
    wanted = plain_loss(plain_model(loaded, "lora", moved(point, law=law)), batches(1, 0, 0))
    assert_close(bench.losses([point]), [wanted])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_lanes_per_forward_change_rounding_only(name, kind):
    loaded = tiny(name)
    points = points_of(bench_of(loaded, kind))
    together = bench_of(loaded, kind).losses(points)
    for lanes in (1, 2, 5):
        bench = bench_of(loaded, kind, lanes=lanes)
        before = bench.engine.passes
        assert_close(bench.losses(points), together, tolerance=2e-7)
        assert bench.engine.passes - before >= math.ceil(len(points) / lanes)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_order_of_points_does_not_matter_to_the_bit(kind):
    bench = bench_of(tiny("llama"), kind)
    points = points_of(bench)
    wanted = bench.losses(points)
    order = random.Random(1).sample(range(len(points)), len(points))
    assert bench.losses([points[at] for at in order]) == [wanted[at] for at in order]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_losses_leave_parameters_and_model_bit_for_bit(kind):
    loaded = tiny("qwen2")
    bench = bench_of(loaded, kind)
    before = bench.params.digest(), {n: t.clone() for n, t in loaded.model.state_dict().items()}
    bench.losses(points_of(bench))
    bench.evaluate(answers(4))
    assert bench.params.digest() == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in loaded.model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in loaded.model.modules())


def test_private_copies_are_evaluated_each_at_its_own_place():
    loaded = tiny("llama")
    bench = bench_of(loaded, "lora")
    with bench.open(2) as (one, other):
        for _, tensor in other:
            tensor.mul_(1.5)
        points = [Point(params, 9, offset, 1, 0, 0) for params in (one, other) for offset in (0.01, -0.01)]
        wanted = [plain_loss(plain_model(loaded, "lora", moved(point)), batches(1, 0, 0)) for point in points]
        assert_close(bench.losses(points), wanted)


def test_sliding_window_packs_short_rows_and_runs_long_ones_alone():
    loaded = tiny("mistral")
    engine = bench_of(loaded, "lora").engine
    assert (engine.packs, engine.local) == (True, 8)
    for sizes, passes in (((7, 8, 9), 1), ((7, 8, 19), 3)):
        batch = answers(3, sizes=sizes)
        bench = bench_of(loaded, "lora", batches=lambda *_, batch=batch: batch)
        before = bench.engine.passes
        point = Point(bench.params, 4, 0.01, 0, 0, 0)
        wanted = plain_loss(plain_model(loaded, "lora", moved(point)), batch)
        assert_close(bench.losses([point]), [wanted])
        assert bench.engine.passes - before == passes


@pytest.mark.parametrize("name", ["mamba", "mixtral"])
def test_lora_on_other_architectures_equals_peft(name):
    loaded = tiny(name)
    bench = bench_of(loaded, "lora")
    attention = loaded.model.config._attn_implementation if name == "mamba" else "sdpa"
    points = points_of(bench, clients=(1,))
    wanted = [
        plain_loss(plain_model(loaded, "lora", moved(p), attention=attention), batches(p.client, p.round, 0))
        for p in points
    ]
    assert_close(bench.losses(points), wanted)


@pytest.mark.parametrize("name", ["mamba", "mixtral"])
def test_full_training_is_refused_where_lanes_cannot_be_had(name):
    loaded = tiny(name)
    with pytest.raises(ModelError, match=type(loaded.model).__name__):
        ModelBench(loaded, full_adapter(loaded.model), batches=batches)


def test_half_precision_lora_equals_peft():
    loaded = tiny("llama", dtype=torch.bfloat16)
    bench = bench_of(loaded, "lora")
    assert bench.engine.packs and all(tensor.dtype == torch.float32 for _, tensor in bench.params)
    points = points_of(bench, rounds=(0,))
    wanted = [plain_loss(plain_model(loaded, "lora", moved(p)), batches(p.client, p.round, 0)) for p in points]
    assert_close(bench.losses(points), wanted, tolerance=2e-2)


def test_lora_on_the_output_embeddings_equals_peft(monkeypatch):
    monkeypatch.setitem(TARGETS, "llama", ["q_proj", "lm_head"])
    loaded = tiny("llama")
    bench = bench_of(loaded, "lora")
    points = points_of(bench, rounds=(0,))
    wanted = [plain_loss(plain_model(loaded, "lora", moved(p)), batches(p.client, p.round, 0)) for p in points]
    assert_close(bench.losses(points), wanted)


def test_more_label_rows_than_a_chunk(monkeypatch):
    batch = answers(40, sizes=(30, 31))
    wanted = bench_of(tiny("gpt2"), "lora", batches=lambda *_: batch)
    point = Point(wanted.params, 3, 0.01, 0, 0, 0)
    monkeypatch.setattr("fedmezo.models.engine.CHUNK", 7)
    chunked = bench_of(tiny("gpt2"), "lora", batches=lambda *_: batch)
    assert_close(chunked.losses([point]), wanted.losses([point]), tolerance=2e-7)


def test_head_in_blocks_of_words(monkeypatch):
    loaded = tiny("qwen2")
    whole = bench_of(loaded, "full")
    wanted = whole.losses(points_of(whole))
    monkeypatch.setattr("fedmezo.zo.lazy.BLOCK", 10)
    assert_close(bench_of(loaded, "full").losses(points_of(whole)), wanted, tolerance=2e-7)


@pytest.mark.parametrize("cut", [(5, 9), (2, 4), (1, 9)])
def test_pieces_of_logits_in_any_cut_give_the_same_scores(cut):
    logits = 5 * torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    rows, options = [Row((1, 4, 8, 0), 1), Row((3, 3, 2, 5), 2)], [(), ()]
    options[1] = (5, 1)
    pieces = [
        Piece(a, b, logits[a : a + cut[0], b : b + cut[1]].clone())
        for b in range(0, 9, cut[1])
        for a in range(0, 5, cut[0])
    ]
    first, second = label_scores(pieces, rows=rows, options=options, device=logits.device)
    losses = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([4, 8, 0, 2, 5]), reduction="none")
    assert first.nll == pytest.approx(losses[:3].sum().item(), rel=1e-6)
    assert second.nll == pytest.approx(losses[3:].sum().item(), rel=1e-6)
    assert second.options == tuple(logits[4, [5, 1]].tolist())
    assert first.hits + second.hits == (logits.argmax(1) == torch.tensor([4, 8, 0, 2, 5])).sum()


def test_loss_that_is_not_finite_passes_through():
    bench = bench_of(tiny("llama"), "lora")
    broken = bench.params.clone()
    for _, tensor in broken:
        tensor.fill_(1e30)
    sound, bad = bench.losses([Point(bench.params, 1, 0.0, 1, 0, 0), Point(broken, 1, 0.0, 1, 0, 0)])
    assert math.isfinite(sound) and not math.isfinite(bad)


def test_lay_out_covers_every_lane_once():
    spans = lay_out([4] * 20 + [0, 3])
    assert [(s.first, s.count, s.start, s.tokens) for s in spans] == [(0, 16, 0, 4), (16, 4, 64, 4), (21, 1, 80, 3)]


def test_names_and_shapes_are_pefts(tmp_path):
    loaded = tiny("gpt2")
    adapter = lora_adapter(loaded.model, config("gpt2"))
    reference = get_peft_model(copy.deepcopy(loaded.model), config("gpt2", fan_in_fan_out=True))
    reference.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    theirs = load_file(tmp_path / "adapter_model.safetensors")
    assert dict(adapter.shapes) == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("rslora", [True, False])
def test_saved_adapter_loads_in_plain_peft_and_here(name, rslora, tmp_path):
    loaded = tiny(name)
    adapter = lora_adapter(loaded.model, config(name, use_rslora=rslora))
    params = start_of(loaded, adapter)
    save_adapter(tmp_path / "adapter", params, adapter=adapter, base="some/model")
    bench = ModelBench(loaded, adapter, params=params, batches=batches)
    got = bench.losses([Point(bench.params, 0, 0.0, 1, 0, 0)])
    again, values = load_adapter(tmp_path / "adapter", loaded.model)
    assert values.digest() == params.digest() and again.sites == adapter.sites
    base = copy.deepcopy(loaded.model)
    base.set_attn_implementation("sdpa")
    assert_close(got, [plain_loss(PeftModel.from_pretrained(base, tmp_path / "adapter"), batches(1, 0, 0))])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_merged_model_equals_the_lane(name, kind):
    loaded = tiny(name)
    bench = bench_of(loaded, kind)
    point = Point(bench.params, 5, 0.05, 1, 0, 0)
    params = Params(moved(point))
    model = copy.deepcopy(loaded.model)
    model.load_state_dict(merge(loaded.model, bench.adapter, params=params))
    model.set_attn_implementation("sdpa")
    assert_close(bench.losses([point]), [plain_loss(model, batches(1, 0, 0))])


def test_merge_refuses_a_target_tied_to_another_module(monkeypatch):
    monkeypatch.setitem(TARGETS, "qwen2", ["lm_head"])
    loaded = tiny("qwen2")
    bench = bench_of(loaded, "lora")
    with pytest.raises(ModelError, match="shares its weight"):
        merge(loaded.model, bench.adapter, params=bench.params)


def test_start_is_the_same_everywhere_and_pefts_law():
    loaded = tiny("llama")
    adapter = lora_adapter(loaded.model, config("llama"))
    one, two, other = (adapter.start(loaded.model, seed=seed) for seed in (1, 1, 2))
    assert one.digest() == two.digest() != other.digest()
    for site in adapter.sites:
        assert not one[site.b].any()
        bound = 1 / math.sqrt(one[site.a].shape[1])
        assert one[site.a].abs().max() < bound and one[site.a].std() == pytest.approx(bound / math.sqrt(3), rel=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_lora_settings_we_would_not_honour_are_refused(options):
    with pytest.raises(ModelError, match=next(iter(options))):
        lora_adapter(tiny("llama").model, config("llama", **options))


@pytest.mark.parametrize("targets", [["nowhere"], ["embed_tokens"]])
def test_impossible_targets_are_refused(targets):
    with pytest.raises(ModelError, match=targets[0]):
        lora_adapter(tiny("llama").model, LoraConfig(target_modules=targets))


def test_foreign_parameters_are_refused():
    loaded = tiny("llama")
    adapter = lora_adapter(loaded.model, config("llama"))
    wrong = Params({name: torch.zeros(3) for name, _ in adapter.start(loaded.model, seed=0)})
    with pytest.raises(ModelError, match="another adapter"):
        ModelBench(loaded, adapter, params=wrong)


def test_a_model_that_wants_gradients_or_trains_is_refused():
    loaded = tiny("llama")
    adapter = lora_adapter(loaded.model, config("llama"))
    params = adapter.start(loaded.model, seed=0)
    loaded.model.train()
    with pytest.raises(ModelError, match="training mode"):
        Engine(loaded.model, adapter, params=params, law="gaussian")
    loaded.model.eval().lm_head.requires_grad_()
    with pytest.raises(ModelError, match="lm_head"):
        Engine(loaded.model, adapter, params=params, law="gaussian")


def test_scores_carry_no_graph_and_the_model_stays_usable():
    loaded = tiny("llama")
    bench = bench_of(loaded, "lora")
    ids = torch.tensor([[4, 5, 6, 7]])
    wanted = tiny("llama").model(input_ids=ids).logits
    scores = bench.engine.score([Lane(bench.params)], [Unit(0, Row((4, 5, 6), 1))])
    assert isinstance(scores[0].nll, float)
    assert torch.equal(loaded.model(input_ids=ids).logits, wanted)
    padded = loaded.model(input_ids=torch.tensor([[0, 4, 5, 6, 7]]), attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    assert torch.allclose(padded.logits[:, 1:], wanted, atol=1e-4)
