"""The bench: private copies, evaluation, generation, and what it refuses."""

import dataclasses
import math
import random
import tempfile

import pytest
import torch
from tiny_models import Example, Row, answers, candidates, multiple_choice, tiny

from fedmezo.errors import DataError, ModelError, RunError
from fedmezo.fl.algorithm import Point, Task
from fedmezo.fl.walk import take_walks
from fedmezo.models.adapters import full_adapter, make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.models.schedule import token_budget
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import lane_, lanes_, step_

pytestmark = pytest.mark.usefixtures("one_thread")


def bench_of(name="llama", kind="lora", **options):
    loaded = tiny(name)
    adapter = make_adapter(loaded.model, kind=kind, rank=4)
    params = adapter.start(loaded.model, seed=0).clone()
    if kind == "lora":
        for site in adapter.sites:
            params[site.b].normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    chosen = {"batches": lambda client, round, step: answers(2, seed=client + step), "params": params} | options
    return ModelBench(loaded, adapter, **chosen)


def point(bench, **options):
    return Point(**({"params": bench.params, "seed": 1, "offset": 0.0, "client": 0, "round": 0, "step": 0} | options))


def test_private_lora_copies_are_independent():
    bench = bench_of()
    before = bench.params.digest()
    with bench.open(3) as copies:
        assert {copy.digest() for copy in copies} == {before}
        step_(copies[1], 5, coefficient=0.1, law="gaussian")
        assert copies[0].digest() == copies[2].digest() == bench.params.digest() == before != copies[1].digest()


def test_full_lends_the_weights_themselves_and_puts_every_bit_back():
    bench = bench_of("qwen2", "full")
    before, same = bench.params.digest(), bench.losses([point(bench)])
    with bench.open(1) as (copy,):
        step_(copy, 5, coefficient=0.01, law="gaussian")
        assert copy.digest() != before
        assert bench.losses([point(bench, params=copy)]) != same
    assert bench.params.digest() == before and bench.losses([point(bench)]) == same


def test_full_puts_every_bit_back_after_an_error():
    bench = bench_of("gpt2", "full")
    before = bench.params.digest()
    with pytest.raises(KeyError), bench.open(1) as (copy,):
        step_(copy, 5, coefficient=0.01, law="gaussian")
        raise KeyError
    assert bench.params.digest() == before


def test_full_without_room_for_the_weights_says_so(monkeypatch):
    def refuse():
        raise OSError(28, "No space left on device")

    bench = bench_of("llama", "full")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunError, match="TMPDIR"), bench.open(1):
        pass


def test_capacity_is_kept():
    assert bench_of(kind="full").capacity == 1
    assert bench_of(capacity=3).capacity == 3
    with pytest.raises(ModelError, match="at most 2"), bench_of(capacity=2).open(3):
        pass


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_walks_lower_the_loss_and_keep_the_global_model(kind):
    batch = answers(4)
    bench = bench_of(kind=kind, batches=lambda *_: batch)
    before, start = bench.params.digest(), bench.evaluate(batch).loss
    rate = 3e-2 if kind == "lora" else 2e-4
    task = Task(round=0, client=0, seed=1, rate=rate, mu=1e-3, steps=40, dense=True)
    (reply,) = take_walks([task], bench)
    assert bench.params.digest() == before and reply.examples == 160
    end = Params({name: tensor + reply.delta.tensors[name] for name, tensor in bench.params})
    assert bench.evaluate(batch, params=end).loss < start - 0.02


def test_two_clients_walk_together_as_they_walk_alone():
    tasks = [Task(round=2, client=client, seed=1, rate=1e-3, mu=1e-2, steps=5) for client in (0, 1)]
    together = take_walks(tasks, bench_of())
    alone = [take_walks([task], bench_of())[0] for task in tasks]
    for one, other in zip(together, alone, strict=True):
        # A slope is a difference of losses over 2 mu: rounding of 1e-6 in a loss of 5 is 5e-5 here.
        assert one.slopes == pytest.approx(other.slopes, abs=2e-4)


def test_work_is_counted_per_point():
    bench = bench_of()
    bench.losses([point(bench, offset=o) for o in (0.1, -0.1)])
    assert bench.forwards == 2
    assert bench.tokens == 2 * sum(len(example.rows[0].ids) - 1 for example in answers(2))
    bench.evaluate(answers(5))
    assert bench.forwards == 2
    assert bench.examples(0, 0, 0) == 2


