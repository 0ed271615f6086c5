"""Whether a run goes down, and at which rate: line searches, setbacks, and the bits of a run that has both."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_runtime_simulate import SETTINGS, header
from tiny_runs import small
from toys import ToyBench, quadratic_bench, quadratic_loss, quadratic_params, quadratic_recipe

from fedmezo.fl.cohort import decayed
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import fedmezo
from fedmezo.runtime.journal import LOOK, SLOW, Journal, replay
from fedmezo.runtime.lookout import Lookout, places_of
from fedmezo.runtime.pace import Look, Pace, factor_of, line, lowest_on, rose, start_of, stays_up
from fedmezo.runtime.pull import Downlink, catch_up_
from fedmezo.runtime.simulate import Simulation
from fedmezo.runtime.wire import Sums
from fedmezo.runtime.workers import Workers
from fedmezo.studies.build import build
from fedmezo.studies.run import resume, run
from fedmezo.zo.perturb import apply_
from fedmezo.zo.seedsum import Update, Walk

# When


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 8, 20, 100, 1000])
def test_a_run_is_looked_at_early_eight_times_and_at_its_end(rounds):
    pace = Pace(rounds, adapt=True)
    early = {2**k for k in range(12) if 2**k <= max(2, 0.35 * rounds)}
    every = set(range(math.ceil(rounds / 8), rounds + 1, math.ceil(rounds / 8)))
    assert {at for at in range(1, rounds + 1) if pace.looks(at)} == (early | every | {rounds}) & {*range(rounds + 1)}
    assert {at for at in range(1, rounds + 1) if pace.sets_rate(at)} == early & {*range(rounds + 1)}


@pytest.mark.parametrize("rounds", [1, 7, 64])
def test_who_does_not_adapt_looks_as_often_and_sets_no_rate(rounds):
    still, adapting = Pace(rounds, adapt=False), Pace(rounds, adapt=True)
    assert not any(still.sets_rate(at) for at in range(1, rounds + 1))
    assert [still.looks(at) for at in range(1, rounds + 1)] == [adapting.looks(at) for at in range(1, rounds + 1)]


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_rate_is_set_only_where_a_run_is_looked_at(rounds, at):
    pace = Pace(rounds, adapt=True)
    assert pace.looks(at) or not pace.sets_rate(at)


# Rises


BATCHES = (2.0, 2.6, 3.1, 1.7, 2.2, 2.9)


def test_a_planted_rise_is_seen_and_a_fall_or_a_hundredth_is_not():
    assert rose([loss + 0.2 for loss in BATCHES], BATCHES)
    assert not rose([loss - 0.2 for loss in BATCHES], BATCHES)
    assert not rose([loss + 0.01 for loss in BATCHES], BATCHES)
    assert not rose(BATCHES, BATCHES)


def test_a_rise_within_its_own_noise_is_not_one():
    gaps = (-0.5, 0.9, -0.4, 1.0, 0.1, 0.1)  # 0.2 in the mean, with an error of 0.27
    assert not rose([loss + gap for loss, gap in zip(BATCHES, gaps, strict=True)], BATCHES)


@pytest.mark.parametrize("broken", [math.inf, math.nan, -math.inf])
def test_a_loss_that_is_not_finite_is_a_rise(broken):
    assert rose((*BATCHES[:-1], broken), BATCHES)


def alarms(drift: float, *, runs: int = 500, looks: int = 12) -> float:
    """Returns the share of simulated runs that were told they rose, at batches that differ by a tenth of their loss."""
    noise, found = np.random.default_rng(5), 0
    for _ in range(runs):
        level = noise.normal(2.5, 0.5, 6)
        seen = [level + drift * number + noise.normal(0, 0.25, 6) for number in range(looks)]
        look = start_of(0, seen[0].tolist())
        for number, losses in enumerate(seen[1:], 1):
            told = losses.tolist()
            if rose(told, look.lowest) or stays_up(look.losses, told, look.lowest):
                found += 1
                break
            look = look.then(number, losses.tolist(), forwards=6)
    return found / runs


def test_in_a_run_that_falls_chance_seldom_raises_an_alarm_and_a_rise_does():
    assert alarms(-0.05) < 0.1
    assert alarms(0.3) > 0.95


def test_a_slow_rise_shows_at_two_looks_where_one_is_not_enough():
    gaps = (0.1, 0.16, 0.13, 0.1, 0.2, 0.15)
    above = [loss + gap for loss, gap in zip(BATCHES, gaps, strict=True)]
    slight = [loss + gap / 3 for loss, gap in zip(BATCHES, gaps, strict=True)]
    assert stays_up(above, above, BATCHES)
    assert not stays_up(BATCHES, above, BATCHES) and not stays_up(above, BATCHES, BATCHES)
    assert not stays_up(above, slight, BATCHES)  # under 2 % of the level
    scattered = [loss + gap for loss, gap in zip(BATCHES, (-0.5, 0.9, -0.4, 1.0, 0.1, 0.1), strict=True)]
    assert not stays_up(scattered, scattered, BATCHES)


# What was seen


def test_the_lowest_look_is_kept_and_forwards_add_up():
    look = start_of(0, [3.0, 5.0])
    assert look == Look(0, (3.0, 5.0), 0, (3.0, 5.0), 2)
    low = look.then(1, [2.0, 4.0], forwards=8)
    high = low.then(2, [9.0, 4.0], forwards=2)
    assert low == Look(1, (2.0, 4.0), 1, (2.0, 4.0), 10)
    assert high == Look(2, (9.0, 4.0), 1, (2.0, 4.0), 12)
    assert high.then(4, [math.inf, 1.0], forwards=2).best == 1


def test_going_back_is_to_the_lowest_and_counts_what_was_lost():
    back = Look(8, (9.0, 4.0), 3, (2.0, 4.0), 12, undone=2).back(8)
    assert back == Look(3, (2.0, 4.0), 3, (2.0, 4.0), 12, undone=7)


losses_of = st.lists(st.floats(0, 1e6) | st.just(math.inf), min_size=1, max_size=6).map(tuple)


@given(st.builds(Look, st.integers(0), losses_of, st.integers(0), losses_of, st.integers(0), st.integers(0)))
def test_a_look_survives_its_journal(look):
    assert Look.from_json(look.to_json()) == look


# Along a line


@given(st.floats(-5, 25), st.floats(0.01, 10), st.sampled_from([(0, 1, 4), (0, 1, 2, 4), (0, 1, 4, 8, 16)]))
def test_the_lowest_point_of_a_parabola_is_exact(centre, bend, places):
    points = {float(at): bend * (at - centre) ** 2 for at in places}
    assert lowest_on(points) == pytest.approx(min(max(centre, 0), places[-1]), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("points", "lowest"),
    [
        ({0: 3, 1: 2, 4: -1, 16: -13}, 16),  # a straight fall
        ({0: 3, 1: 2.5, 4: 0, 16: -40}, 16),  # one that bends down
        ({0: 0, 1: 2, 4: 3}, 0),  # a rise that bends down
        ({0: 1, 1: 0.5, 4: math.inf}, 1),
        ({0: 0.5, 1: 1, 4: math.inf}, 0),
        ({0: 1, 1: 0.7, 4: 0.4, 8: math.inf, 16: math.inf}, 3.5),
        ({0: 16, 1: 9, 4: 0, 8: 16, 16: math.inf}, 4),
    ],
)
def test_the_lowest_point_at_the_edges(points, lowest):
    assert lowest_on({float(at): float(loss) for at, loss in points.items()}) == pytest.approx(lowest, abs=1e-9)


@given(st.dictionaries(st.sampled_from([1.0, 2.0, 4.0, 8.0, 16.0]), st.floats(0, 50) | st.just(math.inf), min_size=2))
def test_the_lowest_point_is_never_beyond_what_was_seen(points):
    assert 0 <= lowest_on({0.0: 5.0, **points}) <= max(points)


def noisy(shape, *, spread: float = 0.0, size: int = 6):
    """Returns a judge whose batches have levels of their own, and differences that scatter by `spread`."""

    def judge(at):
        scatter = random.Random(f"{at}")
        return [2 + place / 4 + shape(at) + scatter.gauss(0, spread) for place in range(size)]

    return judge


def along(shape, **options):
    """Returns what a line search saw, and where it asked."""
    judge, asked = noisy(shape, **options), []

    def ask(at):
        asked.append(at)
        return judge(at)

    return line(ask, before=judge(0), after=judge(1)), asked


@pytest.mark.parametrize(
    ("centre", "asked"),
    [(30, [4, 16, 8]), (10, [4, 16, 8]), (5, [4, 16, 8]), (2.6, [4, 16, 8]), (2.1, [4, 16, 2]), (1.5, [4, 2])],
)
def test_a_line_asks_far_at_first_and_then_next_to_the_best(centre, asked):
    seen, places = along(lambda at: 0.01 * (at - centre) ** 2 if centre > 2 else 0.5 * (at - centre) ** 2)
    assert places == asked
    assert set(seen) == {0.0, 1.0, *map(float, asked)}


@pytest.mark.parametrize("far", [math.inf, 5.0])
def test_a_line_stretches_no_further_after_a_rise(far):
    _, places = along(lambda at: far if at >= 4 else -0.1 * at)
    assert places == [4, 2]


def test_a_line_stretches_no_further_where_the_update_itself_was_better():
    _, places = along(lambda at: {0: 1.0, 1: 0.0, 4: 0.9, 2: 0.1}[at])
    assert places == [4, 2]


# The factor


def room(done: int, rounds: int) -> float:
    return 1.2 * max(1.0, rounds / (3 * done)) ** 0.5


@pytest.mark.parametrize("done", [1, 2, 8])
@pytest.mark.parametrize("centre", [0.3, 0.8, 1.3, 2.0, 3.0, 4.5, 7.0])
def test_a_clear_parabola_gives_its_minimum_less_the_room_a_run_needs(centre, done):
    seen, _ = along(lambda at: 0.3 * (at - centre) ** 2, spread=1e-5)
    expected = min(max(centre / room(done, 40), 0.25), 4)
    assert factor_of(seen, done=done, rounds=40) == pytest.approx(expected, rel=1 / 16)


def test_late_in_a_run_a_fifth_is_room_enough():
    seen, _ = along(lambda at: 0.3 * (at - 3) ** 2, spread=1e-5)
    assert factor_of(seen, done=20, rounds=40) == factor_of(seen, done=40, rounds=40) == 2.5


@pytest.mark.parametrize("centre", [0.1, 12.0])
def test_differences_that_drown_in_noise_hardly_change_the_rate(centre):
    clear, drowned = ([], [])
    unseen = 4 ** (1 / sum(map(Pace(80, adapt=True).sets_rate, range(1, 81))))
    for number in range(200):
        scatter = random.Random(number)
        for spread, found in ((1e-6, clear), (1.0, drowned)):
            seen = {
                at: [2 + 1e-4 * (at - centre) ** 2 + scatter.gauss(0, spread) for _ in range(6)] for at in (0.0, 1.0)
            }
            seen |= {4.0: [loss + 1e-4 * ((4 - centre) ** 2 - (1 - centre) ** 2) for loss in seen[1.0]]}
            found.append(abs(math.log(factor_of(seen, done=1, rounds=80) / unseen)))
    assert median(drowned) < 0.35 * median(clear)


def test_a_tiny_gap_draws_the_rate_towards_its_share_of_four():
    spread = (0.9, -1.1, 0.4, -0.6, 1.3, -0.9)
    after = [loss - 0.05 + gap for loss, gap in zip(BATCHES, spread, strict=True)]
    searches = sum(map(Pace(20, adapt=True).sets_rate, range(1, 21)))
    hardly = {0.0: BATCHES, 1.0: after, 4.0: [loss + gap for loss, gap in zip(BATCHES, spread, strict=True)]}
    assert factor_of(hardly, done=1, rounds=20) == pytest.approx(4 ** (1 / searches), rel=0.1)
    rising = hardly | {4.0: [loss + 3 for loss in BATCHES]}
    assert factor_of(rising, done=1, rounds=20) == pytest.approx(1, rel=0.1)


several = st.lists(st.floats(0, 100) | st.just(math.inf), min_size=6, max_size=6)


@given(
    st.lists(st.floats(0, 100), min_size=6, max_size=6),
    st.dictionaries(st.sampled_from([2.0, 4.0, 8.0, 16.0]), several, min_size=1),
    st.lists(st.floats(0, 100), min_size=6, max_size=6),
    st.integers(1, 300),
    st.integers(1, 300),
)
def test_a_factor_is_between_a_quarter_and_four_and_has_four_bits(before, others, after, done, rounds):
    factor = factor_of({0.0: before, 1.0: after, **others}, done=done, rounds=rounds)
    assert 0.25 <= factor <= 4
    assert (math.frexp(factor)[0] * 16).is_integer()


@given(several, st.lists(st.floats(0, 100), min_size=6, max_size=6), several, several)
def test_no_loss_breaks_a_line_search(before, after, far, between):
    """A loss before may be inf: the look before this one may have found so, and the run went on at half of the rate."""
    judge = {4.0: far, 2.0: between, 8.0: between, 16.0: far}.__getitem__
    assert 0.25 <= factor_of(line(judge, before=before, after=after), done=1, rounds=8) <= 4


# The batches


@pytest.mark.parametrize(("clients", "count"), [(3, 6), (3, 7), (5, 5), (100, 6), (1, 6), (64, 24), (7, 5)])
def test_judged_batches_are_spread_evenly_and_no_round_reaches_them(clients, count):
    places = places_of(clients, count)
    assert len(set(places)) == count
    by_client = Counter(client for client, _ in places)
    assert set(by_client) <= {*range(clients)}
    assert max(by_client.values()) - min(by_client[client] for client in range(clients)) <= 1
    gaps = [later - earlier for earlier, later in pairwise(sorted(by_client))]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert all(2**31 <= number < 2**32 for _, number in places)


def some_updates() -> list[Update]:
    return [Update((Walk((11, 12), (0.03, -0.02)), Walk((13,), (0.05,))), (0.5, 0.5), n) for n in range(2)]


def moved():
    """Returns a lookout on a model that two updates moved, and the losses before them."""
    bench = quadratic_bench()
    lookout = Lookout(Pace(8, adapt=True), bench, places_of(3, 6))
    before = lookout.losses()
    for update in some_updates():
        apply_(bench.params, update, law="gaussian")
    return lookout, before


def test_a_lookout_judges_the_model_as_it_is_at_its_places():
    lookout, _ = moved()
    tensors = dict(lookout.bench.params)
    assert lookout.losses() == pytest.approx([quadratic_loss(tensors, client, 0, 0) for client, _ in lookout.places])


def test_stretching_by_one_changes_no_loss_and_leaves_the_bits():
    lookout, before = moved()
    digest = lookout.bench.params.digest()
    assert lookout.stretched(some_updates(), by=1) == lookout.losses()
    assert lookout.stretched(some_updates(), by=0) == pytest.approx(before, rel=1e-6)
    assert lookout.stretched(some_updates(), by=0) != pytest.approx(lookout.losses(), rel=1e-4)
    assert lookout.bench.params.digest() == digest


def test_a_quadratic_loss_is_a_parabola_along_an_update():
    lookout, before = moved()
    at = {by: fmean(lookout.stretched(some_updates(), by=by)) for by in (1.0, 2.0, 4.0)}
    bend = fmean(before) - 2 * at[1.0] + at[2.0]
    straight = at[1.0] - fmean(before) - bend / 2
    assert at[4.0] == pytest.approx(fmean(before) + 4 * straight + 8 * bend, rel=1e-5)


def test_the_bits_are_back_after_an_error():
    lookout, _ = moved()
    digest = lookout.bench.params.digest()

    def broken(points):
        raise ZeroDivisionError

    lookout.bench.losses = broken
    with pytest.raises(ZeroDivisionError):
        lookout.stretched(some_updates(), by=4)
    assert lookout.bench.params.digest() == digest


# Whole runs


def same_task(tensors, client, round_number, step):
    """A quadratic all clients share but for a little, whose batches differ a little too."""
    return quadratic_loss(tensors, 0, 0, 0) * (1 + 0.05 * math.sin(client + 3 * round_number + 5 * step)) + 1


def simulation(path: Path, *, loss=same_task, adapt=True, rounds=24, factor=1.0, clip=3.0, count=6, **options):
    """Returns a run with a lookout, begun or taken up again; `count` 0 for none."""
    bench = options.pop("bench", None) or ToyBench(quadratic_params(), loss)
    settings = replace(SETTINGS, rate=factor * SETTINGS.rate, clip=clip, steps=4)
    algorithm = options.pop("algorithm", None) or fedmezo(settings, seed=11, cohort=2)
    lookout = Lookout(Pace(rounds, adapt=adapt), bench, places_of(3, count)) if count else None
    journal = Journal.open(path) if path.exists() else Journal.create(path, header(bench))
    kinds = {"on_surge": "rollback", "evaluate": dict, **options}
    return Simulation(algorithm, bench, journal, range(3), rounds, lookout=lookout, **kinds)


def go(path: Path, *, stop=None, **options):
    """Runs or goes on; returns (simulation, reports)."""
    running = simulation(path, **options)
    reports = []
    with running.journal:
        for report in running.run():
            reports.append(report)
            if stop is not None and len(reports) == stop:
                break
    return running, reports


def written(path: Path) -> list:
    """Returns everything a journal holds but the seconds, and its own name."""
    with Journal.open(path) as journal:
        journal.verify_chain()
        rounds = [replace(done, seconds=0) for done in journal.rounds()]
        told = str([rounds, journal.evaluations(), journal.events()])
        return told.replace(f"{path.name}.before", "NAME.before").split("Round(")


def looks_of(journal: Journal) -> list[Look]:
    return [Look.from_json(detail) for _, kind, detail in journal.events() if kind == LOOK]


def judged(running) -> float:
    return fmean(running.lookout.losses())


def start() -> float:
    return fmean(Lookout(Pace(1, adapt=False), ToyBench(quadratic_params(), same_task), places_of(3, 6)).losses())


WILD = {"factor": 30.0, "clip": math.inf}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Returns a function: options -> an uninterrupted run's folder, simulation and reports; each is run once."""
    folder, known = tmp_path_factory.mktemp("wholes"), {}

    def whole(**options):
        name = json.dumps(options, sort_keys=True)
        if name not in known:
            path = folder / str(len(known))
            known[name] = (path, *go(path, **options))
        return known[name]

    return whole


