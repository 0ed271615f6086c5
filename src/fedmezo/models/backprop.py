"""Backpropagation for the baseline: the batch loss as something to differentiate, in the memory of a few label rows.

The forward pass is the lanes' own with one lane, whose weights are the parameters themselves. Here is what else a
gradient needs: the loss from log-probabilities, and functions that keep their inputs instead of all between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedmezo.errors import ModelError
from fedmezo.models.loss import Example, Row, Tally, loss_weight
from fedmezo.models.schedule import fill

__all__ = ["backward_", "recomputed", "recomputing"]

P = ParamSpec("P")
T = TypeVar("T")
Trace = Callable[[Sequence[Row], Tensor], Tensor]


def recomputed(function: Callable[P, T]) -> Callable[P, T]:
    """Returns `function` as one that keeps only its inputs for the backward pass and runs again there.

    It must draw no random number.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        # On an accelerator autograd works in a thread of its own, which would not see whose lane is being visited.
        again = partial(copy_context().run, function, **kwargs)
        result: T = checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)
        return result

    return run


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Lends a scope in which each decoder layer is `recomputed`; no training flag is touched, so dropout stays off.

    Raises:
      ModelError: the model marks no layer as one that may be computed twice.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that can be computed twice; set gradient_checkpointing = false."
        )
    try:
        for layer in layers:
            layer.forward = recomputed(layer.forward)
        yield
    finally:
        for layer in layers:
            del layer.forward


def backward_(batch: Sequence[Example], *, trace: Trace, budget: int, device: torch.device) -> float:
    """Returns the batch's loss, nats, and adds its gradient to `.grad` of the leaves behind `trace`.

    Neighbours that fit the budget share a forward and a backward pass, so memory does not grow with the batch.

    Args:
      batch: on what.
      trace: (rows, tokens [labels, k]) -> log-probabilities of those tokens at each label position, with their graph.
      budget: tokens per pass; an example that exceeds it goes alone.
      device: where the model is.

    Raises:
      DataError: there is no label token.
    """
    # The loss of a batch with a sum of 1: its share per label, and the refusal of a batch without any.
    share, total = Tally(1.0, sum(map(loss_weight, batch))).loss, 0.0
    places = [(at, 0) for at in range(len(batch))]
    for group in fill(places, budget=budget, size=lambda place: _tokens(batch[place[0]])):
        examples = [batch[at] for at, _ in group]
        rows = [row for example in examples for row in example.rows]
        loss = _total(examples, trace(rows, _wanted(examples).to(device))) * share
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _tokens(example: Example) -> int:
    return sum(len(row.ids) - 1 for row in example.rows)


def _wanted(examples: Sequence[Example]) -> Tensor:
    """Returns the tokens whose probabilities the loss needs, [labels, k]: the label itself, or the options."""
    width = max(1, *(len(example.options) for example in examples))
    wanted: list[list[int]] = []
    for example in examples:
        for row in example.rows:
            wanted += [[token] * width for token in row.ids[row.start :]]
            if example.options:
                wanted[-1][: len(example.options)] = example.options
    return torch.tensor(wanted)


def _total(examples: Sequence[Example], found: Tensor) -> Tensor:
    """Returns the sum of the examples' losses, float64."""
    counts = [len(row.ids) - row.start for example in examples for row in example.rows]
    parts = iter(torch.split(found.double(), counts))
    return torch.stack([_loss(example, [next(parts) for _ in example.rows]) for example in examples]).sum()


def _loss(example: Example, parts: Sequence[Tensor]) -> Tensor:
    if example.options:
        # Log-probabilities of the options differ from their logits by one number, which the softmax does not see.
        scores = parts[0][-1, : len(example.options)]
    elif len(parts) == 1:
        return -parts[0][:, 0].sum()
    else:
        scores = torch.stack([part[:, 0].mean() for part in parts])
    return -scores.log_softmax(0)[example.answer]
