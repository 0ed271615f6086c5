"""The section about differential privacy: whose secret is kept, by whom, how well; and the algorithm made from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from fedmezo.errors import ConfigError
from fedmezo.studies.keys import MAX_SEED, Section, key

if TYPE_CHECKING:
    from fedmezo.fl.algorithm import Algorithm
    from fedmezo.fl.spending import Spending
    from fedmezo.studies.config import Config

__all__ = ["Privacy", "complaint", "forecast", "private_numbers", "privately", "releases_of", "spending_of"]

_LOCAL = ("example", "client")


class Privacy(Section):
    """Differential privacy of what leaves a client, or of the model; see docs/privacy.md."""

    mode: Literal["none", "example", "client", "central"] = key(
        "none | example (each client limits and hides each of its examples' effect on a slope) | client (each client "
        "hides all of its data) | central (a trusted server hides each client from whoever gets the model).",
        default="none",
    )
    clip: Annotated[float, Field(gt=0)] | Literal["none"] | None = key(
        "Limit on what one unit can change. example: on an example's difference of two losses, nats. client, central: "
        'on the length of the vector of a client\'s slopes in a round. "none" for no limit, which allows no noise.',
        default=None,
        example=0.05,
    )
    sigma: float | None = key(
        'Noise multiplier: deviation of the noise over clip; "auto" is the smallest with which the planned rounds cost '
        "privacy.epsilon.",
        default=None,
        word="auto",
        also=("noise_multiplier",),
        ge=0,
    )
    epsilon: float | None = key(
        'The most that any unit may spend in the run; it does not go on beyond. "none" for no limit.',
        default=None,
        word="none",
        also=("target_epsilon",),
        gt=0,
    )
    delta: float = key(
        "The probability that epsilon does not bound; far below one over the number of units.",
        default=1e-5,
        gt=0,
        lt=1,
    )
    accountant: Literal["pld", "rdp"] = key(
        "How releases add up: pld (privacy loss distributions, tight) | rdp (Renyi divergences, some 10 % looser).",
        default="pld",
    )
    noise_seed: int | None = key(
        "For studies only: noise that can be repeated, and so taken off by whoever knows this number.",
        default=None,
        example=1,
        ge=0,
        le=MAX_SEED,
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Privacy:
        if self.mode == "none":
            for name in ("sigma", "epsilon"):
                if getattr(self, name) is not None:
                    raise ValueError(f"privacy.{name} is given, and privacy.mode is none; set privacy.mode too.")
        elif self.clip is None:
            raise ValueError(f'privacy.clip: privacy.mode = "{self.mode}" needs a limit on what a unit can change.')
        elif self.sigma is None and self.epsilon is None:
            raise ValueError("privacy.sigma: give a noise multiplier, or privacy.epsilon for one to be chosen.")
        elif self.clip == "none" and self.sigma != 0:
            raise ValueError("privacy.clip: no noise hides what has no limit; give a number, or privacy.sigma = 0.")
        return self

    @property
    def limit(self) -> float:
        """The clip as a number: inf for "none"."""
        return math.inf if self.clip in (None, "none") else float(self.clip)

    @property
    def local(self) -> bool:
        """Whether it is the clients that make noise."""
        return self.mode in _LOCAL


def complaint(config: Config) -> str | None:
    """Returns why a run cannot be private as it is, in one sentence that begins with the key; None when it can."""
    mode = config.privacy.mode
    if mode == "none":
        return None
    algorithm, federation, signal = config.algorithm, config.federation, config.personal.signal
    central, whole = mode == "central", mode != "example"
    losses = signal in ("round-loss", "five-round-loss")
    wants = {
        "algorithm.name": ('not "fedavg"', algorithm.name, algorithm.name != "fedavg"),
        "algorithm.adapt": ("false", algorithm.adapt, not algorithm.adapt),
        "guard.batches": ("0", config.guard.batches, not config.guard.batches),
        "eval.per_client": ("false", config.eval.per_client, not config.eval.per_client),
        "network.secure": ("false", config.network.secure, not config.network.secure),
        "personal.signal": ("none of losses", signal, not losses),
        "federation.budget": ("no tokens", federation.budget, "tokens" not in federation.budget),
        "federation.transport": ('"scalars"', federation.transport, not whole or federation.transport == "scalars"),
    } | ({
        "algorithm.shared": ("true", algorithm.shared, algorithm.shared),
        "algorithm.name ": ('not "fedkseed-pro"', algorithm.name, algorithm.name != "fedkseed-pro"),
        "personal.signal ": ('"none"', signal, signal == "none"),
        "robust.rule": ('"none"', config.robust.rule, config.robust.rule == "none"),
        "federation.weighting": ('"uniform"', federation.weighting, federation.weighting == "uniform"),
    } if central else {})  # fmt: skip
    for name, (wanted, got, good) in wants.items():
        if not good:
            told = f'"{got}"' if isinstance(got, str) else str(got).lower() if isinstance(got, bool) else str(got)
            return f'{name.strip()}: privacy.mode = "{mode}" needs {wanted}, got {told}: {_REASONS[name.strip()]}.'
    return None


_REASONS = {
    "algorithm.name": "privacy here is of slopes, and of sums that do not go by single ones",
    "algorithm.adapt": "rates set by losses would tell of the data",
    "guard.batches": "judged batches are clients' data",
    "eval.per_client": "what clients hold back is theirs too",
    "network.secure": "a share of a secret sum holds a loss",
    "personal.signal": "rates of single clients would go by what has to stay hidden",
    "federation.budget": "how many tokens were read tells of the data",
    "federation.transport": "noise is on the scalars",
    "algorithm.shared": "slopes are added direction by direction",
    "robust.rule": "noise is on the sum of all, and a rule would replace that",
    "federation.weighting": "the sum has every client once",
}


def releases_of(config: Config, sizes: Mapping[int, int]) -> dict[int, float]:
    """Returns client -> the rate at which its units are sampled; {WHOLE: rate} where all clients are one release."""
    from fedmezo.fl.whole import WHOLE

    federation = config.federation
    if config.privacy.mode == "central":
        return {WHOLE: (federation.cohort or federation.clients) / federation.clients}
    batch = federation.batch_size
    return {c: min(1.0, batch / size) if config.privacy.mode == "example" else 1.0 for c, size in sizes.items()}


def _rounds_of(config: Config, clients: Mapping[int, float]) -> dict[int, int]:
    """Returns client -> rounds it will take part in, if everyone is always there."""
    from fedmezo.fl.cohort import draw_cohort

    federation = config.federation
    if config.privacy.mode == "central" or federation.cohort is None or federation.cohort == federation.clients:
        return dict.fromkeys(clients, federation.rounds)
    counts = dict.fromkeys(clients, 0)
    for number in range(federation.rounds):
        for client in draw_cohort(federation.seed, number, list(clients), federation.cohort):
            counts[client] += 1
    return counts


def spending_of(config: Config, sizes: Mapping[int, int]) -> Spending:
    """Returns what a round of a private run costs; sigma must be a number."""
    from fedmezo.fl.accountant import Releases, epsilon
    from fedmezo.fl.spending import Spending

    privacy, sigma = config.privacy, config.privacy.sigma
    if sigma is None:
        raise ConfigError("privacy.sigma must be a number here; let `build` choose it first.")

    def cost(rate: float, count: int) -> float:
        return epsilon([Releases(sigma, rate, count)], delta=privacy.delta, accountant=privacy.accountant)

    return Spending(
        cost,
        releases_of(config, sizes),
        releases=config.federation.local_steps if privacy.mode == "example" else 1,
        budget=math.inf if privacy.epsilon is None else privacy.epsilon,
        told={"delta": privacy.delta, "budget": privacy.epsilon, "sigma": sigma, "unit": _unit(privacy)},
    )


def _unit(privacy: Privacy) -> str:
    return "example" if privacy.mode == "example" else "client"


def private_numbers(config: Config, sizes: Mapping[int, int]) -> Config:
    """Returns the configuration with its sigma as a number.

    Args:
      config: the configuration.
      sizes: client -> number of training examples.

    Raises:
      ConfigError: the planned rounds cost more than the budget, or no noise is enough.
    """
    from fedmezo.fl.accountant import sigma_for
    from fedmezo.fl.spending import foremost

    privacy = config.privacy
    if privacy.mode == "none":
        return config
    if privacy.sigma is None and privacy.epsilon is not None:
        draft = config.model_copy(update={"privacy": privacy.model_copy(update={"sigma": 1.0})})
        plain = spending_of(draft, sizes)
        rounds = _rounds_of(config, plain.rates)
        pairs = foremost([(plain.rates[client], plain.releases * count) for client, count in rounds.items()])
        how: dict[str, Any] = {"delta": privacy.delta, "accountant": privacy.accountant}
        sigma = max(sigma_for(privacy.epsilon, rate=rate, count=count, **how) for rate, count in pairs)
        return config.model_copy(update={"privacy": privacy.model_copy(update={"sigma": sigma})})
    planned = forecast(config, sizes)["epsilon"]
    if privacy.epsilon is not None and (planned is None or planned > privacy.epsilon):
        told = "without bound" if planned is None else f"{planned:.4g}"
        raise ConfigError(
            f"privacy.epsilon: {config.federation.rounds} rounds would cost {told} at sigma {privacy.sigma:g}, more "
            f"than the budget of {privacy.epsilon:g}; take fewer rounds, or begin a run with a larger privacy.sigma."
        )
    return config


def forecast(config: Config, sizes: Mapping[int, int]) -> dict[str, Any]:
    """Returns what a private run will have spent after its last round, as plain values; epsilon is None for inf."""
    spending, privacy = spending_of(config, sizes), config.privacy
    spent = spending.spent(_rounds_of(config, spending.rates))
    return {
        "mode": privacy.mode,
        "unit": _unit(privacy),
        "epsilon": spent if math.isfinite(spent) else None,
        "budget": privacy.epsilon,
        "delta": privacy.delta,
        "sigma": privacy.sigma,
        "clip": privacy.clip,
        "sampling_rate": max(spending.rates.values()),
        "accountant": privacy.accountant,
    }


def privately(algorithm: Algorithm[Any], config: Config, sizes: Mapping[int, int], *, secret: bytes) -> Algorithm[Any]:
    """Returns the algorithm with the section's noise and budget; itself when nothing is private.

    Args:
      algorithm: the algorithm; for central privacy one that asks all it is offered.
      config: the configuration, sigma a number.
      sizes: client -> number of training examples.
      secret: names noise and samples, for these data.
    """
    privacy, federation = config.privacy, config.federation
    if privacy.mode == "none":
        return algorithm
    from fedmezo.fl import privacy as mechanisms
    from fedmezo.fl.spending import with_spending

    noise = mechanisms.Noise(privacy.limit, float(privacy.sigma or 0), secret)
    if privacy.mode == "central":
        cohort = federation.cohort or federation.clients
        private = mechanisms.with_central_privacy(algorithm, noise, clients=federation.clients, cohort=cohort)
    else:
        by = mechanisms.with_example_privacy if privacy.mode == "example" else mechanisms.with_client_privacy
        private = by(algorithm, noise, batch=federation.batch_size)
    return with_spending(private, spending_of(config, sizes))
