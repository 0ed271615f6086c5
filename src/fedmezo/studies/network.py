"""The section about clients on other machines: how long a server waits for them, and whether it sees sums only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmezo.runtime.line import FEWEST
from fedmezo.studies.keys import Section, key

if TYPE_CHECKING:
    from fedmezo.studies.personal import Personal
    from fedmezo.studies.settings import Algorithm, Federation

__all__ = ["Network", "complaint"]


class Network(Section):
    """How long a server waits for clients on other machines, and what it sees of them."""

    clients: int | None = key(
        'Clients that have to be there before the first round; "all" for all of the federation.',
        default=None,
        word="all",
        ge=1,
    )
    quorum: int | None = key(
        'Replies that a round needs; "half" of those asked, rounded up. A secure round needs more than half.',
        default=None,
        word="half",
        ge=1,
    )
    deadline: float = key(
        "Seconds after which a round closes without those who have not answered, if it has its quorum.",
        default=600.0,
        also=("timeout", "round_timeout"),
        gt=0,
    )
    patience: float = key(
        "Seconds a server waits for enough clients before it ends; the run can go on later.", default=600.0, gt=0
    )
    secure: bool = key(
        "Secure aggregation: the server learns the sum of the clients' walks and nothing of a single one; needs "
        "algorithm.shared = true and secure_clip (docs/secure-aggregation.md). Simulated clients are summed in the "
        "clear, to the same model up to the sum's rounding.",
        default=False,
        also=("secagg", "secure_aggregation"),
    )
    secure_clip: float | None = key(
        "With secure: the limit on |slope|, in nats per unit of the parameters, instead of algorithm.clip; everyone "
        "knows it, and the server cannot follow the slopes' scale.",
        default=None,
        example=50.0,
        gt=0,
    )


def complaint(network: Network, algorithm: Algorithm, federation: Federation, personal: Personal) -> str | None:
    """Returns why a run cannot be secure as it is, in one sentence that begins with the key; None when it can."""
    if not network.secure:
        return None
    wants = {
        "network.secure_clip": ("a number", network.secure_clip, network.secure_clip is not None),
        "algorithm.name": ('"fedmezo" or "fedkseed"', algorithm.name, algorithm.name in ("fedmezo", "fedkseed")),
        "algorithm.directions": ("1", algorithm.directions, algorithm.directions == 1),
        "algorithm.momentum": ("0", algorithm.momentum, algorithm.momentum == 0),
        "algorithm.shared": ("true", algorithm.shared, algorithm.shared),
        "algorithm.clip_at": ("none", algorithm.clip_at, algorithm.clip_at is None),
        "algorithm.coding": ('"float32"', algorithm.coding, algorithm.coding == "float32"),
        "federation.weighting": ('"uniform"', federation.weighting, federation.weighting == "uniform"),
        "federation.transport": ('"scalars"', federation.transport, federation.transport == "scalars"),
        "federation.sums_coding": ('"float32"', federation.sums_coding, federation.sums_coding == "float32"),
        "personal.signal": ('"none"', personal.signal, personal.signal == "none"),
    }
    for name, (wanted, got, good) in wants.items():
        if not good:
            return f"{name}: network.secure = true needs {wanted}, got {_told(got)}: {_REASONS[name]}."
    cohort = federation.cohort or federation.clients
    if cohort < FEWEST:
        name = "federation.clients" if federation.cohort is None else "federation.cohort"
        return f"{name}: network.secure = true needs at least {FEWEST}, got {cohort}: two would know each other's part."
    return None


def _told(got: object) -> str:
    return "none" if got is None else f'"{got}"' if isinstance(got, str) else str(got)


_REASONS = {
    "network.secure_clip": "what is summed has to lie in a range that everyone knows",
    "algorithm.name": "only walks add up step by step, and fedkseed-pro goes by single slopes",
    "algorithm.directions": "a secure walk has one direction a step",
    "algorithm.momentum": "a secure walk has none",
    "algorithm.shared": "the sum along a direction that one client has alone is that client's slope",
    "algorithm.clip_at": "network.secure_clip is the limit on slopes",
    "algorithm.coding": "what travels is a sum, in a format of its own",
    "federation.weighting": "the sum has every client once",
    "federation.transport": "a sum is scalars",
    "federation.sums_coding": "all clients of a sum walk from the model itself",
    "personal.signal": "rates of single clients go by what is seen of them",
}
