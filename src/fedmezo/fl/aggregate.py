"""From replies to weights: who counts how much."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import is_whole

__all__ = [
    "Pairs", "Weighting", "cut", "dataset_weights", "first_bounded", "sample_weights", "uniform_weights", "weighting",
    "weights_of",
]  # fmt: skip

Pairs = Sequence[tuple[Task, Reply]]
Weighting = Callable[[Pairs], list[float]]
_FARTHEST = 10.0  # medians; a walk that long has diverged, or was made up


def weights_of(pairs: Pairs, weights: Weighting) -> tuple[float, ...]:
    """Returns the weight of each reply of a round: by `weights`, or 1 for a walk that stands for all and 0 for others.

    Args:
      pairs: tasks and replies in client order.
      weights: how much clients count.
    """
    if pairs and is_whole(pairs[-1][1]):
        return (*[0.0] * (len(pairs) - 1), 1.0)
    return tuple(weights(pairs)) if pairs else ()


def uniform_weights(pairs: Pairs) -> list[float]:
    """Returns 1/N for each of N replies, as the theory has it."""
    return [1 / len(pairs)] * len(pairs)


def sample_weights(pairs: Pairs) -> list[float]:
    """Returns weights proportional to the examples each walk used, as the released code has it."""
    return _proportional([reply.examples for _, reply in pairs])


def first_bounded(weights: Weighting) -> Weighting:
    """Returns the weighting with a limit on walks whose slopes nobody limited: ten times the median length.

    In a run's first round the slopes' scale is unknown and every walk limits itself by its own (`Task.clip` is 0), so a
    single client could send any. A walk longer than ten times the median one counts as if it had that length.
    """

    def bounded(pairs: Pairs) -> list[float]:
        plain = weights(pairs)
        if not any(task.clip == 0 and task.method == "walk" for task, _ in pairs):
            return plain
        lengths = [math.hypot(*walk_of(task, reply.slopes).coefficients) for task, reply in pairs]
        return cut(plain, lengths, medians=_FARTHEST)

    return bounded


def cut(weights: Sequence[float], lengths: Sequence[float], *, medians: float) -> list[float]:
    """Returns the weights with which no walk counts as longer than so many median lengths of those that went anywhere.

    Args:
      weights: one per walk.
      lengths: as many, >= 0.
      medians: the multiple, > 0.
    """
    most = medians * median([long for long in lengths if long] or [0.0])
    return [weight * min(1.0, most / long) if long else weight for weight, long in zip(weights, lengths, strict=True)]


def dataset_weights(sizes: Mapping[int, int]) -> Weighting:
    """Returns a weighting proportional to each client's number of training examples."""

    def weights(pairs: Pairs) -> list[float]:
        return _proportional([sizes[reply.client] for _, reply in pairs])

    return weights


def _proportional(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    if total == 0:
        raise RunError("No client used a single example this round (every loss was not finite); lower rate or mu.")
    return [count / total for count in counts]


def weighting(name: str, sizes: Mapping[int, int]) -> Weighting:
    """Returns the weighting called `name`: uniform | samples | dataset.

    Raises:
      ConfigError: no such weighting.
    """
    known = {"uniform": uniform_weights, "samples": sample_weights, "dataset": dataset_weights(sizes)}
    if name not in known:
        raise ConfigError(f"federation.weighting must be one of {sorted(known)}, got {name!r}.")
    return known[name]