@pytest.mark.parametrize("stop", [1, 2, 5, 8, 15])
@pytest.mark.parametrize(
    "options",
    [{}, {**WILD, "on_surge": "rollback"}, {**WILD, "on_surge": "halve"}],
    ids=["calm", "rollback", "halve"],
)
def test_resume_equals_uninterrupted_wherever_it_stopped(tmp_path, wholes, options, stop):
    path, whole, reports = wholes(**options)
    _, first = go(tmp_path / "b", stop=stop, **options)
    resumed, rest = go(tmp_path / "b", **options)
    assert resumed.bench.params.digest() == whole.bench.params.digest()
    assert [r.loss for r in first + rest] == [r.loss for r in reports]
    assert written(tmp_path / "b") == written(path)
    assert (resumed.look, resumed.state) == (whole.look, whole.state)


@pytest.mark.parametrize("options", [{}, WILD], ids=["calm", "wild"])
def test_a_run_stopped_after_every_round_is_the_same_run(tmp_path, wholes, options):
    path, whole, reports = wholes(**options)
    for _ in reports:
        resumed, _ = go(tmp_path / "b", stop=1, **options)
    assert resumed.bench.params.digest() == whole.bench.params.digest()
    assert written(tmp_path / "b") == written(path)


def test_a_wild_rate_does_set_back_and_a_calm_one_does_not(wholes):
    for options, undone in (({}, False), (WILD, True)):
        _, running, reports = wholes(**options)
        assert (running.look.undone > 0) is undone
        assert len(reports) == 24 + running.look.undone


