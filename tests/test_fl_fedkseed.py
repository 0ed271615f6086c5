"""FedKSeed and FedKSeed-Pro: the numpy twins, the pool's laws, and what they share with FedMeZO."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import fedkseed as twin
from reference import pro_chances
from toys import ToyBench, quadratic_bench, quadratic_loss, quadratic_params

from fedmezo.fl import walk as walk_module
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.fedkseed import Pool, PoolState, fedkseed, odds_of
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.pool import Directions, directions_of, pool_seed
from fedmezo.fl.walk import walk_of
from fedmezo.zo.noise import derive_seed
from fedmezo.zo.perturb import add_sum_, apply_
from fedmezo.zo.seedsum import SeedSum

CLIENTS = (0, 1, 2)
SETTINGS = Settings(rate=2e-5, mu=1e-2, steps=6, clip=math.inf)


def play(algorithm, *, rounds, bench=None, clients=CLIENTS, law="gaussian"):
    """Runs rounds in the plainest way; returns (params, last state, all tasks, all replies)."""
    bench = bench or quadratic_bench()
    state, asked, answered = algorithm.init(), [], []
    for _ in range(rounds):
        tasks = algorithm.plan(state, clients)
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law=law)
        asked.append(tasks)
        answered.append(replies)
    return bench.params, state, asked, answered


def plain_loss(tensors, client, _round, _step):
    return 0.5 * sum(float(((t - client) ** 2).sum()) for t in tensors.values())


@pytest.mark.parametrize("pro", [False, True])
def test_five_rounds_match_the_numpy_twin_to_a_millionth(pro):
    algorithm = fedkseed(SETTINGS, Pool(16, pro=pro), seed=5, cohort=3)
    got, state, _, _ = play(algorithm, rounds=5)
    start = {name: t.double().numpy() for name, t in quadratic_params()}
    options = {"rounds": 5, "clients": CLIENTS, "run_seed": 5, "rate": 2e-5, "mu": 1e-2, "steps": 6, "pool": 16}
    trajectory, accumulators, history = twin(start, plain_loss, pro=pro, **options)
    for name, tensor in got:
        assert np.abs(tensor.numpy() - trajectory[-1][name]).max() < 1e-6
        assert np.abs(tensor.numpy() - start[name]).max() > 1e-5
    # Coefficients have 11 bits, the twin's slopes all of them.
    assert np.abs(state.sums + 2e-5 * accumulators).max() < 2**-10 * np.abs(2e-5 * accumulators).max()
    assert list(state.counts) == [len(seen) - (not pro) for seen in history]


def test_pro_draws_as_the_paper_has_it():
    algorithm = fedkseed(SETTINGS, Pool(16, pro=True), seed=5, cohort=3)
    _, state, _, _ = play(algorithm, rounds=4)
    start = {name: t.double().numpy() for name, t in quadratic_params()}
    options = {"rounds": 4, "clients": CLIENTS, "run_seed": 5, "rate": 2e-5, "mu": 1e-2, "steps": 6, "pool": 16}
    chances = pro_chances(twin(start, plain_loss, pro=True, **options)[2])
    odds = np.array(odds_of(state, Pool(16, pro=True)))
    assert odds / odds.sum() == pytest.approx(chances, rel=1e-3)
    assert chances.max() / chances.min() > 2


def test_the_first_round_of_pro_is_uniform_and_the_second_is_not():
    algorithm = fedkseed(SETTINGS, Pool(16, pro=True), seed=5, cohort=3)
    _, _, asked, _ = play(algorithm, rounds=2)
    assert all(task.odds == () for task in asked[0])
    assert all(len(set(task.odds)) > 1 for task in asked[1])
    uniform = fedkseed(SETTINGS, Pool(16), seed=5, cohort=3)
    assert directions_of(asked[0][0]) == directions_of(uniform.plan(uniform.init(), CLIENTS)[0])


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_with_the_same_seeds_fedkseed_is_fedmezo_bit_for_bit(law, monkeypatch):
    # As many candidates as steps in the whole run and more; FedMeZO is made to take the seeds that were drawn.
    chosen = replace(SETTINGS, rate=0.02, clip=3.0, law=law, decay="linear", rounds=8)
    pooled, state, asked, _ = play(
        fedkseed(chosen, Pool(4096), seed=5, cohort=2), rounds=4, bench=quadratic_bench(law=law), law=law
    )
    drawn = {(task.round, task.client): directions_of(task).seeds for tasks in asked for task in tasks}
    monkeypatch.setattr(walk_module, "directions_of", lambda task: Directions(drawn[task.round, task.client]))
    fresh, _, _, _ = play(fedmezo(chosen, seed=5, cohort=2), rounds=4, bench=quadratic_bench(law=law), law=law)
    assert pooled.digest() == fresh.digest()
    assert pooled.digest() != quadratic_params().digest()
    assert np.count_nonzero(state.sums) == len({seed for seeds in drawn.values() for seed in seeds})


def test_the_model_is_the_base_plus_the_sums_within_rounding():
    rounds = 12
    got, state, _, _ = play(fedkseed(replace(SETTINGS, rate=0.02), Pool(32), seed=5, cohort=2), rounds=rounds)
    rebuilt = quadratic_params()
    single = state.sums.astype(np.float32)
    add_sum_(rebuilt, SeedSum.of((pool_seed(5, j), float(c)) for j, c in enumerate(single) if c), law="gaussian")
    for name, tensor in rebuilt:
        unit = np.spacing(np.maximum(np.abs(got[name].numpy()), 1).astype(np.float32))
        assert (np.abs(tensor.numpy() - got[name].numpy()) <= (rounds + 2) / 2 * unit + 1e-6).all()
    assert rebuilt.digest() != quadratic_params().digest()


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_the_state_is_bounded_by_the_pool_whatever_the_number_of_rounds(rounds, pool, steps, pro):
    algorithm = fedkseed(replace(SETTINGS, steps=steps), Pool(pool, pro=bool(pro)), seed=1, cohort=2)
    state = algorithm.init()
    for number in range(rounds):
        tasks = algorithm.plan(state, CLIENTS)
        replies = [Reply(number, task.client, 1, 1.0, (0.5,) * steps) for task in tasks]
        state, _ = algorithm.aggregate(state, tasks, replies)
    assert {state.sums.size, state.scores.size, state.counts.size} == {pool}
    assert state.counts.sum() == 2 * steps * rounds + pool * bool(pro)
    odds = odds_of(state, Pool(pool, pro=bool(pro)))
    assert len(odds) in (0, pool)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.floats(0.05, 5))
def test_no_candidate_is_more_than_e_times_likelier_at_temperature_one(slopes, temperature):
    state = seen_once(slopes)
    for heat in (1.0, temperature):
        odds = odds_of(state, Pool(len(slopes), pro=True, temperature=heat))
        if odds:
            assert 1 <= min(odds) <= max(odds) == 65535
            # Odds are whole numbers, each rounded by half of one at most.
            assert (max(odds) - 0.5) / (min(odds) + 0.5) <= math.exp(1 / heat) * (1 + 1e-9)


def test_lower_temperature_prefers_the_best_more():
    state = seen_once([1.0, 5.0, 10.0])
    cold, hot = (odds_of(state, Pool(3, pro=True, temperature=heat)) for heat in (0.3, 3.0))
    assert cold[2] / cold[0] > 10 > hot[2] / hot[0] > 1


def test_the_score_of_a_seed_is_its_mean_clipped_slope_whatever_its_sign():
    state = seen_once([-2000.0, 1000.0, 500.0])
    odds = odds_of(state, Pool(3, pro=True, score_clip=1000.0))
    assert odds[0] == odds[1] > odds[2]
    free = odds_of(seen_once([-2000.0, 1000.0, 500.0], clip=math.inf), Pool(3, pro=True))
    assert free[0] > free[1] > free[2]


def seen_once(slopes, clip=1000.0):
    """Returns the state of a pool whose candidates have been drawn once each, without a prior."""
    one = PoolState(sums=np.zeros(len(slopes)), scores=np.zeros(len(slopes)), counts=np.zeros(len(slopes), np.int64))
    return replace(one, scores=np.minimum(np.abs(slopes), clip), counts=np.ones(len(slopes), np.int64))


def test_without_a_prior_an_unseen_seed_is_an_average_one():
    state = PoolState(sums=np.zeros(3), scores=np.array([4.0, 2.0, 0.0]), counts=np.array([1, 1, 0]))
    odds = odds_of(state, Pool(3, pro=True, score_prior=False))
    assert odds[0] > odds[2] > odds[1]
    with_prior = replace(state, counts=state.counts + 1)
    assert odds_of(with_prior, Pool(3, pro=True))[2] == min(odds_of(with_prior, Pool(3, pro=True)))


def test_draws_follow_the_odds():
    base = Task(0, 0, 3, 1e-3, 1e-3, 4000, pool=3)
    even = np.bincount(directions_of(base).places, minlength=3) / 4000
    uneven = np.bincount(directions_of(replace(base, odds=(1, 2, 5))).places, minlength=3) / 4000
    assert even == pytest.approx([1 / 3] * 3, abs=0.03)
    assert uneven == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)


def test_draws_differ_between_clients_rounds_steps_and_runs_and_never_change():
    base = Task(0, 0, 3, 1e-3, 1e-3, 20, pool=1024)
    others = [replace(base, client=1), replace(base, round=1), replace(base, seed=4)]
    places = [directions_of(task).places for task in (base, *others)]
    assert len(set(places)) == 4
    assert len(set(places[0])) > 15
    assert places[0][:5] == tuple(derive_seed("draw", 3, 0, 0, step, 0) * 1024 >> 64 for step in range(5))


def test_importance_weights_make_the_mean_step_that_of_a_uniform_draw():
    odds = (1, 2, 5)
    task = Task(0, 0, 3, 0.5, 1e-3, 1, pool=3, odds=odds, importance=True)
    expected, total = np.zeros(3), sum(odds)
    for client in range(400):
        mine = replace(task, client=client)
        place = directions_of(mine).places[0]
        walk = walk_of(mine, (1.0,))
        assert walk.coefficients[0] == pytest.approx(-0.5 * total / (3 * odds[place]), rel=2**-11)
    for place, chance in enumerate(odds):
        weight = total / (3 * chance)
        expected[place] = chance / total * weight
    assert expected == pytest.approx([1 / 3] * 3)


def test_a_skipped_step_adds_nothing_to_sums_or_history():
    def broken(tensors, client, round_number, step):
        return math.nan if client == 1 else quadratic_loss(tensors, client, round_number, step)

    algorithm = fedkseed(SETTINGS, Pool(64, pro=True), seed=5, cohort=3)
    _, state, asked, answered = play(algorithm, rounds=1, bench=ToyBench(quadratic_params(), broken))
    lost = set(directions_of(asked[0][1]).places)
    kept = {place for at in (0, 2) for place in directions_of(asked[0][at]).places}
    assert answered[0][1].skipped == 6
    assert all(state.sums[place] == 0 and state.counts[place] == 1 for place in lost - kept)
    assert all(state.sums[place] != 0 for place in kept)


def test_history_is_the_servers_own_and_a_client_learns_it_from_its_task_alone():
    # In the papers' code clients append to the server's list; here a state never changes after it was returned.
    algorithm = fedkseed(SETTINGS, Pool(16, pro=True), seed=5, cohort=3)
    state = algorithm.init()
    kept = state.counts.copy()
    tasks = algorithm.plan(state, CLIENTS)
    replies = algorithm.client(tasks, quadratic_bench())
    after, _ = algorithm.aggregate(state, tasks, replies)
    assert (state.counts == kept).all() and (after.counts != kept).any()
    again, _ = algorithm.aggregate(state, tasks, replies)
    assert (again.scores == after.scores).all() and (again.sums == after.sums).all()


def test_a_guard_slows_a_pool_down_too():
    algorithm = fedkseed(SETTINGS, Pool(4), seed=0, cohort=1)
    state = algorithm.slow_down(algorithm.init(), 0.5)
    assert algorithm.plan(state, CLIENTS)[0].rate == pytest.approx(0.5 * SETTINGS.rate)


def test_rates_may_decay_because_the_sums_are_of_coefficients():
    chosen = replace(SETTINGS, rate=0.02, decay="cosine", rounds=6)
    got, state, _, _ = play(fedkseed(chosen, Pool(8), seed=2, cohort=3), rounds=6)
    rebuilt = quadratic_params()
    add_sum_(
        rebuilt, SeedSum.of((pool_seed(2, j), float(np.float32(c))) for j, c in enumerate(state.sums)), law="gaussian"
    )
    for name, tensor in rebuilt:
        assert np.abs(tensor.numpy() - got[name].numpy()).max() < 1e-5


@pytest.mark.parametrize("pro", [False, True])
def test_sums_are_of_the_tasks_that_were_sent_whatever_would_be_planned_now(pro):
    def falling(rounds):
        return fedkseed(replace(SETTINGS, decay="linear", rounds=rounds), Pool(8, pro=pro), seed=2, cohort=3)

    _, live, asked, answered = play(falling(4), rounds=4)
    longer = falling(40)
    state = longer.init()
    for tasks, replies in zip(asked, answered, strict=True):
        state, _ = longer.aggregate(state, tasks, replies)
    assert state.sums.tolist() == live.sums.tolist() != [0.0] * 8
    assert odds_of(state, Pool(8, pro=pro)) == odds_of(live, Pool(8, pro=pro))


@pytest.mark.parametrize("prior", [True, False])
def test_a_history_holds_clipped_slopes_and_begins_with_a_prior_or_not(prior):
    pool = Pool(16, pro=True, score_clip=0.5, score_prior=prior)
    algorithm = fedkseed(SETTINGS, pool, seed=5, cohort=3)
    assert algorithm.init().counts.sum() == (16 if prior else 0)
    _, state, _, answered = play(algorithm, rounds=1)
    slopes = np.abs([slope for reply in answered[0] for slope in reply.slopes])
    assert state.scores.sum() == pytest.approx(np.minimum(slopes, 0.5).sum())
    assert slopes.max() > 0.5 > slopes.min()
