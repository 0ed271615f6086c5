"""A batch is a pure function of (seed, client, round, step)."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo.data import Batches, Example, Row
from fedmezo.errors import DataError

PARTS = [[Example((Row((client, n), 1),), record=100 * client + n) for n in range(7 + client)] for client in range(3)]


def batches(**changes):
    return Batches(PARTS, **{"batch_size": 2, "local_steps": 3, "seed": 9, **changes})


def numbers(batch):
    return [example.record for example in batch]


@given(seed=st.integers(0, 2**64 - 1), order=st.randoms(use_true_random=False))
def test_batch_does_not_depend_on_what_was_asked_before(seed, order):
    points = [(client, round, step) for client in range(3) for round in range(4) for step in range(3)]
    walk = batches(seed=seed)
    wanted = {point: walk(*point) for point in points}
    order.shuffle(points)
    again = batches(seed=seed)
    assert {point: again(*point) for point in points} == wanted
    assert {point: batches(seed=seed)(*point) for point in points[:5]} == {point: wanted[point] for point in points[:5]}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 20])
def test_every_epoch_sees_every_example_once(batch_size):
    made = batches(batch_size=batch_size)
    for client, part in enumerate(PARTS):
        stream = [n for round in range(60) for step in range(3) for n in numbers(made(client, round, step))]
        size = len(part)
        epochs = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        assert len(epochs) > 1
        assert all(Counter(epoch) == Counter(numbers(part)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_clients_seeds_and_epochs_have_orders_of_their_own():
    parts = [PARTS[0] * 9] * 2
    first = Batches(parts, batch_size=63, local_steps=1, seed=1)
    other = Batches(parts, batch_size=63, local_steps=1, seed=2)
    orders = [first(0, 0, 0), first(1, 0, 0), first(0, 1, 0), other(0, 0, 0)]
    assert len(set(orders)) == 4


def test_rounds_continue_where_the_last_one_stopped():
    short, long = batches(local_steps=2), batches(local_steps=6)
    assert [short(1, round, step) for round in range(3) for step in range(2)] == [long(1, 0, step) for step in range(6)]


def test_batches_leave_the_global_generator_alone():
    random.seed(1)
    state = random.getstate()
    batches()(0, 0, 0)
    assert random.getstate() == state


def test_sizes_are_the_clients():
    assert [batches().size(client) for client in range(batches().clients)] == [7, 8, 9]


def test_one_order_per_client_is_kept():
    made = batches()
    for round in range(50):
        made(0, round, 0)
        made(1, round, 0)
    assert len(made._orders) == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parts": []}, "clients: expected at least 1, got 0"),
        ({"parts": [PARTS[0], []]}, "Client 1 has no training example"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"local_steps": 0}, "local_steps: expected at least 1, got 0"),
    ],
)
def test_impossible_batches_are_refused(changes, sentence):
    with pytest.raises(DataError, match=sentence):
        Batches(**{"parts": PARTS, "batch_size": 1, "local_steps": 1, "seed": 0, **changes})


@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        ((3, 0, 0), "client: expected one of the 3 that have data here, got 3"),
        ((-1, 0, 0), "client: expected"),
        ((0, -1, 0), "round: expected 0 or more, got -1"),
        ((0, 0, 3), "step: expected 0 <= step < 3, got 3"),
    ],
)
def test_points_out_of_range_are_refused(point, sentence):
    with pytest.raises(DataError, match=sentence):
        batches()(*point)