@pytest.mark.parametrize("options", [{}, WILD, {**WILD, "on_surge": "halve"}], ids=["calm", "rollback", "halve"])
def test_replay_gives_the_bits_of_the_run(wholes, options):
    path, running, _ = wholes(**options)
    rebuilt = quadratic_params()
    with Journal.open(path) as journal:
        journal.verify_chain()
        replay(rebuilt, journal)
    assert rebuilt.digest() == running.bench.params.digest()


def test_a_look_says_what_it_cost_and_what_the_model_loses(tmp_path):
    bench = ToyBench(quadratic_params(), same_task)
    running, _ = go(tmp_path / "a", bench=bench)
    with Journal.open(tmp_path / "a") as journal:
        looks = looks_of(journal)
        walks = sum(done.forwards for done in journal.rounds())
    assert bench.forwards == walks + looks[-1].forwards
    assert [look.at for look in looks] == [1, 2, 3, 4, 6, 8, 9, 12, 15, 18, 21, 24]
    assert list(looks[-1].losses) == running.lookout.losses()
    assert min(map(fmean, (look.losses for look in looks))) == fmean(looks[-1].lowest)


def test_a_setback_counts_the_rounds_it_undid_and_their_looks_stay_counted(tmp_path):
    bench = ToyBench(quadratic_params(), same_task)
    running, reports = go(tmp_path / "a", bench=bench, **WILD)
    assert running.look.undone == len(reports) - 24 > 0
    assert bench.forwards == sum(report.forwards for report in reports) + running.look.forwards


