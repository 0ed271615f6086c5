"""What the doctor says: findings, each one sentence with its numbers and what to do."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["SEVERITIES", "Diagnosis", "Finding", "Severity"]

Severity = Literal["problem", "warning", "good", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "good", "note")


@dataclass(frozen=True)
class Finding:
    """One thing seen in a run.

    Attributes:
      kind: its name, for programs.
      severity: "problem" (the run will not get anywhere like this), "warning", "good" or "note".
      sentence: what is seen, with its number.
      advice: what to do; empty when there is nothing to do.
      command: what to type for it; may be empty.
      numbers: the figures behind the sentence.
    """

    kind: str
    severity: Severity
    sentence: str
    advice: str = ""
    command: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All that is seen in a run.

    Attributes:
      findings: the gravest first.
      facts: what the run is and how far it is.
    """

    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]

    @property
    def healthy(self) -> bool:
        """Whether nothing is a problem or a warning."""
        return all(finding.severity in ("good", "note") for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values: facts, and the findings as objects."""
        return {
            "healthy": self.healthy,
            "facts": dict(self.facts),
            "findings": [asdict(finding) for finding in self.findings],
        }
