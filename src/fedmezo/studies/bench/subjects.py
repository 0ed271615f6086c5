"""The three that are measured side by side: a plain model, one under the in-place scheme, and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmezo.data.batches import Batches
from fedmezo.data.prompt import Example, Row
from fedmezo.fl.algorithm import Task
from fedmezo.fl.walk import take_walks
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.models.load import Loaded, load_model
from fedmezo.models.plain import random_llama, twin, with_peft
from fedmezo.studies.bench.inplace import InPlace
from fedmezo.studies.bench.options import BenchOptions, Trained
from fedmezo.zo.noise import Law

__all__ = ["MU", "RATE", "Subjects", "batch_of", "example_of", "forwards", "open_model", "our_bench", "subjects"]

MU, RATE = 1e-3, 1e-7  # the rate is small, so that hundreds of steps leave the model what it was
MOST_STEPS = 10  # local steps that a bench has batches for


def open_model(asked: BenchOptions, dtype: str, *, copies: int = 1) -> Loaded:
    """Returns the model asked for, its weights out of the memory-mapped file; `copies` as for `random_llama`."""
    if asked.shape is not None:
        return random_llama(asked.shape, dtype=dtype, device=asked.device, copies=copies)
    loaded = load_model(asked.model, dtype=dtype, device=asked.device)
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()
    return loaded


def example_of(tokens: int, *, vocabulary: int) -> Example:
    """Returns an example of so many tokens, 60 % of them prompt."""
    words = min(5000, vocabulary - 10)
    ids = tuple((torch.arange(tokens) * 7919 % words + 10).tolist())
    return Example(rows=(Row(ids, max(1, tokens * 6 // 10)),))


def batch_of(tokens: int, model: Any) -> dict[str, Tensor]:
    """Returns the same example as plain models take it: input_ids and labels, prompt masked."""
    row = example_of(tokens, vocabulary=model.config.vocab_size).rows[0]
    ids = torch.tensor([row.ids], device=model.device)
    labels = ids.clone()
    labels[:, : row.start] = -100
    return {"input_ids": ids, "labels": labels}


def our_bench(
    loaded: Loaded, asked: BenchOptions, *, train: Trained, lengths: Sequence[int], **options: Any
) -> ModelBench:
    """Returns our bench with one client per length, whose every batch is one row of so many tokens."""
    vocabulary = int(loaded.model.config.vocab_size)
    parts = [[example_of(length, vocabulary=vocabulary)] for length in lengths]
    batches = Batches(parts, batch_size=1, local_steps=MOST_STEPS, seed=0)
    adapter = make_adapter(loaded.model, kind=train, **(asked.lora if train == "lora" else {}))
    return ModelBench(loaded, adapter, batches=batches, law=asked.law, **options)


def forwards(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Runs one plain inference forward per batch, labels given."""
    with torch.inference_mode():
        for batch in batches:
            model(**batch)


@dataclass
class Subjects:
    """What an interleaved run calls in turn.

    Attributes:
      plain: the base model as Hugging Face has it.
      attached: the same with peft's adapter in it; None when all parameters are trained.
      inplace: the in-place scheme on the model with peft's adapter, or on a model of its own.
      ours: our bench, one client per length.
      law: law of z.
    """

    plain: Any
    attached: nn.Module | None
    inplace: InPlace
    ours: ModelBench
    law: Law

    def round(self, clients: Sequence[int], *, steps: int) -> Callable[[], object]:
        """Returns a round of ours: so many steps of these clients, whose changes are dropped at its end."""
        tasks = [Task(0, client, 0, RATE, MU, steps, law=self.law) for client in clients]
        return partial(take_walks, tasks, self.ours)


def subjects(loaded: Loaded, asked: BenchOptions, *, train: Trained, lengths: Sequence[int]) -> Subjects:
    """Returns the three; frozen weights are shared, trained ones are not.

    Raises:
      ModelError: the model cannot be trained this way.
    """
    plain = twin(loaded.model)
    if train == "lora":
        attached = with_peft(twin(loaded.model), **asked.lora)
        moved: nn.Module = attached
        trained = {name: p for name, p in attached.named_parameters() if p.requires_grad}
    else:
        attached, moved = None, copy.deepcopy(loaded.model)
        trained = dict(moved.named_parameters())
    ours = our_bench(loaded, asked, train=train, lengths=lengths)
    return Subjects(plain, attached, InPlace(moved, trained, mu=MU, rate=RATE), ours, asked.law)
