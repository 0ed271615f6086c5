"""The effective rank of the Hessian that a configuration's training meets, by forward passes and by backpropagation."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from fedmezo.data.batches import Batches
from fedmezo.data.prompt import Example
from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Point
from fedmezo.models.hessian import MATRICES, Matrix, PlainLoss, plain_loss, product, require_backprop
from fedmezo.studies.build import Built, build, load_base
from fedmezo.studies.config import Config
from fedmezo.studies.curvature import Batch, curvature_samples, default_mu, flaws
from fedmezo.studies.rank_table import ALL, RankRow, rank_table, rank_words
from fedmezo.studies.sampling import exact_config, led_on
from fedmezo.theory.rank import Curvature, from_curvatures, from_spectrum, lanczos
from fedmezo.zo.noise import derive_seed
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_

__all__ = ["METHODS", "RankOptions", "RankRow", "layer_of", "rank_rows", "rank_table", "rank_words"]

METHODS = ("forward", "backprop", "both")
_MOST_BATCHES = 8  # by default
_FLAW_SEEDS = 4
_SHIFT_SEED = 0x5167  # names the direction in which the parameters are moved off their start, as in `analyze noise`


@dataclass(frozen=True)
class RankOptions:
    """What shall be measured.

    Attributes:
      method: "forward", "backprop" or "both".
      directions: samples of a trace; at least 3.
      steps: Lanczos steps for the ends of a spectrum.
      batches: dealt to the clients in turn; None for one per client, at most 8.
      mu: None for `curvature.default_mu`.
      layers: per layer too.
      after: rounds of the configuration's own run after which it is measured again; 0 for never.
      spread: how far off the start the parameters are.

    Raises:
      ConfigError: a method that does not exist, or a number out of its range.
    """

    method: str = "forward"
    directions: int = 64
    steps: int = 16
    batches: int | None = None
    mu: float | None = None
    layers: bool = False
    after: int = 0
    spread: float = 0.0

    def __post_init__(self) -> None:
        """Checks every choice."""
        if self.method not in METHODS:
            raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}.")
        least = {"directions": (self.directions, 3), "steps": (self.steps, 1), "after": (self.after, 0),
                 "batches": (1 if self.batches is None else self.batches, 1)}  # fmt: skip
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise ConfigError(f"{name}: expected at least {lowest}, got {value}.")
        if not (math.isfinite(self.spread) and (self.mu is None or (math.isfinite(self.mu) and self.mu > 0))):
            raise ConfigError(f"mu must be above 0 and spread a number, got {self.mu} and {self.spread}.")


@dataclass(frozen=True)
class _Place:
    """A point of the parameter space, and what is asked there."""

    built: Built
    asked: RankOptions
    batches: Sequence[Batch]
    after: int
    mu: float
    loss: float

    @property
    def params(self) -> Params:
        return self.built.bench.params

    @property
    def tokens(self) -> int:
        examples = (example for batch in self.batches for example in self.examples(*batch))
        return sum(len(row.ids) for example in examples for row in example.rows)

    def examples(self, client: int, number: int, step: int) -> tuple[Example, ...]:
        """Returns a batch, the same that the bench has."""
        federation = self.built.config.federation
        size, steps, seed = federation.batch_size, federation.local_steps, federation.seed
        return Batches(self.built.data.parts, batch_size=size, local_steps=steps, seed=seed)(client, number, step)


def rank_rows(config: Config, asked: RankOptions, *, say: Callable[[str], None] | None = None) -> list[RankRow]:
    """Returns the rows of a configuration: at its start, then after `asked.after` rounds; the whole before its layers.

    The model is measured in float32, unquantised, in evaluation mode, with Gaussian directions. The loss is the mean
    of the batches' losses, each batch counting the same.

    Args:
      config: what would be run.
      asked: what to measure.
      say: hears of every measurement begun.

    Raises:
      ConfigError: curvlinops is missing and backpropagation was asked for.
    """
    if asked.method != "forward":
        require_backprop()
    tell = say or (lambda _: None)
    variant = exact_config(config, quantize="none")
    built = build(variant, loaded=load_base(variant, say=tell))
    if asked.spread:
        step_(built.bench.params, _SHIFT_SEED, coefficient=asked.spread, law="gaussian")
    batches = _batches(built, asked.batches)
    mu = asked.mu if asked.mu is not None else default_mu(built.bench.adapter.kind)
    rows: list[RankRow] = []
    for after in dict.fromkeys((0, asked.after)):
        if after:
            tell(f"Training for {after} rounds.")
            deque(led_on(built, rounds=after), maxlen=0)
        loss = fmean(built.bench.losses([Point(built.bench.params, 0, 0.0, *batch) for batch in batches]))
        rows += _measured(_Place(built, asked, batches, after, mu, loss), tell)
    return rows


def layer_of(name: str) -> str:
    """Returns the layer that a parameter belongs to: its path up to the first number, or its module's path."""
    words = name.removeprefix("base_model.model.").split(".")
    number = next((at for at, word in enumerate(words) if word.isdigit()), None)
    return ".".join(words[:-1] if number is None else words[: number + 1])