def test_a_setback_goes_back_to_the_lowest_look_at_half_the_rate_and_later_ones_at_a_quarter(tmp_path):
    running = simulation(tmp_path / "a", adapt=False, **WILD)
    lowest, surges, reports = 0, 0, []
    with running.journal:
        for report in running.run():
            if reports and "surge" in dict(reports[-1].events):
                surges += 1
                assert report.round == lowest
                assert report.rate == reports[-1].rate / (2 if surges == 1 else 4)
            elif reports:
                assert (report.round, report.rate) == (reports[-1].round + 1, reports[-1].rate)
            reports.append(report)
            lowest = looks_of(running.journal)[-1].best
    assert surges


def test_what_is_stretched_is_all_that_came_since_the_last_look(tmp_path):
    running, spans = simulation(tmp_path / "a"), []

    class Checking(Lookout):
        def stretched(self, updates, *, by):
            spans.append(len(updates))
            assert super().stretched(updates, by=0) == pytest.approx(list(running.look.losses), rel=1e-5)
            return super().stretched(updates, by=by)

    running.lookout = Checking(running.lookout.pace, running.bench, running.lookout.places)
    with running.journal:
        list(running.run())
    assert set(spans) == {1, 2}


def test_looks_are_not_for_people(wholes):
    _, _, reports = wholes(**WILD)
    kinds = {kind for report in reports for kind, _ in report.events}
    assert LOOK not in kinds
    assert {"surge", SLOW} <= kinds


