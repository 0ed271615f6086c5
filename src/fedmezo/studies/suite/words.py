"""Studies in words: a claim's rule on one line, and a study's part of docs/studies/protocol.md."""

from __future__ import annotations

from collections.abc import Iterator

from fedmezo.studies.suite.cells import cells_of
from fedmezo.studies.suite.study import SCALES, Claim, Study

__all__ = ["protocol_of", "rule_text", "value_text"]


def rule_text(claim: Claim) -> str:
    """Returns the rule as the study's file has it, on one line."""
    given = ", ".join(f"{name} = {value_text(value)}" for name, value in claim.given.items())
    by = f", by {' and '.join(claim.by)}" if claim.by else ""
    only = f", only {value_text(claim.only)}" if claim.only else ""
    return f"{claim.rule}({given}) of {claim.measure} in {claim.grid}{by}{only}; at least {claim.fewest} seeds"


def value_text(value: object) -> str:
    """Returns a value of a study's file for people."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {value_text(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def protocol_of(study: Study) -> str:
    """Returns the study's part of the protocol as Markdown: question, grids, cells at every scale, claims and rules."""
    return "\n".join(_lines(study)) + "\n"


def _lines(study: Study) -> Iterator[str]:
    yield f"## {study.order}. {study.title} (`{study.name}`)"
    yield ""
    yield f"{study.question} {study.about}"
    yield ""
    yield "| grid | a cell is | factors and levels |"
    yield "|---|---|---|"
    for name, grid in study.grids.items():
        factors = "; ".join(f"{factor}: {', '.join(levels)}" for factor, levels in grid.factors.items())
        yield f"| {name} | {grid.kind} | {factors} |"
    yield ""
    yield "| scale | cells (paired seeds) | estimated CPU minutes | note |"
    yield "|---|---|---|---|"
    for scale in SCALES:
        if scale in study.scales:
            yield _scale(study, scale)
    yield ""
    yield "| claim | where | the paper, in our words | rule | effect |"
    yield "|---|---|---|---|---|"
    for claim in study.claims:
        yield f"| {claim.id} | {claim.where} | {claim.text} | `{rule_text(claim)}` | {claim.meaning} |"


def _scale(study: Study, scale: str) -> str:
    sized, cells = study.scales[scale], cells_of(study, scale)
    parts = []
    for name in study.grids:
        listed = [cell for cell in cells if cell.grid == name]
        if listed:
            seeds = len({cell.seed for cell in listed})
            parts.append(f"{name} {len(listed)} ({seeds})")
    minutes = f"{sized.minutes:g}" if sized.minutes else "not estimated"
    other = "; ".join(f"{claim} by {name}" for claim, name in sized.measures.items())
    note = " ".join(part for part in (sized.note, other and f"Measures here: {other}.") if part)
    return f"| {scale} | {', '.join(parts)}: {len(cells)} in all | {minutes} | {note} |"
