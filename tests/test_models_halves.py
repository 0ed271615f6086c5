"""Training every weight of a 16-bit model: lanes, updates and rounding, against the model perturbed by hand."""

import copy

import pytest
import torch
from tiny_models import answers, tiny

from fedmezo.fl.algorithm import Point, Task
from fedmezo.fl.walk import take_walks
from fedmezo.models.adapters import full_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_

DTYPES = [torch.float32, torch.bfloat16]


def batches(client, round, step):
    return answers(2, seed=step)


def bench_of(name, dtype):
    loaded = tiny(name, dtype=dtype)
    return ModelBench(loaded, full_adapter(loaded.model), batches=batches)


def by_hand(bench, params, step):
    """The plain model's loss at `params`, by its own forward with all logits."""
    model = copy.deepcopy(bench.engine.model)
    model.set_attn_implementation("eager")
    model.load_state_dict(dict(params), strict=False)
    total, count = 0.0, 0
    with torch.inference_mode():
        for example in batches(0, 0, step):
            (row,) = example.rows
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1].double()
            total -= float(logits.log_softmax(-1).gather(1, torch.tensor(row.ids[row.start :])[:, None]).sum())
            count += len(row.ids) - row.start
    return total / count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "neox"])
def test_lanes_after_owed_steps_are_the_model_stepped_by_hand(name, dtype):
    bench = bench_of(name, dtype)
    steps = [(31, 0.004), (32, -0.002)]
    by = Params({key: tensor.clone() for key, tensor in bench.params})
    for seed, coefficient in steps:
        step_(by, seed, coefficient=coefficient, law="gaussian")
    with bench.open(1) as (mine,):
        for seed, coefficient in steps:
            step_(mine, seed, coefficient=coefficient, law="gaussian")
        points = [Point(mine, 9, offset, 0, 0, 0) for offset in (0.01, -0.01)]
        above, below = bench.losses(points)
    for got, sign in ((above, 1), (below, -1)):
        there = by.clone()
        for key, tensor in there:
            wide = tensor.float()
            step_(Params({key: wide}), 9, coefficient=sign * 0.01, law="gaussian")
            tensor.copy_(wide)
        wanted = by_hand(bench, there, 0)
        assert got == pytest.approx(wanted, rel=2e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_thousand_steps_at_rate_zero_change_no_bit(dtype):
    loaded = tiny("llama", dtype=dtype)
    one = answers(1, sizes=(4,))
    bench = ModelBench(loaded, full_adapter(loaded.model), batches=lambda *_: one)
    before = bench.params.digest()
    with bench.open(1) as (mine,):
        for step in range(1000):
            if step % 50 == 0:
                bench.losses([Point(mine, step, offset, 0, 0, step) for offset in (1e-3, -1e-3)])
            step_(mine, step, coefficient=0.0, law="rademacher")
        assert mine.digest() == before
    assert bench.params.digest() == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_walk_leaves_the_shared_model_alone_and_moves(dtype):
    bench = bench_of("llama", dtype)
    before = bench.params.digest()
    (reply,) = take_walks([Task(0, 0, 5, 1e-3, 1e-2, 4)], bench)
    (again,) = take_walks([Task(0, 0, 5, 1e-3, 1e-2, 4)], bench)
    (still,) = take_walks([Task(0, 0, 5, 0.0, 1e-2, 4)], bench)
    assert bench.params.digest() == before
    assert reply.slopes == again.slopes and reply.slopes[0] == still.slopes[0]
    assert reply.slopes[1:] != still.slopes[1:]


def test_untied_embeddings_are_looked_up_row_by_row():
    """Only rows of the batch are made, and rows that nobody looked at for some steps catch up."""
    bench = bench_of("llama", torch.float32)
    name = next(key for key, _ in bench.params if "embed" in key)
    with bench.open(1) as (mine,):
        for step in range(3):
            bench.losses([Point(mine, step, offset, 0, 0, step) for offset in (1e-2, -1e-2)])
            step_(mine, step, coefficient=0.01, law="gaussian")
        assert len(mine.owed(name, 0)) == 3
        wanted = Params({name: bench.params[name].clone()})
        for step in range(3):
            step_(wanted, step, coefficient=0.01, law="gaussian")
        assert torch.equal(mine[name], wanted[name]) and not mine.owed(name, 0)


def test_large_layers_go_block_by_block_with_the_same_losses(monkeypatch):
    """Both sides of a direction share their noise however large a layer is, and scratch holds a block of it."""
    whole = bench_of("neox", torch.float32)
    points = [Point(whole.params, 9, offset, 0, 0, 0) for offset in (0.01, -0.01)]
    wanted = whole.losses(points)
    monkeypatch.setattr("fedmezo.zo.lazy.BLOCK", 24)
    cut = bench_of("neox", torch.float32)
    with cut.open(1) as (mine,):
        step_(mine, 5, coefficient=0.0, law="gaussian")
        found = cut.losses([Point(mine, 9, offset, 0, 0, 0) for offset in (0.01, -0.01)])
    assert found == pytest.approx(wanted, rel=1e-6)
    largest = max(tensor.numel() for tensor in cut.engine.modules._scratch.buffers.values())
    width = max(tensor.shape[-1] for _, tensor in cut.params)
    assert largest <= 2 * 24 * width
