"""Personalised rates: laws of Phi, of the wrapper around every algorithm, its controls, and the paper's own numbers."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import StopAfter, StopError, small
from toys import ToyBench, quadratic_bench, quadratic_loss, quadratic_params

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.algorithm import Reply
from fedmezo.fl.fedavg import Settings as GradientSettings
from fedmezo.fl.fedavg import fedavg
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.phi import dealt, deviations, normalised, random_phi, smoothed
from fedmezo.fl.rates import Personal, PersonalState, factor, phi_of, with_personal_rates
from fedmezo.fl.signals import distances, gradient_gaps, losses, scalar_distances, squared_gradients
from fedmezo.fl.walk import walk_of
from fedmezo.runtime.journal import Journal
from fedmezo.studies.charts import charts
from fedmezo.studies.compare.verdicts import paired_interval
from fedmezo.studies.config import load_config
from fedmezo.studies.facts import gather
from fedmezo.studies.run import resume, run, verify
from fedmezo.zo.noise import noise
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_, walk_delta
from fedmezo.zo.seedsum import DenseDelta, Update, Walk

RATE = 5e-3
PLAIN = Settings(rate=RATE, mu=1e-2, steps=4, clip=math.inf)
SIGNALS = ("round-loss", "five-round-loss", "update-difference", "heterogeneity", "random")
NORMALISERS = ("maxabs", "zscore-tanh", "rank", "none")
VALUES = st.dictionaries(st.integers(0, 99), st.floats(-1e100, 1e100), max_size=12)
WALKERS = {
    "fedmezo": lambda settings, cohort: fedmezo(settings, seed=5, cohort=cohort),
    "fedkseed": lambda settings, cohort: fedkseed(settings, Pool(16), seed=5, cohort=cohort),
    "fedkseed-pro": lambda settings, cohort: fedkseed(settings, Pool(16, pro=True), seed=5, cohort=cohort),
}


def personal_of(algorithm, signal, **options):
    return with_personal_rates(
        algorithm, Personal(signal, **options), seed=5, rate=RATE, params=quadratic_params(), law="gaussian"
    )


def play(algorithm, bench, *, clients, rounds=8):
    """Returns the parameters, the state and, round by round, client -> rate."""
    state, rates = algorithm.init(), []
    for _ in range(rounds):
        tasks = algorithm.plan(state, range(clients))
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law="gaussian")
        rates.append({task.client: task.rate for task in tasks})
    return bench.params, state, rates


def alike_loss(tensors, client, round, step):
    return quadratic_loss(tensors, 1, round, step)


# --- laws of Phi ---


@given(VALUES, st.sampled_from(NORMALISERS))
def test_phi_is_finite_and_bounded_for_any_values(values, how):
    phi = normalised(deviations(values), how=how)
    assert set(phi) == set(values)
    assert all(-1 <= p <= 1 for p in phi.values())
    if how in ("maxabs", "rank"):
        assert abs(sum(phi.values())) < 1e-6 * max(len(phi), 1)
    if how == "maxabs" and any(phi.values()):
        assert max(map(abs, phi.values())) == 1


@given(VALUES, st.sampled_from(NORMALISERS), st.randoms(use_true_random=False))
def test_renaming_the_clients_renames_phi(values, how, draw):
    taken = draw.sample(sorted(values), len(values))
    names = dict(zip(sorted(values), taken, strict=True))
    renamed = normalised(deviations({names[c]: v for c, v in values.items()}), how=how)
    assert renamed == {names[c]: p for c, p in normalised(deviations(values), how=how).items()}


@given(st.sets(st.integers(0, 99), min_size=1), st.floats(-1e100, 1e100), st.sampled_from(NORMALISERS))
def test_equal_values_give_phi_zero(clients, value, how):
    assert set(normalised(deviations(dict.fromkeys(clients, value)), how=how).values()) == {0.0}


@given(VALUES, st.sampled_from(NORMALISERS))
def test_a_larger_value_never_has_a_smaller_phi(values, how):
    phi = normalised(deviations(values), how=how)
    ordered = sorted(values, key=values.__getitem__)
    assert all(phi[a] <= phi[b] for a, b in pairwise(ordered))


@given(VALUES, st.integers(0, 2**32), st.integers(0, 1000))
def test_dealt_phi_are_the_same_phi(values, seed, round):
    assert sorted(dealt(values, seed=seed, round=round).values()) == sorted(values.values())
    assert set(dealt(values, seed=seed, round=round)) == set(values)


def test_deals_differ_by_round_and_send_every_phi_everywhere():
    phi = {client: float(client) for client in range(4)}
    deals = [dealt(phi, seed=1, round=number) for number in range(400)]
    for client in phi:
        got = [deal[client] for deal in deals]
        assert all(60 < got.count(value) < 140 for value in phi.values())


def test_random_phi_is_uniform_and_named():
    drawn = np.array([random_phi(3, number, client) for number in range(50) for client in range(20)])
    assert abs(drawn.mean()) < 0.06 and drawn.min() < -0.99 and drawn.max() > 0.99
    assert np.var(drawn) == pytest.approx(1 / 3, rel=0.1)
    assert random_phi(3, 1, 2) == random_phi(3, 1, 2) != random_phi(4, 1, 2)


@given(
    st.floats(-1, 1),
    st.floats(-10, 10),
    st.floats(0, 1),
    st.floats(1, 100),
    st.floats(1e-9, 1) | st.just(math.inf),
    st.sampled_from(("multiplicative", "additive")),
)
def test_rates_stay_in_their_clamp_and_under_the_cap(phi, gain, lowest, highest, cap, mode):
    personal = Personal("random", alpha=gain, delta=gain, mode=mode, lowest=lowest, highest=highest, cap=cap)
    found = factor(phi, personal, rate=RATE)
    assert found <= highest and found * RATE <= cap * (1 + 1e-12)
    assert found >= min(lowest, cap / RATE)


def test_no_phi_is_the_plain_rate_and_both_modes_agree():
    assert factor(0.0, Personal("random"), rate=RATE) == 1.0
    paper, code = Personal("random"), Personal("random", mode="additive", delta=5e-6)
    for phi in (-1.0, -0.3, 0.7, 1.0):
        assert factor(phi, paper, rate=1e-5) == pytest.approx(1 + 0.5 * phi)
        assert factor(phi, code, rate=1e-5) == pytest.approx(factor(phi, paper, rate=1e-5))


def test_ties_share_a_rank():
    assert normalised({0: 3.0, 1: -1.0, 2: 3.0, 3: 9.0}, how="rank") == {0: 0.0, 1: -1.0, 2: 0.0, 3: 1.0}
    assert normalised({4: 2.0}, how="rank") == {4: 0.0}


def test_the_window_is_the_warm_up_and_absent_clients_are_left_alone():
    personal = Personal("five-round-loss")
    seen = [{0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0}, {1: 5.0}, {}, {0: 2.0, 2: 8.0}]
    assert phi_of(personal, seen[:4]) == {}
    # Means of deviations: client 0 (-1, -0.5, -3), 1 (0, 0.5, 0), 2 (1, 3).
    gaps = {0: -1.5, 1: 0.5 / 3, 2: 2.0}
    assert phi_of(personal, seen) == pytest.approx({c: g / 2 for c, g in gaps.items()})


def test_deviations_that_cancel_over_the_window_are_none():
    seen = [{0: 0.1, 1: 0.7, 2: 0.4}, {0: 0.7, 1: 0.1, 2: 0.4}]
    assert phi_of(Personal("round-loss", window=2), seen) == {0: 0.0, 1: 0.0, 2: 0.0}


@given(VALUES, VALUES, st.floats(0, 0.99))
def test_smoothing_mixes_the_old_and_the_new(old, new, keep):
    mixed = smoothed(old, new, keep=keep)
    for client, value in mixed.items():
        bounds = (old.get(client, 0.0), new.get(client, 0.0))
        assert min(bounds) - 1e-9 * abs(min(bounds)) <= value <= max(bounds) + 1e-9 * abs(max(bounds))


# --- signals ---


def reply_of(client, slopes, loss=1.0):
    return Reply(0, client, 1, loss, tuple(slopes))


def test_a_client_whose_losses_were_not_finite_has_no_signal():
    replies = [reply_of(0, (1.0, 2.0)), reply_of(1, (math.nan, math.nan), math.nan), reply_of(2, (3.0, math.nan))]
    walks = {client: Walk((1, 2), (0.1, 0.2)) for client in (0, 1, 2)}
    assert losses(replies) == {0: 1.0, 2: 1.0}
    assert squared_gradients(replies) == {0: 2.5, 2: 9.0}
    assert set(gradient_gaps(replies, walks)) == {0, 2}


def test_squared_slopes_estimate_the_squared_gradient():
    gradient = np.array([3.0, -4.0, 0.0])
    draws = np.stack([noise(seed, "a", size=3).double().numpy() for seed in range(4000)])
    found = squared_gradients([reply_of(0, (draws @ gradient).tolist())])
    assert found[0] == pytest.approx(25.0, rel=4 * math.sqrt(2 / 4000))


def test_slopes_along_shared_directions_give_the_distance_of_gradients():
    gradients = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 6.0], [1.0, 1.0, 1.0]])
    seeds = tuple(range(4000))
    draws = np.stack([noise(seed, "a", size=3).double().numpy() for seed in seeds])
    replies = [reply_of(c, (draws @ g).tolist()) for c, g in enumerate(gradients)]
    found = gradient_gaps(replies, dict.fromkeys(range(4), Walk(seeds, (0.1,) * 4000)))
    true = ((gradients - gradients.mean(0)) ** 2).sum(1)
    assert [found[c] for c in range(4)] == pytest.approx(true.tolist(), rel=0.1, abs=0.5)


def test_without_shared_directions_there_is_no_distance_of_gradients():
    replies = [reply_of(0, (1.0, 2.0)), reply_of(1, (3.0, 4.0))]
    assert gradient_gaps(replies, {0: Walk((1, 2), (0.1, 0.1)), 1: Walk((3, 4), (0.1, 0.1))}) == {}


def some_walks(*, clients, steps, pool, seed=0):
    draw = np.random.default_rng(seed)
    for client in range(clients):
        seeds = draw.integers(0, pool, steps) if pool else 1000 * client + np.arange(steps)
        amounts = draw.normal(size=steps) * (1 + client)
        # As they are applied: 11 significant bits.
        yield Walk(tuple(map(int, seeds)), tuple(float(np.float16(c)) for c in amounts))


@pytest.mark.parametrize("pool", [0, 6], ids=["fresh directions", "shared directions"])
@pytest.mark.parametrize("clients", [2, 3, 8])
def test_distances_from_scalars_are_those_of_the_written_updates(pool, clients):
    params = Params({"a": torch.zeros(150, 200), "b": torch.zeros(10_000)})
    walks = list(some_walks(clients=clients, steps=5, pool=pool))
    scalar = scalar_distances(walks, dim=params.dim)
    written = [walk_delta(params, walk, law="gaussian").tensors for walk in walks]
    flat = np.stack([np.concatenate([t.numpy().ravel() for t in w.values()]) for w in written])
    exact = np.linalg.norm(flat - flat.mean(0), axis=1)
    # The stated accuracy, with four deviations.
    assert scalar == pytest.approx(exact.tolist(), rel=4 * math.sqrt(1 / (2 * params.dim)) + 5 / params.dim)


def test_exact_distances_are_sums_over_tensors_of_unsquared_norms():
    params = quadratic_params()
    walks = list(some_walks(clients=3, steps=4, pool=0))
    written = [walk_delta(params, walk, law="gaussian") for walk in walks]
    by_hand = [
        sum(
            float(np.linalg.norm(own.tensors[name].numpy() - np.mean([w.tensors[name].numpy() for w in written], 0)))
            for name in params.names
        )
        for own in written
    ]
    assert distances(walks, params, law="gaussian") == pytest.approx(by_hand, rel=1e-5)
    assert distances(written, None, law="gaussian") == distances(walks, params, law="gaussian")
    with pytest.raises(RunError, match="parameters' shapes"):
        distances(walks, None, law="gaussian")


def test_two_clients_are_equally_far_from_their_mean():
    walks = list(some_walks(clients=2, steps=4, pool=0))
    one, other = scalar_distances(walks, dim=27)
    assert one == pytest.approx(other) and one > 0
    assert set(normalised(deviations({0: one, 1: other}, relative=True)).values()) == {0.0}


def test_equal_walks_are_not_apart():
    for clients in range(1, 12):
        walk = Walk((1, 2, 3), (0.1, 0.7, clients / 3))
        assert scalar_distances([walk] * clients, dim=27) == [0.0] * clients
    assert distances([DenseDelta({"a": torch.tensor([0.1, 0.7])})] * 3, None, law="gaussian") == [0.0] * 3


# --- the wrapper ---


@pytest.mark.parametrize(("clients", "cohort"), [(2, 2), (3, 3), (20, 20), (20, 5)])
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("kind", WALKERS)
def test_every_signal_works_for_any_number_of_clients(kind, signal, clients, cohort):
    algorithm = personal_of(WALKERS[kind](PLAIN, cohort), signal)
    params, state, rates = play(algorithm, quadratic_bench(capacity=20), clients=clients)
    assert all(torch.isfinite(tensor).all() for _, tensor in params)
    assert all(0.5 * RATE <= rate <= 1.5 * RATE for round_rates in rates for rate in round_rates.values())
    assert all(len(found) == cohort for found in rates)
    assert len(state.seen) <= 5 and state.round == 8
    warm = {"random": 0, "five-round-loss": 5}.get(signal, 1)
    assert all(rate == RATE for found in rates[:warm] for rate in found.values())
    silent = signal == "update-difference" and clients == 2
    assert silent != any(rate != RATE for found in rates[warm:] for rate in found.values())


@pytest.mark.parametrize("signal", ["update-difference", "heterogeneity"])
def test_exact_signals_work_where_their_directions_allow(signal):
    algorithm = personal_of(WALKERS["fedkseed"](PLAIN, 5), signal, exact=True)
    _, _, rates = play(algorithm, quadratic_bench(capacity=5), clients=8)
    assert any(rate != RATE for found in rates for rate in found.values())


@pytest.mark.parametrize("signal", SIGNALS[:-1])
@pytest.mark.parametrize("pro", [False, True], ids=["fedkseed", "fedkseed-pro"])
def test_equal_clients_give_the_bits_of_the_plain_run(pro, signal):
    # A pool of one seed, so that clients with equal data do equal walks.
    plain = fedkseed(PLAIN, Pool(1, pro=pro), seed=5, cohort=4)
    own = personal_of(plain, signal)
    (one, *_), (other, state, _) = (
        play(algorithm, ToyBench(quadratic_params(), alike_loss, capacity=4), clients=4) for algorithm in (plain, own)
    )
    assert one.digest() == other.digest() != quadratic_params().digest()
    assert state.phi == dict.fromkeys(range(4), 0.0)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_equal_losses_leave_every_rate_as_it_is(normaliser):
    algorithm = personal_of(WALKERS["fedmezo"](PLAIN, 3), "round-loss", normaliser=normaliser)
    told = dict.fromkeys(range(3), (0.1, (1.0,) * 4))
    state = after(algorithm, algorithm.init(), told)
    assert [task.rate for task in algorithm.plan(state, range(3))] == [RATE] * 3


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_guard_that_slows_everyone_down_changes_no_phi(signal, normaliser):
    # A replayed journal's tasks are slow ones, and the state is slowed down at the end.
    algorithm = personal_of(WALKERS["fedmezo"](PLAIN, 4), signal, normaliser=normaliser, window=1)
    told = {c: (1.0 + c * c, (1.0 + c, 3.0, -2.0, 0.3 * c)) for c in range(4)}
    slow = algorithm.slow_down(algorithm.init(), 0.25)
    tasks = algorithm.plan(slow, sorted(told))
    replies = [Reply(0, c, 1, *said) for c, said in told.items()]
    live, _ = algorithm.aggregate(slow, tasks, replies)
    replayed, _ = algorithm.aggregate(algorithm.init(), tasks, replies)
    assert algorithm.plan(live, range(4)) == algorithm.plan(algorithm.slow_down(replayed, 0.25), range(4))
    assert live.phi == after(algorithm, algorithm.init(), told).phi
    assert signal == "random" or any(live.phi.values())


@pytest.mark.parametrize("signal", SIGNALS[:-1])
def test_gain_zero_gives_the_bits_of_the_plain_run(signal):
    plain, *_ = play(WALKERS["fedmezo"](PLAIN, 3), quadratic_bench(), clients=6)
    frozen, *_ = play(personal_of(WALKERS["fedmezo"](PLAIN, 3), signal, alpha=0.0), quadratic_bench(), clients=6)
    other, *_ = play(personal_of(WALKERS["fedmezo"](PLAIN, 3), signal), quadratic_bench(), clients=6)
    assert frozen.digest() == plain.digest() != other.digest()


def after(algorithm, state, told):
    """Returns the state after a round in which clients said `told`, client -> (loss, slopes)."""
    tasks = algorithm.plan(state, sorted(told))
    replies = [Reply(t.round, t.client, 1, told[t.client][0], told[t.client][1]) for t in tasks]
    return algorithm.aggregate(state, tasks, replies)[0]


@pytest.mark.parametrize("signal", ["round-loss", "five-round-loss", "update-difference", "heterogeneity"])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_permuting_the_clients_permutes_the_rates(signal, normaliser):
    draw, names = np.random.default_rng(1), {0: 3, 1: 0, 2: 4, 3: 2, 4: 1}
    rounds = [
        {c: (float(draw.normal() + 3), tuple(map(float, np.float32(draw.normal(size=4) * (1 + c))))) for c in names}
        for _ in range(6)
    ]
    found = []
    for naming in ({c: c for c in names}, names):
        algorithm = personal_of(WALKERS["fedmezo"](PLAIN, 5), signal, normaliser=normaliser)
        state = algorithm.init()
        for told in rounds:
            state = after(algorithm, state, {naming[c]: said for c, said in told.items()})
        rates = {task.client: task.rate for task in algorithm.plan(state, sorted(names))}
        found.append({c: rates[naming[c]] for c in names})
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert len(set(found[0].values())) > 2


def test_higher_losses_get_higher_rates_and_a_lost_client_the_plain_one():
    algorithm = personal_of(WALKERS["fedmezo"](PLAIN, 4), "round-loss")
    state = algorithm.init()
    told = {0: (1.0, (1.0,) * 4), 1: (2.0, (1.0,) * 4), 2: (math.nan, (math.nan,) * 4), 3: (6.0, (1.0,) * 4)}
    state = after(algorithm, state, told)
    assert [t.rate / RATE for t in algorithm.plan(state, range(4))] == pytest.approx([1 - 1 / 3, 1 - 1 / 6, 1.0, 1.5])


def test_update_differences_feed_on_themselves():
    # A walk is as long as its rate: one odd round sets rates apart, and equal slopes do not bring them back.
    rates = {}
    for signal in ("update-difference", "heterogeneity", "round-loss"):
        algorithm = personal_of(WALKERS["fedmezo"](PLAIN, 4), signal)
        state = algorithm.init()
        for number in range(30):
            odd = 2.0 if number == 0 else 1.0
            told = {c: (odd, (odd,) * 4) if c == 2 else (1.0, (1.0,) * 4) for c in range(4)}
            state = after(algorithm, state, told)
        rates[signal] = [task.rate / RATE for task in algorithm.plan(state, range(4))]
    assert rates["heterogeneity"] == rates["round-loss"] == [1.0] * 4
    assert rates["update-difference"] == pytest.approx([1 - 0.5 / 3, 1 - 0.5 / 3, 1.5, 1 - 0.5 / 3])


def test_shuffled_rates_are_the_same_rates():
    told = {c: (1.0 + c * c, (1.0,) * 4) for c in range(6)}
    rates = {}
    for shuffle in (False, True):
        algorithm = personal_of(WALKERS["fedmezo"](PLAIN, 6), "round-loss", shuffle=shuffle)
        state = after(algorithm, algorithm.init(), told)
        rates[shuffle] = [task.rate for task in algorithm.plan(state, range(6))]
    assert sorted(rates[True]) == sorted(rates[False]) != rates[True]


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("kind", WALKERS)
def test_what_the_server_adds_is_what_the_clients_walked_at_their_own_rates(kind, signal):
    settings = replace(PLAIN, dense=kind == "fedmezo")
    algorithm, bench = personal_of(WALKERS[kind](settings, 4), signal), quadratic_bench()
    state = algorithm.init()
    for _ in range(7):
        tasks = algorithm.plan(state, range(6))
        replies = algorithm.client(tasks, bench)
        walks = [walk_of(task, reply.slopes) for task, reply in zip(tasks, replies, strict=True)]
        written = [walk_delta(bench.params, walk, law="gaussian") for walk in walks]
        state, update = algorithm.aggregate(state, tasks, replies)
        twin = bench.params.clone()
        apply_(bench.params, update, law="gaussian")
        apply_(twin, Update(tuple(written), update.weights, update.round), law="gaussian")
        assert bench.params.digest() == twin.digest()


@pytest.mark.parametrize("signal", SIGNALS)
def test_dense_replies_give_the_rates_of_scalar_ones(signal):
    found = [
        play(personal_of(WALKERS["fedmezo"](replace(PLAIN, dense=dense), 3), signal), quadratic_bench(), clients=6)
        for dense in (False, True)
    ]
    assert found[0][2] == found[1][2]
    assert found[0][0].digest() == found[1][0].digest()


def test_guards_and_decay_scale_personal_rates_and_wrappers_compose():
    inner = fedmezo(replace(PLAIN, decay="linear", rounds=4), seed=5, cohort=3)
    for mode in ("multiplicative", "additive"):
        algorithm = personal_of(inner, "round-loss", mode=mode, delta=RATE / 2)
        told = {0: (1.0, (1.0,) * 4), 1: (2.0, (1.0,) * 4), 2: (3.0, (1.0,) * 4)}
        state = after(algorithm, algorithm.init(), told)
        state = algorithm.with_factors(algorithm.slow_down(state, 0.5), {1: 3.0})
        rates = [task.rate for task in algorithm.plan(state, range(3))]
        assert rates == pytest.approx([RATE * 0.75 * 0.5 * f for f in (0.5, 3.0, 1.5)])


def test_fedavg_takes_personal_rates_too():
    deltas = [DenseDelta({"a": torch.tensor([float(c * c), 1.0])}) for c in range(3)]
    for signal, wanted in (("round-loss", [0.5, 1.0, 1.5]), ("update-difference", None)):
        algorithm = with_personal_rates(
            fedavg(GradientSettings(RATE, 4), seed=5, cohort=3), Personal(signal), seed=5, rate=RATE
        )
        replies = [Reply(0, c, 4, 1.0 + c, (), deltas[c]) for c in range(3)]
        state, _ = algorithm.aggregate(algorithm.init(), algorithm.plan(algorithm.init(), range(3)), replies)
        rates = [task.rate / RATE for task in algorithm.plan(state, range(3))]
        # |u - mean u| of 0, 1, 4 is 5/3, 2/3, 7/3; the mean is 14/9.
        away = np.array([5 / 3, 2 / 3, 7 / 3]) - 14 / 9
        assert rates == pytest.approx(wanted or (1 + 0.5 * away / abs(away).max()).tolist())


def test_the_sums_of_a_pool_pass_through():
    algorithm = personal_of(WALKERS["fedkseed"](PLAIN, 3), "round-loss")
    _, state, _ = play(algorithm, quadratic_bench(), clients=3)
    assert algorithm.sums(state).any() and isinstance(state, PersonalState)
    assert personal_of(WALKERS["fedmezo"](PLAIN, 3), "random").sums(PersonalState(None)) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lowest": 1.5}, "lowest <= 1"),
        ({"highest": 0.5}, "1 <= highest"),
        ({"cap": 0.0}, "cap must be above 0"),
        ({"alpha": math.nan}, "alpha, delta and cap"),
        ({"window": 0}, "window must be at least 1"),
        ({"smoothing": 1.0}, "smoothing in"),
        ({"shuffle": True}, "Shuffling random rates"),
    ],
)
def test_what_means_nothing_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        Personal("random", **options)


# --- the paper's code ---


def code_rates(log, *, signal, eta=1e-5, delta=5e-6):
    """The rates of the next round as PAPER.md 4 and 2.6 describe the code, for a float16 log of rounds x clients."""
    log = np.asarray(log, np.float16)
    means = log.mean(axis=1).astype(np.float16)
    if signal == "five-round-loss":
        if len(log) < 5:
            return [eta] * log.shape[1]
        gaps = log[-5:].mean(axis=0) - means[-5:].mean()
    else:
        gaps = log[-1] - means[-1]
    phi = (gaps / abs(gaps).max()).astype(np.float16)
    return [eta + delta * float(p) for p in phi]


@pytest.mark.parametrize("signal", ["round-loss", "five-round-loss"])
def test_compat_gives_the_rates_of_the_papers_code_from_losses(signal):
    log = np.random.default_rng(4).uniform(1.4, 2.2, size=(12, 3))
    settings = Settings(rate=1e-5, steps=1, clip=math.inf)
    wanted = Personal(signal, mode="additive", delta=5e-6, compat=True)
    algorithm = with_personal_rates(fedmezo(settings, seed=1, cohort=3), wanted, seed=1, rate=1e-5)
    state, exact = algorithm.init(), []
    for number, row in enumerate(log):
        state = after(algorithm, state, {c: (float(row[c]), (1.0,)) for c in range(3)})
        rates = [task.rate for task in algorithm.plan(state, range(3))]
        assert rates == pytest.approx(code_rates(log[: number + 1], signal=signal), rel=1e-12)
        exact.append(rates)
    # Float16 is seen: three digits of the losses are not enough for the same rates.
    plain = with_personal_rates(fedmezo(settings, seed=1, cohort=3), replace(wanted, compat=False), seed=1, rate=1e-5)
    state = plain.init()
    for row in log:
        state = after(plain, state, {c: (float(row[c]), (1.0,)) for c in range(3)})
    last = [task.rate for task in plain.plan(state, range(3))]
    assert last != exact[-1]
    assert last == pytest.approx(exact[-1], rel=0.02)


def test_compat_gives_the_rates_of_the_papers_code_from_updates():
    settings = Settings(rate=1e-5, steps=3, clip=math.inf)
    wanted = Personal("update-difference", mode="additive", delta=5e-6, compat=True)
    params = quadratic_params()
    algorithm = with_personal_rates(
        fedmezo(settings, seed=1, cohort=3), wanted, seed=1, rate=1e-5, params=params, law="gaussian"
    )
    slopes = [(900.0, -200.0, 30.0), (10.0, 500.0, 700.0), (-300.0, 40.0, 1.0)]
    replies = [Reply(0, c, 1, 2.0, slopes[c]) for c in range(3)]
    state, update = algorithm.aggregate(algorithm.init(), algorithm.plan(algorithm.init(), range(3)), replies)
    moved = [walk_delta(params, walk, law="gaussian").tensors for walk in update.parts]
    log = [
        sum(np.linalg.norm((m[name] - sum(o[name] for o in moved) / 3).numpy()) for name in params.names) for m in moved
    ]
    rates = [task.rate for task in algorithm.plan(state, range(3))]
    assert rates == pytest.approx(code_rates([log], signal="update-difference"), rel=1e-9)


def test_compat_is_not_nan_where_the_papers_code_was():
    # After float16 these losses are equal: 0 / 0 in the code.
    algorithm = with_personal_rates(
        fedmezo(Settings(1e-5, steps=1), seed=1, cohort=3), Personal("round-loss", compat=True), seed=1, rate=1e-5
    )
    state = after(algorithm, algorithm.init(), {c: (1.5 + c * 1e-5, (1.0,)) for c in range(3)})
    assert [task.rate for task in algorithm.plan(state, range(3))] == [1e-5] * 3


# --- whole runs ---


def configured(data, name="fedmezo", **personal):
    return small(
        data,
        algorithm={"name": name, "rate": 2e-2, "pool": 16},
        federation={"clients": 20, "cohort": 5, "rounds": 7},
        personal=personal,
        guard={"on_surge": "warn"},
        eval={"every": 10, "examples": 4},
    )


def rates_of(folder):
    with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
        return [{entry.task.client: entry.task.rate for entry in done.entries} for done in journal.rounds()]


@pytest.mark.parametrize(
    ("name", "personal"),
    [
        ("fedmezo", {"signal": "five-round-loss", "smoothing": 0.5}),
        ("fedmezo", {"signal": "update-difference", "shuffle": True}),
        ("fedkseed-pro", {"signal": "heterogeneity", "normaliser": "rank"}),
        ("fedavg", {"signal": "update-difference"}),
        pytest.param("fedkseed", {"signal": "update-difference", "exact": True}, marks=pytest.mark.slow),
        pytest.param("fedmezo", {"signal": "random"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(data, tmp_path, name, personal):
    config = configured(data, name, **personal)
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, out=tmp_path / "half", watch=StopAfter(3))
    again = resume(tmp_path / "half")
    assert again.digest == whole.digest
    assert rates_of(tmp_path / "half") == rates_of(tmp_path / "whole")
    assert any(len(set(found.values())) > 1 for found in rates_of(tmp_path / "whole"))


def test_rates_are_journaled_replayed_and_drawn(data, tmp_path):
    config = small(data, algorithm={"rate": 2e-2}, personal={"signal": "round-loss"})
    own = run(config, out=tmp_path / "own")
    assert verify(tmp_path / "own")
    plain = small(data, algorithm={"rate": 2e-2})
    assert run(plain, out=tmp_path / "plain").digest != own.digest
    rates = rates_of(tmp_path / "own")
    assert set(rates[0].values()) == {2e-2} and all(len(set(found.values())) == 3 for found in rates[1:])
    drawn = {}
    for name in ("own", "plain"):
        with Journal.open(tmp_path / name / "journal.sqlite", readonly=True) as journal:
            chart = next(chart for chart in charts(gather(journal))["slopes"] if chart.id == "rate")
        drawn[name] = {trace["name"]: trace["y"] for trace in chart.traces}
    assert set(drawn["plain"]) == {"mean rate"}
    assert [drawn["own"][f"client {client}"] for client in range(3)] == [[r[c] for r in rates] for c in range(3)]


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["personal.signal=heterogeneity", "algorithm.name=fedavg"], 'choose "update-difference"'),
        (["personal.signal=heterogeneity", "personal.exact=true"], 'use "fedkseed"'),
        (["personal.signal=round-loss", "personal.exact=true"], "personal.exact is for"),
        (["personal.signal=heterogeneity", "personal.compat=true"], "no signal"),
        (["personal.shuffle=true"], "personal.shuffle deals out"),
        (["personal.signal=loss"], "personal.signal"),
        (["personal.rate_min=2"], "personal.rate_min"),
    ],
)
def test_combinations_without_a_meaning_are_refused(overrides, match):
    with pytest.raises(ConfigError, match=match):
        load_config(None, overrides)


def test_the_documented_figures_are_the_recorded_ones():
    docs = Path(__file__).parent.parent / "docs"
    text = (docs / "personal-rates.md").read_text()
    rows = [json.loads(line) for line in (docs / "results" / "personal.jsonl").read_text().splitlines()]
    compared = [row for row in rows if "minus" in row]
    for row in compared:
        parts = (row["end_difference"], row["mean_difference"])
        cells = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*part) for part in parts]
        assert f"| {row['arm']} | {' | '.join(cells)} |" in text
    ends = {(row["arm"], row["seed"]): row["losses"][-1] for row in rows if "seed" in row}
    for arm in ("five-round-loss", "update-difference"):
        gaps = [ends[arm, seed] - ends[f"{arm} shuffled", seed] for seed in range(6)]
        assert "({:+.3f}, {:+.3f} to {:+.3f})".format(*paired_interval(gaps)) in text
    assert len(compared) == 8


def test_heterogeneity_from_shared_directions_is_for_the_pooled():
    config = load_config(None, ["personal.signal=heterogeneity", "personal.exact=true", "algorithm.name=fedkseed"])
    assert config.personal.exact
