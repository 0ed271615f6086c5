"""The estimator's options, each an option of the one walk: degenerate cases give the plain walk, bit for bit."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import ToyBench, quadratic_bench, quadratic_loss, quadratic_params

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Point, Task
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.pool import directions_of
from fedmezo.fl.walk import walk_of
from fedmezo.zo.coding import CODINGS, coded
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_, step_

CLIENTS = (0, 1, 2)
PLAIN = Settings(rate=0.02, mu=1e-2, steps=5, directions=2, clip=math.inf)
ALGORITHMS = {
    "fedmezo": lambda settings: fedmezo(settings, seed=5, cohort=3),
    "fedkseed": lambda settings: fedkseed(settings, Pool(64), seed=5, cohort=3),
    "fedkseed-pro": lambda settings: fedkseed(settings, Pool(64, pro=True), seed=5, cohort=3),
}


def play(algorithm, bench, *, rounds=3, law="gaussian"):
    state, answered = algorithm.init(), []
    for _ in range(rounds):
        tasks = algorithm.plan(state, CLIENTS)
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law=law)
        answered += replies
    return bench.params, answered


def slope_of_one(tensors, client, _round, _step):
    """A loss whose slope along any Rademacher direction of one scalar is exactly 1 or -1."""
    return float(tensors["a"].double().sum())


def unit_bench():
    return ToyBench(Params({"a": torch.zeros(1)}), slope_of_one, law="rademacher")


DEGENERATE = {
    "one step has no momentum": (replace(PLAIN, steps=1), {"momentum": 0.9}, quadratic_bench),
    "momentum 0 is none": (PLAIN, {"momentum": 0.0}, quadratic_bench),
    "float32 is what slopes are": (PLAIN, {"coding": "float32"}, quadratic_bench),
    "signs of unit slopes are the slopes": (
        replace(PLAIN, law="rademacher", mu=0.25), {"coding": "sign"}, unit_bench,
    ),
    "8 bits hold a unit slope": (replace(PLAIN, law="rademacher", mu=0.25), {"coding": "float8"}, unit_bench),
    "unit slopes have deviation 1": (replace(PLAIN, law="rademacher", mu=0.25), {"normalise": True}, unit_bench),
    "an infinite clip is none": (PLAIN, {"clip": math.inf}, quadratic_bench),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("case", DEGENERATE)
def test_in_its_degenerate_case_an_option_is_the_plain_walk(kind, case):
    plain, option, bench = DEGENERATE[case]
    with_option, _ = play(ALGORITHMS[kind](replace(plain, **option)), bench(), law=plain.law)
    without, _ = play(ALGORITHMS[kind](plain), bench(), law=plain.law)
    assert with_option.digest() == without.digest()
    assert with_option.digest() != bench().params.digest()


OPTIONS = {
    "momentum": {"momentum": 0.5},
    "normalise": {"normalise": True},
    "rademacher": {"law": "rademacher"},
    "forward": {"estimator": "forward"},
    **{coding: {"coding": coding} for coding in CODINGS if coding != "float32"},
}


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_walk_and_still_descends(kind, option):
    chosen = replace(PLAIN, rate=0.01, steps=10, clip=3.0, **OPTIONS[option])
    law = chosen.law
    if option in ("normalise", "sign"):
        chosen = replace(chosen, rate=0.1)
    bench, start = quadratic_bench(law=law), quadratic_params()
    got, answered = play(ALGORITHMS[kind](chosen), bench, rounds=25, law=law)
    plain, _ = play(
        ALGORITHMS[kind](replace(PLAIN, rate=chosen.rate, steps=10, clip=3.0)), quadratic_bench(), rounds=25
    )
    assert got.digest() != plain.digest()
    losses = [sum(quadratic_loss(dict(p), c, 0, 0) for c in CLIENTS) for p in (start, got)]
    assert losses[1] < 0.75 * losses[0]
    assert all(reply.coding == chosen.coding for reply in answered)


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("coding", CODINGS)
def test_what_travels_is_what_the_client_walked_by(kind, coding):
    settings = replace(PLAIN, coding=coding)
    _, answered = play(ALGORITHMS[kind](settings), quadratic_bench(), rounds=1)
    raw = play(ALGORITHMS[kind](PLAIN), quadratic_bench(), rounds=1)[1]
    for reply, plain in zip(answered, raw, strict=True):
        assert all(coded(slope, coding) == slope for slope in reply.slopes)
        # Its first step was taken from the same point as the plain client's.
        assert reply.slopes[:2] == tuple(coded(slope, coding) for slope in plain.slopes[:2])


def test_a_walk_with_momentum_ends_where_the_server_says():
    settings = replace(PLAIN, momentum=0.8, steps=12, directions=1)
    walker = fedmezo(settings, seed=5, cohort=1)
    task = walker.plan(walker.init(), (1,))[0]
    by_hand, velocity = quadratic_params(), {name: torch.zeros_like(t) for name, t in quadratic_params()}
    reply = walker.client([task], quadratic_bench())[0]
    for seed, slope in zip(directions_of(task).seeds, reply.slopes, strict=True):
        # The client was where the heavy ball is, or it would have seen another slope.
        sides = [Point(by_hand, seed, side * task.mu, 1, 0, 0) for side in (1, -1)]
        above, below = quadratic_bench().losses(sides)
        assert slope == pytest.approx((above - below) / (2 * task.mu), rel=1e-2, abs=2e-2)
        push = Params({name: torch.zeros_like(t) for name, t in by_hand})
        step_(push, seed, coefficient=-0.02 * slope, law="gaussian")
        for name, t in by_hand:
            velocity[name] = 0.8 * velocity[name] + push[name]
            t += velocity[name]
    server = quadratic_params()
    _, update = walker.aggregate(walker.init(), [task], [reply])
    apply_(server, update, law="gaussian")
    for name, t in server:
        moved = float((t - quadratic_params()[name]).abs().max())
        assert float((t - by_hand[name]).abs().max()) < 2**-9 * moved


def test_the_slopes_of_a_walk_with_momentum_are_those_of_its_own_path():
    # With momentum the client is somewhere else from its second step on.
    settings = replace(PLAIN, directions=1)
    plain, heavy = (
        play(fedmezo(s, seed=5, cohort=3), quadratic_bench(), rounds=1)[1][0].slopes
        for s in (settings, replace(settings, momentum=0.8))
    )
    assert plain[0] == heavy[0]
    assert plain[1] == heavy[1]
    assert plain[2] != heavy[2]


@pytest.mark.parametrize(("estimator", "points"), [("two-point", 8), ("forward", 5)])
def test_all_directions_of_a_step_go_into_one_call(estimator, points):
    asked = []

    class Counting(ToyBench):
        def losses(self, points):
            asked.append(len(points))
            return super().losses(points)

    bench = Counting(quadratic_params(), quadratic_loss, capacity=1)
    settings = replace(PLAIN, directions=4, steps=3, estimator=estimator)
    walker = fedmezo(settings, seed=5, cohort=1)
    walker.client(walker.plan(walker.init(), (0,)), bench)
    assert asked == [points] * 3


def test_more_directions_make_a_step_closer_to_the_gradient():
    def cosine(directions):
        settings = replace(PLAIN, steps=1, directions=directions, rate=1e-3)
        found = []
        for client in range(30):
            walker = fedmezo(settings, seed=client, cohort=1)
            tasks = walker.plan(walker.init(), (0,))
            replies = walker.client(tasks, quadratic_bench())
            moved = quadratic_params()
            apply_(moved, walker.aggregate(walker.init(), tasks, replies)[1], law="gaussian")
            step = torch.cat([(t - quadratic_params()[n]).view(-1) for n, t in moved])
            gradient = torch.cat([t.view(-1) for _, t in quadratic_params()])
            found.append(-float(torch.cosine_similarity(step, gradient, dim=0)))
        return np.mean(found)

    # E cos ~ sqrt(n / (n + d + 1)), d = 27.
    assert cosine(1) < 0.3 < 0.5 < cosine(16)
    assert cosine(16) == pytest.approx(math.sqrt(16 / 44), abs=0.12)


def test_normalising_needs_two_directions():
    with pytest.raises(RunError, match="at least 2 directions"):
        Task(0, 0, 0, 1.0, 1.0, 1, normalise=True)


def test_weight_decay_is_refused_for_walks():
    with pytest.raises(RunError, match="backpropagation only"):
        Task(0, 0, 0, 1.0, 1.0, 1, weight_decay=0.1)


def test_a_walk_rebuilt_from_its_slopes_has_one_coefficient_per_direction():
    task = Task(0, 0, 0, 1.0, 1.0, 3, directions=2, momentum=0.5)
    walk = walk_of(task, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
    assert walk.coefficients == (-0.5 * 1.75, -1.0 * 1.75, -2.0 * 1.5, -4.0 * 1.5, -8.0, -16.0)
