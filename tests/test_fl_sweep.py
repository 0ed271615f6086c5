"""Sums over a pool: the mean of walks is one walk of nobody, for replay, catch-up and the journal as for the model."""

import math
import zlib
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings
from fedmezo.fl.pool import directions_of, pool_seed
from fedmezo.fl.sweep import SUM, WORST_LOSS, limited, passes_of, share_of, swept
from fedmezo.fl.walk import walk_of
from fedmezo.runtime.pull import catch_up_
from fedmezo.runtime.wire import News, Sums, decode_reply, decode_task, encode_reply, encode_task
from fedmezo.zo.noise import derive_seed, tensor_id
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_
from fedmezo.zo.seedsum import Update

K = 64
TASK = Task(3, 0, 7, 0.01, 1e-3, 8, clip=20.0, pool=K)
SWEEP = replace(TASK, client=SUM, rate=1.0, steps=K, clip=math.inf, sweep=True)
FLOAT32 = st.floats(-1e6, 1e6, width=32)


def replies(count: int, *, seed: int = 0) -> list[tuple[Task, Reply]]:
    random = np.random.default_rng(seed)
    found = []
    for client in range(count):
        slopes = (10 * random.standard_normal(TASK.steps)).astype(np.float32).astype(float)
        found.append((replace(TASK, client=client), Reply(3, client, 16, 2.0 + client, tuple(slopes.tolist()))))
    return found


def mean_of(answers: list[tuple[Task, Reply]]) -> np.ndarray:
    return np.mean([share_of(task, reply) for task, reply in answers], axis=0, dtype=np.float64)


def model(*, seed: int = 0) -> Params:
    torch.manual_seed(seed)
    return Params({"a.weight": torch.randn(30, 20), "b.bias": torch.randn(11)})


# --- the task ---------------------------------------------------------------------------------------------------------


def test_a_sweep_names_the_pool_in_order():
    named = directions_of(SWEEP)
    assert named.places == tuple(range(K)) and named.factors == ()
    assert named.seeds == tuple(pool_seed(7, place) for place in range(K))


@given(st.lists(FLOAT32, min_size=K, max_size=K))
def test_a_walk_over_a_sweep_gives_the_vector_back_to_eleven_bits(vector):
    walk = walk_of(SWEEP, [-value for value in vector])
    assert walk.seeds == directions_of(SWEEP).seeds
    np.testing.assert_allclose(walk.coefficients, vector, rtol=2**-11, atol=0)


def test_the_largest_pool_takes_a_second_not_an_hour():
    task = replace(SWEEP, pool=2**16, steps=2**16)
    assert len(walk_of(task, [1.0] * 2**16).seeds) == 2**16


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 63}, {"pool": 0}, {"odds": (1,) * K}, {"momentum": 0.5}, {"clip": 0.0}, {"directions": 2, "steps": 32}],
)
def test_a_sweep_is_plain(wrong):
    with pytest.raises(RunError, match=r"Task\.sweep .*\.$"):
        replace(SWEEP, **wrong)


# --- its bytes --------------------------------------------------------------------------------------------------------


@given(st.lists(FLOAT32, min_size=K, max_size=K))
def test_a_sweep_comes_back_from_its_bytes(vector):
    task, reply = SWEEP, Reply(3, SUM, 4, 1.5, tuple(vector))
    news = News((replace(SWEEP, round=2),), (tuple(vector),), (1.0,))
    assert decode_reply(encode_reply(reply)) == reply
    assert decode_task(encode_task(task)) == (task, ())
    for asked in (replace(TASK, round=4), replace(SWEEP, round=4)):
        assert decode_task(encode_task(asked, [news])) == (asked, (news,))
    assert len(encode_task(SWEEP)) == len(encode_task(TASK)) == 96


def test_version_2_knows_no_sweep():
    body = bytearray(encode_task(SWEEP)[:-4])
    assert body[4] == 3
    body[4] = 2
    with pytest.raises(WireError, match="unknown flags 16"):
        decode_task(bytes(body) + zlib.crc32(body).to_bytes(4, "little"))


# --- shares and their mean --------------------------------------------------------------------------------------------


def test_a_share_says_how_far_a_walk_went_along_each_seed():
    ((task, reply),) = replies(1)
    share, walk = share_of(task, reply), walk_of(task, reply.slopes)
    assert share.shape == (K + 1,) and share.dtype == np.float32
    for place in range(K):
        went = sum(c for c, at in zip(walk.coefficients, directions_of(task).places, strict=True) if at == place)
        assert share[place] * (0.01 * 20 * 8) == pytest.approx(went, rel=1e-6, abs=1e-9)
    assert share[-1] == pytest.approx(reply.loss / WORST_LOSS)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | st.just(math.nan), min_size=8, max_size=8), st.floats(0, 1e3)
)
def test_every_share_lies_between_minus_one_and_one(slopes, loss):
    share = share_of(TASK, Reply(3, 0, 4, loss, tuple(slopes)))
    assert np.abs(share).max() <= 1 and np.isfinite(share).all()


def test_a_loss_that_is_not_finite_counts_as_the_worst():
    reply = Reply(3, 0, 0, math.nan, (math.nan,) * 8)
    assert share_of(TASK, reply).tolist() == [0.0] * K + [1.0]


