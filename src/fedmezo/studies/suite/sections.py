"""The parts of the site's pages: claims with their tests, figures, cells, settings, commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmezo.studies.charts import AXES, Chart, figures_html
from fedmezo.studies.page import DASH, Html, count, duration, number, safe, switch, table
from fedmezo.studies.suite.claims import Verdict, effect_text
from fedmezo.studies.suite.lines import rows_of
from fedmezo.studies.suite.records import Record
from fedmezo.studies.suite.study import Slope, Study
from fedmezo.studies.suite.words import rule_text, value_text

__all__ = ["STYLE", "At", "badge", "fold", "study_body"]

STYLE = """
a{color:var(--accent);text-decoration:none}a:hover,a:focus-visible{text-decoration:underline}
.fold{width:100%;border:1px solid var(--line);border-radius:8px;background:var(--card);border-collapse:separate;
border-spacing:0}.fold td{vertical-align:top}.fold small{display:block;color:var(--soft)}.fold .w{white-space:nowrap}
.fold .e{font-variant-numeric:tabular-nums;min-width:13rem}
.badge{display:inline-block;border-radius:99px;padding:1px 10px;font-size:.82rem;font-weight:620;white-space:nowrap;
border:1px solid currentColor}
.holds{color:#3d8a50}.part{color:#b07a1e}.not{color:#b9506c}.open{color:var(--soft)}
.claim{border:1px solid var(--line);border-radius:8px;background:var(--card);padding:12px 15px;margin:10px 0;
scroll-margin-top:12px}.claim p{max-width:85ch}.claim .badge{margin-right:.6em}.claim code{overflow-wrap:anywhere}
.figures:has(>:only-child){grid-template-columns:1fr}
@media(max-width:760px){.fold,.fold tbody,.fold tr,.fold td{display:block}.fold thead{display:none}
.fold tr{padding:8px 0;border-bottom:1px solid var(--line)}.fold tr:last-child{border-bottom:0}
.fold td{border-bottom:0;padding:2px 12px}.fold .e{min-width:0}
.fold .s{font-size:.82rem}.fold .s::after{content:" scale"}}
"""
_CLASSES = {"holds": "holds", "holds in part": "part", "does not hold": "not", "not testable at this scale": "open"}


@dataclass(frozen=True)
class At:
    """A study at one scale.

    Attributes:
      scale: tiny, small or paper.
      records: of its cells.
      verdicts: one per claim, in their order.
      cells: how many the study has at this scale.
    """

    scale: str
    records: Sequence[Record]
    verdicts: Sequence[Verdict]
    cells: int


def badge(word: str) -> Html:
    """Returns a verdict in its colour; the words tell it, too."""
    return Html(f"<span class='badge {_CLASSES[word]}'>{safe(word)}</span>")


def fold(heads: Sequence[str], rows: Sequence[str]) -> Html:
    """Returns a table whose rows become blocks on a narrow screen; `rows` are HTML."""
    top = "".join(f"<th scope=col>{safe(head)}</th>" for head in heads)
    return Html(f"<table class=fold><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def study_body(
    study: Study, scales: Sequence[At], *, charts: Mapping[str, Sequence[Chart]], command: str
) -> str:  # fmt: skip
    """Returns the body of a study's page.

    Args:
      study: which.
      scales: what is known of it at each scale, the smallest first.
      charts: scale -> its charts.
      command: how the program's verb is called.
    """
    head = (
        "<header><p class=kicker><a href='index.html'>The paper, checked</a></p>"
        f"<h1>{safe(study.title)}</h1><p class=lead>{safe(study.question)}</p>"
        f"<p class=lead>{safe(study.about)}</p></header>"
    )
    parts = [_claims(study, scales)]
    for at in reversed(scales):
        parts.append(_figures(at, charts.get(at.scale, ()), study=study))
        parts += [_slope(slope, at) for slope in study.slopes]
        parts.append(_cells(study, at))
    parts += [_settings(study), _commands(study, scales, command=command)]
    return head + "".join(f"<section>{part}</section>" for part in parts if part)


def _claims(study: Study, scales: Sequence[At]) -> str:
    blocks = []
    for place, claim in enumerate(study.claims):
        asked = [at.verdicts[place] for at in reversed(scales)]
        # A scale that does not run a claim's cells has nothing to say of it, unless none does.
        verdicts = [verdict for verdict in asked if verdict.tested] or asked[:1]
        found = "".join(_verdict(verdict) for verdict in verdicts) or "<p class=note>No record yet.</p>"
        blocks.append(
            f"<div class=claim id='{safe(claim.id)}'><h3>{safe(claim.where)}</h3><p>{safe(claim.text)}</p>{found}"
            f"<p class=note>Rule: <code>{safe(rule_text(claim))}</code></p></div>"
        )
    return f"<h2>What is claimed, and what the runs say</h2>{''.join(blocks)}"


def _verdict(verdict: Verdict) -> str:
    meaning = f" {verdict.claim.meaning}" if verdict.claim.meaning else ""
    said = verdict.reason or f"{effect_text(verdict.effect)}{meaning}"
    rows = [
        (t.label or "all", t.answer, effect_text(t.effect), count(t.effect.seeds) if t.effect.seeds else DASH)
        for t in verdict.tests
    ]
    tests = table(("Test", "Answer", "Effect, 95 % interval", "Seeds"), rows, texts=2)
    many = f"{len(rows)} test{'s' if len(rows) != 1 else ''}"
    detail = f"<details><summary>{many}, {safe(verdict.scale)} scale</summary>{tests}</details>" if rows else ""
    return f"<p>{badge(verdict.word)}<small>{safe(verdict.scale)}</small> {safe(said)}</p>{detail}"


def _figures(at: At, charts: Sequence[Chart], *, study: Study) -> str:
    if not charts:
        return ""
    budgets = [chart for chart in charts if all(trace.get("meta") for trace in chart.traces)]
    first = next((figure.x for figure in study.figures if figure.kind == "curves"), "rounds")
    choice = switch(AXES, chosen=first, group=f"axis-{at.scale}") if budgets else ""
    return f"<h2>Figures, {safe(at.scale)} scale</h2>{choice}{figures_html(charts)}"


def _slope(slope: Slope, at: At) -> str:
    found = list(rows_of(slope, at.records, scale=at.scale))
    if not found:
        return ""
    missed = ("Largest, foretold by the smaller",) if any(row.missed.seeds for row in found) else ()
    heads = (", ".join(slope.by), "Bytes per parameter", *missed, *(f"Foretold for {name}" for name in slope.ahead))
    rows = []
    for row in found:
        off = (f"{row.missed.mean:+.1%} of what it is".replace("-", "\N{MINUS SIGN}") if row.missed.seeds else DASH,)
        ahead = (f"{number(value.mean / 1e3, 3)} GB" for value in row.ahead.values())
        rows.append((row.label, effect_text(row.slope), *(off if missed else ()), *ahead))
    note = (
        f"Straight lines through {found[0].sizes} sizes, one for each seed; mean over them with its 95 % interval. "
        "How far the line through the smaller ones misses the largest is the better guide to its error."
    )
    return f"<h2>{safe(slope.title)}, {safe(at.scale)} scale</h2>{table(heads, rows, texts=1)}<p class=note>{note}</p>"


def _cells(study: Study, at: At) -> str:
    failed = [record for record in at.records if record.error]
    note = study.scales[at.scale].note
    spent = duration(sum(record.cpu for record in at.records))
    said = f"{len(at.records)} of {at.cells} cells have a record; {spent} of one core. {note}"
    rows = [(r.grid, ", ".join(r.levels.values()), r.seed, r.error) for r in failed]
    errors = f"<h3>Cells that failed</h3>{table(('Grid', 'Levels', 'Seed', 'Why'), rows, texts=4)}" if rows else ""
    return f"<h2>Cells, {safe(at.scale)} scale</h2><p class=note>{safe(said)}</p>{errors}"


def _settings(study: Study) -> str:
    rows = [(name, value_text(value)) for name, value in study.base.items()]
    grids = [
        (name, grid.kind, "; ".join(f"{factor}: {', '.join(levels)}" for factor, levels in grid.factors.items()))
        for name, grid in study.grids.items()
    ]
    shared = f"<details><summary>Settings of all cells</summary>{table(('Key', 'Value'), rows, texts=2)}</details>"
    return f"<h2>How it was asked</h2>{table(('Grid', 'Kind', 'Factors'), grids, texts=3)}{shared if rows else ''}"


def _commands(study: Study, scales: Sequence[At], *, command: str) -> str:
    lines = [f"{command} run {study.name} --scale {at.scale} --workers 2" for at in scales] or [
        f"{command} run {study.name} --scale tiny --workers 2"
    ]
    lines += [f"{command} check {study.name}   # one cell again, beside its record", f"{command} report"]
    files = ", ".join(f"{at.scale}/{study.name}.jsonl" for at in scales)
    raw = f"<p class=note>Raw records: {safe(files)}.</p>" if files else ""
    return f"<h2>Run it again</h2><pre>{safe(chr(10).join(lines))}</pre>{raw}"