@pytest.mark.parametrize("clip", [math.inf, 3.0])
@pytest.mark.parametrize("factor", [10.0, 30.0, 100.0])
@pytest.mark.parametrize("adapt", [True, False])
def test_a_rate_that_is_far_too_high_still_ends_below_the_start(wholes, factor, clip, adapt):
    _, running, _ = wholes(factor=factor, clip=clip, adapt=adapt)
    assert judged(running) < 0.8 * start()


@pytest.mark.parametrize("factor", [1e-3, 1e-2])
def test_a_rate_that_is_far_too_low_is_raised(wholes, factor):
    ends = {adapt: judged(wholes(factor=factor, adapt=adapt)[1]) for adapt in (True, False)}
    assert ends[False] > 0.97 * start()
    assert start() - ends[True] > 10 * (start() - ends[False])


def test_who_does_not_adapt_and_never_surges_has_the_bits_of_a_run_without_a_lookout(wholes):
    _, plain, reports = wholes(count=0)
    _, watched, others = wholes(adapt=False)
    assert watched.bench.params.digest() == plain.bench.params.digest()
    assert [replace(r, seconds=0) for r in reports] == [replace(r, seconds=0) for r in others]
    assert plain.look is None


def test_the_rate_in_force_is_the_product_of_the_factors(wholes):
    path, running, reports = wholes()
    with Journal.open(path) as journal:
        factors = {number: float(detail) for number, kind, detail in journal.events() if kind == SLOW}
    assert set(factors) <= {0, 1, 3, 7}
    expected = 1.0
    for report in reports:
        assert report.rate == SETTINGS.rate * expected
        expected *= factors.get(report.round, 1.0)
    assert running.state.slowed == expected != 1


