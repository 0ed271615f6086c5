"""From replies to weights: who counts how much."""

from collections.abc import Callable, Mapping, Sequence

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.algorithm import Reply

__all__ = ["Weighting", "dataset_weights", "sample_weights", "uniform_weights", "weighting"]

Weighting = Callable[[Sequence[Reply]], list[float]]


def uniform_weights(replies: Sequence[Reply]) -> list[float]:
    """Returns 1/N for each of N replies, as the theory has it."""
    return [1 / len(replies)] * len(replies)


def sample_weights(replies: Sequence[Reply]) -> list[float]:
    """Returns weights proportional to the examples each walk used, as the released code has it."""
    return _proportional([reply.examples for reply in replies])


def dataset_weights(sizes: Mapping[int, int]) -> Weighting:
    """Returns a weighting proportional to each client's number of training examples."""

    def weights(replies: Sequence[Reply]) -> list[float]:
        return _proportional([sizes[reply.client] for reply in replies])

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
