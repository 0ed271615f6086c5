"""Many settings of the trained parameters in one forward pass of a frozen model.

A lane is one setting: params + offset * z(seed). The tokens of all lanes lie end to end in one [1, T] input. What is
frozen is computed once for all tokens; at the visit of a trained module each lane's weights are written to scratch and
applied to that lane's tokens. No perturbed copy of the model ever exists and no weight is ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmezo.errors import ModelError
from fedmezo.models.adapters import Adapter, Site
from fedmezo.models.linear import adapter_type, add_adapters_, fast_forward, linear
from fedmezo.models.scratch import Lane, Scratch
from fedmezo.models.spans import Span, axis_of, cut, each_pair, lay_out
from fedmezo.zo.lazy import blocks
from fedmezo.zo.noise import Law

__all__ = ["Lane", "LaneModules", "Span", "lay_out"]

_PAIR_NUMEL = 1 << 22  # larger modules are written for one lane at a time: scratch counts more than noise there

Forward = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Visit:
    """What a trained module needs to know while a forward pass runs.

    `head` are the spans that the output embeddings see, when those are not all tokens.
    """

    owner: LaneModules
    lanes: tuple[Lane, ...]
    spans: tuple[Span, ...]
    head: tuple[Span, ...] | None = None


_VISIT: ContextVar[_Visit | None] = ContextVar("fedmezo_visit", default=None)


class LaneModules:
    """The trained modules of a model, made lane-aware for the length of a `visiting` scope.

    Attributes:
      head: the output embeddings, if the model has any.
      expected: paths of the trained modules.
      visited: paths of those that ran so far.

    Args:
      model: the frozen model.
      adapter: what is trained.
      law: law of z.

    Raises:
      ModelError: the adapter trains parameters in a way that cannot be evaluated lane by lane.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, *, law: Law) -> None:
        self._scratch = Scratch(next(model.parameters()).device, law)
        self.visited: set[str] = set()
        find_head: Any = getattr(model, "get_output_embeddings", None)
        self.head: nn.Module | None = find_head() if find_head is not None else None
        self._forwards: dict[str, Forward] = dict(
            self._lora(model, adapter.sites) if adapter.kind == "lora" else self._full(model)
        )
        self.expected = frozenset(self._forwards)
        for path, module in model.named_modules():
            fast = fast_forward(module)
            if path not in self._forwards and fast is not None:
                self._forwards[path] = fast
        self._modules = {path: model.get_submodule(path) for path in self._forwards}
        self._head_path = next((path for path in self.expected if self._modules[path] is self.head), None)
        plain = type(self.head) is nn.Linear and self.head.bias is None
        self._head_name = _names(model, self.head).get("weight") if adapter.kind == "full" and plain else None

    @property
    def head_in_blocks(self) -> bool:
        """Whether the output embeddings are trained whole, so that `head_blocks` applies."""
        return self._head_name is not None

    def _lora(self, model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, Forward]]:
        for site in sites:
            module = model.get_submodule(site.module)
            yield site.module, partial(self._lora_forward, site, fast_forward(module) or module.forward)

    def _full(self, model: nn.Module) -> Iterator[tuple[str, Forward]]:
        for path, module in model.named_modules():
            own = _names(model, module)
            if not own:
                continue
            if any(True for child in module.children() for _ in child.parameters()):
                raise ModelError(
                    f"{type(model).__name__}: '{path}' mixes parameters of its own with modules that have some, which "
                    "cannot be trained as a whole; train LoRA."
                )
            forward: Callable[..., Tensor] = self._full_forward
            # A subclass may look up other rows than its input names, as OPT's positions do.
            if type(module) is nn.Embedding and module.max_norm is None:
                forward = self._embedding_forward
            elif type(module) is nn.Linear:
                forward = self._linear_forward
            yield path, partial(forward, path, own, fast_forward(module) or module.forward)

    @contextmanager
    def visiting(self, lanes: Sequence[Lane], *, spans: tuple[Span, ...]) -> Iterator[None]:
        """Lends a scope in which the model's trained modules evaluate `lanes`; `spans` say whose the tokens are."""
        old = {path: module.__dict__.get("forward") for path, module in self._modules.items()}
        token = _VISIT.set(_Visit(self, tuple(lanes), spans))
        try:
            for path, forward in self._forwards.items():
                self._modules[path].forward = forward
            yield
        finally:
            _VISIT.reset(token)
            for path, before in old.items():
                _restore(self._modules[path], before)

    @contextmanager
    def rows(self, spans: tuple[Span, ...]) -> Iterator[None]:
        """Lends a scope, inside `visiting`, in which the output embeddings see these spans instead of all tokens."""
        token = _VISIT.set(replace(self._visit(), head=spans))
        try:
            yield
        finally:
            _VISIT.reset(token)

    def head_blocks(self, hidden: Tensor, spans: Sequence[Span]) -> Iterator[tuple[int, Tensor]]:
        """Yields (first word, logits [rows, words]) over the vocabulary, when the head is trained whole.

        Needs a `visiting` scope. A block of the weights is made once for all lanes and rows, so neither logits nor
        weights ever exist whole.

        Args:
          hidden: [rows, width], in lane order.
          spans: which rows belong to which lane.
        """
        visit, name = self._visit(), str(self._head_name)
        self.visited.add(str(self._head_path))
        for rows in blocks(visit.lanes[0].params.tensors[name]):
            logits = hidden.new_empty((len(hidden), rows.stop - rows.start))
            for lanes, start, size in each_pair(visit.lanes, spans, pairs=True):
                weights = self._scratch.stack(name, lanes, role="weight", rows=rows)
                for which, weight in enumerate(weights):
                    mine = slice(start + which * size, start + (which + 1) * size)
                    logits[mine] = linear(hidden[mine], weight)
            yield rows.start, logits

    def _visit(self) -> _Visit:
        visit = _VISIT.get()
        if visit is None or visit.owner is not self:
            raise ModelError("A trained module was called outside its bench; a bench serves one thread at a time.")
        return visit

    def _lanes_of(self, path: str, x: Tensor) -> tuple[_Visit, tuple[Span, ...], int]:
        """Returns the visit in progress, the spans this module sees, and the axis of `x` along which its tokens lie."""
        visit = self._visit()
        self.visited.add(path)
        spans = visit.head if path == self._head_path and visit.head is not None else visit.spans
        axis = axis_of(x, spans[-1].stop)
        if axis is None:
            raise ModelError(
                f"'{path}' got an input of shape {tuple(x.shape)} where the forward has {spans[-1].stop} tokens: "
                "modules that see only some tokens (such as experts) cannot be trained."
            )
        return visit, spans, axis

    def _lora_forward(self, site: Site, base: Forward, x: Tensor) -> Tensor:
        """Returns W x + scale * B (A x), x [1, T, in], B and A of each token's lane."""
        visit, spans, _ = self._lanes_of(site.module, x)
        out = base(x)
        flat, total = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        for span in spans:
            lanes = visit.lanes[span.first : span.first + span.count]
            kind = adapter_type(x, len(lanes[0].params.tensors[site.a]))
            a = self._scratch.stack(site.a, lanes, role="a", dtype=kind)
            b = self._scratch.stack(site.b, lanes, role="b", dtype=kind)
            if torch.is_grad_enabled():
                # One lane; autograd forbids to write into what came out of a function of ours.
                apart = linear(linear(flat.to(kind), a[0]), b[0])
                return (total + site.scale * apart).to(out.dtype).view(out.shape)
            add_adapters_(total[span.start : span.stop], flat[span.start : span.stop], a, b, scale=site.scale)
        return total.view(out.shape)

    def _full_forward(self, path: str, own: Mapping[str, str], base: Forward, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the module's output, run once per lane with that lane's weights on that lane's tokens."""
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        visit, spans, axis = self._lanes_of(path, given)
        size = sum(visit.lanes[0].params.tensors[name].numel() for name in own.values())
        outs = []
        for lanes, start, tokens in each_pair(visit.lanes, spans, pairs=size <= _PAIR_NUMEL):
            stacks = {local: self._scratch.stack(name, lanes, role=local) for local, name in own.items()}
            for which in range(len(lanes)):
                mine = partial(cut, axis=axis, start=start + which * tokens, tokens=tokens, total=given.shape[axis])
                with _swapped(self._modules[path], {local: stack[which] for local, stack in stacks.items()}):
                    outs.append(base(*map(mine, args), **{key: mine(value) for key, value in kwargs.items()}))
        return torch.cat(outs, axis)

    def _linear_forward(self, path: str, own: Mapping[str, str], base: Forward, x: Tensor) -> Tensor:
        """Returns the product with each lane's weights on its tokens; both sides of a direction, a block at a time."""
        if torch.is_grad_enabled():
            return self._full_forward(path, own, base, x)
        visit, spans, _ = self._lanes_of(path, x)
        flat, params = x.reshape(-1, x.shape[-1]), visit.lanes[0].params.tensors
        out = x.new_empty((len(flat), len(params[own["weight"]])))
        for rows in blocks(params[own["weight"]]):
            for lanes, start, tokens in each_pair(visit.lanes, spans, pairs=True):
                stacks = {local: self._scratch.stack(name, lanes, role=local, rows=rows) for local, name in own.items()}
                for which in range(len(lanes)):
                    mine = slice(start + which * tokens, start + (which + 1) * tokens)
                    out[mine, rows] = linear(flat[mine], **{local: stack[which] for local, stack in stacks.items()})
        return out.view(*x.shape[:-1], -1)

    def _embedding_forward(self, path: str, own: Mapping[str, str], _: Forward, ids: Tensor) -> Tensor:
        """Returns the embeddings of `ids` [1, T], each looked up in its lane; only the rows asked for are made."""
        visit, spans, axis = self._lanes_of(path, ids)
        outs = []
        for lanes, start, tokens in each_pair(visit.lanes, spans, pairs=True):
            part = ids.narrow(axis, start, tokens * len(lanes)).reshape(len(lanes), tokens)
            found = self._scratch.lookup(own["weight"], lanes, ids=part)
            outs += [found[which, which] for which in range(len(lanes))]
        return torch.cat(outs).view(*ids.shape, -1)


def _names(model: nn.Module, module: nn.Module | None) -> dict[str, str]:
    """Returns local name -> name in the model for the parameters `module` itself owns; tied ones have one name."""
    if module is None:
        return {}
    canonical = {id(tensor): name for name, tensor in model.named_parameters()}
    return {local: canonical[id(tensor)] for local, tensor in module.named_parameters(recurse=False)}


@contextmanager
def _swapped(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    own: dict[str, Any] = module._parameters
    old = {name: own[name] for name in weights}
    own.update(weights)
    try:
        yield
    finally:
        own.update(old)


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is not None:
        module.forward = forward
        return
    with suppress(AttributeError):
        del module.forward
