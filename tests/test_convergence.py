"""Forward-only training works: on the tiny language model, with thresholds measured on it.

The settings are those of a study at this scale: LoRA rank 8, alpha 16 on all linear layers, four clients, five local
steps, batch 2, mu 1e-3, clip 3. `python scripts/measure_tiny.py` prints the figures behind every threshold over three
seeds; a threshold is about two thirds of the weakest seed's drop.
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

COMMON = Settings(rate=5e-4, mu=1e-3, steps=5, clip=3.0)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_t1_twenty_rounds_lower_the_evaluation_loss():
    assert drop(COMMON, rounds=20) > T1


def test_t2_forty_rounds_lower_it_further():
    assert drop(COMMON, rounds=40) > T2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t3_eighty_rounds_on_three_seeds(seed):
    assert drop(COMMON, rounds=80, seed=seed) > T3


def test_t4_full_parameters_of_one_client():
    settings = Settings(rate=3.6e-4, steps=50)
    assert drop(settings, rounds=1, clients=1, kind="full") > T4


def test_t5_without_a_clip_a_high_rate_surges_and_the_guard_sees_it():
    wild = Settings(rate=T5_RATE, steps=10, clip=math.inf)
    history = federate(wild, rounds=16, clients=1, guard=True)
    assert history.end > history.start + 1
    assert history.surged


def test_t5b_the_same_rate_with_the_default_clip_does_not_surge():
    history = federate(Settings(rate=T5_RATE, steps=10), rounds=16, clients=1, guard=True)
    assert history.end < history.start
    assert not history.surged


def test_t6_at_a_small_rate_forward_only_descends_like_backpropagation():
    settings = Settings(rate=1e-3, steps=10, clip=math.inf)
    ours = federate(settings, rounds=12)
    theirs = backprop(settings, rounds=12)
    assert abs(ours.end - theirs) < T6_GAP
    assert ours.end < ours.start - T6_DROP
    assert theirs < ours.start - T6_DROP


def test_t7_the_slope_is_the_directional_derivative_and_its_estimate_points_where_theory_says():
    bench = bench_for(clients=1, batch=8)
    names = bench.params.names
    gradient = bench.gradient(client=0, round_number=0, step=0)
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
