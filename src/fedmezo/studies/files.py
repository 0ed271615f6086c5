"""The names of what lies in a run's folder; nothing here takes long to import."""

import json
from pathlib import Path
from typing import Any

__all__ = ["BEGUN", "DATA", "JOURNAL", "SUMMARY", "object_in"]

JOURNAL = "journal.sqlite"
SUMMARY = "summary.json"
DATA = "data.sha256"
BEGUN = "start.json"  # what a journal does not hold and its readers want: dim, split


def object_in(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file; empty without one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
