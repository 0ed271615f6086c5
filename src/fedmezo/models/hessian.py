"""The loss of given batches through plain transformers and PEFT, and products of its Hessian with vectors.

The packed forward pass of the lanes is made for many points, not to be differentiated twice. Here is the same loss,
written as a user of transformers would, and twice differentiable: eager attention, and SiLU written out.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmezo.errors import ModelError, missing
from fedmezo.models.adapters import Adapter
from fedmezo.models.load import Loaded
from fedmezo.models.loss import Example, Tally, loss_weight
from fedmezo.models.plain import trained_names, twin
from fedmezo.models.read import quiet
from fedmezo.zo.params import Params

__all__ = ["MATRICES", "Matrix", "PlainLoss", "plain_loss", "product", "require_backprop"]

Matrix = Literal["hessian", "ggn"]
MATRICES: tuple[Matrix, ...] = ("hessian", "ggn")
Product = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_Span = tuple[int, range, tuple[int, ...]]
_NEVER = -1e30  # the logit of an option that is not there


@dataclass(frozen=True, eq=False)
class PlainLoss:
    """The mean over batches of the batches' losses, as a model and a criterion.

    Attributes:
      model: rows of tokens [rows, longest] -> scores [choices, width], of which each choice takes one.
      criterion: (scores, taken) -> the loss, nats, convex in the scores.
      rows: what the model gets.
      taken: for each choice the index of the right score.
      parameters: our name of a trained parameter -> the tensor in `model`, in name order.
    """

    model: nn.Module
    criterion: nn.Module
    rows: Tensor
    taken: Tensor
    parameters: Mapping[str, nn.Parameter]

    def value(self) -> float:
        """Returns the loss, nats."""
        with torch.no_grad():
            return float(self.criterion(self.model(self.rows), self.taken))


def plain_loss(
    loaded: Loaded, adapter: Adapter, *, params: Params, batches: Sequence[Sequence[Example]]
) -> PlainLoss:  # fmt: skip
    """Returns the mean of the batches' losses at `params`; equal to `bench.losses` up to float32 rounding.

    The frozen weights are the loaded model's own. LoRA matrices are copied, so later changes of `params` do not show;
    "full" reads the tensors of `params` themselves.

    Args:
      loaded: the base model, float32.
      adapter: what is trained.
      params: where.
      batches: at least one, of examples with labels.

    Raises:
      ModelError: the model is not float32, or quantised.
    """
    if loaded.model.dtype != torch.float32:
        raise ModelError(f"A Hessian is taken in float32, got a model in {loaded.model.dtype}; set model.dtype.")
    adapter.check(params)
    model, parameters = _trained(loaded, adapter, params)
    _write_out_(model)
    rows, choices = _plan(batches)
    device = loaded.model.device
    weights, taken = (
        torch.tensor([getattr(choice, key) for choice in choices], device=device) for key in ("weight", "taken")
    )
    return PlainLoss(
        _Scores(model, choices).eval(), _Weighted(weights), rows.to(device), taken, dict(sorted(parameters.items()))
    )


def product(plain: PlainLoss, *, matrix: Matrix, names: Sequence[str] | None = None) -> Product:
    """Returns v -> Hv for the Hessian of a loss, or its Gauss-Newton matrix, float32, by curvlinops.

    The Gauss-Newton matrix leaves out the curvature of the scores in the parameters; it has no negative eigenvalue.

    Args:
      plain: the loss.
      matrix: "hessian" or "ggn".
      names: the parameters whose diagonal block is meant; None for all. The entries of v are theirs, in name order.

    Raises:
      ConfigError: curvlinops is not installed.
      ModelError: an operation of the model has no forward derivative.
    """
    kind = _operators()[matrix]
    chosen = [tensor for name, tensor in plain.parameters.items() if names is None or name in names]
    data = [(plain.rows, plain.taken)]
    # Its own check of determinism would take four more gradients; nothing here is random.
    operator = kind(
        plain.model, plain.criterion, chosen, data, check_deterministic=False, num_data=len(plain.rows)
    )  # fmt: skip

    def apply(vector: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's forward derivatives load with what it calls deprecated
                found: Tensor = operator @ torch.from_numpy(vector).to(plain.rows.device)
        except NotImplementedError as error:
            raise ModelError(
                f"This model's Hessian cannot be had by backpropagation ({error}); use --method forward."
            ) from error
        return cast(NDArray[np.float32], found.cpu().numpy())

    return apply


def require_backprop() -> None:
    """Raises ConfigError when curvlinops is not installed."""
    _operators()


def _operators() -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a library beneath it uses what torch calls deprecated
            from curvlinops import GGNLinearOperator, HessianLinearOperator
    except ImportError as error:
        needs = "The backpropagation reference (--method backprop; forward needs nothing) needs curvlinops"
        raise missing(needs, extra="analyze") from error
    return {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}


def _trained(loaded: Loaded, adapter: Adapter, params: Params) -> tuple[Any, dict[str, nn.Parameter]]:
    base: Any = twin(loaded.model)
    base.set_attn_implementation("eager")
    if adapter.kind == "full":
        found = dict(base.named_parameters())
        if all(tensor.data_ptr() == params[name].data_ptr() for name, tensor in found.items()):
            return base, found
        base = copy.deepcopy(base).requires_grad_(requires_grad=False)
        found = dict(base.named_parameters())
        for name, tensor in found.items():
            tensor.data = params[name]
        return base, found
    from peft import get_peft_model

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(base, copy.deepcopy(adapter.config), autocast_adapter_dtype=False).eval()
    names, inside = trained_names(wrapped), dict(wrapped.named_parameters())
    for theirs, ours in names.items():
        inside[theirs].data = params[ours].clone()
    return wrapped, {ours: inside[theirs] for theirs, ours in names.items()}


class _Silu(nn.Module):
    """x * sigmoid(x) in two operations: torch's own cannot be differentiated forwards after backwards."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def _write_out_(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Silu())


