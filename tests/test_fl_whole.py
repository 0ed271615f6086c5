"""Shared directions, a walk that stands for all, and the limit on what a first round can do."""

import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from toys import quadratic_bench, quadratic_params

from fedmezo.errors import RunError
from fedmezo.fl.aggregate import first_bounded, uniform_weights, weights_of
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.pool import directions_of
from fedmezo.fl.rates import Personal, with_personal_rates
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import WHOLE, is_whole, whole
from fedmezo.runtime.journal import Header, Journal, replay
from fedmezo.runtime.pull import Downlink, catch_up_
from fedmezo.runtime.simulate import Simulation
from fedmezo.zo.noise import NOISE_VERSION
from fedmezo.zo.perturb import apply_
from fedmezo.zo.seedsum import Update, Walk

SETTINGS = Settings(rate=0.01, steps=4, shared=True)
CLIENTS = (0, 1, 2)
PAIRS = Downlink(quadratic_params().dim, "pairs")


def fresh(**changes):
    return fedmezo(replace(SETTINGS, **changes), seed=5, cohort=3)


def pooled(**changes):
    return fedkseed(replace(SETTINGS, **changes), Pool(8), seed=5, cohort=3)


def with_mean(algorithm, *, strike=False):
    """The mean as a walk of nobody: the smallest thing that `gather` can do."""

    def gather(tasks, replies):
        pairs = [(task, reply) for task in tasks for reply in replies if reply.client == task.client]
        walks = [walk_of(task, reply.slopes).coefficients for task, reply in pairs]
        task, reply = whole(tasks[0], np.mean(walks, axis=0), loss=fmean(reply.loss for reply in replies))
        kept = [replace(one, slopes=(), loss=math.nan) for one in replies] if strike else replies
        return [*tasks, task], [*kept, reply]

    return replace(algorithm, gather=gather)


def header(bench):
    return Header("{}", "f", bench.params.layout(), "gaussian", NOISE_VERSION, "0", "now")


def simulated(algorithm, path, *, rounds=4):
    bench = quadratic_bench()
    with Journal.create(path, header(bench)) as journal:
        simulation = Simulation(algorithm, bench, journal, CLIENTS, rounds, dict, on_surge="warn", downlink=PAIRS)
        for _ in simulation.run():
            pass
        done = list(journal.rounds())
    return bench.params, simulation, done


def tasks_of(algorithm):
    return algorithm.plan(algorithm.init(), CLIENTS)


@pytest.mark.parametrize("make", [fresh, pooled])
def test_clients_share_directions_when_asked_to_and_only_then(make):
    shared = {directions_of(task).seeds for task in tasks_of(make())}
    assert len(shared) == 1
    own = [directions_of(task).seeds for task in tasks_of(make(shared=False))]
    assert len(set(own)) == 3
    assert not shared & set(own)


@pytest.mark.parametrize("make", [fresh, pooled])
def test_shared_directions_are_new_in_every_round(make):
    algorithm = make()
    first, second = (algorithm.plan(replace(algorithm.init(), round=at), CLIENTS)[0] for at in (0, 1))
    assert directions_of(first).seeds != directions_of(second).seeds


def test_a_whole_walks_by_the_coefficients_it_was_made_of():
    task = Task(3, 1, 7, 0.5, 1e-3, 3, directions=2, shared=True, momentum=0.5, clip=2.0, coding="float16")
    wanted = (0.5, -0.25, 0.0, 1.0, -2.0, 0.125)
    nobodys, reply = whole(task, wanted)
    assert (nobodys.client, reply.client, reply.round) == (WHOLE, WHOLE, 3)
    assert walk_of(nobodys, reply.slopes) == Walk(directions_of(task).seeds, wanted)


def test_a_whole_counts_alone():
    task = Task(0, 1, 7, 0.5, 1e-3, 1, shared=True)
    pairs = [(task, Reply(0, 1, 1, 1.0, (1.0,))), whole(task, (0.5,))]
    assert weights_of(pairs, uniform_weights) == (0.0, 1.0)
    assert weights_of(pairs[:1], uniform_weights) == (1.0,)
    assert weights_of([], uniform_weights) == ()


@pytest.mark.parametrize("make", [fresh, pooled])
@pytest.mark.parametrize("strike", [False, True])
def test_a_run_with_wholes_replays_restores_and_catches_up_to_its_own_bits(tmp_path, make, strike):
    algorithm = with_mean(make(clip=math.inf), strike=strike)
    params, simulation, done = simulated(algorithm, tmp_path / "run.sqlite")
    assert all([is_whole(entry.task) for entry in one.entries] == [False, False, False, True] for one in done)
    assert all([entry.weight for entry in one.entries] == [0, 0, 0, 1] for one in done)
    assert all(bool(entry.reply.slopes) == (not strike) for one in done for entry in one.entries[:3])
    bench = quadratic_bench()
    with Journal.open(tmp_path / "run.sqlite", readonly=True) as journal:
        rebuilt = quadratic_params()
        replay(rebuilt, journal)
        again = Simulation(algorithm, bench, journal, CLIENTS, 4, dict, on_surge="warn", downlink=PAIRS)
    assert rebuilt.digest() == bench.params.digest() == params.digest()
    assert repr(again.state) == repr(simulation.state)
    told = simulation._down.tell(algorithm.plan(simulation.state, CLIENTS), None)(0)
    assert all(len(news.tasks) == 1 and is_whole(news.tasks[0]) for news in told.content)
    late = quadratic_params()
    catch_up_(late, told.content, law="gaussian")
    assert late.digest() == params.digest()


