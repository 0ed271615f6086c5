"""How clients get the model: three ways to the same parameters, chosen by cost, with a bounded memory."""

from dataclasses import replace

import numpy as np
import pytest
from toys import quadratic_bench, quadratic_params

from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.runtime.journal import Header, Journal, replay
from fedmezo.runtime.pull import Cost, Downlink, catch_up_, cheapest
from fedmezo.runtime.simulate import Simulation
from fedmezo.runtime.wire import News, Sums
from fedmezo.zo.perturb import add_sum_
from fedmezo.zo.seedsum import SeedSum

SETTINGS = Settings(rate=0.01, mu=1e-2, steps=6, clip=3.0)
POOLED = fedkseed(SETTINGS, Pool(32), seed=11, cohort=2)
FRESH = fedmezo(SETTINGS, seed=11, cohort=2)
DIM = quadratic_params().dim


def header(bench):
    return Header("{}", "base", bench.params.layout(), "gaussian", 2, "0", "2026-01-01T00:00:00+00:00")


def simulation(path, *, algorithm=POOLED, rounds=9, bench=None, **options):
    bench = bench or quadratic_bench()
    journal = Journal.open(path) if path.exists() else Journal.create(path, header(bench))
    return Simulation(algorithm, bench, journal, range(6), rounds, dict, **options)


def go(path, **options):
    """Runs to the end; returns (simulation, reports)."""
    running = simulation(path, **options)
    with running.journal:
        return running, list(running.run())


def news_of(done):
    entries = done.entries
    return News(
        tuple(e.task for e in entries), tuple(e.reply.slopes for e in entries), tuple(e.weight for e in entries)
    )


def test_pairs_sums_and_dense_give_the_same_model(tmp_path):
    running, _ = go(tmp_path / "a", rounds=12)
    whole, early, by_sums = running.bench.params, quadratic_params(), quadratic_params()
    with Journal.open(tmp_path / "a") as journal:
        replay(early, journal, upto=5)
        catch_up_(early, [news_of(journal.round(number)) for number in range(5, 12)], law="gaussian")
    assert early.digest() == whole.digest()
    sums = Sums(11, 32, "float32", tuple(POOLED.sums(running.state).tolist()))
    catch_up_(by_sums, sums, law="gaussian")
    for name, tensor in by_sums:
        unit = np.spacing(np.maximum(np.abs(whole[name].numpy()), np.abs(quadratic_params()[name].numpy())))
        stated = (12 + 2) / 2 * unit + 2**-24 * 5 * sum(map(abs, sums.values))
        assert (np.abs(tensor.numpy() - whole[name].numpy()) <= stated).all()
    assert by_sums.digest() != quadratic_params().digest()


def test_half_sums_are_as_near_as_their_bits(tmp_path):
    running, _ = go(tmp_path / "a", rounds=12)
    exact = POOLED.sums(running.state)
    for coding, bits in (("float16", 11), ("bfloat16", 8)):
        rounded = quadratic_params()
        catch_up_(rounded, Sums(11, 32, coding, tuple(exact.tolist())), law="gaussian")
        error = max(float((t - running.bench.params[n]).abs().max()) for n, t in rounded)
        assert 0 < error < 2**-bits * 5 * np.abs(exact).sum()


def test_the_cheapest_pull_is_chosen_and_bandwidth_decides():
    costs = {"pairs": Cost(400, 2_000_000_000), "sums": Cost(4000, 1_000_000_000), "dense": Cost(10_000_000, 0)}
    assert cheapest(costs, bandwidth=1.0) == "sums"
    assert cheapest(costs, bandwidth=100.0) == "dense"
    assert cheapest({"pairs": Cost(1, 0), "sums": Cost(1, 0)}, bandwidth=1.0) == "pairs"


def test_a_client_pulls_pairs_at_first_and_sums_once_they_are_fewer(tmp_path):
    slow = Downlink(DIM, bandwidth=1e-6)  # bytes decide, and the toy model itself is as small as four pairs
    big = Downlink(10**6, bandwidth=1e-6)
    _, reports = go(tmp_path / "a", rounds=30, downlink=big)
    offers = [big_offer for big_offer in kinds(tmp_path / "a", Downlink(10**6, bandwidth=1e-6))]
    assert offers[0] == "pairs"
    assert offers[-1] == "sums"
    assert reports[-1].bytes_down < 2 * (4 * 32 + 200)
    assert "dense" in set(kinds(tmp_path / "a", slow))


