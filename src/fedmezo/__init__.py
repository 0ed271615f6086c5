"""Federated fine-tuning of language models with forward passes only.

    import fedmezo

    config = fedmezo.load_config("configs/demo.toml", overrides=["federation.rounds=5"])
    summary = fedmezo.run(config)
    print(summary.eval["start"]["loss"], "->", summary.eval["end"]["loss"])

The names below are loaded when first used, so `import fedmezo` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedmezo.errors import FedMeZOError

if TYPE_CHECKING:
    from fedmezo.fl.fedavg import fedavg
    from fedmezo.fl.fedkseed import Pool, fedkseed
    from fedmezo.fl.fedmezo import Settings, fedmezo
    from fedmezo.fl.privacy import Noise, with_central_privacy, with_client_privacy, with_example_privacy
    from fedmezo.fl.rates import Personal, with_personal_rates
    from fedmezo.fl.robust import with_robust_mean
    from fedmezo.models.load import fetch, load_model
    from fedmezo.runtime.journal import Journal
    from fedmezo.runtime.line import Line, Parcel, Returned
    from fedmezo.runtime.progress import RoundReport
    from fedmezo.runtime.simulate import simulate
    from fedmezo.studies.ask import ask
    from fedmezo.studies.build import build
    from fedmezo.studies.config import Config, load_config
    from fedmezo.studies.doctor import diagnose
    from fedmezo.studies.live import LivePage, watch
    from fedmezo.studies.plan import plan
    from fedmezo.studies.resident import ClientOptions, build_resident
    from fedmezo.studies.run import Summary, resume, run
    from fedmezo.studies.trainer import ZOTrainer, ZOTrainingArguments
    from fedmezo.studies.uses import evaluate, export, rollback, verify
    from fedmezo.studies.watch import Tracker

__version__ = "0.1.0"

_HOMES = {
    "ClientOptions": "fedmezo.studies.resident",
    "Config": "fedmezo.studies.config",
    "Journal": "fedmezo.runtime.journal",
    "Line": "fedmezo.runtime.line",
    "LivePage": "fedmezo.studies.live",
    "Noise": "fedmezo.fl.privacy",
    "Parcel": "fedmezo.runtime.line",
    "Personal": "fedmezo.fl.rates",
    "Pool": "fedmezo.fl.fedkseed",
    "Returned": "fedmezo.runtime.line",
    "RoundReport": "fedmezo.runtime.progress",
    "Settings": "fedmezo.fl.fedmezo",
    "Summary": "fedmezo.studies.run",
    "Tracker": "fedmezo.studies.watch",
    "ZOTrainer": "fedmezo.studies.trainer",
    "ZOTrainingArguments": "fedmezo.studies.trainer",
    "ask": "fedmezo.studies.ask",
    "build": "fedmezo.studies.build",
    "build_resident": "fedmezo.studies.resident",
    "diagnose": "fedmezo.studies.doctor",
    "evaluate": "fedmezo.studies.uses",
    "export": "fedmezo.studies.uses",
    "fedavg": "fedmezo.fl.fedavg",
    "fedkseed": "fedmezo.fl.fedkseed",
    "fedmezo": "fedmezo.fl.fedmezo",
    "fetch": "fedmezo.models.load",
    "load_config": "fedmezo.studies.config",
    "load_model": "fedmezo.models.load",
    "plan": "fedmezo.studies.plan",
    "resume": "fedmezo.studies.run",
    "rollback": "fedmezo.studies.uses",
    "run": "fedmezo.studies.run",
    "simulate": "fedmezo.runtime.simulate",
    "verify": "fedmezo.studies.uses",
    "watch": "fedmezo.studies.live",
    "with_central_privacy": "fedmezo.fl.privacy",
    "with_client_privacy": "fedmezo.fl.privacy",
    "with_example_privacy": "fedmezo.fl.privacy",
    "with_personal_rates": "fedmezo.fl.rates",
    "with_robust_mean": "fedmezo.fl.robust",
}

__all__ = [
    "ClientOptions",
    "Config",
    "FedMeZOError",
    "Journal",
    "Line",
    "LivePage",
    "Noise",
    "Parcel",
    "Personal",
    "Pool",
    "Returned",
    "RoundReport",
    "Settings",
    "Summary",
    "Tracker",
    "ZOTrainer",
    "ZOTrainingArguments",
    "__version__",
    "ask",
    "build",
    "build_resident",
    "diagnose",
    "evaluate",
    "export",
    "fedavg",
    "fedkseed",
    "fedmezo",
    "fetch",
    "load_config",
    "load_model",
    "plan",
    "resume",
    "rollback",
    "run",
    "simulate",
    "verify",
    "watch",
    "with_central_privacy",
    "with_client_privacy",
    "with_example_privacy",
    "with_personal_rates",
    "with_robust_mean",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its home module the first time it is used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedmezo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted(__all__)
