"""The run report: one HTML file that needs no network, made from the journal alone.

write_report(Path("runs/demo/journal.sqlite"), out=Path("runs/demo/report.html"))
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmezo.runtime.journal import Journal
from fedmezo.studies.charts import AXES, Chart, charts, figures_html, figures_json, plotly_script, split_chart
from fedmezo.studies.facts import Facts, Split, gather, setting
from fedmezo.studies.page import Html, document, safe, switch
from fedmezo.studies.tables import cards, categories, clients, configuration, evaluations, events, identity

__all__ = ["title_of", "write_report"]

_NOTHING = "<p>No round is complete yet.</p>"


def write_report(
    journal: Path | str | Journal,
    *,
    out: Path,
    summary: Mapping[str, object] | None = None,
    split: Mapping[str, Any] | None = None,
) -> Path:
    """Returns the path of the report it writes: `out`, or report.html in `out` if that is a folder.

    The file appears whole or not at all. A run in progress is fine.

    Args:
      journal: an open journal, or the path of one.
      out: where the report goes.
      summary: the run's summary (`Summary.as_dict()`), once it has ended.
      split: who has what: `SplitReport.as_dict()`; see `Split`.

    Raises:
      ConfigError: plotly is not installed.
      JournalError: the journal cannot be read.
    """
    script = plotly_script()
    facts = _facts(journal, summary or {})
    target = out / "report.html" if out.is_dir() else out
    folder = str(facts.summary.get("run_dir") or target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{target.name}.half")
    half.write_text(_page(facts, Split(split or {}), folder=folder, script=script), encoding="utf-8")
    os.replace(half, target)
    return target


def _facts(journal: Path | str | Journal, summary: Mapping[str, object]) -> Facts:
    if not isinstance(journal, str | Path):
        return gather(journal, summary=summary)
    with Journal.open(Path(journal), readonly=True) as opened:
        return gather(opened, summary=summary)


def _page(facts: Facts, split: Split, *, folder: str, script: str) -> str:
    groups = charts(facts)
    groups["split"] = [split_chart(split.labels, names=split.names)] if split.labels else []
    title = title_of(facts)
    figures = figures_json([chart for group in groups.values() for chart in group])
    body = "\n".join(
        f"<section>{part}</section>" for part in _sections(facts, split, groups=groups, folder=folder) if part
    )
    return document(title, body=f"{_head(facts, title)}\n{body}", figures=figures, plotly=script)


def title_of(facts: Facts) -> str:
    """Returns what a run is called: its model and its algorithm."""
    algorithm = setting(facts, "algorithm.name") or "federated tuning"
    return f"{setting(facts, 'model.name') or 'A language model'}, {algorithm}"


def _head(facts: Facts, title: str) -> Html:
    data = setting(facts, "data.name", "data.path", "data.preset")
    planned = setting(facts, "federation.rounds")
    done = len(facts.rows)
    rounds = f"{done:,} of {planned}" if planned.isdigit() and int(planned) > done else f"{done:,}"
    number = facts.summary.get("clients") or setting(facts, "federation.clients") or len(facts.clients)
    said = [
        f"{number} client{'' if str(number) == '1' else 's'}",
        f"{rounds} rounds of {facts.steps} local steps" if facts.steps else f"{rounds} rounds",
    ]
    said += [f"{facts.dim:,} trainable scalars"] if facts.dim else []
    said += [f"data: {data}"] if data else []
    made = f"Started {facts.header.created}, fedmezo {facts.header.package}, {facts.header.kind}."
    words = f"<p class=lead>{safe(', '.join(said))}.<br><small>{safe(made)}</small></p>"
    return Html(f"<header><p class=kicker>fedmezo run report</p><h1>{safe(title)}</h1>{words}</header>")


def _sections(facts: Facts, split: Split, *, groups: Mapping[str, Sequence[Chart]], folder: str) -> Iterator[str]:
    yield cards(facts)
    yield (
        "<h2>Evaluation</h2>" + _switch(groups["evaluation"]) + figures_html(groups["evaluation"]) + evaluations(facts)
    )
    yield "<h2>Training</h2>" + (figures_html([*groups["training"], *groups["slopes"]]) or _NOTHING)
    yield "<h2>Traffic</h2>" + (figures_html(groups["traffic"]) or _NOTHING)
    yield clients(facts, split) + figures_html(groups["split"])
    yield categories(facts)
    yield events(facts)
    yield identity(facts, folder)
    yield configuration(facts)


def _switch(shown: Sequence[Chart]) -> str:
    """Returns the choice of what the evaluation charts are drawn against."""
    if not shown:
        return "<p>Nothing was evaluated yet.</p>"
    return switch(AXES, chosen="rounds")
