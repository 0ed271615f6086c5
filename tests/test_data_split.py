"""Splits are disjoint covers named by their seed."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmezo.data import SplitReport, holdout, holdout_clients, split, split_report
from fedmezo.data.split import shuffled
from fedmezo.errors import DataError

LABELS = [f"c{i % 7}" for i in range(140)]
GOLDEN_ORDER = [1, 6, 5, 4, 0, 3, 7, 2]
GOLDEN_LDA = ((3, 7, 2), (0, 1, 4, 5, 6))
labels_of = st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=80)


def is_cover(parts, count):
    return sorted(index for part in parts for index in part) == list(range(count))


@given(labels=labels_of, clients=st.integers(1, 8), seed=st.integers(0, 2**64 - 1))
def test_iid_is_a_disjoint_cover_of_equal_parts(labels, clients, seed):
    parts = split("iid", labels, clients=clients, seed=seed)
    assert is_cover(parts, len(labels))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(
    counts=st.lists(st.integers(20, 60), min_size=3, max_size=8),
    clients=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    alpha=st.floats(0.2, 1e6),
)
def test_lda_is_a_disjoint_cover_without_an_empty_client(counts, clients, seed, alpha):
    labels = [str(category) for category, count in enumerate(counts) for _ in range(count)]
    parts = split("lda", labels, clients=clients, seed=seed, alpha=alpha)
    assert len(parts) == clients
    assert min(map(len, parts)) >= 1
    assert is_cover(parts, len(labels))


@settings(max_examples=30)
@given(labels=labels_of, clients=st.integers(1, 8), seed=st.integers(0, 99), alpha=st.floats(1e-12, 1e12))
def test_lda_of_any_data_is_a_cover_or_says_what_to_change(labels, clients, seed, alpha):
    try:
        parts = split("lda", labels, clients=clients, seed=seed, alpha=alpha)
    except DataError as error:
        assert "raise alpha, use fewer clients" in str(error)
    else:
        assert min(map(len, parts)) >= 1
        assert is_cover(parts, len(labels))


@given(
    counts=st.lists(st.integers(30, 60), min_size=3, max_size=8),
    clients=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
    alpha=st.floats(0.5, 1e6),
    least=st.integers(1, 10),
)
def test_balanced_lda_is_a_cover_whose_smallest_client_has_enough(counts, clients, seed, alpha, least):
    labels = [str(category) for category, count in enumerate(counts) for _ in range(count)]
    parts = split("lda", labels, clients=clients, seed=seed, alpha=alpha, balanced=True, min_examples=least)
    assert len(parts) == clients
    assert min(map(len, parts)) >= least
    assert is_cover(parts, len(labels))


def pieces_after_the_mean(*, balanced, seed, clients=6):
    """Counts the clients that hold the mean at some category, and the later categories of which they still get some."""
    report = split_report(split("lda", LABELS, clients=clients, seed=seed, balanced=balanced), LABELS)
    full = more = 0
    for histogram in report.histograms:
        held = 0
        for category in sorted(set(LABELS)):
            more += held * clients >= len(LABELS) and category in histogram
            held += histogram.get(category, 0)
        full += held * clients >= len(LABELS)
    return full, more


def test_balanced_lda_gives_nothing_more_to_a_client_that_holds_the_mean():
    balanced = [pieces_after_the_mean(balanced=True, seed=seed) for seed in range(20)]
    assert all(full and not more for full, more in balanced)
    assert any(pieces_after_the_mean(balanced=False, seed=seed)[1] for seed in range(20))


@pytest.mark.parametrize("balanced", [False, True])
def test_lda_draws_until_every_client_has_enough(balanced):
    few = [min(map(len, split("lda", LABELS, clients=6, seed=s, balanced=balanced))) for s in range(20)]
    many = [
        min(map(len, split("lda", LABELS, clients=6, seed=s, balanced=balanced, min_examples=10))) for s in range(20)
    ]
    assert min(few) < 10 <= min(many)


@given(labels=labels_of)
def test_natural_is_one_label_to_each_client_in_order(labels):
    parts = split("natural", labels, clients=len(set(labels)), seed=0)
    assert is_cover(parts, len(labels))
    assert [{labels[i] for i in part} for part in parts] == [{label} for label in sorted(set(labels))]


@given(labels=labels_of, seed=st.integers(0, 2**64 - 1), data=st.data())
def test_meta_puts_each_category_on_one_client(labels, seed, data):
    categories = len(set(labels))
    clients = data.draw(st.integers(1, categories))
    parts = split("meta", labels, clients=clients, seed=seed)
    assert is_cover(parts, len(labels))
    owners = [{client for client, part in enumerate(parts) for i in part if labels[i] == c} for c in set(labels)]
    assert all(len(owner) == 1 for owner in owners)
    numbers = [len({labels[i] for i in part}) for part in parts]
    assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("kind", ["iid", "lda", "meta"])
def test_split_is_named_by_its_seed(kind):
    first = split(kind, LABELS, clients=3, seed=5)
    assert first == split(kind, LABELS, clients=3, seed=5)
    assert any(first != split(kind, LABELS, clients=3, seed=seed) for seed in (6, 7, 8))


def test_balanced_lda_is_named_by_its_seed():
    first = split("lda", LABELS, clients=3, seed=5, balanced=True)
    assert first == split("lda", LABELS, clients=3, seed=5, balanced=True)
    assert any(first != split("lda", LABELS, clients=3, seed=seed, balanced=True) for seed in (6, 7, 8))


def test_splits_do_not_touch_numpy_s_global_generator():
    import numpy as np

    np.random.seed(3)
    wanted = np.random.rand()
    np.random.seed(3)
    split("lda", LABELS, clients=3, seed=5)
    assert np.random.rand() == wanted


# Made by `shuffled` itself; pins the order that journals of earlier runs rely on.
def test_golden_order():
    assert shuffled(8, "batches", 0, 1, 2).tolist() == GOLDEN_ORDER


def test_golden_lda():
    assert split("lda", [*"aabbaabb"], clients=2, seed=0) == GOLDEN_LDA


def test_lda_is_uneven_for_small_alpha_and_even_for_large():
    uneven = split_report(split("lda", LABELS, clients=3, seed=1, alpha=0.05), LABELS)
    even = split_report(split("lda", LABELS, clients=3, seed=1, alpha=1e6), LABELS)
    assert min(uneven.distances) > 0.2 > 0.05 > max(even.distances)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "idd"}, "Unknown split 'idd'; expected one of iid, lda, meta, natural"),
        ({"kind": "iid", "clients": 0}, "clients: expected at least 1, got 0"),
        ({"kind": "iid", "clients": 141}, "Cannot give 141 clients a record each from 140"),
        ({"kind": "lda", "alpha": 0.0}, "alpha: expected a positive number"),
        ({"kind": "lda", "alpha": float("nan")}, "alpha: expected a positive number"),
        ({"kind": "lda", "alpha": 1e-9, "clients": 9}, "left one of 9 clients without a record in each of"),
        ({"kind": "lda", "alpha": 1e-9, "clients": 9, "balanced": True}, "left one of 9 clients without a record"),
        ({"kind": "lda", "min_examples": 0}, "min_examples: expected at least 1, got 0"),
        ({"kind": "lda", "min_examples": 47}, "Cannot give 3 clients 47 records each from 140"),
        ({"kind": "lda", "min_examples": 20, "clients": 7}, "left one of 7 clients with fewer than 20 records in each"),
        ({"kind": "meta", "clients": 8}, "there are 7 categories for 8 clients"),
        ({"kind": "natural"}, "there are 7 labels for 3 clients; set federation.clients = 7"),
    ],
)
def test_impossible_splits_are_refused(arguments, sentence):
    with pytest.raises(DataError, match=sentence):
        split(labels=LABELS, **{"clients": 3, "seed": 0, **arguments})


def test_report_counts_and_measures():
    report = split_report([(0, 1), (2, 3)], [*"aaab"])
    assert report == SplitReport((2, 2), ({"a": 2}, {"a": 1, "b": 1}), (0.25, 0.25))
    assert json.loads(json.dumps(report.as_dict())) == {
        "sizes": [2, 2],
        "histograms": [{"a": 2}, {"a": 1, "b": 1}],
        "distances": [0.25, 0.25],
    }


@given(labels=labels_of, clients=st.integers(1, 8))
def test_report_histograms_add_up_and_distances_are_shares(labels, clients):
    report = split_report(split("iid", labels, clients=clients, seed=0), labels)
    total = Counter()
    for histogram in report.histograms:
        total.update(histogram)
    assert total == Counter(labels)
    assert all(0 <= distance < 1 for distance in report.distances)
    assert clients > 1 or report.distances == (0.0,)


def test_report_of_an_empty_client_is_refused():
    with pytest.raises(DataError, match="Client 1 has no record"):
        split_report([(0,), ()], ["a"])


@given(count=st.integers(1, 60), seed=st.integers(0, 99), data=st.data())
def test_holdout_is_a_disjoint_cover_of_the_size_asked(count, seed, data):
    examples = data.draw(st.integers(0, count - 1))
    train, test = holdout(count, examples=examples, seed=seed)
    assert sorted(train + test) == list(range(count))
    assert len(test) == examples
    assert (train, test) == holdout(count, examples=examples, seed=seed)


@pytest.mark.parametrize("examples", [-1, 5, 6])
def test_holdout_that_leaves_nothing_is_refused(examples):
    with pytest.raises(DataError, match=f"Cannot set {examples} of 5 records apart"):
        holdout(5, examples=examples, seed=0)


@given(clients=st.integers(1, 8), per_client=st.one_of(st.floats(0, 0.99), st.integers(0, 50)))
def test_clients_holdout_keeps_their_records_and_leaves_one_to_train_on(clients, per_client):
    parts = split("iid", LABELS[:30], clients=clients, seed=0)
    train, test = holdout_clients(parts, per_client=per_client, seed=4)
    for part, kept, apart in zip(parts, train, test, strict=True):
        assert sorted(kept + apart) == sorted(part)
        wanted = per_client if per_client >= 1 else int(per_client * len(part))
        assert len(apart) == min(wanted, len(part) - 1)


@pytest.mark.parametrize("per_client", [-0.1, 1.5])
def test_clients_holdout_of_an_odd_number_is_refused(per_client):
    with pytest.raises(DataError, match="share below 1 or a whole number"):
        holdout_clients([(0, 1, 2)], per_client=per_client, seed=0)
