"""Federated fine-tuning of language models with forward passes only."""

from fedmezo import errors
from fedmezo.errors import FedMeZOError

__all__ = ["FedMeZOError", "errors", "__version__"]

__version__ = "0.1.0"