@pytest.mark.parametrize("make", [fresh, pooled])
def test_the_mean_as_a_whole_is_the_weighted_mean_up_to_rounding(tmp_path, make):
    plain, _, _ = simulated(make(clip=math.inf), tmp_path / "plain.sqlite", rounds=1)
    meant, simulation, done = simulated(with_mean(make(clip=math.inf)), tmp_path / "mean.sqlite", rounds=1)
    begin = quadratic_params()
    for name, tensor in plain:
        moved = (tensor - begin[name]).abs().max()
        assert moved > 0
        # Coefficients are rounded to 11 bits.
        assert (tensor - meant[name]).abs().max() < 2**-9 * moved
    assert done[0].loss == pytest.approx(fmean(entry.reply.loss for entry in done[0].entries[:3]))
    sums = make(clip=math.inf).sums(simulation.state)
    assert (sums is None) == (make is fresh)


def test_the_clip_follows_the_clients_slopes_and_not_the_whole():
    algorithm = fresh()
    tasks = tasks_of(algorithm)
    replies = [Reply(0, client, 4, 1.0, (2.0,) * 4) for client in CLIENTS]
    plain, _ = algorithm.aggregate(algorithm.init(), tasks, replies)
    task, reply = whole(tasks[0], (1e-6,) * 4)
    state, update = algorithm.aggregate(algorithm.init(), [*tasks, task], [*replies, reply])
    assert state == plain
    assert update.weights == (0, 0, 0, 1)


def test_struck_replies_are_answers_only_beside_a_whole():
    algorithm = fresh()
    tasks = tasks_of(algorithm)
    struck = [Reply(0, client, 4, math.nan, ()) for client in CLIENTS]
    with pytest.raises(RunError, match="sent 0 slopes"):
        algorithm.aggregate(algorithm.init(), tasks, struck)
    task, reply = whole(tasks[0], (0.5,) * 4)
    _, update = algorithm.aggregate(algorithm.init(), [*tasks, task], [*struck, reply])
    assert update.parts[-1].coefficients == (0.5,) * 4


def test_personal_rates_hear_of_clients_only():
    algorithm = with_personal_rates(fresh(), Personal("update-difference"), seed=5, rate=0.01)
    tasks = tasks_of(algorithm)
    replies = [Reply(0, client, 4, 1.0 + client, (1.0 + client,) * 4) for client in CLIENTS]
    alone, _ = algorithm.aggregate(algorithm.init(), tasks, replies)
    task, reply = whole(tasks[0], (1.0,) * 4, loss=1.0)
    state, _ = algorithm.aggregate(algorithm.init(), [*tasks, task], [*replies, reply])
    assert state.phi == alone.phi
    assert set(state.phi) == set(CLIENTS)


def test_parts_of_weight_0_change_no_bit():
    params, other = quadratic_params(), quadratic_params()
    for one in (params, other):
        for _, tensor in one:
            tensor.view(-1)[0] = -0.0
    walk, idle = Walk((3,), (0.25,)), Walk((4, 5), (1e30, -1.0))
    apply_(params, Update((walk, idle), (0.0, 0.0)), law="gaussian")
    assert params.digest() == other.digest()
    apply_(params, Update((walk, idle), (0.5, 0.0)), law="gaussian")
    apply_(other, Update((walk,), (0.5,)), law="gaussian")
    assert params.digest() == other.digest()


def first_round(*slopes, clip=0.0):
    task = Task(0, 0, 7, 1.0, 1e-3, 2, clip=clip)
    return [(replace(task, client=at), Reply(0, at, 1, 1.0, (s, s))) for at, s in enumerate(slopes)]


def test_in_a_first_round_no_walk_counts_for_more_than_ten_medians():
    weights = first_bounded(uniform_weights)
    assert weights(first_round(1.0, 2.0, 3.0)) == uniform_weights([(), (), ()])
    pairs = first_round(1.0, 1.0, 1e30)
    bounded = weights(pairs)
    assert bounded[:2] == [1 / 3, 1 / 3]
    length = bounded[2] * math.hypot(*walk_of(*[pairs[2][0], pairs[2][1].slopes]).coefficients)
    assert length == pytest.approx(10 / 3 * math.hypot(1, 1), rel=1e-3)


def test_a_known_clip_leaves_the_weights_alone():
    assert first_bounded(uniform_weights)(first_round(1.0, 1.0, 1e30, clip=5.0)) == uniform_weights([(), (), ()])


def test_walks_of_nothing_are_left_alone():
    assert first_bounded(uniform_weights)(first_round(0.0, 0.0, 0.0)) == uniform_weights([(), (), ()])


def test_clients_without_a_number_do_not_take_the_others_weight():
    nan = (math.nan, math.nan)
    pairs = [(task, replace(reply, slopes=nan)) if at > 0 else (task, reply)
             for at, (task, reply) in enumerate(first_round(1.0, 1.0, 1.0))]  # fmt: skip
    assert first_bounded(uniform_weights)(pairs) == uniform_weights([(), (), ()])
