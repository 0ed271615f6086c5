"""Forward-only training works: on the tiny language model, with thresholds measured on it.

LoRA rank 8, alpha 16 on all linear layers, four clients, five local steps, batch 2, mu 1e-3, clip 3. `make measure`
prints the figures behind every threshold over three seeds (docs/results/tiny_study.jsonl); a threshold is about two
thirds of the weakest seed's figure.
"""

import math
from dataclasses import replace

import pytest
import torch
from tiny_study import LINEARS, backprop, bench_for, drop, examples, federate, start_loss

from fedmezo.fl.algorithm import Point
from fedmezo.fl.fedmezo import Settings
from fedmezo.zo.estimate import two_point
from fedmezo.zo.noise import noise

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = Settings(rate=5e-4, mu=1e-3, steps=5, clip=3.0)


def test_t1_twenty_rounds_lower_the_evaluation_loss():
    assert drop(COMMON, rounds=20) > 0.15


def test_t2_forty_rounds_lower_it_further():
    assert drop(COMMON, rounds=40) > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t3_eighty_rounds_on_three_seeds(seed):
    assert drop(COMMON, rounds=80, seed=seed) > 1.0


def test_t4_full_parameters_of_one_client():
    settings = Settings(rate=1e-4, steps=50)
    assert drop(settings, rounds=1, clients=1, kind="full") > 0.45


WILD = Settings(rate=1e-3, steps=10)


def test_t5_a_rate_ten_times_too_high_surges_without_a_clip_and_the_guard_sees_it():
    wild = federate(replace(WILD, clip=math.inf), rounds=8, clients=1, kind="full", guard=True)
    assert wild.end > wild.start + 1
    assert wild.surged
    clipped = federate(WILD, rounds=8, clients=1, kind="full", guard=True)
    assert clipped.end < wild.end / 2


def test_t6_at_a_small_rate_forward_only_descends_like_backpropagation():
    settings = Settings(rate=1e-4, steps=10, clip=math.inf)
    ours = federate(settings, rounds=12)
    theirs = backprop(settings, rounds=12)
    assert abs(ours.end - theirs) < 0.05
    assert ours.end < ours.start - 0.03
    assert theirs < ours.start - 0.03


def test_t7_the_slope_is_the_directional_derivative_and_its_estimate_points_where_theory_says():
    bench = bench_for(clients=1, batch=8)
    names = bench.params.names
    _, gradient = bench.gradient(Point(bench.params, 0, 0.0, 0, 0, 0))
    flat = torch.cat([gradient[name].view(-1).double() for name in names])
    slopes, exact, estimate = [], [], torch.zeros_like(flat)
    for seed in range(64):
        above, below = bench.losses([Point(bench.params, seed, s * 1e-3, 0, 0, 0) for s in (1, -1)])
        z = torch.cat([noise(seed, name, size=gradient[name].numel()) for name in names]).double()
        slopes.append(two_point(above, below, mu=1e-3))
        exact.append(float(flat @ z))
        if seed < 16:
            estimate += slopes[-1] * z / 16
    pair = torch.tensor([slopes, exact])
    assert torch.corrcoef(pair)[0, 1] > 0.999
    assert (pair[0] - pair[1]).square().mean().sqrt() < 0.01 * pair[1].square().mean().sqrt()
    cosine = float(estimate @ flat / (estimate.norm() * flat.norm()))
    assert 0.5 < cosine / math.sqrt(16 / (16 + flat.numel() + 1)) < 2


def test_t8_a_rate_of_zero_leaves_the_loss_as_it_was():
    history = federate(replace(COMMON, rate=0.0), rounds=2)
    assert history.end == history.start
    assert history.start == start_loss()


def test_examples_of_the_study_are_held_out_kinds_with_a_high_loss():
    assert len(examples(count=40, seed=9)) == 40
    assert start_loss() > 3
    assert len(LINEARS) == 7
