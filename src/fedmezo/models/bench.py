"""The bench on a language model: losses at many points per forward pass, evaluation, greedy generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedmezo.errors import DataError, ModelError
from fedmezo.fl.algorithm import Point
from fedmezo.models.adapters import Adapter
from fedmezo.models.backprop import backward_, recomputing
from fedmezo.models.engine import Engine, Unit
from fedmezo.models.lanes import Lane
from fedmezo.models.load import Loaded
from fedmezo.models.loss import Example, RowScore, Tally, tally
from fedmezo.models.schedule import Job, fill, passes, token_budget
from fedmezo.zo.lazy import LazyParams
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params, kept

__all__ = ["Evaluation", "ModelBench", "Scores"]

Batches = Callable[[int, int, int], Sequence[Example]]
Lanes = int | Literal["auto"]

_COPIES_BYTES = 1 << 29  # private LoRA copies may take this much by default
_MOST_COPIES = 64


@dataclass(frozen=True, slots=True)
class Scores:
    """How well some examples are predicted.

    Attributes:
      loss: mean over label tokens (answers) and over examples (choices), nats.
      examples: number of examples.
      accuracy: share of choice examples answered right; None without any.
    """

    loss: float
    examples: int
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `ModelBench.evaluate` returns.

    Attributes:
      loss: as in `Scores`.
      tokens: label tokens and choices the loss is a mean of.
      examples: number of examples.
      accuracy: share of choice examples answered right; None without any.
      token_accuracy: share of answer tokens that were the likeliest; None without any.
      categories: category -> its scores.
    """

    loss: float
    tokens: int
    examples: int
    accuracy: float | None
    token_accuracy: float | None
    categories: Mapping[str, Scores] = field(default_factory=dict)


