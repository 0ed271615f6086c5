"""Choosing records by their label: whole labels, and so many records of each."""

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence

from fedmezo.data.records import FIELDS, Record
from fedmezo.data.split import shuffled
from fedmezo.errors import DataError

__all__ = ["check_labels", "draw_labels", "few_per_label", "label_of", "most_per_label"]

SHOWN = 20


def label_of(record: Record, field: str) -> str:
    """Returns the record's label, the text of its field.

    Raises:
      DataError: a record has no such field.
    """
    if field not in FIELDS:
        raise DataError(f"split.field: expected a field of a record such as category, got '{field}'.")
    return str(getattr(record, field))


def check_labels(wanted: Iterable[str], labels: Collection[str], *, key: str) -> None:
    """Passes when every wanted label exists.

    Args:
      wanted: labels a configuration names.
      labels: the records' labels.
      key: the configuration's key that names them.

    Raises:
      DataError: one does not exist; the message names those that do, or the closest where they are many.
    """
    known = sorted(set(labels))
    for label in wanted:
        if label in known:
            continue
        close = difflib.get_close_matches(label, known, n=3)
        some = known if len(known) <= SHOWN else close or known[:SHOWN]
        what = "known are" if len(known) <= SHOWN else f"{len(known)} are known, such as"
        raise DataError(f"{key}: no record has the label '{label}'; {what} {', '.join(some)}.")


def draw_labels(
    labels: Collection[str], *, number: int, seed: int, usable: Callable[[str], bool] = bool
) -> frozenset[str]:
    """Returns `number` labels, drawn one after another among those that are usable.

    Args:
      labels: what to draw from; repeats count once.
      number: how many, >= 1.
      seed: names the draw.
      usable: asked of each label drawn, until there are enough.

    Raises:
      DataError: there are not so many usable labels.
    """
    known = sorted(set(labels))
    drawn: set[str] = set()
    for index in shuffled(len(known), "labels", seed).tolist():
        if len(drawn) == number:
            break
        if usable(known[index]):
            drawn.add(known[index])
    if len(drawn) < number:
        raise DataError(
            f"data.categories: {number} labels are wanted, but {len(drawn)} of {len(known)} have enough usable "
            "records; take fewer, or look at data.max_tokens and data.min_per_category."
        )
    return frozenset(drawn)


def few_per_label(labels: Sequence[str], indices: Sequence[int], *, fewest: int) -> tuple[int, ...]:
    """Returns those of the indices whose label has fewer than `fewest` of them."""
    counts: dict[str, int] = {}
    for index in indices:
        counts[labels[index]] = counts.get(labels[index], 0) + 1
    return tuple(index for index in indices if counts[labels[index]] < fewest)


def most_per_label(labels: Sequence[str], indices: Sequence[int], *, most: int, seed: int) -> tuple[int, ...]:
    """Returns at most `most` of the indices for each label, drawn by the seed, in their order."""
    groups: dict[str, list[int]] = {}
    for index in indices:
        groups.setdefault(labels[index], []).append(index)
    kept = {
        group[position]
        for label, group in groups.items()
        for position in shuffled(len(group), "per-label", seed, label)[:most].tolist()
    }
    return tuple(index for index in indices if index in kept)