def _batches(built: Built, count: int | None) -> list[Batch]:
    clients, steps = len(built.data.parts), built.config.federation.local_steps
    wanted = count if count is not None else min(clients, _MOST_BATCHES)
    return [(number % clients, *divmod(number // clients, steps)) for number in range(wanted)]


def _measured(place: _Place, tell: Callable[[str], None]) -> Iterator[RankRow]:
    where = f"after {place.after} rounds" if place.after else "at the start"
    if place.asked.method != "backprop":
        tell(f"Forward passes, {where}.")
        yield from _forward(place)
    if place.asked.method != "forward":
        for matrix in MATRICES:
            tell(f"Backpropagation, {matrix}, {where}.")
            yield from _backprop(place, matrix=matrix)


def _parts(place: _Place) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for name in place.params.names:
        layers.setdefault(layer_of(name), []).append(name)
    named = dict(sorted(layers.items(), key=lambda item: _natural(item[0])))
    return {ALL: list(place.params.names)} | (named if place.asked.layers else {})


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(word), "") if word.isdigit() else (-1, word) for word in name.split("."))


def _forward(place: _Place) -> Iterator[RankRow]:
    bench, params, asked = place.built.bench, place.params, place.asked
    seeds = [derive_seed("rank", number) for number in range(asked.directions)]
    rounding, bend = flaws(bench, params=params, seeds=seeds[:_FLAW_SEEDS], batches=place.batches, mu=place.mu)
    for part, names in _parts(place).items():
        samples = curvature_samples(
            bench, params=params, seeds=seeds, batches=place.batches, mu=place.mu,
            names=None if part == ALL else names,
        )  # fmt: skip
        whole = part == ALL
        yield _row(
            place, from_curvatures(samples), part=part, method="forward", names=names,
            flawed=(rounding, bend) if whole else (math.nan, math.nan),
        )  # fmt: skip


def _backprop(place: _Place, *, matrix: Matrix) -> Iterator[RankRow]:
    built, steps = place.built, place.asked.steps
    plain = plain_loss(
        built.loaded,
        built.bench.adapter,
        params=place.params,
        batches=[place.examples(*batch) for batch in place.batches],
    )
    parts = _parts(place)
    values, squares = _hutchinson(place, plain, parts=parts, matrix=matrix)
    for part, names in parts.items():
        block = product(plain, matrix=matrix, names=None if part == ALL else names)
        dim = sum(place.params[name].numel() for name in names)
        extremes = lanczos(block, _generator("start", part).standard_normal(dim, dtype=np.float32), steps=steps)
        # What the other layers' signs add to a block's |Hz|^2 would have to be taken off; it is left open instead.
        found = from_spectrum(values[part], extremes=extremes, squares=squares if part == ALL else None)
        yield _row(place, found, part=part, method=matrix, names=names, steps=extremes.steps)


def _hutchinson(
    place: _Place, plain: PlainLoss, *, parts: Mapping[str, Sequence[str]], matrix: Matrix
) -> tuple[dict[str, list[float]], list[float]]:
    """Returns z'Hz of every part's block, all from the same products, and |Hz|^2 of the whole."""
    whole, bounds, end = product(plain, matrix=matrix), {}, 0
    for name, tensor in place.params:
        bounds[name] = slice(end, end := end + tensor.numel())
    values: dict[str, list[float]] = {part: [] for part in parts}
    squares: list[float] = []
    for number in range(place.asked.directions):
        coins = _generator("trace", number).integers(2, size=end, dtype=np.int8)
        signs = coins.astype(np.float32) * 2 - 1
        found = whole(signs)
        own = {name: float(signs[cut] @ found[cut]) for name, cut in bounds.items()}
        for part, names in parts.items():
            values[part].append(math.fsum(own[name] for name in names))
        squares.append(float(found @ found))
    return values, squares


def _generator(*parts: str | int) -> np.random.Generator:
    return np.random.default_rng(derive_seed("rank", *parts))


def _row(
    place: _Place, found: Curvature, *, part: str, method: str, names: Sequence[str], steps: int = 0,
    flawed: tuple[float, float] = (math.nan, math.nan),
) -> RankRow:  # fmt: skip
    config, asked = place.built.config, place.asked
    rank = config.adapter.rank if config.adapter.kind == "lora" else 0
    return RankRow(
        model=config.model.name, adapter=f"lora {rank}" if rank else "full", part=part, method=method,
        after=place.after, spread=asked.spread, loss=place.loss, trace=found.trace, frobenius2=found.frobenius2,
        norm=found.norm, lambda_max=found.lambda_max, lambda_min=found.lambda_min, rank=found.rank,
        intervals=found.intervals, directions=asked.directions, steps=steps,
        mu=place.mu if method == "forward" else math.nan, rounding=flawed[0], bend=flawed[1],
        batches=len(place.batches), tokens=place.tokens, dim=sum(place.params[name].numel() for name in names),
        lora_rank=rank, note=found.note,
    )  # fmt: skip
