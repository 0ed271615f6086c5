"""The constants of Assumptions 1, 3, 4 and 6, measured on a configuration's own model and data by forward passes."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedmezo.errors import ConfigError
from fedmezo.studies.build import Built, build
from fedmezo.studies.config import Config
from fedmezo.studies.curvature import default_mu
from fedmezo.studies.measured import ClientRow, Interval, Measured, PointRow
from fedmezo.studies.moments import Array, cover_line, fit_line, moments, resamplings, spread_of
from fedmezo.studies.sampling import Sampled, SamplingOptions, exact_config, places, sample, steps_apart
from fedmezo.theory.constants import Constants
from fedmezo.theory.rank import Curvature

__all__ = ["estimate", "measure_built", "measure_constants"]

Say = Callable[[str], None]


def measure_constants(config: Config, *, asked: SamplingOptions | None = None, say: Say = lambda _: None) -> Measured:
    """Returns the constants of a configuration's losses, measured with forward passes in float32.

    Args:
      config: whose model, adapter, clients' data and batch size; the run's rounds lead to the later points.
      asked: how exactly.
      say: hears of every point begun.

    Raises:
      ConfigError: a number asked for is too small.
    """
    return measure_built(build(exact_config(config)), asked=asked, say=say)


def measure_built(built: Built, *, asked: SamplingOptions | None = None, say: Say = lambda _: None) -> Measured:
    """Returns the constants of what `build(exact_config(config))` made; its parameters move on with the run.

    Args:
      built: with parameters as they start.
      asked: how exactly.
      say: hears of every point begun.
    """
    began, config, wanted = time.perf_counter(), built.config, asked or SamplingOptions()
    how, federation = replace(wanted, reach=wanted.reach or default_mu(config.adapter.kind)), config.federation
    clients, sizes = range(federation.clients), list(built.data.sizes.values())
    count = how.directions * (how.batches + 1)
    names = steps_apart(sizes, batch=federation.batch_size, local_steps=federation.local_steps, count=count)
    found = []
    for place in places(built, how):
        say(f"{place[0]}: {how.passes(federation.clients)} forward passes.")
        found.append(sample(built.bench, place, clients=clients, names=names, asked=how, seed=federation.seed))
    of = {
        "model": config.model.name,
        "quantize": config.model.quantize,
        "adapter": config.adapter.kind,
        "clients": federation.clients,
        "batch_size": federation.batch_size,
        "examples": sum(sizes),
        **asdict(how),
    }
    seconds = round(time.perf_counter() - began, 1)
    return estimate(found, dim=built.bench.params.dim, asked=how, of=of, forwards=built.bench.forwards, seconds=seconds)


def estimate(
    found: Sequence[Sampled],
    *,
    dim: int,
    asked: SamplingOptions,
    of: Mapping[str, Any] | None = None,
    forwards: int = 0,
    seconds: float = 0.0,
) -> Measured:
    """Returns the constants that samples at several points give, with intervals from resampled directions.

    Lines are fitted with each point weighted by 1 / (E|grad F|^2)^2, for its noise is in proportion to that.

    Args:
      found: samples of the same clients along the same directions.
      dim: trained scalars.
      asked: how it was measured.
      of: what is noted of the measurement.
      forwards: what is noted of its cost.
      seconds: what is noted of its time.

    Raises:
      ConfigError: every slope was 0, or the loss bends nowhere.
    """
    drawn = _drawn(found, resamples=asked.resamples)
    c_g, sigma_g2 = fit_line(drawn.flat("own"), drawn.flat("batch"), weights=drawn.weights, least=1)
    c_h, sigma_h2 = fit_line(drawn.flat("whole"), drawn.flat("apart"), weights=drawn.weights)
    fits = {"c_g": c_g, "sigma_g2": sigma_g2, "c_h": c_h, "sigma_h2": sigma_h2}
    intervals = {name: spread_of(values[1:]) for name, values in fits.items()}
    bends, bent = _bends(found, dim=dim)
    over_batches = cover_line(drawn.flat("own")[0], drawn.flat("batch")[0], least=1)
    over_clients = cover_line(drawn.flat("whole")[0], drawn.flat("apart")[0])
    covers = dict(zip(fits, (*over_batches, *over_clients), strict=True))
    return Measured(
        Constants(dim=dim, **bends, **{name: float(values[0]) for name, values in fits.items()}),
        Constants(dim=dim, **bends, **covers),
        {**bent, **intervals},
        tuple(_point_row(one, drawn, at, dim=dim) for at, one in enumerate(found)),
        tuple(_client_row(one, drawn, at, who) for at, one in enumerate(found) for who in range(drawn.clients)),
        of or asdict(asked),
        forwards,
        seconds,
    )


@dataclass(frozen=True)
class _Drawn:
    """Moments of every resampling, the measured ones first: arrays (resamplings, points, clients)."""

    means: Mapping[str, Array]
    clients: int
    weights: Array

    def flat(self, name: str) -> Array:
        """Returns one moment with points and clients as rows."""
        values = self.means[name]
        return values.reshape(len(values), -1)

    def told(self, name: str, at: int, who: int) -> float:
        """Returns one measured moment of a point and client."""
        return float(self.means[name][0, at, who])

    def interval(self, name: str, at: int, who: int) -> Interval:
        """Returns its 95 %."""
        return spread_of(self.means[name][1:, at, who])


def _drawn(found: Sequence[Sampled], *, resamples: int) -> _Drawn:
    parts, count = [moments(one.slopes) for one in found], len(found[0].slopes)
    shares = np.vstack([np.full((1, count), 1 / count), resamplings(count, resamples=resamples, seed=0)])
    clients = found[0].slopes.shape[1]
    whole = np.stack([part.whole for part in parts], 1)[..., None].repeat(clients, 2)
    samples = {
        "own": np.stack([part.own for part in parts], 1),
        "batch": np.stack([part.batch for part in parts], 1),
        "apart": np.stack([part.apart for part in parts], 1),
        "aligned": np.stack([part.aligned for part in parts], 1),
        "loss": np.stack([one.losses for one in found], 1),
        "whole": whole,
    }
    means = {name: np.tensordot(shares, values, 1) for name, values in samples.items()}
    # For Gaussian z, E (z'g)^2 z'Hz = |g|^2 tr H + 2 g'Hg: the covariance is 2 g'Hg, the mean itself E e'He.
    bends = np.stack([one.bends for one in found], 1)[..., None]
    bent = np.tensordot(shares, bends, 1)
    means["stretch"] = np.tensordot(shares, samples["batch"] * bends, 1)
    unbiased = count / (count - 1) / 2
    means["along"] = unbiased * (np.tensordot(shares, whole * bends, 1) - means["whole"] * bent)
    noisy = means["batch"][0].mean(1)
    if not (noisy > 0).all():
        raise ConfigError("Every slope was 0: the loss does not depend on the trained parameters, or mu is too small.")
    with np.errstate(invalid="ignore", divide="ignore"):
        means["cosine"] = means["aligned"] / np.sqrt(means["own"] * means["whole"])
    return _Drawn(means, clients, np.repeat(noisy**-2.0, clients))


def _bends(found: Sequence[Sampled], *, dim: int) -> tuple[dict[str, float], dict[str, Interval]]:
    """Returns the largest smoothness and effective rank over the points, each with the interval of its point."""
    stiff = max((_stiffness(one.curvature, dim=dim) for one in found), key=lambda known: known[0])
    wide = max((_stiffness(one.curvature, dim=dim) for one in found), key=lambda known: known[1])
    if not stiff[0] > 0:
        raise ConfigError("No curvature was found at any point: the loss looks linear; ask for more directions.")
    return {"smoothness": stiff[0], "effective_rank": wide[1]}, {"smoothness": stiff[2], "effective_rank": wide[3]}


def _stiffness(bend: Curvature, *, dim: int) -> tuple[float, float, Interval, Interval]:
    """Returns L and r with L r >= tr H at one point, and their intervals.

    L is tr(H^2) / tr(H). Where that passes |H|_F, or the trace is negative, H has negative eigenvalues; then L is
    |H|_F, which no |H|op passes, and r has no interval.
    """
    whole = math.sqrt(bend.frobenius2)
    if bend.trace > 0 and bend.norm <= whole:
        return bend.norm, min(bend.rank, float(dim)), bend.intervals["norm"], bend.intervals["rank"]
    low, high = bend.intervals["frobenius2"]
    return whole, 1.0, (math.sqrt(low), math.sqrt(high)), (math.nan, math.nan)


def _point_row(one: Sampled, drawn: _Drawn, at: int, *, dim: int) -> PointRow:
    norm, rank, of_norm, of_rank = _stiffness(one.curvature, dim=dim)
    mean = {name: drawn.means[name].mean(2)[:, at] for name in ("loss", "whole", "batch", "apart", "along", "stretch")}
    told = {name: float(values[0]) for name, values in mean.items()}
    sure = {name: spread_of(values[1:]) for name, values in mean.items()}
    intervals = {
        "loss": sure["loss"], "gradient2": sure["whole"], "batch2": sure["batch"], "apart2": sure["apart"],
        "trace": one.curvature.intervals["trace"], "norm": of_norm, "rank": of_rank,
        "along": sure["along"], "stretch": sure["stretch"],
    }  # fmt: skip
    sizes = (told["loss"], told["whole"], told["batch"], told["apart"])
    return PointRow(one.label, *sizes, one.curvature.trace, norm, rank, told["along"], told["stretch"], intervals)


def _client_row(one: Sampled, drawn: _Drawn, at: int, who: int) -> ClientRow:
    names = {"loss": "loss", "gradient2": "own", "batch2": "batch", "apart2": "apart", "cosine": "cosine"}
    told = {name: drawn.told(key, at, who) for name, key in names.items()}
    intervals = {name: drawn.interval(key, at, who) for name, key in names.items()}
    cosine = told.pop("cosine")
    return ClientRow(one.label, who, **told, cosine=cosine if math.isfinite(cosine) else None, intervals=intervals)
