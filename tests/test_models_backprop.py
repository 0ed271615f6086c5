"""Backpropagation through the lanes equals plain Hugging Face and PEFT autograd, and leaves nothing behind."""

import math
import threading
from contextvars import ContextVar
from dataclasses import replace

import pytest
import test_models_lanes
import torch
from test_models_lanes import adapter_of, bench_of, plain_model
from tiny_models import VOCABULARY, answers, candidates, multiple_choice, tiny
from torch.autograd.graph import saved_tensors_hooks

from fedmezo.errors import DataError, ModelError
from fedmezo.fl.algorithm import Point
from fedmezo.models.backprop import recomputed, recomputing
from fedmezo.models.bench import ModelBench
from fedmezo.models.loss import RowScore, loss_weight, tally
from fedmezo.zo.noise import noise
from fedmezo.zo.params import Params

# PEFT's own warnings, when the reference model is built with it.
pytestmark = [
    pytest.mark.usefixtures("both_libraries", "one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

BATCHES = (answers(3, seed=1), candidates(2, seed=1), multiple_choice(2, seed=1))
NAMES = ["llama", "gpt2", "opt", "qwen2", "neox", "granite", "mistral", "gemma2", "bloom"]


def bench(loaded, kind="lora", *, batches=BATCHES, **options):
    return bench_of(loaded, kind, batches=lambda client, round, step: batches[round], **options)


def mixed():
    """Every kind of example in one batch, with different numbers of options, one of them after several labels."""
    four, two, late = multiple_choice(3, seed=2)
    two = replace(two, options=(7, 11), answer=1)
    late = replace(late, rows=(replace(late.rows[0], start=late.rows[0].start - 2),), options=(4, 8, 15))
    return (*answers(2, seed=4), four, *candidates(1, seed=4), two, late)


def at(bench, round=0, **options):
    return Point(
        **({"params": bench.params, "seed": 1, "offset": 0.0, "client": 0, "round": round, "step": 0} | options)
    )


def plain_loss(model, batch):
    """The batch loss of test_models_lanes.py, with a graph."""
    losses, weight = [], 0
    for example in batch:
        scores = []
        for row in example.rows:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
            spans = logits[row.start - 1 : -1].log_softmax(-1)
            scores.append(spans[range(len(spans)), list(row.ids[row.start :])])
        if example.options:
            losses.append(-logits[-2, list(example.options)].log_softmax(0)[example.answer])
        elif len(scores) == 1:
            losses.append(-scores[0].sum())
        else:
            losses.append(-torch.stack([s.mean() for s in scores]).log_softmax(0)[example.answer])
        weight += len(scores[0]) if len(scores) == 1 and not example.options else 1
    return sum(losses) / weight


def plain_gradient(loaded, bench, batch):
    """The loss and gradient that a user of transformers and peft would get; names are ours."""
    name = loaded.source
    attention = "eager" if name in ("gemma2", "mamba") else "sdpa"
    model = plain_model(loaded, bench.adapter.kind, dict(bench.params), attention=attention)
    leaves = {}
    for name, tensor in model.named_parameters():
        ours = name.replace(".default.", ".")
        tensor.requires_grad_(ours in bench.params.names)
        leaves |= {ours: tensor} if tensor.requires_grad else {}
    assert set(leaves) == set(bench.params.names)
    loss = plain_loss(model, batch)
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def distance(got, wanted):
    """The largest |difference| of any tensor, relative to the whole gradient's norm."""
    assert got.keys() == wanted.keys()
    norm = math.sqrt(sum(float(t.double().pow(2).sum()) for t in wanted.values()))
    return max(float((got[name].double() - wanted[name].double()).norm()) for name in wanted) / norm


def saved(bench, round=0):
    """The tensors autograd keeps between forward and backward, by storage; parameters and weights are not counted."""
    own = {t.data_ptr() for _, t in bench.params} | {t.data_ptr() for t in bench._loaded.model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tuple(tensor.shape), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        bench.gradient(at(bench, round))
    return sum(size for size, _, _ in kept.values()), [shape for _, shape, _ in kept.values()]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_plain_autograd(name, kind):
    loaded = tiny(name)
    mine = bench(loaded, kind)
    for round, batch in enumerate(BATCHES):
        loss, got = mine.gradient(at(mine, round))
        wanted_loss, wanted = plain_gradient(loaded, mine, batch)
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert distance(got, wanted) < 2e-6
        assert all(
            t.dtype == torch.float32 and not t.requires_grad and t.shape == mine.params[n].shape for n, t in got.items()
        )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradient_of_a_mixed_batch_equals_plain_autograd(kind):
    loaded = tiny("qwen2")
    mine = bench(loaded, kind, batches=[mixed()])
    loss, got = mine.gradient(at(mine))
    wanted_loss, wanted = plain_gradient(loaded, mine, mixed())
    assert loss == pytest.approx(wanted_loss, rel=1e-6) == pytest.approx(mine.losses([at(mine)])[0], rel=1e-6)
    assert distance(got, wanted) < 2e-6


@pytest.mark.parametrize("name", ["mamba", "mixtral"])
def test_lora_gradient_on_other_architectures_equals_peft(name):
    loaded = tiny(name)
    mine = bench(loaded)
    _, got = mine.gradient(at(mine))
    assert distance(got, plain_gradient(loaded, mine, BATCHES[0])[1]) < 2e-6


def test_lora_gradient_on_the_output_embeddings_equals_peft(monkeypatch):
    monkeypatch.setitem(test_models_lanes.TARGETS, "llama", ["q_proj", "lm_head"])
    loaded = tiny("llama")
    mine = bench(loaded)
    _, got = mine.gradient(at(mine))
    assert distance(got, plain_gradient(loaded, mine, BATCHES[0])[1]) < 2e-6


@pytest.mark.parametrize("round", [0, 1, 2])
def test_half_precision_gradient_equals_pefts(round):
    loaded = tiny("llama", dtype=torch.bfloat16)
    mine = bench(loaded)
    loss, got = mine.gradient(at(mine, round))
    wanted_loss, wanted = plain_gradient(loaded, mine, BATCHES[round])
    assert loss == pytest.approx(wanted_loss, rel=2e-2)
    # A bfloat16 activation has 8 bits, so that gradients of any two orders of summation agree to a per cent or so.
    assert distance(got, wanted) < 4e-2
    assert all(tensor.dtype == torch.float32 for tensor in got.values())


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_slope_of_two_losses_is_the_gradient_along_the_direction(name, kind):
    mine = bench(tiny(name), kind)
    mu = 1e-3 if kind == "lora" else 2e-4
    for round in range(3):
        _, gradient = mine.gradient(at(mine, round))
        norm = math.sqrt(sum(float(t.double().pow(2).sum()) for t in gradient.values()))
        for seed in range(4):
            above, below = mine.losses([at(mine, round, seed=seed, offset=sign * mu) for sign in (1, -1)])
            along = sum(
                float((t.double() * noise(seed, n, size=t.numel()).view(t.shape)).sum()) for n, t in gradient.items()
            )
            assert (above - below) / (2 * mu) == pytest.approx(along, abs=1e-3 * norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("round", [0, 1, 2])
def test_loss_is_the_benchs(round, dtype):
    mine = bench(tiny("qwen2", dtype=dtype))
    assert mine.gradient(at(mine, round))[0] == pytest.approx(mine.losses([at(mine, round)])[0], rel=1e-6)


def test_gradient_is_taken_where_the_point_is():
    mine = bench(tiny("llama"))
    with mine.open(1) as (copy,):
        for _, tensor in copy:
            tensor.mul_(1.5)
        loss, moved = mine.gradient(at(mine, params=copy))
        assert loss == pytest.approx(mine.losses([at(mine, params=copy)])[0], rel=1e-6)
    assert distance(moved, mine.gradient(at(mine))[1]) > 0.05


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "bloom"])
def test_checkpointing_changes_nothing_but_memory(name, kind):
    plain, again = bench(tiny(name), kind), bench(tiny(name), kind, checkpointing=True)
    for round in range(3):
        (loss, wanted), (same, got) = plain.gradient(at(plain, round)), again.gradient(at(again, round))
        assert same == pytest.approx(loss, rel=1e-7) and distance(got, wanted) < 1e-6
        assert saved(again, round)[0] < 0.5 * saved(plain, round)[0]


def test_logits_are_never_kept():
    for kind in ("lora", "full"):
        shapes = saved(bench(tiny("llama"), kind))[1]
        assert shapes and not any(VOCABULARY in shape for shape in shapes)


def test_more_label_rows_than_a_chunk(monkeypatch):
    batch = answers(12, sizes=(30, 31))
    whole = bench(tiny("llama"), "full", batches=[batch])
    wanted = whole.gradient(at(whole))[1]
    monkeypatch.setattr("fedmezo.models.engine.CHUNK", 7)
    assert distance(whole.gradient(at(whole))[1], wanted) < 1e-6


@pytest.mark.parametrize("round", [0, 1, 2])
def test_a_batch_over_the_budget_goes_in_parts_with_the_same_sum(round):
    batches = answers(5), candidates(3), multiple_choice(5)
    whole, parts = bench(tiny("llama"), batches=batches), bench(tiny("llama"), batches=batches)
    parts._budget = 40
    before = parts.engine.passes, whole.engine.passes
    (loss, wanted), (same, got) = whole.gradient(at(whole, round)), parts.gradient(at(parts, round))
    assert same == pytest.approx(loss, rel=1e-7) and distance(got, wanted) < 1e-6
    assert (parts.engine.passes - before[0] > 1, whole.engine.passes - before[1]) == (True, 1)


def most_kept(bench):
    """The largest number of tensors autograd keeps at any one time."""
    counts = [0]

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            counts.append(counts[-1] + 1)

        def __del__(self):
            counts.append(counts[-1] - 1)

    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        bench.gradient(at(bench))
    assert counts[-1] == 0
    return max(counts)


def test_memory_does_not_grow_with_the_batch():
    one, five = (bench(tiny("llama"), batches=[answers(count)]) for count in (1, 5))
    five._budget = 1
    assert most_kept(five) < 1.2 * most_kept(one)
    assert five.engine.passes - one.engine.passes == 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nothing_is_left_behind(kind, checkpointing):
    loaded = tiny("qwen2")
    mine = bench(loaded, kind, checkpointing=checkpointing)
    bits, same = mine.params.digest(), mine.losses([at(mine, offset=0.01)])
    _, gradient = mine.gradient(at(mine))
    tensors = [*loaded.model.parameters(), *dict(mine.params).values()]
    assert not any(t.requires_grad or t.grad is not None for t in tensors)
    assert all(t.grad_fn is None and t.grad is None for t in gradient.values())
    assert not any("forward" in module.__dict__ or module.training for module in loaded.model.modules())
    assert mine.params.digest() == bits and mine.losses([at(mine, offset=0.01)]) == same


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_error_on_the_way_leaves_nothing_behind(checkpointing, monkeypatch):
    loaded = tiny("llama")
    mine = bench(loaded, checkpointing=checkpointing)
    wanted = mine.gradient(at(mine))[1]
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("fedmezo.models.backprop._loss", lambda *_: {}["missing"])
        mine.gradient(at(mine))
    assert not any("forward" in module.__dict__ for module in loaded.model.modules())
    assert distance(mine.gradient(at(mine))[1], wanted) == 0


def test_only_gradients_leave_inference_mode_and_dropout_stays_off_in_both():
    loaded, modes = tiny("gpt2"), []
    assert loaded.model.config.resid_pdrop > 0
    mine = bench(loaded, checkpointing=True)
    layer = loaded.model.transformer.h[0]
    layer.mlp.register_forward_pre_hook(
        lambda module, *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), module.training))
    )
    mine.losses([at(mine)])
    mine.evaluate(answers(2))
    assert set(modes) == {(True, False, False)}
    modes.clear()
    with torch.no_grad():
        mine.gradient(at(mine))
    assert set(modes) == {(False, True, False)} and len(modes) == 2  # once forth, once again on the way back