class ModelBench:
    """A frozen language model with the global parameters, and lanes to evaluate others in; a `Bench`.

    Laws: `losses` does not depend on the order of the points, to the bit. How many lanes share a forward pass changes a
    float32 loss by rounding only. Parameters are never written by `losses` or `evaluate`.

    Attributes:
      params: the global model's trained parameters. "full": the model's own weights.
      capacity: private copies that may be open at once; 1 for "full".
      forwards: points evaluated by `losses` so far, plus 3 per `gradient`, or 4 with checkpointing.
      tokens: tokens read for them.
      engine: the forward pass; `engine.passes` counts packed passes.

    Args:
      loaded: the frozen base model.
      adapter: what is trained in it.
      params: where training starts; None for the adapter's own start.
      batches: (client, round, step) -> that batch; None when only evaluating.
      law: law of z.
      seed: seed of the adapter's own start.
      lanes: points per forward pass, or "auto": as many as `schedule.token_budget` allows.
      capacity: LoRA copies; None for as many as fit 512 MB, at most 64.
      checkpointing: `gradient` keeps each decoder layer's input only and computes the layer again when it goes back.

    Raises:
      ModelError: this model cannot be trained this way.
    """

    def __init__(
        self, loaded: Loaded, adapter: Adapter, *, params: Params | None = None, batches: Batches | None = None,
        law: Law = "gaussian", seed: int = 0, lanes: Lanes = "auto", capacity: int | None = None,
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        if lanes != "auto" and lanes < 1:
            raise ModelError(f"lanes: expected 'auto' or at least 1, got {lanes}.")
        self._loaded, self.adapter, self._batches, self._lanes = loaded, adapter, batches, lanes
        self.params = adapter.start(loaded.model, seed=seed)
        if params is not None:
            adapter.check(params)
            self.params.copy_(params)
        self.engine = Engine(loaded.model, adapter, params=self.params, law=law)
        self._budget = token_budget(loaded.model)
        fitting = min(_MOST_COPIES, max(1, _COPIES_BYTES // (4 * self.params.dim)))
        self.capacity = 1 if adapter.kind == "full" else capacity or fitting
        self._checkpointing, self._law = checkpointing, law
        self.forwards = self.tokens = 0

    @contextmanager
    def open(self, count: int) -> Iterator[Sequence[Params]]:
        """Lends `count` private copies that start equal to `params`; afterwards `params` has its old bits.

        They take their steps lazily. "full" lends the model's own weights and keeps their bits in a temporary file, so
        that a client needs no more memory than a forward pass; the folder for temporary files must have room for one
        copy.
        """
        if count > self.capacity:
            raise ModelError(f"Expected at most {self.capacity} private copies, got {count}; please report this bug.")
        with kept(self.params) if self.adapter.kind == "full" else nullcontext():
            whole = self.adapter.kind == "full"
            yield [
                LazyParams((self.params if whole else self.params.clone()).tensors, law=self._law) for _ in range(count)
            ]

    def examples(self, client: int, round: int, step: int) -> int:
        """Returns how many examples the batch of (client, round, step) holds."""
        return len(self._batch(Point(self.params, 0, 0.0, client, round, step)))

    def losses(self, points: Sequence[Point]) -> list[float]:
        """Returns the loss at each point, nats; a loss that is not finite is returned as it is.

        Raises:
          DataError: a batch without a label token, or a row that does not fit the model.
        """
        self.forwards += len(points)
        work = [Job(index, point, self._batch(point)) for index, point in enumerate(points)]
        self.tokens += sum(job.tokens for job in work)
        found = {job.index: job.loss(scores) for job, scores in self._scored(work)}
        return [found[index] for index in range(len(points))]

    def each(self, points: Sequence[Point]) -> list[list[float]]:
        """Returns the loss of each example of each point's batch, nats, in the batch's order; [] where it is empty.

        Examples never share a forward pass, so no bit of a loss depends on who else is in the batch. Tokens are not
        counted: with `Point.draw` their number would tell of the examples drawn.

        Raises:
          DataError: as `losses`.
        """
        self.forwards += len(points)
        apart: dict[tuple[int, int], list[Job]] = {}
        for index, point in enumerate(points):
            for place, example in enumerate(self._batch(point)):
                apart.setdefault((point.client, place), []).append(Job(index, point, [example]))
        found: list[list[float]] = [[] for _ in points]
        for key in sorted(apart):
            for job, scores in self._scored(apart[key]):
                found[job.index].append(job.loss(scores))
        return found

    def _scored(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[RowScore]]]:
        """Yields each job with the scores of its rows."""
        # Any order of the jobs gives the same passes, hence the same bits. Long batches first: neighbours of equal
        # length share matrix products, and mirrored points share their noise.
        work = sorted(jobs, key=Job.order)
        scores: dict[tuple[int, int], RowScore] = {}
        for units in passes(work, budget=self._budget, most=None if self._lanes == "auto" else self._lanes):
            scores |= self._pass(work, units)
        for at, job in enumerate(work):
            yield job, [scores[at, row] for row in range(len(job.rows))]

    def _pass(self, work: Sequence[Job], units: Sequence[tuple[int, int]]) -> dict[tuple[int, int], RowScore]:
        lanes: dict[tuple[int, int, float], Lane] = {}
        for job, _ in sorted(units):
            lanes.setdefault(work[job].lane.key, work[job].lane)
        places = {key: place for place, key in enumerate(lanes)}
        # Points that are one setting share a lane, such as the global model on the batches of many clients.
        ordered = sorted(units, key=lambda unit: (places[work[unit[0]].lane.key], unit))
        asked = [Unit(places[work[job].lane.key], work[job].rows[row], work[job].options[row]) for job, row in ordered]
        return dict(zip(ordered, self.engine.score(list(lanes.values()), asked, hits=False), strict=True))

    def gradient(self, point: Point) -> tuple[float, dict[str, Tensor]]:
        """Returns the loss at a point, nats, and its gradient by backpropagation, name -> float32 tensor.

        The loss is that of `losses` up to float32 rounding. Neither the model nor `point.params` ever wants a gradient:
        leaves that share the parameters' memory do, for the length of the call. Numbers that are not finite are
        returned as they are; a float16 base may lose small ones to underflow, for nothing scales the loss.

        Raises:
          DataError: as `losses`.
          ModelError: the point has an offset, or checkpointing is asked of a model that has no layers for it.
        """
        if point.offset:
            raise ModelError(f"A gradient is taken at the parameters themselves, got offset {point.offset}; give 0.")
        work = Job(0, point, self._batch(point))
        leaves = Params({name: tensor.detach().requires_grad_() for name, tensor in point.params})
        again = recomputing(self.engine.model) if self._checkpointing else nullcontext()
        with self.engine.tracing(leaves) as trace, again:
            device = self._loaded.model.device
            loss = backward_(work.batch, trace=trace, budget=self._budget, device=device)
        self.forwards += 4 if self._checkpointing else 3
        self.tokens += work.tokens
        # A parameter no row touched has a gradient of 0.
        return loss, {n: torch.zeros_like(t.detach()) if t.grad is None else t.grad for n, t in leaves}

    def _batch(self, point: Point) -> Sequence[Example]:
        batches: Any = self._batches
        if batches is None:
            raise DataError("This bench has no training data; give it batches.")
        drawn = batches.drawn(point.client, point.draw) if point.draw else None
        batch: Sequence[Example] = batches(point.client, point.round, point.step) if drawn is None else drawn
        self._check(batch)
        return batch

    def _check(self, examples: Sequence[Example]) -> None:
        for row in (row for example in examples for row in example.rows):
            if not 1 <= row.start < len(row.ids):
                raise DataError(
                    f"A row of {len(row.ids)} tokens has no label token (start {row.start}); raise max_tokens "
                    "or drop it."
                )
            if len(row.ids) > self._loaded.window:
                raise DataError(
                    f"A row has {len(row.ids)} tokens, the model takes {self._loaded.window}; lower max_tokens."
                )

    def evaluate(
        self, examples: Sequence[Example], *, params: Params | None = None, batch_tokens: int | None = None
    ) -> Evaluation:
        """Returns loss and accuracy on `examples`, over all and per category.

        Args:
          examples: what to predict; the result does not depend on their order, up to rounding.
          params: where; None for the global model's.
          batch_tokens: tokens per forward pass; None for the bench's own budget.

        Raises:
          DataError: no example, or a row that does not fit the model.
        """
        if not examples:
            raise DataError("There is no example to evaluate; give at least one.")
        self._check(examples)
        lane = Lane(params or self.params)
        rows = [(which, row) for which, example in enumerate(examples) for row in range(len(example.rows))]
        rows.sort(key=lambda place: (len(examples[place[0]].rows[place[1]].ids), place))
        found: dict[tuple[int, int], RowScore] = {}
        for group in fill(
            rows, budget=batch_tokens or self._budget, size=lambda at: len(examples[at[0]].rows[at[1]].ids)
        ):
            units = [Unit(0, examples[which].rows[row], examples[which].options) for which, row in group]
            found |= dict(zip(group, self.engine.score([lane], units), strict=True))
        tallies = [
            tally(example, [found[which, row] for row in range(len(example.rows))])
            for which, example in enumerate(examples)
        ]
        return _evaluation(examples, tallies)

    def generate(self, prompt: Sequence[int], *, max_new_tokens: int, params: Params | None = None) -> tuple[int, ...]:
        """Returns the tokens greedy decoding adds to `prompt` at `params`, without the end-of-text token.

        Raises:
          DataError: the prompt is empty or leaves no room in the model's window.
        """
        room = self._loaded.window - len(prompt)
        if not prompt or room < 1:
            raise DataError(
                f"Cannot generate from {len(prompt)} tokens: the model takes 1 to {self._loaded.window - 1}."
            )
        ends, lane = self._ends(), Lane(params or self.params)
        made: list[int] = []
        feed, cache = list(prompt), None
        while len(made) < min(max_new_tokens, room):
            token, cache = self.engine.next_token(lane, feed, cache=cache)
            if token in ends:
                break
            made.append(token)
            feed = [token] if cache is not None else [*prompt, *made]
        return tuple(made)

    def _ends(self) -> set[int]:
        sources = (
            getattr(self._loaded.model, "generation_config", None),
            self._loaded.model.config,
            self._loaded.tokenizer,
        )
        ends: set[int] = set()
        for source in sources:
            found = getattr(source, "eos_token_id", None)
            ends |= set(found if isinstance(found, list | tuple) else [found] if found is not None else [])
        return ends


def _evaluation(examples: Sequence[Example], tallies: Sequence[Tally]) -> Evaluation:
    groups: dict[str, list[Tally]] = {}
    for example, one in zip(examples, tallies, strict=True):
        groups.setdefault(example.category, []).append(one)
    total = _total(tallies)
    named = {name: group for name, group in sorted(groups.items()) if name}
    categories = {
        name: Scores(_total(group).loss, len(group), _accuracy(_total(group))) for name, group in named.items()
    }
    tokens = total.hits / total.tokens if total.tokens else None
    return Evaluation(total.loss, total.weight, len(tallies), _accuracy(total), tokens, categories)


def _total(tallies: Sequence[Tally]) -> Tally:
    # fsum: the mean must not depend on the order of the examples.
    summed = sum(tallies, Tally())
    losses = [one.total for one in tallies]
    total = math.fsum(losses) if all(map(math.isfinite, losses)) else summed.total
    return Tally(total, summed.weight, summed.right, summed.choices, summed.hits, summed.tokens)


def _accuracy(total: Tally) -> float | None:
    return total.right / total.choices if total.choices else None
