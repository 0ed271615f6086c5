"""Secret sums: the mean of shares is one walk of nobody, for replay, catch-up and the journal as for the model."""

import math
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.pool import directions_of
from fedmezo.fl.share import WORST_LOSS, limited, numbers_of, passes_of, share_of, summed
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import WHOLE
from fedmezo.runtime.pull import catch_up_
from fedmezo.runtime.wire import News, Sums, decode_task, encode_task
from fedmezo.zo.noise import derive_seed, tensor_id
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_
from fedmezo.zo.seedsum import Update

K, H = 64, 8
FRESH = Task(3, 0, 7, 0.01, 1e-3, H, clip=20.0, shared=True)
POOLED = replace(FRESH, pool=K)
BOTH = pytest.mark.parametrize("asked", [FRESH, POOLED], ids=["fresh", "pooled"])


def replies(asked: Task, count: int, *, seed: int = 0) -> list[tuple[Task, Reply]]:
    random = np.random.default_rng(seed)
    found = []
    for client in range(count):
        slopes = (10 * random.standard_normal(H)).astype(np.float32).astype(float)
        found.append((replace(asked, client=client), Reply(3, client, 16, 2.0 + client, tuple(slopes.tolist()))))
    return found


def mean_of(answers: list[tuple[Task, Reply]]) -> np.ndarray:
    return np.mean([share_of(task, reply) for task, reply in answers], axis=0, dtype=np.float64)


def model(*, seed: int = 0) -> Params:
    torch.manual_seed(seed)
    return Params({"a.weight": torch.randn(30, 20), "b.bias": torch.randn(11)})


# --- shares and their mean --------------------------------------------------------------------------------------------


@BOTH
def test_a_share_says_how_far_a_walk_went_at_each_step(asked):
    ((task, reply),) = replies(asked, 1)
    share, walk = share_of(task, reply), walk_of(task, reply.slopes)
    assert share.shape == (numbers_of(task),) == (H + 1,) and share.dtype == np.float32
    np.testing.assert_allclose(share[:-1] * (0.01 * 20), walk.coefficients, rtol=1e-6)
    assert share[-1] == pytest.approx(reply.loss / WORST_LOSS)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | st.just(math.nan), min_size=H, max_size=H), st.floats(0, 1e3)
)
def test_every_share_lies_between_minus_one_and_one(slopes, loss):
    share = share_of(FRESH, Reply(3, 0, 4, loss, tuple(slopes)))
    assert np.abs(share).max() <= 1 and np.isfinite(share).all()


def test_a_loss_that_is_not_finite_counts_as_the_worst():
    reply = Reply(3, 0, 0, math.nan, (math.nan,) * H)
    assert share_of(FRESH, reply).tolist() == [0.0] * H + [1.0]


@pytest.mark.parametrize("wrong", [{"clip": math.inf}, {"clip": 0.0}, {"shared": False}, {"momentum": 0.5}])
def test_a_walk_without_a_limit_or_along_directions_of_its_own_has_no_share(wrong):
    with pytest.raises(RunError, match="needs shared directions, one a step, no momentum and a limit"):
        share_of(replace(FRESH, **wrong), Reply(3, 0, 0, 1.0, (1.0,) * H))


@pytest.mark.parametrize("asked", [FRESH, POOLED, replace(FRESH, pool=1 << 20)], ids=["fresh", "pool", "large pool"])
def test_no_entry_of_a_sum_is_of_one_client_alone(asked):
    # The server knows the draws: an entry of the sum that only one client reaches would be that client's slope.
    named = [directions_of(replace(asked, client=client)).seeds for client in range(4)]
    assert len(set(named)) == 1


@BOTH
def test_the_mean_moves_the_model_as_the_walks_would(asked):
    answers = replies(asked, 5)
    nobodys, reply = summed([task for task, _ in answers], mean_of(answers))
    one, all_ = model(), model()
    apply_(one, Update((walk_of(nobodys, reply.slopes),), (1.0,)), law="gaussian")
    walks = tuple(walk_of(task, reply.slopes) for task, reply in answers)
    apply_(all_, Update(walks, (0.2,) * 5), law="gaussian")
    moved = (all_.tensors["a.weight"] - model().tensors["a.weight"]).norm()
    assert moved > 0.1
    assert (one.tensors["a.weight"] - all_.tensors["a.weight"]).norm() < 2**-10 * moved
    assert (reply.client, reply.examples, nobodys.client, nobodys.rate) == (WHOLE, 5, WHOLE, 1.0)
    assert reply.loss == pytest.approx(4.0, rel=1e-6)