@dataclass(frozen=True)
class _Choice:
    """One term of the loss: -log softmax(scores)[taken] * weight.

    Attributes:
      spans: (row, positions, labels there): one for a label or for options, one per candidate.
      options: the tokens it is between; empty for candidates, None for all words.
      weight: its share of the loss.
      taken: the right one.
    """

    spans: tuple[_Span, ...]
    options: tuple[int, ...] | None
    weight: float
    taken: int

    @property
    def width(self) -> int:
        return len(self.options or self.spans)


def _plan(batches: Sequence[Sequence[Example]]) -> tuple[Tensor, list[_Choice]]:
    """Returns the rows without their last tokens, padded at the end, where no label sees it, and what is scored."""
    rows: list[Tensor] = []
    choices: list[_Choice] = []
    for batch in batches:
        # The loss of a batch with a sum of 1: its share per choice, and the refusal of a batch without any.
        share = Tally(1.0, sum(map(loss_weight, batch))).loss / len(batches)
        for example in batch:
            choices += _choices(example, first=len(rows), weight=share)
            rows += [torch.tensor(row.ids[:-1]) for row in example.rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), choices


def _choices(example: Example, *, first: int, weight: float) -> Iterator[_Choice]:
    spans = tuple(
        (first + at, range(row.start - 1, len(row.ids) - 1), row.ids[row.start :])
        for at, row in enumerate(example.rows)
    )
    row, span, labels = spans[0]
    if example.options:
        yield _Choice(((row, span[-1:], labels[-1:]),), tuple(example.options), weight, example.answer)
    elif len(spans) > 1:
        yield _Choice(spans, (), weight, example.answer)
    else:
        for at, label in zip(span, labels, strict=True):
            yield _Choice(((row, range(at, at + 1), (label,)),), None, weight, label)


class _Scores(nn.Module):
    """Rows of tokens -> scores [choices, width]."""

    def __init__(self, model: Any, choices: Sequence[_Choice]) -> None:
        super().__init__()
        self.model, self._choices = model, choices
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        kept = sorted({at for choice in choices for _, span, _ in choice.spans for at in span})
        # Logits of the label positions only: all of them would be most of the memory.
        keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._kept = torch.tensor(kept) if keeps else None
        self._places = {at: place for place, at in enumerate(kept)} if keeps else {}
        words = inner.get_output_embeddings().weight.shape[0]
        narrow = all(choice.options is not None for choice in choices)
        self._width = max(choice.width for choice in choices) if narrow else words

    def forward(self, rows: Tensor) -> Tensor:
        asked = {} if self._kept is None else {"logits_to_keep": self._kept.to(rows.device)}
        logits = self.model(input_ids=rows, use_cache=False, **asked).logits
        return torch.stack([self._of(choice, logits) for choice in self._choices])

    def _of(self, choice: _Choice, logits: Tensor) -> Tensor:
        parts = [logits[row, [self._places.get(at, at) for at in span]] for row, span, _ in choice.spans]
        if choice.options is None:
            return parts[0][0]
        if choice.options:
            scores = parts[0][0][list(choice.options)]
        else:
            labels = [list(tokens) for _, _, tokens in choice.spans]
            pairs = zip(parts, labels, strict=True)
            scores = torch.stack([part.log_softmax(-1)[range(len(own)), own].mean() for part, own in pairs])
        return nn.functional.pad(scores, (0, self._width - len(scores)), value=_NEVER)


class _Weighted(nn.Module):
    """Cross-entropy with a weight per choice."""

    reduction = "sum"  # what curvlinops asks for; it adds up the parts of the data as they are

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self._weights = weights

    def forward(self, scores: Tensor, taken: Tensor) -> Tensor:
        taken_ones = scores.log_softmax(-1).gather(1, taken[:, None])[:, 0]
        return -(taken_ones * self._weights).sum()