def test_a_surge_of_training_that_the_judged_batches_do_not_share_ends_as_it_does_without_a_stop(tmp_path):
    """The round whose loss surged is the lowest one looked at: there is nothing to go back to."""

    def loss(tensors, client, round_number, step):
        return same_task(tensors, client, round_number, step) + 500 * (16 <= round_number <= 23)

    whole, _ = go(tmp_path / "a", loss=loss, adapt=False)
    for stop in (17, 18, 19):
        go(tmp_path / f"{stop}", loss=loss, adapt=False, stop=stop)
        resumed, _ = go(tmp_path / f"{stop}", loss=loss, adapt=False)
        assert resumed.bench.params.digest() == whole.bench.params.digest()


@pytest.mark.parametrize("on_surge", ["halve", "warn"])
def test_judged_batches_that_once_are_not_finite_end_no_run(tmp_path, on_surge):
    bench = ToyBench(quadratic_params(), same_task)
    running = simulation(tmp_path / "a", bench=bench, on_surge=on_surge)
    plain, calls = Lookout.losses, []

    class Blinking(Lookout):
        def losses(self):
            calls.append(1)
            found = plain(self)
            return [math.inf, *found[1:]] if len(calls) == 6 else found

    running.lookout = Blinking(running.lookout.pace, bench, running.lookout.places)
    with running.journal:
        reports = list(running.run())
    assert [r.round for r in reports if "surge" in dict(r.events)] == [1]
    assert judged(running) < start()


