"""Records from files or a hub, prompts with exact label masks, splits over clients, batches by name."""

from fedmezo.data.batches import Batches
from fedmezo.data.imbalance import SplitReport, split_report
from fedmezo.data.prompt import Encoded, Example, Row, encode
from fedmezo.data.split import holdout, holdout_clients, split
from fedmezo.data.tasks import DataSource, Record, load_records

__all__ = [
    "Batches",
    "DataSource",
    "Encoded",
    "Example",
    "Record",
    "Row",
    "SplitReport",
    "encode",
    "holdout",
    "holdout_clients",
    "load_records",
    "split",
    "split_report",
]
