"""One packed forward pass: rows of many lanes in, one score per row out. Tests at its start what the model allows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedmezo.errors import FedMeZOError, ModelError
from fedmezo.models.adapters import Adapter
from fedmezo.models.backprop import Trace, recomputed
from fedmezo.models.lanes import Lane, LaneModules, Span, lay_out
from fedmezo.models.loss import CHUNK, Piece, Row, RowScore, label_scores
from fedmezo.models.segments import NAME, Segments, packed, register
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params

__all__ = ["Engine", "Unit"]

# Largest |difference| of logits allowed between a packed and a plain forward, relative to the largest |logit|.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_PROBES = ((3, 11, 5, 2, 7), (8, 1, 6, 4, 9, 10, 3, 12), (2, 4, 13, 9, 1))  # lengths 5, 8, 5: no model has 13 heads


@dataclass(frozen=True, slots=True)
class Unit:
    """One row to be scored in one lane; `options` are the tokens it chooses between, if any."""

    lane: int
    row: Row
    options: tuple[int, ...] = ()


class Engine:
    """A frozen model whose forward pass takes many lanes.

    Attributes:
      packs: whether many sequences go into one forward; if not, `why` says why, and each goes alone.
      local: the longest sequence that may be packed (the model's attention window); None for no limit.
      passes: forward passes so far.

    Args:
      model: frozen, in eval mode.
      adapter: what is trained.
      params: parameters for the self-test; only read.
      law: law of z.

    Raises:
      ModelError: the model cannot be evaluated in lanes at all.
    """

    def __init__(self, model: Any, adapter: Adapter, *, params: Params, law: Law) -> None:
        _check_frozen(model)
        self.model, self.modules = model, LaneModules(model, adapter, law=law)
        self.packs, self.why, self.passes = False, "", 0
        self.local: int | None = None
        self._device = next(model.parameters()).device
        self._decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        with torch.inference_mode():
            self._head_mode = self._choose_head()
            self._try_packing()
            self._try_lanes(adapter, params)

    def score(self, lanes: Sequence[Lane], units: Sequence[Unit], *, hits: bool = True) -> list[RowScore]:
        """Returns one score per unit, from one forward pass when the model packs.

        Args:
          lanes: the settings.
          units: rows in lane order.
          hits: whether scores shall count the labels that were the likeliest tokens.
        """
        with torch.inference_mode():
            if self._together([unit.row for unit in units]):
                return self._pass(lanes, units, hits=hits)
            alone = [([lanes[unit.lane]], [Unit(0, unit.row, unit.options)]) for unit in units]
            return [self._pass(lane, unit, hits=hits)[0] for lane, unit in alone]

    def _together(self, rows: Sequence[Row]) -> bool:
        """Returns whether these rows may share a forward pass."""
        return self.packs and (self.local is None or max(len(row.ids) - 1 for row in rows) <= self.local)

    @contextmanager
    def tracing(self, params: Params) -> Iterator[Trace]:
        """Lends a function to differentiate: (rows, tokens [labels, k]) -> their log-probabilities at the labels.

        It takes one forward pass, or one per row when the model does not pack. The backward pass must run inside.

        Args:
          params: leaves that want a gradient.
        """
        lane = Lane(params)

        def trace(rows: Sequence[Row], wanted: Tensor) -> Tensor:
            if self._together(rows):
                return self._trace(lane, rows, wanted)
            parts = torch.split(wanted, [len(row.ids) - row.start for row in rows])
            return torch.cat([self._trace(lane, [row], part) for row, part in zip(rows, parts, strict=True)])

        # Layers that are computed again in the backward pass must find their lane-aware modules.
        with torch.inference_mode(mode=False), torch.enable_grad(), self.modules.visiting([lane], spans=()):
            yield trace

    def _trace(self, lane: Lane, rows: Sequence[Row], wanted: Tensor) -> Tensor:
        sizes, index = _label_places(rows, device=self._device)
        with self.modules.visiting([lane], spans=lay_out([sum(sizes)])), self._attending(sizes):
            inputs = self._inputs([row.ids[:-1] for row in rows])
            if self._head_mode != "split":
                (piece,) = self._pieces(inputs, index, [len(index)])
                return piece.logits.float().log_softmax(-1).gather(1, wanted)
            hidden = self._decoder(**inputs, use_cache=False).last_hidden_state[0].index_select(0, index)
            # Logits are made again in the backward pass, so that never more than one chunk of them exists.
            read = recomputed(self._read)
            chunks = zip(torch.split(hidden, CHUNK), torch.split(wanted, CHUNK), strict=True)
            return torch.cat([read(chunk, part) for chunk, part in chunks])

    def _read(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        with self.modules.rows(lay_out([len(hidden)])):
            logits: Tensor = self.modules.head(hidden[None])[0]  # type: ignore[misc]
        return logits.float().log_softmax(-1).gather(1, wanted)

    def _pass(self, lanes: Sequence[Lane], units: Sequence[Unit], *, hits: bool) -> list[RowScore]:
        rows, options = [unit.row for unit in units], [unit.options for unit in units]
        sizes, index = _label_places(rows, device=self._device)
        tokens, labels = [0] * len(lanes), [0] * len(lanes)
        for unit, size in zip(units, sizes, strict=True):
            tokens[unit.lane] += size
            labels[unit.lane] += len(unit.row.ids) - unit.row.start
        with self.modules.visiting(lanes, spans=lay_out(tokens)), self._attending(sizes):
            pieces = self._pieces(self._inputs([row.ids[:-1] for row in rows]), index, labels)
            return label_scores(pieces, rows=rows, options=options, device=self._device, hits=hits)

    def _inputs(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        self.passes += 1
        inputs = {"input_ids": torch.tensor([[token for row in ids for token in row]], device=self._device)}
        if self.packs:
            positions = torch.cat([torch.arange(len(row), device=self._device) for row in ids])
            inputs["position_ids"] = positions[None]
        return inputs

    def _attending(self, sizes: Sequence[int]) -> Any:
        return packed(sizes) if self.packs and (self.local is None or max(sizes) <= self.local) else nullcontext()

    def _pieces(self, inputs: dict[str, Tensor], index: Tensor, labels: Sequence[int]) -> Iterator[Piece]:
        """Yields the logits at the tokens `index`; `labels` says how many of them each lane has."""
        if self._head_mode == "plain":
            yield Piece(0, 0, self.model(**inputs, use_cache=False).logits[0].index_select(0, index))
        elif self._head_mode == "keep":
            with self.modules.rows(lay_out(labels)):
                logits = self.model(**inputs, use_cache=False, logits_to_keep=index).logits
            yield Piece(0, 0, logits[0])
        else:
            hidden = self._decoder(**inputs, use_cache=False).last_hidden_state[0].index_select(0, index)
            yield from self._split_pieces(hidden, labels)

    def _split_pieces(self, hidden: Tensor, labels: Sequence[int]) -> Iterator[Piece]:
        if self.modules.head_in_blocks:
            for word, logits in self.modules.head_blocks(hidden, lay_out(labels)):
                yield Piece(0, word, logits)
            return
        ends = list(accumulate(labels))
        for row in range(0, len(hidden), CHUNK):
            chunk = hidden[row : row + CHUNK]
            with self.modules.rows(_row_spans(ends, row, row + len(chunk))):
                logits = self.modules.head(chunk[None])[0]  # type: ignore[misc]
            yield Piece(row, 0, logits)

    def _choose_head(self) -> Literal["split", "keep", "plain"]:
        """Returns how logits at some positions are had: own head call, the model's `logits_to_keep`, or all of them."""
        probe = torch.tensor([_PROBES[1]], device=self._device)
        plain = self.model(input_ids=probe, use_cache=False).logits
        head = self.modules.head
        try:
            if head is not None and _close(
                head(self._decoder(input_ids=probe, use_cache=False).last_hidden_state), plain
            ):
                return "split"
        except (TypeError, AttributeError, RuntimeError):
            pass
        keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return "keep" if keeps else "plain"

    def _try_packing(self) -> None:
        """Packs two short sequences and compares with plain forwards; restores the attention if they differ."""
        register()
        first, second, other = (torch.tensor([probe], device=self._device) for probe in _PROBES)
        plain = [self.model(input_ids=ids, use_cache=False).logits for ids in (first, second)]
        own = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation(NAME)
            logits, segments = self._probe(first, second)
            leaked, _ = self._probe(other, second)
            size = first.shape[1]
            if not segments.calls:
                self.why = "its attention does not go through transformers' attention interface"
            # Bit equality: with other tokens before them, the second sequence's logits may not change at all.
            elif not torch.equal(logits[:, size:], leaked[:, size:]):
                self.why = "sequences in one forward see each other"
            elif not _close(logits, torch.cat(plain, 1)):
                self.why = "packed logits differ from plain ones"
            else:
                self.packs, self.local = True, segments.local
        except Exception as error:  # a model may refuse in any way; what it says is kept in `why`
            self.why = str(error).split("\n")[0]
        if not self.packs:
            self.model.set_attn_implementation(own)

    def _probe(self, first: Tensor, second: Tensor) -> tuple[Tensor, Segments]:
        sizes = [first.shape[1], second.shape[1]]
        positions = torch.cat([torch.arange(size, device=self._device) for size in sizes])[None]
        # In bfloat16 two right ways to attend differ by more than any tolerance that would find a wrong one.
        with packed(sizes, plain=True) as segments:
            ids = torch.cat([first, second], 1)
            return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits, segments

    def _try_lanes(self, adapter: Adapter, params: Params) -> None:
        """Runs one pass at `params` and checks that every trained module was seen."""
        kind = type(self.model).__name__
        units = [Unit(0, _Probe(_PROBES[0])), Unit(0, _Probe(_PROBES[1]))]
        try:
            self.score([Lane(params)], units)
        except FedMeZOError:
            raise
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise ModelError(f"{kind} cannot be evaluated in lanes: {str(error).splitlines()[0]}") from error
        missed = self.modules.expected - self.modules.visited
        if missed:
            raise ModelError(
                f"{kind} uses the weights of '{min(missed)}' without calling it, so they cannot be trained in lanes; "
                "exclude it from the LoRA targets, or train LoRA instead of all parameters."
            )

    def next_token(self, lane: Lane, ids: Sequence[int], *, cache: Any = None) -> tuple[int, Any]:
        """Returns the likeliest token after `ids` in `lane`, and the cache to pass on; None if it has none."""
        spans, last = lay_out([len(ids)]), lay_out([1])
        inputs = {"input_ids": torch.tensor([list(ids)], device=self._device)}
        with torch.inference_mode(), self.modules.visiting([lane], spans=spans):
            if self._head_mode == "plain":
                out = self.model(**inputs, past_key_values=cache, use_cache=True)
            else:
                with self.modules.rows(last):
                    out = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax()), getattr(out, "past_key_values", None)