def test_work_is_counted():
    for checkpointing, passes in ((False, 3), (True, 4)):
        mine = bench(tiny("llama"), checkpointing=checkpointing)
        mine.gradient(at(mine))
        assert (mine.forwards, mine.tokens) == (passes, sum(len(example.rows[0].ids) - 1 for example in BATCHES[0]))


def test_what_no_token_touches_has_gradient_zero():
    mine = bench(tiny("opt"), "full")
    _, gradient = mine.gradient(at(mine, params=Params({**dict(mine.params), "unused": torch.ones(3)})))
    assert torch.equal(gradient["unused"], torch.zeros(3))
    positions = next(tensor for name, tensor in gradient.items() if "embed_positions" in name)
    assert not positions[40:].any() and positions[2:].any()


def test_a_loss_that_is_not_finite_is_returned():
    mine = bench(tiny("llama"))
    with mine.open(1) as (copy,):
        for _, tensor in copy:
            tensor.fill_(1e30)
        for round in range(3):
            loss, gradient = mine.gradient(at(mine, round, params=copy))
            assert not math.isfinite(loss) and not all(tensor.isfinite().all() for tensor in gradient.values())


def test_what_cannot_be_differentiated_is_said():
    mine = bench(tiny("llama"), batches=[(), (multiple_choice(1)[0],)])
    with pytest.raises(ModelError, match="got offset"):
        mine.gradient(at(mine, 1, offset=0.01))
    with pytest.raises(DataError, match="no label token"):
        mine.gradient(at(mine, 0))
    with pytest.raises(DataError, match="no training data"):
        ModelBench(tiny("llama"), adapter_of(tiny("llama"), "lora")).gradient(at(mine))