def pooled():
    return fedkseed(replace(SETTINGS, steps=4), Pool(16), seed=11, cohort=2)


def sums_and_model(running):
    gained = quadratic_params()
    catch_up_(gained, Sums(11, 16, "float32", tuple(running.state.sums.tolist())), law="gaussian")
    return [(t, running.bench.params[name]) for name, t in gained]


@pytest.mark.parametrize("stop", [2, 5, 9, 17])
def test_sums_of_a_pool_are_those_of_the_rates_in_force(tmp_path, stop):
    live, _ = go(tmp_path / "a", algorithm=pooled(), stop=stop)
    assert live.state.slowed != 1
    again = simulation(tmp_path / "a", algorithm=pooled())
    again.journal.close()
    assert again.state.sums.tolist() == live.state.sums.tolist()
    assert all(a.numpy() == pytest.approx(b.numpy(), abs=1e-5) for a, b in sums_and_model(again))


def test_clients_of_a_resumed_run_pull_the_same_sums(tmp_path):
    options = {"downlink": Downlink(10**6, "sums"), "factor": 5.0}
    whole, reports = go(tmp_path / "a", algorithm=pooled(), **options)
    _, first = go(tmp_path / "b", algorithm=pooled(), stop=10, **options)
    resumed, rest = go(tmp_path / "b", algorithm=pooled(), **options)
    assert [r.bytes_down for r in first + rest] == [r.bytes_down for r in reports]
    assert resumed.state.sums.tolist() == whole.state.sums.tolist()
    assert resumed.bench.params.digest() == whole.bench.params.digest()


