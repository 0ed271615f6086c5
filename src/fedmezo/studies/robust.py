"""The section about clients that lie: which rule takes the place of the mean, and the algorithm made from it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from fedmezo.studies.keys import Section, key

if TYPE_CHECKING:
    from fedmezo.fl.aggregate import Weighting
    from fedmezo.fl.algorithm import Algorithm
    from fedmezo.studies.network import Network
    from fedmezo.studies.settings import Algorithm as Descent
    from fedmezo.studies.settings import Federation

__all__ = ["Robust", "complaint", "robust_weights", "robustly"]

_COMPARING = ("median", "trimmed-mean", "sign-vote")
_KRUM = ("krum", "multi-krum")


class Robust(Section):
    """What takes the place of the clients' mean, so that a minority that sends anything bends a round little."""

    rule: Literal["none", "median", "trimmed-mean", "sign-vote", "norm-bound", "krum", "multi-krum"] = key(
        "none (the mean) | median, trimmed-mean, sign-vote (of the clients' steps along each direction; these need "
        "algorithm.shared) | norm-bound (no walk counts as longer than the bound) | krum, multi-krum (the walk, or the "
        "walks, nearest to the others).",
        default="none",
    )
    share: float = key(
        "Share of a round's clients that may be adversaries, for trimmed-mean, krum and multi-krum; rounded up.",
        default=0.2,
        ge=0,
        lt=0.5,
    )
    bound: float = key("norm-bound: longest walk, as a multiple of the round's median length.", default=1.0, gt=0)


def complaint(robust: Robust, algorithm: Descent, federation: Federation, network: Network) -> str | None:
    """Returns why the rule cannot work in this run, in one sentence that begins with the key; None when it can."""
    rule = robust.rule
    if rule == "none":
        return None
    comparing, cohort = rule in _COMPARING, federation.cohort or federation.clients
    scalars = algorithm.name == "fedavg" or federation.transport == "scalars"
    fewest = 2 * _assumed(robust.share, cohort) + 3 if rule in _KRUM else 3
    wants = {
        "network.secure": ("false", network.secure, not network.secure),
        "federation.weighting": ('"uniform"', federation.weighting, federation.weighting == "uniform"),
        "federation.transport": ('"scalars"', federation.transport, scalars),
        "algorithm.name": ("walks", algorithm.name, not comparing or algorithm.name != "fedavg"),
        "algorithm.shared": ("true", algorithm.shared, not comparing or algorithm.shared),
        "federation.clients" if federation.cohort is None else "federation.cohort": (
            f"at least {fewest}", cohort, cohort >= fewest
        ),
    }  # fmt: skip
    for name, (wanted, got, good) in wants.items():
        if not good:
            return f'{name}: robust.rule = "{rule}" needs {wanted}, got {_told(got)}: {_reason(name)}.'
    return None


def _assumed(share: float, count: int) -> int:
    # As `fl.robust.assumed`; a configuration is read without numpy.
    return min(math.ceil(share * count - 1e-9), (count - 1) // 2)


def _told(got: object) -> str:
    return f'"{got}"' if isinstance(got, str) else str(got).lower()


def _reason(name: str) -> str:
    return _REASONS.get(name, "among fewer no rule can tell the honest from the others")


_REASONS = {
    "network.secure": "a server that sees no single walk cannot compare any",
    "federation.weighting": "how many examples it has or used is what a client says of itself",
    "federation.transport": "a walk written out need not be the one its slopes tell",
    "algorithm.name": "backpropagation has no steps along named directions; norm-bound, krum and multi-krum compare "
    "what it sends as a whole",
    "algorithm.shared": "steps along different directions cannot be compared",
}


def robust_weights(weights: Weighting, robust: Robust) -> Weighting:
    """Returns the weighting with what the section asks of weights; changes that are not finite never count."""
    # A configuration is read without torch.
    from fedmezo.fl.robust import finite_only, krum, norm_bounded

    if robust.rule == "norm-bound":
        return norm_bounded(weights, bound=robust.bound)
    if robust.rule in _KRUM:
        return krum(weights, share=robust.share, single=robust.rule == "krum")
    return finite_only(weights)


def robustly(algorithm: Algorithm[Any], robust: Robust) -> Algorithm[Any]:
    """Returns the algorithm with what the section asks of the server; itself when the rule is none."""
    from fedmezo.fl.robust import with_believed_losses, with_robust_mean

    if robust.rule == "none":
        return algorithm
    if robust.rule == "median" or robust.rule == "trimmed-mean" or robust.rule == "sign-vote":
        return with_robust_mean(algorithm, robust.rule, share=robust.share)
    return with_believed_losses(algorithm)
