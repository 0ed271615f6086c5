"""From the section [algorithm] to the descent: what is left to the program, the algorithm, and who watches over it."""

import math
from collections.abc import Mapping
from typing import Any

from fedmezo.errors import ConfigError
from fedmezo.fl.aggregate import Weighting, first_bounded, weighting
from fedmezo.fl.algorithm import Algorithm
from fedmezo.fl.fedavg import Settings as GradientSettings
from fedmezo.fl.fedavg import fedavg
from fedmezo.fl.fedkseed import Pool, fedkseed
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.fl.share import limited
from fedmezo.runtime.lookout import Lookout, places_of
from fedmezo.runtime.pace import Pace
from fedmezo.runtime.walkers import MeteredBench
from fedmezo.studies.config import Config
from fedmezo.studies.personal import personalised
from fedmezo.studies.privacy import privately
from fedmezo.studies.robust import robust_weights, robustly
from fedmezo.studies.window import customary_mu
from fedmezo.zo.estimate import Estimator
from fedmezo.zo.params import Params

__all__ = ["build_algorithm", "build_lookout", "cost_of", "resolve", "step_passes", "walk_passes"]

# Starts, not recommendations: tuned sgd took 0.1 to 0.3 on SmolLM2 (docs/results); adamw has not been tuned here.
FEDAVG_RATES = {"sgd": 0.05, "adamw": 5e-4}
# The judged batches: examples that are enough; shares of a run's forward passes: cheap, dear, and dear where they set
# the rate too; limits.
_EXAMPLES, _SHARE, _DEAR, _DEAREST = 32, 0.02, 0.15, 0.25
_FEWEST, _MOST = 6, 64


def resolve(config: Config, *, dim: int) -> Config:
    """Returns the configuration with rate and mu as numbers, and what else algorithm leaves to the program.

    0.3 / sqrt(d) is where an adapted rate starts: good constant rates were 0.2 to 10 times that (docs/rate.md). A
    16-bit forward pass needs mu about 1e-2: at 1e-3 the difference of two losses is mostly rounding.
    `build`, which has data, measures whether that holds here.
    """
    algorithm = config.algorithm
    start = 0.3 / math.sqrt(dim)
    if algorithm.name == "fedavg":
        start = FEDAVG_RATES[algorithm.optimizer]
    rate = algorithm.rate if algorithm.rate is not None else start
    adapt = (algorithm.rate is None if algorithm.adapt is None else algorithm.adapt) and algorithm.name != "fedavg"
    adapt = adapt and config.privacy.mode == "none"  # losses would tell of the data
    decay = algorithm.decay or ("wsd" if adapt else "constant")
    mu = algorithm.mu if algorithm.mu is not None else customary_mu(config.model.dtype)
    told = {"rate": rate, "mu": mu, "adapt": adapt, "decay": decay}
    return config.model_copy(update={"algorithm": algorithm.model_copy(update=told)})


def build_algorithm(
    config: Config, sizes: Mapping[int, int], *, params: Params | None = None, secret: bytes = b""
) -> Algorithm[Any]:
    """Returns the algorithm of a resolved configuration, with the clients' own rates if it asks for them.

    Args:
      config: the configuration.
      sizes: client -> number of training examples.
      params: what is trained; needed only where rates go by exact distances of walks.
      secret: names the noise of a private run; without one nobody may walk.
    """
    algorithm = config.algorithm
    if algorithm.rate is None or algorithm.mu is None:
        raise ConfigError("algorithm.rate and algorithm.mu must be numbers here; resolve the configuration first.")
    method = _plain_algorithm(config, sizes)
    clip = config.network.secure_clip if config.network.secure else algorithm.clip_at
    own_rates = personalised(
        method if clip is None else limited(method, clip=clip),
        config.personal,
        seed=config.federation.seed,
        rate=algorithm.rate,
        law=algorithm.law,
        params=params,
    )
    return privately(robustly(own_rates, config.robust), config, sizes, secret=secret)


