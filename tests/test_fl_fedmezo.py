"""FedMeZO: the numpy twin, the laws of one round, and the degenerate cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
from reference import fedmezo as twin
from toys import ToyBench, quadratic_bench, quadratic_loss, quadratic_params

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.aggregate import dataset_weights, sample_weights, uniform_weights, weighting
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.fedmezo import Settings, State, fedmezo
from fedmezo.fl.walk import walk_of
from fedmezo.zo.noise import derive_seed
from fedmezo.zo.perturb import apply_, step_
from fedmezo.zo.seedsum import Walk

CLIENTS = (0, 1, 2)
SETTINGS = Settings(rate=0.02, mu=1e-2, steps=4, clip=math.inf)


def play(settings, *, rounds, bench=None, clients=CLIENTS, cohort=None, seed=5, **options):
    """Runs rounds in the plainest way; returns (params, states, replies per round)."""
    bench = bench or quadratic_bench()
    algorithm = fedmezo(settings, seed=seed, cohort=cohort or len(clients), **options)
    state, states, history = algorithm.init(), [], []
    for _ in range(rounds):
        tasks = algorithm.plan(state, clients)
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law=settings.law)
        states.append(state)
        history.append(replies)
    return bench.params, states, history


@pytest.mark.parametrize(("clip", "directions"), [(math.inf, 1), (2.0, 1), (1.5, 3)])
def test_five_rounds_match_the_numpy_twin(clip, directions):
    settings = replace(SETTINGS, clip=clip, directions=directions)
    got, _, _ = play(settings, rounds=5)

    def loss(tensors, client, _round, _step):
        return 0.5 * sum(float(((t - client) ** 2).sum()) for t in tensors.values())

    start = {name: t.double().numpy() for name, t in quadratic_params()}
    trajectory = twin(
        start,
        loss,
        rounds=5,
        clients=CLIENTS,
        run_seed=5,
        rate=0.02,
        mu=1e-2,
        steps=4,
        directions=directions,
        clip=clip,
    )
    # Float32 masters and 11-bit coefficients against exact float64: 2**-11 of each step.
    for name, tensor in got:
        step = np.abs(trajectory[-1][name] - start[name]).max()
        assert np.abs(tensor.numpy() - trajectory[-1][name]).max() < 2**-9 * step


def test_five_rounds_match_the_numpy_twin_to_a_millionth_at_the_papers_rate():
    settings = replace(SETTINGS, rate=2e-5)
    got, _, _ = play(settings, rounds=5)
    start = {name: t.double().numpy() for name, t in quadratic_params()}

    def loss(tensors, client, _round, _step):
        return 0.5 * sum(float(((t - client) ** 2).sum()) for t in tensors.values())

    trajectory = twin(start, loss, rounds=5, clients=CLIENTS, run_seed=5, rate=2e-5, mu=1e-2, steps=4)
    for name, tensor in got:
        assert np.abs(tensor.numpy() - trajectory[-1][name]).max() < 1e-6
        assert np.abs(tensor.numpy() - start[name]).max() > 1e-5


def test_one_client_one_step_is_mezo():
    bench, by_hand = quadratic_bench(), quadratic_params()
    settings = replace(SETTINGS, steps=1)
    got, _, history = play(settings, rounds=1, bench=bench, clients=(1,))
    slope = history[0][0].slopes[0]
    step_(by_hand, derive_seed("direction", 5, 0, 1, 0, 0), coefficient=-0.02 * slope, law="gaussian")
    assert got.digest() == by_hand.digest()


def test_dense_transport_gives_the_bits_of_scalar_transport():
    scalar, _, _ = play(replace(SETTINGS, steps=7), rounds=4, cohort=2)
    dense, _, history = play(replace(SETTINGS, steps=7, dense=True), rounds=4, cohort=2)
    assert history[0][0].delta is not None
    assert scalar.digest() == dense.digest()


def test_a_round_does_not_depend_on_the_order_of_replies():
    algorithm = fedmezo(SETTINGS, seed=1, cohort=3)
    tasks = algorithm.plan(State(), CLIENTS)
    replies = algorithm.client(tasks, quadratic_bench())
    assert algorithm.aggregate(State(), tasks, replies) == algorithm.aggregate(State(), tasks[::-1], replies[::-1])


def test_a_run_does_not_depend_on_how_many_copies_fit():
    digests = {play(SETTINGS, rounds=3, bench=quadratic_bench(capacity=c))[0].digest() for c in (1, 2, 3)}
    assert len(digests) == 1


def test_a_client_call_leaves_the_weights_bit_for_bit():
    bench = quadratic_bench()
    before = bench.params.digest()
    algorithm = fedmezo(SETTINGS, seed=1, cohort=3)
    algorithm.client(algorithm.plan(State(), CLIENTS), bench)
    assert bench.params.digest() == before


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
@pytest.mark.parametrize("estimator", ["two-point", "forward"])
def test_the_loss_falls_to_the_mean_of_the_clients_optima(law, estimator):
    bench = quadratic_bench(law=law)
    settings = replace(SETTINGS, law=law, estimator=estimator, steps=10, mu=1e-3, clip=3.0)
    got, _, _ = play(settings, rounds=60, bench=bench)
    assert max(float((t - 1.0).abs().max()) for _, t in got) < 0.5


def test_the_printed_forward_scale_halves_the_step():
    whole = play(replace(SETTINGS, estimator="forward", steps=1), rounds=1)[2][0]
    half = play(replace(SETTINGS, estimator="forward-half", steps=1), rounds=1)[2][0]
    for a, b in zip(whole, half, strict=True):
        assert b.slopes[0] == pytest.approx(a.slopes[0] / 2, rel=1e-6)


def test_cohorts_come_from_the_runs_seed_and_reach_every_client():
    algorithm = fedmezo(SETTINGS, seed=1, cohort=2)
    drawn = [tuple(t.client for t in algorithm.plan(State(round=r), range(7))) for r in range(60)]
    again = [tuple(t.client for t in algorithm.plan(State(round=r), list(range(7))[::-1])) for r in range(60)]
    assert drawn == again
    assert {c for pair in drawn for c in pair} == set(range(7))
    assert all(len(set(pair)) == 2 for pair in drawn)
    other = fedmezo(SETTINGS, seed=2, cohort=2)
    assert drawn != [tuple(t.client for t in other.plan(State(round=r), range(7))) for r in range(60)]


def test_a_skipped_step_moves_nothing_and_only_its_own_client_loses():
    def broken(tensors, client, round_number, step):
        return math.nan if client == 1 else quadratic_loss(tensors, client, round_number, step)

    bench = ToyBench(quadratic_params(), broken)
    _, states, history = play(SETTINGS, rounds=1, bench=bench)
    reply = history[0][1]
    assert reply.skipped == 4
    assert reply.examples == 0
    assert math.isnan(reply.loss)
    task = fedmezo(SETTINGS, seed=5, cohort=3).plan(State(), CLIENTS)[1]
    assert set(walk_of(task, reply.slopes).coefficients) == {0.0}
    assert states[0].scale > 0


def test_clipping_follows_the_running_scale_of_past_rounds():
    settings = replace(SETTINGS, clip=3.0)
    algorithm = fedmezo(settings, seed=5, cohort=3)
    assert algorithm.plan(State(), CLIENTS)[0].clip == 0
    state = State(round=3, scale=2.0)
    assert algorithm.plan(state, CLIENTS)[0].clip == 6.0
    assert fedmezo(SETTINGS, seed=5, cohort=3).plan(state, CLIENTS)[0].clip == math.inf


@pytest.mark.parametrize(("seen", "expected"), [(100.0, 2.04), (2.01, 2.01), (1.9, 1.9), (0.01, 1.8), (0.0, 2.0)])
def test_the_running_scale_rises_slowly_and_falls_faster(seen, expected):
    algorithm = fedmezo(replace(SETTINGS, steps=1), seed=1, cohort=2)
    slopes = (seen / 1.4826,) if seen else (math.nan,)
    replies = [Reply(0, c, examples=1, loss=1.0, slopes=slopes) for c in (0, 1)]
    before = State(scale=2.0, lowest=1.0)
    state, _ = algorithm.aggregate(before, algorithm.plan(before, (0, 1)), replies)
    assert state.scale == pytest.approx(expected)
    assert state.lowest == min(1.0, state.scale)


def test_the_running_scale_never_exceeds_four_times_its_lowest():
    algorithm = fedmezo(replace(SETTINGS, steps=1), seed=1, cohort=2)
    state = State()
    for number in range(300):
        replies = [
            Reply(number, c, examples=1, loss=1.0, slopes=(1.5**number if number < 200 else 1.0,)) for c in (0, 1)
        ]
        state, _ = algorithm.aggregate(state, algorithm.plan(state, (0, 1)), replies)
        assert state.scale <= 4 * state.lowest
    assert state.scale == pytest.approx(1.4826)


@pytest.mark.parametrize(("decay", "expected"), [("constant", 1.0), ("linear", 0.75), ("cosine", 0.853553)])
def test_rates_decay(decay, expected):
    settings = replace(SETTINGS, decay=decay, rounds=8)
    task = fedmezo(settings, seed=1, cohort=3).plan(State(round=2), CLIENTS)[0]
    assert task.rate == pytest.approx(0.02 * expected, rel=1e-5)


def test_client_rates_and_guards_scale_the_rate():
    algorithm = fedmezo(SETTINGS, seed=1, cohort=3)
    slow = algorithm.slow_down(algorithm.with_factors(State(), {1: 2.0, 2: 3.0}), 0.5)
    assert [t.rate for t in algorithm.plan(slow, CLIENTS)] == [0.01, 0.02, 0.03]


def test_weightings():
    tasks = fedmezo(replace(SETTINGS, steps=1), seed=1, cohort=2).plan(State(), (0, 1))
    replies = [Reply(0, c, examples=n, loss=1.0, slopes=(0.0,)) for c, n in ((0, 1), (1, 3))]
    pairs = list(zip(tasks, replies, strict=True))
    assert uniform_weights(pairs) == [0.5, 0.5]
    assert sample_weights(pairs) == [0.25, 0.75]
    assert dataset_weights({0: 10, 1: 30})(pairs) == [0.25, 0.75]
    assert weighting("samples", {}) is sample_weights
    with pytest.raises(ConfigError, match=r"federation\.weighting"):
        weighting("median", {})
    with pytest.raises(RunError, match="single example"):
        sample_weights([(task, replace(reply, examples=0)) for task, reply in pairs])


def test_weights_reach_the_update():
    algorithm = fedmezo(replace(SETTINGS, steps=1), seed=1, cohort=2, weights=sample_weights)
    replies = [Reply(0, c, examples=n, loss=1.0, slopes=(1.0,)) for c, n in ((0, 1), (1, 3))]
    _, update = algorithm.aggregate(State(), algorithm.plan(State(), (0, 1)), replies)
    assert update.weights == (0.25, 0.75)
    assert all(isinstance(part, Walk) for part in update.parts)


def test_strange_replies_are_refused():
    algorithm = fedmezo(SETTINGS, seed=1, cohort=2)
    tasks = algorithm.plan(State(), (0, 1))
    good = Reply(0, 0, examples=1, loss=1.0, slopes=(1.0,) * 4)
    with pytest.raises(RunError, match="twice"):
        algorithm.aggregate(State(), tasks, [good, good])
    with pytest.raises(RunError, match="expected 4"):
        algorithm.aggregate(State(), tasks, [replace(good, slopes=(1.0,))])
    with pytest.raises(RunError, match="round 3"):
        algorithm.aggregate(State(), tasks, [replace(good, round=3)])
    for others in ([], tasks[1:], [replace(task, round=3) for task in tasks]):
        with pytest.raises(RunError, match=r"^Round 0: client 0 replied, and there is no task for it; was it asked\?$"):
            algorithm.aggregate(State(), others, [good])


def test_a_round_adds_what_its_own_tasks_say_whatever_would_be_planned_now():
    algorithm, other = (fedmezo(replace(SETTINGS, rate=rate), seed=1, cohort=3) for rate in (0.02, 0.5))
    tasks = [replace(task, steps=2 + task.client) for task in algorithm.plan(State(), CLIENTS)]
    replies = [Reply(0, task.client, 1, 1.0, (1.0,) * task.slopes) for task in tasks]
    found = algorithm.aggregate(State(), tasks, replies)
    assert found[1].parts == tuple(walk_of(task, (1.0,) * (2 + task.client)) for task in tasks)
    assert other.aggregate(State(), tasks, replies) == found
    with pytest.raises(RunError, match="client 2 sent 3 slopes for round 0, expected 4"):
        algorithm.aggregate(State(), tasks, [replace(replies[2], slopes=(1.0,) * 3)])


def test_a_task_without_a_reply_adds_nothing():
    algorithm = fedmezo(SETTINGS, seed=1, cohort=3)
    tasks = algorithm.plan(State(), CLIENTS)
    replies = [Reply(0, client, 1, 1.0, (1.0 + client,) * 4) for client in (0, 2)]
    found = algorithm.aggregate(State(), tasks, replies)
    assert found == algorithm.aggregate(State(), [tasks[0], tasks[2]], replies)
    assert found[1].parts == (walk_of(tasks[0], (1.0,) * 4), walk_of(tasks[2], (3.0,) * 4))


@pytest.mark.parametrize(
    "change",
    [
        {"rate": math.nan},
        {"rate": -1.0},
        {"mu": 0.0},
        {"steps": 0},
        {"directions": 0},
        {"clip": -1.0},
        {"seed": 2**64},
        {"round": -1},
        {"law": "cauchy"},
        {"estimator": "none"},
        {"multiple": 0.0},
        {"client": -1},
    ],
)
def test_a_bad_task_is_refused_at_birth(change):
    good = Task(0, 0, 0, 0.1, 1e-3, 1)
    with pytest.raises(RunError, match="Task"):
        replace(good, **change)


def test_an_infinite_slope_never_becomes_a_reply():
    with pytest.raises(RunError, match="slopes"):
        Reply(0, 0, 1, 1.0, (math.inf,))
