"""Noise on scalars: what it hides, that it is what it says, and that without it nothing changes."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import ToyBench, quadratic_bench, quadratic_loss, quadratic_params

from fedmezo.data.batches import Batches
from fedmezo.errors import DataError, RunError
from fedmezo.fl.algorithm import Point, Task
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.privacy import (
    Noise,
    noisy_sum,
    question_of,
    scaled,
    with_central_privacy,
    with_client_privacy,
    with_example_privacy,
)
from fedmezo.fl.secret import Stream, drawn
from fedmezo.fl.spending import SPENT, Spending, foremost, with_spending
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import WHOLE
from fedmezo.zo.perturb import apply_

KEY = b"a key of a test, thirty-two byte"
FREE = Noise(math.inf, 0.0, KEY)
floats = st.floats(-1e6, 1e6)


def answered(algorithm, bench=None, clients=3):
    bench = bench or quadratic_bench()
    tasks = algorithm.plan(algorithm.init(), range(clients))
    return tasks, algorithm.client(tasks, bench)


def played(algorithm, bench, *, rounds=3, clients=3):
    state = algorithm.init()
    for _ in range(rounds):
        tasks = algorithm.plan(state, range(clients))
        tasks, replies = algorithm.gather(tasks, algorithm.client(tasks, bench))
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law="gaussian")
    return bench.params.digest()


def plain(**options):
    return fedmezo(Settings(1e-3, steps=4, **options), seed=5, cohort=3)


class Examples(ToyBench):
    """A bench whose batch is (factor,) * example loss; `drawn` notes the draws."""

    def __init__(self, losses, **options):
        super().__init__(quadratic_params(), quadratic_loss, **options)
        self.factors, self.draws = losses, []

    def each(self, points):
        self.draws += [point.draw for point in points]
        return [[factor * loss for factor in self.factors] for loss in self.losses(points)]


# --- the law of no privacy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": math.inf},
        {"directions": 3},
        {"estimator": "forward"},
        {"estimator": "forward-half", "directions": 2},
        {"coding": "float16", "momentum": 0.5},
        {"directions": 2, "normalise": True},
        {"dense": True},
    ],
    ids=str,
)
def test_without_limit_and_noise_samples_of_one_example_give_the_bits_of_the_algorithm(options):
    algorithm = plain(**options)
    private = with_example_privacy(algorithm, FREE, batch=1)
    for (_, own), (_, other) in [(answered(algorithm), answered(private))]:
        assert [reply.slopes for reply in own] == [reply.slopes for reply in other]
    assert played(algorithm, quadratic_bench()) == played(private, quadratic_bench())


def test_without_limit_and_noise_clients_give_the_bits_of_the_algorithm():
    private = with_client_privacy(plain(), FREE, batch=1)
    assert played(plain(), quadratic_bench()) == played(private, quadratic_bench())


def test_without_limit_and_noise_the_servers_sum_is_the_mean_of_everyone():
    shared = plain(shared=True, clip=math.inf)
    private = with_central_privacy(shared, FREE, clients=3, cohort=3)
    own, other = quadratic_bench(), quadratic_bench()
    played(shared, own), played(private, other)
    for name, tensor in own.params:
        assert np.allclose(tensor, other.params[name], atol=1e-4, rtol=1e-3)


# --- limits -------------------------------------------------------------------------------------------------------


@given(st.lists(floats, max_size=20), st.floats(1e-3, 1e3), floats)
def test_one_example_more_changes_a_sum_by_the_limit_at_most(values, clip, extra):
    def total(some):
        return noisy_sum(some, clip=clip, deviation=0.0, normal=0.0)

    assert abs(total([*values, extra]) - total(values)) <= clip * (1 + 1e-9)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20), st.floats(1e-3, 1e3))
def test_no_vector_is_longer_than_its_limit_and_none_is_turned(values, length):
    cut = scaled(values, length=length)
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    assert math.hypot(*cut) <= length * (1 + 1e-9)
    assert all(a * b >= 0 for a, b in zip(cut, finite, strict=True))
    if math.hypot(*finite) <= length:
        assert cut == finite


def test_examples_are_limited_one_by_one_and_divided_by_the_expected_number():
    # Along a direction of slope s an example f has the difference 2 mu f s; the third one's is cut.
    bench, whole = Examples([1.0, -0.5, 100.0]), plain(clip=math.inf)
    tasks, free = answered(whole, Examples([1.0]))
    clip = 0.5 * min(abs(s) for s in free[0].slopes if s) * 2 * tasks[0].mu
    _, replies = answered(with_example_privacy(whole, Noise(clip, 0.0, KEY), batch=8), bench)
    slope, mu = free[0].slopes[0], tasks[0].mu
    wanted = sum(max(-clip, min(clip, f * slope * 2 * mu)) for f in bench.factors) / 8 / (2 * mu)
    assert replies[0].slopes[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_example_whose_loss_is_not_finite_counts_nothing(bad):
    noise = Noise(0.1, 1.0, KEY)
    _, with_bad = answered(with_example_privacy(plain(), noise, batch=2), Examples([1.0, bad]))
    _, without = answered(with_example_privacy(plain(), noise, batch=2), Examples([1.0]))
    assert [reply.slopes for reply in with_bad] == [reply.slopes for reply in without]


def test_an_empty_sample_is_answered_by_noise_alone():
    _, replies = answered(with_example_privacy(plain(), Noise(0.1, 1.0, KEY), batch=4), Examples([]))
    assert all(slope and math.isfinite(slope) for reply in replies for slope in reply.slopes)
    _, silent = answered(with_example_privacy(plain(), Noise(0.1, 0.0, KEY), batch=4), Examples([]))
    assert not any(slope for reply in silent for slope in reply.slopes)


@pytest.mark.parametrize("wrap", [with_example_privacy, with_client_privacy])
def test_a_private_reply_tells_slopes_and_nothing_else(wrap):
    bench = Examples([1.0] * 5, batch=5)
    tasks, replies = answered(wrap(plain(), Noise(0.1, 1.0, KEY), batch=8), bench)
    for task, reply in zip(tasks, replies, strict=True):
        assert math.isnan(reply.loss) and reply.examples == 8 * task.steps and reply.skipped == 0
        assert all(float(np.float32(slope)) == slope for slope in reply.slopes)


def test_every_step_of_every_client_draws_a_sample_of_its_own_for_all_its_points():
    bench = Examples([1.0])
    answered(with_example_privacy(plain(directions=2), Noise(0.1, 1.0, KEY), batch=1), bench)
    assert len(set(bench.draws)) == 3 * 4 and all(bench.draws)
    assert {bench.draws.count(draw) for draw in bench.draws} == {4}


# --- noise --------------------------------------------------------------------------------------------------------


def test_noise_is_normal_with_the_deviation_that_is_asked_for():
    stream = Stream(KEY, b"question")
    numbers = np.array([noisy_sum([], clip=1.0, deviation=2.0, normal=stream.normal(k)) for k in range(20000)])
    assert abs(numbers.mean()) < 5 * 2 / math.sqrt(numbers.size)
    assert numbers.std() == pytest.approx(2.0, rel=0.03)
    ranks = np.sort([NormalDist(0, 2).cdf(x) for x in numbers])
    steps = (np.arange(numbers.size) + 0.5) / numbers.size
    assert np.abs(ranks - steps).max() < 1.95 / math.sqrt(numbers.size)  # Kolmogorov-Smirnov, p = 0.001
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / math.sqrt(numbers.size)


@pytest.mark.parametrize("directions", [1, 4])
def test_slopes_have_the_noise_of_their_limit_over_the_expected_batch(directions):
    # No example: what is left is noise, of deviation C sigma sqrt(n) / (2 mu B).
    settings = Settings(1e-9, steps=400, directions=directions, clip=math.inf)
    algorithm = with_example_privacy(fedmezo(settings, seed=1, cohort=3), Noise(0.2, 1.5, KEY), batch=8)
    _, replies = answered(algorithm, Examples([], capacity=3))
    slopes = np.array([reply.slopes for reply in replies]).ravel()
    wanted = 0.2 * 1.5 * math.sqrt(directions) / (2 * settings.mu * 8)
    assert slopes.std() == pytest.approx(wanted, rel=5 / math.sqrt(2 * slopes.size))


def test_noise_is_on_a_grid_too_coarse_to_tell_sums_apart():
    unit = 2.0 ** math.floor(math.log2(0.3 * 2**-12))
    for at in range(50):
        noisy = noisy_sum([0.1 * at], clip=9.0, deviation=0.3, normal=Stream(KEY, b"").normal(at))
        assert (noisy / unit).is_integer()


def test_the_same_question_has_the_same_answer_and_any_other_one_has_other_noise():
    task = plain().plan(plain().init(), [0])[0]
    noise = Noise(0.1, 1.0, KEY)
    asked = question_of(task, "model", noise)
    others = [
        question_of(replace(task, rate=task.rate * 1.0001), "model", noise),
        question_of(replace(task, round=1), "model", noise),
        question_of(replace(task, client=1), "model", noise),
        question_of(task, "another", noise),
        question_of(task, "model", replace(noise, clip=0.2)),
        question_of(task, "model", replace(noise, sigma=2.0)),
    ]
    assert question_of(replace(task), "model", noise) == asked and len({asked, *others}) == 7
    numbers = {Stream(KEY, question).normal(0, 0) for question in (asked, *others)}
    assert len(numbers | {Stream(b"another key", asked).normal(0, 0), Stream(KEY, asked).normal(1, 0)}) == 9


@pytest.mark.parametrize("wrap", [with_example_privacy, with_client_privacy])
def test_walks_are_repeatable_and_leave_the_model_alone(wrap):
    bench = Examples([1.0, 2.0])
    before = bench.params.digest()
    algorithm = wrap(plain(), Noise(0.1, 1.0, KEY), batch=2)
    assert answered(algorithm, bench)[1] == answered(algorithm, bench)[1]
    assert bench.params.digest() == before
    other = wrap(plain(), Noise(0.1, 1.0, b"another"), batch=2)
    assert answered(algorithm, bench)[1] != answered(other, bench)[1]


def test_the_secret_is_in_no_text_and_cannot_be_left_out():
    assert KEY.hex() not in repr(Noise(0.1, 1.0, KEY)) and str(KEY) not in repr(Stream(KEY, b""))
    with pytest.raises(RunError, match="need a secret"):
        answered(with_example_privacy(plain(), Noise(0.1, 1.0, b""), batch=1))


@pytest.mark.parametrize(("clip", "sigma"), [(0.0, 1.0), (-1.0, 0.0), (1.0, -1.0), (1.0, math.nan), (math.nan, 0.0)])
def test_impossible_noise_is_refused(clip, sigma):
    with pytest.raises(RunError, match="expected clip"):
        Noise(clip, sigma, KEY)


def test_noise_without_a_limit_is_refused():
    with pytest.raises(RunError, match="no noise hides what has no limit"):
        Noise(math.inf, 1.0, KEY)


# --- samples ------------------------------------------------------------------------------------------------------


def test_everyone_is_in_a_sample_with_the_same_probability_and_alone():
    counts, pairs = np.zeros(40), 0
    for at in range(4000):
        sample = drawn(Stream(KEY, b"draws").name(at), 40, rate=0.2)
        counts[sample] += 1
        pairs += 0 in sample and 1 in sample
    assert np.abs(counts / 4000 - 0.2).max() < 5 * math.sqrt(0.16 / 4000)
    assert abs(pairs / 4000 - 0.04) < 5 * math.sqrt(0.0384 / 4000)


@pytest.mark.parametrize(("rate", "wanted"), [(0.0, 0), (1.0, 7), (3.0, 7)])
def test_rates_of_none_and_of_all(rate, wanted):
    assert len(drawn(b"seed", 7, rate=rate)) == wanted


def test_poisson_batches_are_named_by_their_draw_alone():
    batches = Batches([list("abcdefghij"), list("xyz")], batch_size=3, local_steps=2, seed=1)
    sizes = [len(batches.drawn(0, b"%d" % at)) for at in range(500)]
    assert np.mean(sizes) == pytest.approx(3, abs=5 * math.sqrt(2.1 / 500)) and min(sizes) == 0
    assert batches.drawn(0, b"1") == batches.drawn(0, b"1")
    assert batches.drawn(1, b"1") == ("x", "y", "z")  # no more than there are
    with pytest.raises(DataError, match="expected one of the 2"):
        batches.drawn(2, b"1")


# --- the server's sum ---------------------------------------------------------------------------------------------


def central(noise, *, clients=40, cohort=10, **options):
    whole = fedmezo(Settings(1e-2, steps=3, shared=True, clip=math.inf, **options), seed=5, cohort=clients)
    return with_central_privacy(whole, noise, clients=clients, cohort=cohort)


def test_cohorts_are_poisson_samples_that_the_secret_alone_tells():
    one, other = central(Noise(1.0, 1.0, KEY)), central(Noise(1.0, 1.0, b"another"))
    states = [replace(one.init(), round=number) for number in range(200)]
    cohorts = [[task.client for task in one.plan(state, range(40))] for state in states]
    assert np.mean([len(cohort) for cohort in cohorts]) == pytest.approx(10, abs=5 * math.sqrt(7.5 / 200))
    assert cohorts != [[task.client for task in other.plan(state, range(40))] for state in states]
    assert cohorts == [[task.client for task in one.plan(state, range(40))] for state in states]


def test_the_server_keeps_a_noisy_sum_and_nothing_of_anyone():
    algorithm = central(Noise(5.0, 1.0, KEY))
    tasks, replies = answered(algorithm, clients=40)
    kept_tasks, kept = algorithm.gather(tasks, replies)
    assert [task.client for task in kept_tasks] == [*[task.client for task in tasks], WHOLE]
    assert all(reply.slopes == () and math.isnan(reply.loss) for reply in kept[:-1])
    assert kept[-1].client == WHOLE and len(kept[-1].slopes) == 3 and math.isnan(kept[-1].loss)
    _, update = algorithm.aggregate(algorithm.init(), kept_tasks, kept)
    assert update.weights == (*[0.0] * len(tasks), 1.0)


def test_a_client_that_sends_anything_moves_the_sum_by_its_limit_at_most():
    algorithm = central(Noise(5.0, 0.0, KEY))
    tasks, replies = answered(algorithm, clients=40)
    liar = replace(replies[0], slopes=(1e30, math.nan, -1e30))

    def coefficients(some):
        kept_tasks, kept = algorithm.gather(tasks, some)
        return np.array(walk_of(kept_tasks[-1], kept[-1].slopes).coefficients)

    moved = coefficients([liar, *replies[1:]]) - coefficients(replies[1:])
    assert np.linalg.norm(moved) <= 1e-2 * 5.0 / 10 * 1.01  # rate, clip, expected cohort; 11 bits


def test_the_sums_noise_has_its_deviation_and_depends_on_who_is_in_it():
    settings = Settings(1.0, steps=2000, shared=True, clip=math.inf)
    algorithm = with_central_privacy(fedmezo(settings, seed=1, cohort=4), Noise(3.0, 2.0, KEY), clients=4, cohort=4)
    tasks = algorithm.plan(algorithm.init(), range(4))
    empty = [replace(reply, slopes=(0.0,) * 2000) for reply in answered(plain())[1][:3]]
    _, kept = algorithm.gather(tasks, empty)
    assert np.std(kept[-1].slopes) == pytest.approx(3.0 * 2.0 / 4, rel=5 / math.sqrt(4000))
    _, other = algorithm.gather(tasks, empty[:2])
    assert np.corrcoef(kept[-1].slopes, other[-1].slopes)[0, 1] < 0.1
    assert algorithm.gather(tasks, empty)[1][-1] == kept[-1]


def test_when_nobody_is_drawn_one_is_asked_and_not_counted():
    algorithm = central(Noise(5.0, 1.0, KEY), clients=40, cohort=1)
    drawn_rounds = [replace(algorithm.init(), round=number) for number in range(60)]
    plans = [algorithm.plan(state, range(40)) for state in drawn_rounds]
    lonely = [tasks for tasks in plans if [task.client for task in tasks] == [0]]
    assert len(lonely) > 10
    tasks = lonely[0]
    replies = algorithm.client(tasks, quadratic_bench())
    loud = [replace(replies[0], slopes=(9.0, 9.0, 9.0))]
    assert algorithm.gather(tasks, replies)[1][-1] == algorithm.gather(tasks, loud)[1][-1]


def test_a_pool_of_seeds_can_be_central_too():
    settings = Settings(1e-2, steps=3, shared=True)
    pooled = fedkseed(settings, Pool(16), seed=1, cohort=3)
    private = with_central_privacy(pooled, Noise(5.0, 0.5, KEY), clients=3, cohort=3)
    bench, state = quadratic_bench(), private.init()
    tasks = private.plan(state, range(3))
    kept = private.gather(tasks, private.client(tasks, bench))
    state, update = private.aggregate(state, *kept)
    assert np.count_nonzero(state.sums) == len(set(update.parts[-1].seeds))


# --- the budget ---------------------------------------------------------------------------------------------------


def counted(budget=math.inf, rates=None, releases=4):
    spending = Spending(lambda rate, count: rate * count, rates or {0: 0.1, 1: 0.2, 2: 0.1}, releases, budget)
    return with_spending(plain(), spending)


def test_a_budget_without_limit_changes_no_bit():
    assert played(counted(), quadratic_bench()) == played(plain(), quadratic_bench())


def test_each_round_says_what_the_dearest_client_has_spent():
    algorithm, state = counted(budget=9.0), counted().init()
    for number in range(3):
        tasks = algorithm.plan(state, range(3))
        state, _ = algorithm.aggregate(state, tasks, algorithm.client(tasks, quadratic_bench()))
        ((kind, detail),) = algorithm.remarks(state)
        assert kind == SPENT and f'"epsilon": {0.2 * 4 * (number + 1)}'[:14] in detail


def test_who_has_spent_the_budget_is_not_asked_and_when_all_have_the_run_ends():
    algorithm = counted(budget=1.3)
    state, asked = algorithm.init(), []
    bench = quadratic_bench()
    for _ in range(3):
        tasks = algorithm.plan(state, range(3))
        asked.append([task.client for task in tasks])
        state, _ = algorithm.aggregate(state, tasks, algorithm.client(tasks, bench))
    assert asked == [[0, 1, 2], [0, 2], [0, 2]]
    with pytest.raises(RunError, match=r"budget is spent: one round more would cost epsilon 1\.6"):
        algorithm.plan(state, range(3))


def test_all_clients_together_are_one_release_a_round_even_an_empty_one():
    algorithm = counted(budget=0.5, rates={WHOLE: 0.1}, releases=1)
    state = algorithm.init()
    for _ in range(5):
        tasks = algorithm.plan(state, range(3))
        state, _ = algorithm.aggregate(state, tasks, [])
    assert state.rounds == {WHOLE: 5}
    with pytest.raises(RunError, match="budget is spent"):
        algorithm.plan(state, range(3))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50)), max_size=30))
def test_the_foremost_pairs_cover_all_others(pairs):
    found = foremost(pairs)
    assert set(found) <= set(pairs)
    assert all(any(r >= rate and c >= count for r, c in found) for rate, count in pairs)
    assert not any(a != b and a[0] >= b[0] and a[1] >= b[1] for a in found for b in found)


def test_a_point_without_a_draw_is_the_batch_of_its_round_and_step():
    assert Point(quadratic_params(), 1, 0.0, 0, 0, 0).draw == b""
    assert isinstance(plain().plan(plain().init(), [0])[0], Task)