def test_no_points_no_losses():
    assert bench_of().losses([]) == []


def test_evaluation_equals_losses_per_category():
    bench = bench_of()
    examples = answers(6)
    result = bench.evaluate(examples)
    bench_all = bench_of(batches=lambda *_: examples)
    assert result.loss == pytest.approx(bench_all.losses([point(bench_all)])[0], rel=2e-7)
    assert (result.examples, result.accuracy) == (6, None)
    assert result.tokens == sum(len(e.rows[0].ids) - e.rows[0].start for e in examples)
    assert 0 <= result.token_accuracy <= 1
    for name in "ab":
        part = bench.evaluate([example for example in examples if example.category == name])
        assert result.categories[name].loss == pytest.approx(part.loss, rel=2e-7)
        assert result.categories[name].examples == 3


@pytest.mark.parametrize(("examples", "count"), [(candidates(4), 3), (multiple_choice(5), 4)])
def test_accuracy_is_one_for_the_likeliest_answers_and_probabilities_sum_to_one(examples, count):
    bench, likeliest = bench_of(), []
    for example in examples:
        each = [dataclasses.replace(example, answer=n) for n in range(count)]
        losses = [bench.evaluate([one]).loss for one in each]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1, rel=1e-6)
        likeliest.append(each[losses.index(min(losses))])
    result = bench.evaluate(likeliest)
    assert (result.accuracy, result.token_accuracy, result.tokens) == (1.0, None, len(examples))
    wrong = [dataclasses.replace(one, answer=(one.answer + 1) % count) for one in likeliest]
    assert bench.evaluate([*likeliest, *wrong]).accuracy == 0.5


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_evaluation_does_not_depend_on_order_or_packing(batch_tokens):
    bench = bench_of("gpt2")
    examples = [*answers(5), *candidates(3), *multiple_choice(3)]
    wanted = bench.evaluate(examples)
    result = bench.evaluate(random.Random(3).sample(examples, len(examples)), batch_tokens=batch_tokens)
    assert result.loss == pytest.approx(wanted.loss, rel=2e-7)
    assert (result.accuracy, result.token_accuracy, result.tokens) == (
        wanted.accuracy,
        wanted.token_accuracy,
        wanted.tokens,
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "mamba"])
def test_generation_equals_the_likeliest_token_of_plain_forwards(name, kind):
    if (name, kind) == ("mamba", "full"):
        pytest.skip("Mamba cannot be trained whole")
    loaded = tiny(name)
    adapter = make_adapter(loaded.model, kind=kind, targets=["in_proj"] if name == "mamba" else None)
    bench = ModelBench(loaded, adapter)
    prompt = (5, 9, 30)
    ids = list(prompt)
    for _ in range(6):  # the whole text again for each token, without a cache
        ids.append(int(loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert bench.generate(prompt, max_new_tokens=6) == tuple(ids[3:])


def test_generation_follows_its_parameters_and_stops_at_the_end():
    bench = bench_of()
    other = bench.params.clone()
    for _, tensor in other:
        tensor.mul_(8)
    assert bench.generate((5, 9, 30), max_new_tokens=8) != bench.generate((5, 9, 30), max_new_tokens=8, params=other)
    made = bench.generate((5, 9, 30), max_new_tokens=8)
    bench._loaded.tokenizer.eos_token_id = made[3]
    assert bench.generate((5, 9, 30), max_new_tokens=8) == made[: made.index(made[3])]
    assert len(bench.generate((5,) * 60, max_new_tokens=8)) <= 4  # the window is 64


@pytest.mark.parametrize(
    ("row", "said"),
    [(Row((4, 5, 6), 3), "no label token"), (Row((4, 5, 6), 0), "no label token"), (Row((4,) * 65, 3), "takes 64")],
)
def test_rows_that_cannot_be_scored_are_refused(row, said):
    bench = bench_of(batches=lambda *_: [Example((row,))])
    with pytest.raises(DataError, match=said):
        bench.losses([point(bench)])
    with pytest.raises(DataError, match=said):
        bench.evaluate([Example((row,))])


def test_what_is_missing_is_said():
    bench = bench_of(batches=None)
    with pytest.raises(DataError, match="no training data"):
        bench.losses([point(bench)])
    with pytest.raises(DataError, match="at least one"):
        bench.evaluate([])
    with pytest.raises(DataError, match="no label token"):
        empty = bench_of(batches=lambda *_: [])
        empty.losses([point(empty)])
    with pytest.raises(DataError, match="generate"):
        bench.generate((), max_new_tokens=3)
    with pytest.raises(ModelError, match="lanes"):
        bench_of(lanes=0)


def test_full_params_are_the_models_own_weights():
    loaded = tiny("llama")
    bench = ModelBench(loaded, full_adapter(loaded.model), batches=lambda *_: answers(2))
    assert bench.params["lm_head.weight"].data_ptr() == loaded.model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("backend", ["torch", ""])
@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_a_part_of_a_lane_is_the_lanes_part(backend, law, monkeypatch):
    monkeypatch.setenv("FEDMEZO_NOISE", backend)
    source = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    key = {"name": "w", "seed": 7, "offset": 0.01, "law": law}
    whole, mirror = torch.empty(9000), torch.empty(9000)
    lanes_(whole, mirror, source, **key)
    for start, size in ((0, 10), (5, 3), (2047, 2), (2048, 6000), (3001, 5999)):
        one, plus, minus = (torch.empty(size) for _ in range(3))
        lane_(one, source[start : start + size], start=start, **key)
        lanes_(plus, minus, source[start : start + size], start=start, **key)
        assert torch.equal(one, whole[start : start + size]) and torch.equal(plus, one)
        assert torch.equal(minus, mirror[start : start + size])


def test_a_forward_pass_takes_what_memory_holds(monkeypatch):
    model = tiny("llama").model
    assert token_budget(model) == 1024
    width, inner = model.config.hidden_size, model.config.intermediate_size
    token = 4 * (8 * width + 3 * inner)
    monkeypatch.setattr("fedmezo.models.schedule._memory", lambda device: 16 * 100 * token + 1)
    assert token_budget(model) == 100
    monkeypatch.setattr("fedmezo.models.schedule._memory", lambda device: 1)
    assert token_budget(model) == 1


def test_points_of_one_setting_share_a_lane(monkeypatch):
    bench = bench_of()
    seen = []
    score = bench.engine.score
    monkeypatch.setattr(bench.engine, "score", lambda lanes, *a, **k: seen.append(len(lanes)) or score(lanes, *a, **k))
    points = [Point(bench.params, seed, 0.0, client, 0, 0) for client, seed in ((0, 5), (1, 6), (2, 7), (0, 8))]
    points += [Point(bench.params, 5, offset, 1, 0, 0) for offset in (1e-3, -1e-3)]
    together = bench.losses(points)
    assert seen == [3]
    assert together == pytest.approx([bench.losses([point])[0] for point in points], rel=1e-6)


class Drawable:
    """Batches of two answers; a draw of b"0" is empty, any other one is of as many examples as its first byte says."""

    def __call__(self, client, round, step):
        return answers(2, seed=client + step)

    def drawn(self, client, draw):
        return answers(5, seed=client)[: int(draw[:1])]


def test_each_example_has_the_loss_it_has_alone():
    bench = bench_of(batches=Drawable())
    points = [point(bench, draw=b"3", offset=offset, client=client) for client in (0, 1) for offset in (1e-3, -1e-3)]
    found = bench.each(points)
    assert [len(losses) for losses in found] == [3] * 4
    for at, example in enumerate(answers(5, seed=1)[:3]):
        alone = bench_of(batches=lambda client, round, step, example=example: [example])
        pair = [point(alone, offset=offset, client=1) for offset in (1e-3, -1e-3)]
        assert alone.losses(pair) == [found[2][at], found[3][at]]


def test_no_bit_of_an_examples_loss_depends_on_who_else_is_in_the_sample():
    bench = bench_of("qwen2", batches=Drawable())
    few, many = (
        bench.each([point(bench, draw=draw, offset=offset) for offset in (1e-3, -1e-3)]) for draw in (b"2", b"5")
    )
    assert [losses[:2] for losses in many] == few


def test_an_empty_sample_has_no_losses_and_looks_like_any_other_in_the_counts():
    bench = bench_of(batches=Drawable())
    assert bench.each([point(bench, draw=b"0"), point(bench, draw=b"2")])[0] == []
    assert (bench.forwards, bench.tokens) == (2, 0)
    assert len(bench.each([point(bench)])[0]) == 2  # without a draw: the batch of the round and the step