def test_a_sum_is_of_equal_tasks():
    tasks = [FRESH, replace(FRESH, client=1, rate=0.02)]
    for wrong, size in ((tasks, H + 1), (tasks[:1], H)):
        with pytest.raises(RunError, match="a sum is of equal tasks"):
            summed(wrong, np.zeros(size))


def test_a_rate_of_zero_moves_nothing():
    asked = replace(FRESH, rate=0.0)
    share = share_of(asked, replies(FRESH, 1)[0][1])
    assert not share[:-1].any()
    assert not any(summed([asked] * 3, share.astype(float))[1].slopes)


def test_the_passes_of_a_walk():
    assert [passes_of(replace(FRESH, estimator=one)) for one in ("two-point", "forward")] == [16, 9 + 7]


# --- the algorithm ----------------------------------------------------------------------------------------------------

SETTINGS = Settings(rate=0.01, steps=H, clip=3.0, shared=True)


@pytest.mark.parametrize(
    "make",
    [lambda: fedmezo(SETTINGS, seed=7, cohort=5), lambda: fedkseed(SETTINGS, Pool(K), seed=7, cohort=5)],
    ids=["fedmezo", "fedkseed"],
)
def test_an_algorithm_takes_a_sum_as_it_takes_the_walks(make):
    method = limited(make(), clip=20.0)
    state = replace(method.init(), round=3)
    tasks = method.plan(state, range(5))
    assert [task.clip for task in tasks] == [20.0] * 5
    answers = [(task, reply) for task, (_, reply) in zip(tasks, replies(FRESH, 5), strict=True)]
    nobodys, reply = summed(tasks, mean_of(answers))
    taken, update = method.aggregate(state, [*tasks, nobodys], [reply])
    plain, _ = method.aggregate(state, tasks, [reply for _, reply in answers])
    assert update.weights == (1.0,) and taken.round == 4
    if method.sums(state) is not None:
        np.testing.assert_allclose(taken.sums, plain.sums, rtol=2**-10, atol=1e-7)
    assert [task.clip for task in method.plan(taken, range(5))] == [20.0] * 5


def test_catching_up_by_pairs_gives_the_bits_and_by_sums_the_model():
    method = fedkseed(SETTINGS, Pool(K), seed=7, cohort=5)
    live, state, news = model(), method.init(), []
    for number in range(4):
        tasks = [replace(POOLED, round=number, client=client) for client in range(5)]
        drawn = replies(POOLED, 5, seed=number)
        answers = [(t, replace(r, round=number)) for t, (_, r) in zip(tasks, drawn, strict=True)]
        nobodys, reply = summed(tasks, mean_of(answers))
        state, update = method.aggregate(state, [*tasks, nobodys], [reply])
        apply_(live, update, law="gaussian")
        news.append(News((nobodys,), (reply.slopes,), update.weights))
    pairs, sums = model(), model()
    told = decode_task(encode_task(replace(POOLED, round=4), news))[1]
    catch_up_(pairs, told, law="gaussian")
    assert pairs.digest() == live.digest() != model().digest()
    catch_up_(sums, Sums(7, K, "float32", tuple(state.sums.tolist())), law="gaussian")
    torch.testing.assert_close(sums.tensors["a.weight"], live.tensors["a.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["numba_ops", "torch_ops"])
@settings(max_examples=20)
@given(st.lists(st.floats(-1, 1, width=32), min_size=H, max_size=H), st.data())
def test_seeds_with_coefficient_zero_change_no_bit(backend, vector, data):
    kernels = import_module(f"fedmezo.zo.kernels.{backend}")
    kept = data.draw(st.sets(st.integers(0, H - 1)))
    walk = walk_of(FRESH, [value if place in kept else 0.0 for place, value in enumerate(vector)])
    for kind in (torch.float32, torch.bfloat16):
        short, whole = (Params({"a": torch.full((40,), -0.0, dtype=kind)}) for _ in range(2))
        apply_(short, Update((walk,), (1.0,), 5), law="gaussian")
        kernels.walks_(
            whole.tensors["a"], tensor=tensor_id("a"), seeds=[walk.seeds], coefficients=[walk.coefficients],
            weights=[1.0], law="gaussian", rounding=derive_seed("rounding", 5),
        )  # fmt: skip
        assert short.digest() == whole.digest()
