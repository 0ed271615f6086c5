"""Choosing by label: whole labels, and so many records of each, named by the seed."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo.data import Record
from fedmezo.data.choose import check_labels, draw_labels, few_per_label, label_of, most_per_label
from fedmezo.errors import DataError

labels_of = st.lists(st.sampled_from("abcdefgh"), max_size=60)


def test_a_label_is_the_text_of_any_field():
    record = Record("i", "j", "o", "c")
    assert [label_of(record, field) for field in ("instruction", "input", "output", "category")] == [*"ijoc"]
    with pytest.raises(
        DataError, match=r"split\.field: expected a field of a record such as category, got '__class__'"
    ):
        label_of(record, "__class__")


def test_an_unknown_label_is_refused_with_those_that_are_known():
    check_labels(["a", "b"], ["b", "a", "b"], key="k")
    check_labels([], [], key="k")
    with pytest.raises(DataError) as caught:
        check_labels(["a", "x"], ["b", "a", "b"], key="data.categories")
    assert str(caught.value) == "data.categories: no record has the label 'x'; known are a, b."


def test_of_many_labels_the_closest_are_named():
    many = [f"task{n:03}_{word}" for n in range(50) for word in ("sort", "count")]
    with pytest.raises(
        DataError, match=r"no record has the label 'task07_sort'; 100 are known, such as task0.7_sort, "
    ):
        check_labels(["task07_sort"], many, key="k")
    with pytest.raises(DataError, match=r"100 are known, such as task000_count, task000_sort, .*task009_sort\.$"):
        check_labels(["!!"], many, key="k")


@given(labels=st.sets(st.text(max_size=3), min_size=1), seed=st.integers(0, 99), data=st.data())
def test_drawn_labels_are_usable_and_as_many_as_asked(labels, seed, data):
    usable = data.draw(st.sets(st.sampled_from(sorted(labels)), min_size=1))
    number = data.draw(st.integers(1, len(usable)))
    drawn = draw_labels(labels, number=number, seed=seed, usable=usable.__contains__)
    assert len(drawn) == number
    assert drawn <= usable
    assert drawn == draw_labels([*labels, *labels], number=number, seed=seed, usable=usable.__contains__)


def test_the_draw_of_labels_is_named_by_its_seed():
    assert len({draw_labels("abcdefgh", number=3, seed=seed) for seed in range(10)}) > 5


def test_no_label_is_asked_about_once_there_are_enough():
    asked = []
    draw_labels("abcdefgh", number=3, seed=0, usable=lambda label: not asked.append(label))
    assert len(asked) == 3


def test_too_few_usable_labels_are_refused():
    with pytest.raises(DataError, match=r"data.categories: 3 labels are wanted, but 1 of 4 have enough usable records"):
        draw_labels("abcd", number=3, seed=0, usable=lambda label: label == "b")


@given(labels=labels_of, fewest=st.integers(1, 10), data=st.data())
def test_few_are_those_of_labels_below_the_count(labels, fewest, data):
    some = sorted(data.draw(st.sets(st.sampled_from(range(len(labels)))))) if labels else []
    counts = Counter(labels[i] for i in some)
    assert few_per_label(labels, some, fewest=fewest) == tuple(i for i in some if counts[labels[i]] < fewest)


@given(labels=labels_of, most=st.integers(1, 10), seed=st.integers(0, 99), data=st.data())
def test_at_most_so_many_of_each_label_stay_in_their_order(labels, most, seed, data):
    some = sorted(data.draw(st.sets(st.sampled_from(range(len(labels)))))) if labels else []
    kept = most_per_label(labels, some, most=most, seed=seed)
    assert list(kept) == sorted(set(kept) & set(some))
    wanted = {label: min(most, count) for label, count in Counter(labels[i] for i in some).items()}
    assert Counter(labels[i] for i in kept) == wanted


def test_the_draw_within_a_label_is_named_by_the_seed():
    labels = ["a"] * 20 + ["b"] * 20
    drawn = {most_per_label(labels, range(40), most=5, seed=seed) for seed in range(5)}
    assert len(drawn) == 5
    # Each label has a draw of its own.
    assert all([i + 20 for i in kept[:5]] != list(kept[5:]) for kept in drawn)
