"""How much of a two-point slope is signal, per number format of the frozen base: measured, not assumed.

All formats are asked for the slopes along the same directions, at the same parameters, on the same batch. The yardstick
is the unquantised float32 model. What a format differs by has two parts that mean different things. A changed base is
another, equally smooth loss: training on it works. Rounding is noise: it grows as 1 / mu and hides the slope. So the
same weights are measured in float32 arithmetic too, which leaves only rounding between the two.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import StatisticsError, correlation, fmean

from rich.table import Table

from fedmezo.data.prompt import Example
from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Point
from fedmezo.models.bench import ModelBench
from fedmezo.models.load import Loaded
from fedmezo.studies.build import load_base
from fedmezo.studies.config import Config, changed, parse_config
from fedmezo.studies.deal import read_data
from fedmezo.studies.origin import origin_of
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_

__all__ = ["SignalRow", "signal_rows", "signal_table"]

_ANCHOR = 1e-3  # where a float32 slope is the derivative to three digits
_SHIFT_SEED = 0x5167  # names the direction in which the adapter is moved off its start


@dataclass(frozen=True, slots=True)
class SignalRow:
    """One format at one mu. Slopes are in nats per unit of the parameters; means over directions are root mean squares.

    Attributes:
      dtype: number format of the arithmetic and of what is not quantised.
      quantize: "none", "int8" or "int4".
      weights_mb: memory of the base model's weights, 10^6 bytes.
      spread: the adapter is at its start + spread * z; at 0, B is zero.
      mu: half the distance between the two points.
      loss: mean of the losses at all points, nats.
      signal: the float32 base's slopes.
      noise: difference of this format's slopes from them.
      ratio: signal / noise; None when there is no difference.
      correlation: of the two; None when one does not vary.
      rounding: difference from the same weights' slopes in float32 arithmetic; None when this is float32 arithmetic.
      bend: difference of the same weights' float32 slopes from those at mu = 1e-3: the cost of the distance itself.
      directions: how many.
      tokens: in the batch.
    """

    dtype: str
    quantize: str
    weights_mb: float
    spread: float
    mu: float
    loss: float
    signal: float
    noise: float
    ratio: float | None
    correlation: float | None
    rounding: float | None
    bend: float
    directions: int
    tokens: int


@dataclass(frozen=True)
class _Asked:
    mus: tuple[float, ...]
    spreads: tuple[float, ...]
    seeds: range
    config: Config
    batch: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for example in self.batch for row in example.rows)


@dataclass(frozen=True)
class _Found:
    """By (spread, mu): one slope per direction, and the mean loss."""

    slopes: Mapping[tuple[float, float], Sequence[float]]
    losses: Mapping[tuple[float, float], float]


def signal_rows(
    source: Config | str,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    quantize: Sequence[str] = ("none", "int8", "int4"),
    mus: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    directions: int = 32,
    spreads: Sequence[float] = (0.0, 0.01),
    say: Callable[[str], None] | None = None,
) -> list[SignalRow]:
    """Returns one row per dtype, quantisation, spread and mu, in that order.

    One model is in memory at a time. The batch is the first `federation.batch_size` examples of the first client.

    Args:
      source: a configuration with a LoRA adapter, or a model's name, which is asked about the built-in corpus.
      dtypes: as model.dtype.
      quantize: as model.quantize.
      mus: half-distances.
      directions: slopes per row; at least 2.
      spreads: how far the adapter is off its start.
      say: hears of every format begun.

    Raises:
      ConfigError: an adapter that is not LoRA, fewer than two directions, or a format that does not exist.
      ModelError: the model cannot be had in one of the formats here.
    """
    config = parse_config({"model": {"name": source}}) if isinstance(source, str) else source
    if config.adapter.kind != "lora" or directions < 2:
        raise ConfigError(
            f"The signal is measured for a LoRA adapter along at least 2 directions, got {config.adapter.kind} and "
            f"{directions} of them; set adapter.kind to lora."
        )
    named = [{"dtype": dtype, "quantize": codes} for dtype in dtypes for codes in quantize]
    formats = [changed(config, {"model": each}) for each in named]
    plain = changed(config, {"model": {"dtype": "float32", "quantize": "none"}})
    tell = say or (lambda _: None)
    tell("float32, the yardstick.")
    base = load_base(plain)
    batch = tuple(read_data(plain, base.tokenizer).parts[0][: config.federation.batch_size])
    asked = _Asked(tuple(mus), tuple(spreads), range(1, directions + 1), config, batch)
    yardstick = _measured(base, asked)
    rows = list(_rows(plain, asked, base, found=yardstick, yardstick=yardstick)) if plain in formats else []
    del base
    for each in formats:
        if each != plain:
            tell(f"{each.model.dtype}, quantize {each.model.quantize}.")
            loaded = load_base(each)
            rows += _rows(each, asked, loaded, found=_measured(loaded, asked), yardstick=yardstick)
            del loaded
    return rows


def _rows(
    config: Config, asked: _Asked, loaded: Loaded, *, found: _Found, yardstick: _Found
) -> Iterator[SignalRow]:  # fmt: skip
    size = sum(tensor.numel() * tensor.element_size() for tensor in loaded.model.parameters()) / 1e6
    exact, narrow = found, config.model.dtype != "float32"
    if narrow:
        loaded.model.float()  # the codes stay codes, all arithmetic becomes float32
        exact = _measured(loaded, asked)
    for spread in asked.spreads:
        for mu in asked.mus:
            at = (spread, mu)
            slopes, wanted, own = found.slopes[at], yardstick.slopes[at], exact.slopes[at]
            signal, noise = _rms(wanted), _apart(slopes, wanted)
            yield SignalRow(
                config.model.dtype, config.model.quantize, round(size, 1), spread, mu, found.losses[at], signal, noise,
                signal / noise if noise else None, _correlation(slopes, wanted),
                _apart(slopes, own) if narrow else None, _apart(own, exact.slopes[spread, _ANCHOR]),
                len(asked.seeds), asked.tokens,
            )  # fmt: skip


def _measured(loaded: Loaded, asked: _Asked) -> _Found:
    """Returns the slopes and the mean loss at every (spread, mu), the anchor's among them."""
    law = asked.config.algorithm.law
    _, adapter, start, _ = origin_of(asked.config, loaded)
    bench = ModelBench(
        loaded, adapter, params=start, batches=lambda *_: asked.batch, law=law, seed=asked.config.federation.seed
    )
    slopes: dict[tuple[float, float], list[float]] = {}
    losses: dict[tuple[float, float], float] = {}
    for spread in asked.spreads:
        params = _moved(bench.params, spread=spread, config=asked.config)
        for mu in dict.fromkeys((*asked.mus, _ANCHOR)):
            points = [Point(params, seed, side * mu, 0, 0, 0) for seed in asked.seeds for side in (1, -1)]
            found = bench.losses(points)
            pairs = zip(found[::2], found[1::2], strict=True)
            slopes[spread, mu] = [(plus - minus) / (2 * mu) for plus, minus in pairs]
            losses[spread, mu] = fmean(found)
    return _Found(slopes, losses)


def _moved(start: Params, *, spread: float, config: Config) -> Params:
    params = start.clone()
    if spread:
        step_(params, _SHIFT_SEED, coefficient=spread, law=config.algorithm.law)
    return params


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value * value for value in values))


def _apart(some: Sequence[float], others: Sequence[float]) -> float:
    return _rms([one - other for one, other in zip(some, others, strict=True)])


def _correlation(some: Sequence[float], others: Sequence[float]) -> float | None:
    try:
        return correlation(some, others)
    except StatisticsError:
        return None


def signal_table(rows: Sequence[SignalRow]) -> Table:
    """Returns a table for the terminal, one line per row, 80 columns wide."""
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for title in ("format", "spread", "mu", "signal", "noise", "ratio", "alike", "rounding", "bend"):
        table.add_column(title, justify="left" if title == "format" else "right", no_wrap=True)
    for row in rows:
        name = row.dtype if row.quantize == "none" else f"{row.dtype} {row.quantize}"
        numbers = (row.signal, row.noise, row.ratio, row.correlation, row.rounding, row.bend)
        table.add_row(name, f"{row.spread:g}", f"{row.mu:g}", *map(_told, numbers))
    return table


def _told(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.2g}" if abs(number) < 100 else f"{number:.0f}"
