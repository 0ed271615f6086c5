"""Slopes for the constants of the theory: which points, which directions, which batches, and how many forward passes.

All clients are asked for the slopes along the same directions. Every direction has batches of its own, each from
another pass through the client's data, so that no two batches of a sample know of each other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Point
from fedmezo.models.bench import ModelBench
from fedmezo.runtime.journal import Header, Journal
from fedmezo.runtime.simulate import simulate
from fedmezo.studies.build import Built
from fedmezo.studies.config import Config, changed
from fedmezo.studies.curvature import curvature_samples, default_mu
from fedmezo.studies.moments import Array
from fedmezo.theory.rank import Curvature, from_curvatures
from fedmezo.zo.noise import NOISE_VERSION, derive_seed
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_

__all__ = ["Names", "Sampled", "SamplingOptions", "exact_config", "led_on", "places", "sample", "steps_apart"]

# (client, number) -> (round, step) of a batch; different numbers are independent batches.
Names = Callable[[int, int], tuple[int, int]]

_MOST_BENT = 8  # clients whose batch the curvature is taken on
_SHIFT_SEED = 0x5A17  # names the direction in which the parameters are moved off their start


@dataclass(frozen=True)
class SamplingOptions:
    """How exactly to measure.

    Attributes:
      directions: directions at every point; relative errors fall as sqrt(2 / directions).
      batches: batches per client and direction, at least 2.
      points: parameters to measure at, at least 2.
      spread: of the second point, start + spread * z.
      rounds: rounds of the run between the points after that.
      mu: half the distance of a slope's two losses.
      reach: the same for curvatures, which need more: rounding is divided by its square. None goes by the adapter.
      resamples: of the bootstrap.

    Raises:
      ConfigError: a number is too small.
    """

    directions: int = 64
    batches: int = 2
    points: int = 3
    spread: float = 0.01
    rounds: int = 2
    mu: float = 1e-3
    reach: float | None = None
    resamples: int = 1000

    def __post_init__(self) -> None:
        """Checks every number."""
        least = {"directions": 8, "batches": 2, "points": 2, "rounds": 1, "resamples": 100}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ConfigError(f"{name}: expected at least {number}, got {getattr(self, name)}.")
        for name in ("spread", "mu", "reach"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name)}.")

    def passes(self, clients: int) -> int:
        """Returns the forward passes at one point, those of the curvature among them."""
        bent = len(range(clients)[:: -(-clients // _MOST_BENT)])
        return self.directions * (2 * clients * self.batches + 3 * bent)


@dataclass(frozen=True)
class Sampled:
    """What was seen at one point.

    Attributes:
      label: which point.
      slopes: (directions, clients, batches), nats per parameter unit.
      losses: (directions, clients), nats.
      bends: z'Hz of the clients' mean loss along the same directions.
      curvature: what these tell of H.
    """

    label: str
    slopes: Array
    losses: Array
    bends: Array
    curvature: Curvature


def exact_config(config: Config, *, quantize: str | None = None) -> Config:
    """Returns the configuration with float32 arithmetic and Gaussian directions, which the formulas are for.

    Quantised weights stay so, unless told: they are another model. An explicit mu stays; "auto" becomes that of
    float32.

    Args:
      config: what would be run.
      quantize: `model.quantize`; None for its own.
    """
    model = {"dtype": "float32"} | ({} if quantize is None else {"quantize": quantize})
    return changed(config, {"model": model, "algorithm": {"law": "gaussian"}})


def steps_apart(sizes: Sequence[int], *, batch: int, local_steps: int, count: int) -> Names:
    """Returns the names of `count` batches per client of which no two lie in the same pass through its data.

    Passes are shuffled independently, and within one no example comes twice: so batches of different passes are
    independent, and each is what the run itself draws.
    """
    named = []
    for size in sizes:
        numbers, number = [], 0
        for _ in range(count):
            numbers.append(divmod(number, local_steps))
            passed = ((number + 1) * batch - 1) // size + 1
            number = -(-passed * size // batch)
        named.append(numbers)
    return lambda client, number: named[client][number]


def places(built: Built, asked: SamplingOptions) -> Iterator[tuple[str, Params]]:
    """Yields labels and parameters: the start, the start moved at random, then the model as the run leads it on.

    The bench's own parameters are changed and lent, so a model trained whole needs one copy only.
    """
    params = built.bench.params
    yield "start", params
    start = params.clone()
    step_(params, _SHIFT_SEED, coefficient=asked.spread, law=built.config.algorithm.law)
    yield f"start + {asked.spread:g} z", params
    params.copy_(start)
    del start
    for done in led_on(built, rounds=(asked.points - 2) * asked.rounds):
        if done % asked.rounds == 0:
            yield f"after {done} round{'s' * (done > 1)}", params


def led_on(built: Built, *, rounds: int) -> Iterator[int]:
    """Yields 1, 2, ... rounds, the bench's parameters being where the run has them then.

    A rate that would be adapted stays at its start: no batches are judged on the way.
    """
    config = built.config
    header = Header(
        config=config.model_dump_json(), fingerprint=built.loaded.fingerprint, layout=built.bench.params.layout(),
        law=config.algorithm.law, noise_version=NOISE_VERSION, package="", created="",
    )  # fmt: skip
    with TemporaryDirectory() as folder, Journal.create(Path(folder) / "journal", header) as journal:
        clients = sorted(built.data.sizes)
        for report in simulate(built.algorithm, built.bench, journal=journal, clients=clients, rounds=rounds):
            yield report.round + 1


def sample(
    bench: ModelBench,
    place: tuple[str, Params],
    *,
    clients: Sequence[int],
    names: Names,
    asked: SamplingOptions,
    seed: int,
) -> Sampled:
    """Returns the slopes, losses and curvature at one point, from forward passes only.

    The curvature takes three passes per direction on one more batch of each client, of eight clients at most. As these
    batches differ, its interval covers them, and the spread of batches counts as tr(H^2): `norm` errs upwards.

    Args:
      bench: of the loss.
      place: label and parameters.
      clients: whose losses.
      names: of independent batches, directions * (batches + 1) per client; the last are the curvature's.
      asked: how exactly.
      seed: names the directions, the same at every point.
    """
    label, params = place
    seeds = [derive_seed("constants", seed, number) for number in range(asked.directions)]
    wanted = [
        Point(params, direction, side * asked.mu, client, *names(client, number * asked.batches + batch))
        for number, direction in enumerate(seeds)
        for client in clients
        for batch in range(asked.batches)
        for side in (1, -1)
    ]
    shape = (asked.directions, len(clients), asked.batches, 2)
    losses = np.array(bench.losses(wanted), dtype=np.float64).reshape(shape)
    slopes = (losses[..., 0] - losses[..., 1]) / (2 * asked.mu)
    some = clients[:: -(-len(clients) // _MOST_BENT)]
    first, reach = asked.directions * asked.batches, asked.reach or default_mu("lora")
    found: list[float] = []
    for number, direction in enumerate(seeds):
        batches = [(client, *names(client, first + number)) for client in some]
        found += curvature_samples(bench, params=params, seeds=[direction], batches=batches, mu=reach)
    curvature = from_curvatures(found, seed=seed, resamples=asked.resamples)
    return Sampled(label, slopes, losses.mean((2, 3)), np.array(found), curvature)