@dataclass(frozen=True, slots=True)
class _Probe:
    ids: tuple[int, ...]
    start: int = 1


def _label_places(rows: Sequence[Row], *, device: torch.device) -> tuple[list[int], Tensor]:
    """Returns how many tokens of each row are read, and at which of all these tokens the labels are predicted."""
    # The last token predicts nothing that is scored.
    sizes = [len(row.ids) - 1 for row in rows]
    starts = [0, *accumulate(sizes)]
    at = [start + p for start, row in zip(starts, rows, strict=False) for p in range(row.start - 1, len(row.ids) - 1)]
    return sizes, torch.tensor(at, device=device)


def _row_spans(ends: Sequence[int], start: int, stop: int) -> tuple[Span, ...]:
    """Returns the spans of the label rows [start, stop), given where each lane's rows end."""
    begins = [0, *ends[:-1]]
    return lay_out([max(0, min(end, stop) - max(begin, start)) for begin, end in zip(begins, ends, strict=True)])


def _close(got: Tensor, wanted: Tensor) -> bool:
    if got.shape != wanted.shape:
        return False
    limit = _TOLERANCE.get(wanted.dtype, 1e-4) * max(wanted.abs().max().item(), 1e-30)
    return (got.float() - wanted.float()).abs().max().item() <= limit


def _check_frozen(model: Any) -> None:
    loose = next((name for name, tensor in model.named_parameters() if tensor.requires_grad), None)
    if loose is not None:
        raise ModelError(f"'{loose}' wants a gradient, but nothing here is trained by one; freeze the model first.")
    if model.training:
        raise ModelError(
            f"{type(model).__name__} is in training mode, so dropout would blur every loss; call eval() first."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} has an encoder; only causal (decoder-only) models can be trained.")