def test_a_walk_without_a_limit_or_a_pool_has_no_share():
    for wrong in ({"clip": math.inf}, {"clip": 0.0}, {"pool": 0}):
        with pytest.raises(RunError, match="needs a pool and a limit"):
            share_of(replace(TASK, **wrong), Reply(3, 0, 0, 1.0, (1.0,) * 8))


def test_the_mean_moves_the_model_as_the_walks_would():
    answers = replies(5)
    sweep, reply = swept([task for task, _ in answers], mean_of(answers))
    one, all_ = model(), model()
    apply_(one, Update((walk_of(sweep, reply.slopes),), (1.0,)), law="gaussian")
    apply_(
        all_, Update(tuple(walk_of(*pair) for pair in ((t, r.slopes) for t, r in answers)), (0.2,) * 5), law="gaussian"
    )
    moved = (all_.tensors["a.weight"] - model().tensors["a.weight"]).norm()
    assert moved > 0.1
    assert (one.tensors["a.weight"] - all_.tensors["a.weight"]).norm() < 2**-11 * moved
    assert (reply.client, reply.examples, sweep.client, sweep.rate) == (SUM, 5, SUM, 1.0)
    assert reply.loss == pytest.approx(4.0, rel=1e-6)


def test_a_sum_is_of_equal_tasks():
    tasks = [TASK, replace(TASK, client=1, rate=0.02)]
    for wrong, size in ((tasks, K + 1), (tasks[:1], K)):
        with pytest.raises(RunError, match="a sum is of equal tasks"):
            swept(wrong, np.zeros(size))


def test_a_rate_of_zero_moves_nothing():
    asked = replace(TASK, rate=0.0)
    share = share_of(asked, replies(1)[0][1])
    assert not share[:-1].any()
    assert not any(swept([asked] * 3, share.astype(float))[1].slopes)


def test_the_passes_of_a_walk():
    assert [passes_of(replace(TASK, estimator=one)) for one in ("two-point", "forward")] == [16, 9 + 7]


# --- the algorithm ----------------------------------------------------------------------------------------------------


def test_an_algorithm_takes_a_sum_as_it_takes_the_walks():
    method = limited(fedkseed(Settings(rate=0.01, steps=8, clip=3.0), Pool(K), seed=7, cohort=5), clip=20.0)
    state = replace(method.init(), round=3)
    tasks = method.plan(state, range(5))
    assert [task.clip for task in tasks] == [20.0] * 5
    answers = [(task, reply) for task, (_, reply) in zip(tasks, replies(5), strict=True)]
    sweep, reply = swept(tasks, mean_of(answers))
    summed, update = method.aggregate(state, [*tasks, sweep], [reply])
    plain, _ = method.aggregate(state, tasks, [reply for _, reply in answers])
    assert update.weights == (1.0,) and summed.round == 4
    np.testing.assert_allclose(summed.sums, plain.sums, rtol=2**-11, atol=1e-7)
    assert [task.clip for task in method.plan(summed, range(5))] == [20.0] * 5


def test_catching_up_by_pairs_gives_the_bits_and_by_sums_the_model():
    method = fedkseed(Settings(rate=0.01, steps=8), Pool(K), seed=7, cohort=5)
    live, state, news = model(), method.init(), []
    for number in range(4):
        tasks = [replace(TASK, round=number, client=client) for client in range(5)]
        answers = [(t, replace(r, round=number)) for t, (_, r) in zip(tasks, replies(5, seed=number), strict=True)]
        sweep, reply = swept(tasks, mean_of(answers))
        state, update = method.aggregate(state, [*tasks, sweep], [reply])
        apply_(live, update, law="gaussian")
        news.append(News((sweep,), (reply.slopes,), update.weights))
    pairs, sums = model(), model()
    told = decode_task(encode_task(replace(TASK, round=4), news))[1]
    catch_up_(pairs, told, law="gaussian")
    assert pairs.digest() == live.digest() != model().digest()
    catch_up_(sums, Sums(7, K, "float32", tuple(state.sums.tolist())), law="gaussian")
    torch.testing.assert_close(sums.tensors["a.weight"], live.tensors["a.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["numba_ops", "torch_ops"])
@settings(max_examples=20)
@given(st.lists(st.floats(-1, 1, width=32), min_size=K, max_size=K), st.data())
def test_seeds_with_coefficient_zero_change_no_bit(backend, vector, data):
    kernels = import_module(f"fedmezo.zo.kernels.{backend}")
    kept = data.draw(st.sets(st.integers(0, K - 1)))
    walk = walk_of(SWEEP, [value if place in kept else 0.0 for place, value in enumerate(vector)])
    for kind in (torch.float32, torch.bfloat16):
        short, whole = (Params({"a": torch.full((40,), -0.0, dtype=kind)}) for _ in range(2))
        apply_(short, Update((walk,), (1.0,), 5), law="gaussian")
        kernels.walks_(
            whole.tensors["a"], tensor=tensor_id("a"), seeds=[walk.seeds], coefficients=[walk.coefficients],
            weights=[1.0], law="gaussian", rounding=derive_seed("rounding", 5),
        )  # fmt: skip
        assert short.digest() == whole.digest()
