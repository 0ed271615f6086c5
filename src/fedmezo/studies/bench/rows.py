"""What a benchmark says: rows of one form, the machine they were measured on, and JSON of both."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["Frame", "Row", "as_result", "machine", "ratio"]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity.

    Attributes:
      name: the benchmark and the quantity, "step: lora, one step".
      dtype: dtype of the model's weights.
      tokens: tokens of one client's batch.
      clients: clients that share the work.
      value: the quantity; None where it is not available.
      unit: "s", "ns" per entry, "MB" (10**6 bytes), "x" or "nats".
      ratio_two_forwards: value / the same of two plain inference forwards; below 1 is cheaper than they are.
      ratio_inplace: value / the same of the in-place scheme; 0.1 is ten times cheaper.
      note: why it is not available.
    """

    name: str
    dtype: str
    tokens: int
    clients: int
    value: float | None
    unit: str
    ratio_two_forwards: float | None = None
    ratio_inplace: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns the row without its note, which goes among the notes."""
        return {name: value for name, value in asdict(self).items() if name != "note"}


def ratio(value: float | None, reference: float | None) -> float | None:
    """Returns value / reference; None when either is missing or not positive."""
    return value / reference if value and reference and value > 0 and reference > 0 else None


@dataclass(frozen=True, slots=True)
class Frame:
    """What the rows of one interleaved run share; makes them.

    Attributes:
      group: name of the benchmark.
      dtype: as in `Row`.
      tokens: as in `Row`.
      clients: as in `Row`.
      base: what two plain inference forwards take, in the unit of the rows.
      inplace: what the in-place scheme takes.
    """

    group: str
    dtype: str
    tokens: int
    clients: int = 1
    base: float | None = None
    inplace: float | None = None

    def against(self, *, base: float | None, inplace: float | None) -> Frame:
        """Returns this frame with what to divide by."""
        return replace(self, base=base, inplace=inplace)

    def row(self, name: str, value: float | None, *, unit: str = "s", per: float = 1.0, note: str = "") -> Row:
        """Returns a row; `per` is how many times the references' work the value stands for."""
        base, inplace = (
            ratio(value, reference * per if reference else None) for reference in (self.base, self.inplace)
        )
        full = f"{self.group}: {name}"
        return Row(full, self.dtype, self.tokens, self.clients, value, unit, base, inplace, note=note)

    def plain(self, name: str, value: float, *, unit: str) -> Row:
        """Returns a row that is compared with nothing."""
        return Row(f"{self.group}: {name}", self.dtype, self.tokens, self.clients, value, unit)

    def missing(self, name: str, reason: object) -> Row:
        """Returns a row for what cannot be measured here."""
        return self.row(name, None, unit="", note=f"not available: {reason}")


def as_result(rows: Sequence[Row], *, settings: dict[str, Any], failed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns everything as JSON has it: machine, settings, rows, notes on rows without a value, limits not kept."""
    notes = [f"{row.name} ({row.dtype}, {row.tokens} tokens): {row.note}" for row in rows if row.note]
    return {
        "machine": machine(),
        "settings": settings,
        "rows": [row.as_dict() for row in rows],
        "notes": list(dict.fromkeys(notes)),
        "failed": list(failed),
    }


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: processor, memory, accelerator, threads and versions; no name, no path."""
    packages = ("fedmezo", "torch", "numba", "transformers", "peft", "numpy")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gb": round(memory / 1e9, 1) if memory else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