@pytest.fixture(scope="module")
def workers():
    with Workers(quadratic_recipe, 2) as found:
        yield found


@pytest.mark.parametrize("options", [{"adapt": True}, WILD, {**WILD, "on_surge": "halve"}], ids=str)
def test_the_journal_is_the_same_whoever_walks(tmp_path, workers, options):
    alone, _ = go(tmp_path / "a", loss=quadratic_loss, **options)
    shared, _ = go(tmp_path / "b", loss=quadratic_loss, walkers=workers, **options)
    assert shared.bench.params.digest() == alone.bench.params.digest()
    assert written(tmp_path / "a") == written(tmp_path / "b")


# Configurations


@pytest.mark.parametrize(
    ("algorithm", "adapt", "decay"),
    [
        ({}, True, "wsd"),
        ({"rate": 1e-3}, False, "constant"),
        ({"rate": 1e-3, "adapt": True}, True, "wsd"),
        ({"adapt": False}, False, "constant"),
        ({"decay": "linear"}, True, "linear"),
        ({"name": "fedavg"}, False, "constant"),
        ({"name": "fedavg", "adapt": True}, False, "constant"),
    ],
    ids=str,
)
def test_a_rate_that_is_left_to_the_program_is_adapted_and_decays(data, algorithm, adapt, decay):
    resolved = build(small(data, algorithm=algorithm), measure=False).config.algorithm
    assert (resolved.adapt, resolved.decay) == (adapt, decay)
    assert resolved.rate > 0


def test_wsd_is_one_for_half_of_the_rounds_and_falls_to_nothing():
    factors = [decayed("wsd", number, 30) for number in range(31)]
    assert factors[:16] == [1.0] * 16
    assert factors[16] < 1
    assert factors[30] == 0
    assert [a - b for a, b in pairwise(factors[15:])] == pytest.approx([1 / 15] * 15)


def test_the_summary_counts_the_passes_of_the_looks(data, tmp_path, monkeypatch):
    passes, plain = [], Lookout.losses

    def counted(self):
        found = plain(self)
        passes.extend(found)
        return found

    monkeypatch.setattr(Lookout, "losses", counted)
    summary = run(small(data), out=tmp_path / "run")
    assert summary.looks == len(passes) > 0
    assert summary.taken_back >= 0
    longer = resume(tmp_path / "run", rounds=8)
    assert longer.rounds == 8
    assert longer.looks == len(passes)
    assert longer.looks > summary.looks


@pytest.mark.parametrize(
    "sections", [{"algorithm": {"name": "fedavg"}}, {"guard": {"batches": 0}}], ids=["fedavg", "no batches"]
)
def test_without_judged_batches_nothing_is_looked_at(data, tmp_path, sections):
    summary = run(small(data, **sections), out=tmp_path / "run")
    assert (summary.looks, summary.taken_back) == (0, 0)
    with Journal.open(tmp_path / "run" / "journal.sqlite", readonly=True) as journal:
        assert LOOK not in {kind for _, kind, _ in journal.events()}