def _plain_algorithm(config: Config, sizes: Mapping[int, int]) -> Algorithm[Any]:
    algorithm, federation = config.algorithm, config.federation
    everyone = config.privacy.mode == "central"  # a private cohort is drawn before
    taking_part: dict[str, Any] = {
        "seed": federation.seed,
        "cohort": federation.clients if everyone or federation.cohort is None else federation.cohort,
        "weights": _weights(config, sizes),
    }
    if algorithm.name == "fedavg":
        return fedavg(_gradient_settings(config), **taking_part)
    settings = _walk_settings(config)
    if algorithm.name == "fedmezo":
        return fedmezo(settings, **taking_part)
    pool = Pool(
        algorithm.pool,
        pro=algorithm.name == "fedkseed-pro",
        temperature=algorithm.temperature,
        importance=algorithm.importance,
        score_clip=algorithm.score_clip,
        score_prior=algorithm.score_prior,
    )
    return fedkseed(settings, pool, **taking_part)


def _weights(config: Config, sizes: Mapping[int, int]) -> Weighting:
    plain = weighting(config.federation.weighting, sizes)
    bounded = first_bounded(plain) if math.isfinite(config.algorithm.clip_multiple) else plain
    return robust_weights(bounded, config.robust)


def _walk_settings(config: Config) -> Settings:
    algorithm, federation = config.algorithm, config.federation
    forward: Estimator = "forward-half" if algorithm.paper_eq2_scale else "forward"
    return Settings(
        rate=float(algorithm.rate or 0),
        mu=float(algorithm.mu or 0),
        steps=federation.local_steps,
        directions=algorithm.directions,
        clip=algorithm.clip_multiple,
        decay=algorithm.decay or "constant",
        rounds=federation.rounds,
        law=algorithm.law,
        estimator="two-point" if algorithm.estimator == "two-point" else forward,
        dense=federation.transport == "dense",
        coding=algorithm.coding,
        normalise=algorithm.normalise,
        momentum=algorithm.momentum,
        shared=algorithm.shared,
        quantile=algorithm.clip_quantile,
    )


def _gradient_settings(config: Config) -> GradientSettings:
    algorithm, federation = config.algorithm, config.federation
    return GradientSettings(
        rate=float(algorithm.rate or 0),
        steps=federation.local_steps,
        optimizer=algorithm.optimizer,
        momentum=algorithm.momentum,
        weight_decay=algorithm.weight_decay,
        decay=algorithm.decay or "constant",
        rounds=federation.rounds,
    )


def build_lookout(config: Config, bench: MeteredBench) -> Lookout | None:
    """Returns the batches by which a run's surges are noticed and its rate is set; None where there are none.

    A batch is one forward pass.
    """
    federation, algorithm = config.federation, config.algorithm
    count, pace = config.guard.batches, Pace(federation.rounds, adapt=bool(algorithm.adapt))
    if config.privacy.mode != "none":
        return None
    if count is None:
        share = walk_passes(config) / pace.passes(1)
        enough = max(math.ceil(_EXAMPLES / federation.batch_size), round(_SHARE * share))
        count = max(_FEWEST, min(enough, _MOST, round((_DEAREST if pace.adapt else _DEAR) * share)))
    if count == 0 or algorithm.name == "fedavg":
        return None
    return Lookout(pace, bench, places_of(federation.clients, count), algorithm.law)


def step_passes(config: Config) -> int:
    """Returns the forward passes of one local step; a backward pass counts as two, recomputed activations as one."""
    algorithm = config.algorithm
    if algorithm.name == "fedavg":
        return 4 if algorithm.gradient_checkpointing else 3
    return 2 * algorithm.directions if algorithm.estimator == "two-point" else algorithm.directions + 1


def walk_passes(config: Config) -> int:
    """Returns the forward passes of all clients' steps in a run."""
    federation = config.federation
    steps = federation.rounds * federation.local_steps * (federation.cohort or federation.clients)
    return steps * step_passes(config)


def cost_of(lookout: Lookout | None, config: Config) -> list[str]:
    """Returns a sentence on what the judged batches cost, where that is more than 2 % of the run's forward passes."""
    if lookout is None:
        return []
    count = len(lookout.places)
    looks, walks = lookout.pace.passes(count), walk_passes(config)
    if looks <= _SHARE * walks:
        return []
    why = "to set the rate and to notice a surge" if lookout.pace.adapt else "to notice a surge"
    return [
        f"{count} batches are judged again and again {why}: up to {looks} forward passes, {looks / walks:.0%} of the "
        f"{walks:,} of this short run (guard.batches = 0 for none)."
    ]