def test_checkpointing_a_model_without_marked_layers_is_refused():
    with pytest.raises(ModelError, match="gradient_checkpointing"), recomputing(torch.nn.Linear(2, 2)):
        pass


def test_recomputing_sees_the_context_of_the_forward_pass_from_any_thread():
    """An accelerator's backward pass runs in a thread of autograd's own, where context variables are unset."""
    place, seen = ContextVar("place", default="nowhere"), []

    def square(x):
        seen.append(place.get())
        return (x * x).sin()

    x = torch.ones(3, requires_grad=True)
    token = place.set("here")
    y = recomputed(square)(x).sum()
    place.reset(token)
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    assert seen == ["here", "here"]
    assert torch.allclose(x.grad, 2 * torch.cos(torch.ones(3)))


def test_weight_of_an_example_is_its_tallys():
    for example in (*answers(4), *candidates(2), *mixed()):
        scores = [
            RowScore(1.0, len(row.ids) - row.start, options=(1.0,) * len(example.options)) for row in example.rows
        ]
        assert loss_weight(example) == tally(example, scores).weight


def test_a_lane_without_offset_is_the_limit_of_one_with():
    mine = bench(tiny("llama"), "full")
    own, near = mine.losses([at(mine)]), mine.losses([at(mine, offset=1e-30)])
    assert own == pytest.approx(near, rel=1e-7)