def kinds(path, downlink):
    """Returns what a client that never took part is offered before each round of a journal."""
    state, found = POOLED.init(), []
    with Journal.open(path) as journal:
        for done in journal.rounds():
            task = replace(done.entries[0].task, client=99)
            found.append(downlink.offers([task], POOLED.sums(state))[0].kind)
            tasks, replies = [entry.task for entry in done.entries], [entry.reply for entry in done.entries]
            state, _ = POOLED.aggregate(state, tasks, replies)
            downlink.remember(done)
    return found


@pytest.mark.parametrize("algorithm", [POOLED, FRESH])
def test_the_servers_memory_of_past_rounds_is_bounded_however_long_a_client_is_away(tmp_path, algorithm):
    short, _ = go(tmp_path / "a", rounds=40, algorithm=algorithm)
    long, _ = go(tmp_path / "b", rounds=120, algorithm=algorithm)
    assert short._down.kept == long._down.kept <= 20
    everything = Downlink(DIM, "pairs")
    with Journal.open(tmp_path / "b") as journal:
        for done in journal.rounds():
            everything.remember(done)
    assert everything.kept == 120


@pytest.mark.parametrize("pull", ["auto", "pairs", "sums", "dense"])
def test_how_clients_pull_changes_bytes_and_not_the_model(tmp_path, pull):
    usual, _ = go(tmp_path / "a")
    running, reports = go(tmp_path / "b", downlink=Downlink(DIM, pull))
    assert running.bench.params.digest() == usual.bench.params.digest()
    last = reports[-1].bytes_down
    expected = {"dense": 4 * DIM, "sums": 4 * 32}
    if pull in expected:
        assert expected[pull] * 2 <= last <= (expected[pull] + 140) * 2


def test_half_sums_move_the_walks_start_and_nothing_accumulates(tmp_path):
    exact, _ = go(tmp_path / "a", rounds=30)
    half, reports = go(tmp_path / "b", rounds=30, downlink=Downlink(DIM, "sums", "float16"))
    assert half.bench.params.digest() != exact.bench.params.digest()
    assert abs(reports[-1].loss - list(go_losses(tmp_path / "a"))[-1]) < 0.05 * reports[-1].loss
    plain = [r.bytes_down for r in go(tmp_path / "c", rounds=30, downlink=Downlink(DIM, "sums"))[1]]
    assert reports[-1].bytes_down < plain[-1] - 2 * 60


def go_losses(path):
    with Journal.open(path) as journal:
        yield from (done.loss for done in journal.rounds())


def test_with_half_sums_resume_equals_uninterrupted_and_replay_equals_live(tmp_path):
    options = {"downlink": Downlink(DIM, "sums", "float16")}
    whole, _ = go(tmp_path / "a", **options)
    go(tmp_path / "b", rounds=4, **options)
    resumed, _ = go(tmp_path / "b", **options)
    assert resumed.bench.params.digest() == whole.bench.params.digest()
    rebuilt = quadratic_params()
    with Journal.open(tmp_path / "a") as journal:
        replay(rebuilt, journal)
    assert rebuilt.digest() == whole.bench.params.digest()


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [({"rounds": 3}, 3), ({"forwards": 49}, 3), ({"forwards": 48}, 2), ({"bytes": 1}, 1), ({"seconds": 1e-9}, 1)],
)
def test_a_run_ends_with_the_round_that_spends_its_budget_and_is_judged_then(tmp_path, budget, rounds):
    judged = []

    def evaluate():
        judged.append(1)
        return {"eval": {"loss": 1.0}}

    bench = quadratic_bench()
    with Journal.create(tmp_path / "a", header(bench)) as journal:
        options = {"every": 100, "budget": budget}
        assert len(list(Simulation(POOLED, bench, journal, range(6), 9, evaluate, **options).run())) == rounds
        assert journal.round(rounds - 1).evaluations == {"eval": {"loss": 1.0}}
        assert journal.round(rounds - 1).digest == bench.params.digest()
        assert len(judged) == 2
        # Nothing is left to do when it is taken up again.
        again = Simulation(POOLED, quadratic_bench(), journal, range(6), 9, evaluate, **options)
        assert list(again.run()) == []


def test_a_sum_whose_coefficients_are_no_float32_numbers_is_refused():
    with pytest.raises(ValueError, match="must be float32 numbers"):
        add_sum_(quadratic_params(), SeedSum.of([(1, 0.1)]), law="gaussian")
