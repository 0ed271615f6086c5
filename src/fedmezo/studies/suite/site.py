"""The report site: a first page with every claim, and a page for each study; files that need no network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmezo import __version__
from fedmezo.channels import plain
from fedmezo.studies.charts import Chart, figures_json, plotly_script
from fedmezo.studies.folder import writing
from fedmezo.studies.page import Html, document, safe
from fedmezo.studies.suite.cells import cells_of
from fedmezo.studies.suite.claims import Verdict, effect_text, judge
from fedmezo.studies.suite.figures import charts_of
from fedmezo.studies.suite.records import Store
from fedmezo.studies.suite.sections import STYLE, At, badge, fold, study_body
from fedmezo.studies.suite.study import SCALES, Study

__all__ = ["beside", "best", "scales_of", "write_site"]

_SCRIPT = "plotly.js"
_LEAD = (
    "Every table and figure of the paper as a study: what it claims in our words, the rule that was written down "
    "before the runs, and what the runs say. A verdict is one of holds, holds in part, does not hold, and not testable "
    "at this scale; the effect is a mean over paired seeds with its 95 % interval. What contradicts the paper was "
    "measured on the models named here; on larger ones it may be otherwise."
)


def write_site(studies: Mapping[str, Study], *, store: Store, out: Path, command: str = "fedmezo study") -> Path:
    """Returns the path of the site's first page; each file appears whole or not at all.

    Args:
      studies: by name, in their order.
      store: where records are.
      out: folder of the site.
      command: how this program's verb is called, for the commands on the pages.

    Raises:
      ConfigError: plotly is not installed, or the folder cannot be written.
    """
    script = plotly_script()
    found = {name: scales_of(study, store) for name, study in studies.items()}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    _write(out / _SCRIPT, script)
    for name, study in studies.items():
        _write(out / f"{name}.html", _study_page(study, found[name], command=command))
    _write(out / "index.html", _first_page(studies, found))
    told = {name: {at.scale: [v.as_dict() for v in at.verdicts] for at in scales} for name, scales in found.items()}
    _write(out / "verdicts.json", json.dumps(plain(told), indent=1, allow_nan=False) + "\n")
    return out / "index.html"


def scales_of(study: Study, store: Store) -> list[At]:
    """Returns what is known of a study at each scale that has records, the smallest first.

    Args:
      study: which.
      store: where records are.
    """
    found = []
    for scale in SCALES:
        if scale not in study.scales:
            continue
        cells = cells_of(study, scale)
        # Records of further seeds than the study's own count as well.
        seeds = max((record.seed for record in store.of(study.name, scale)), default=-1) + 1
        more = cells_of(study, scale, seeds=seeds) if seeds else []
        records = store.current(list({cell.key: cell for cell in (*cells, *more)}.values()))
        if records:
            found.append(At(scale, records, judge(study, records, scale=scale), len(cells)))
    return found


def _write(path: Path, text: str) -> None:
    half = path.with_name(f".{path.name}.half")
    with writing(path.parent):
        half.write_text(text, encoding="utf-8")
        os.replace(half, path)


def _study_page(study: Study, scales: Sequence[At], *, command: str) -> str:
    charts: dict[str, list[Chart]] = {}
    for at in scales:
        numbered = enumerate(study.figures)
        made = [chart for number, figure in numbered for chart in charts_of(figure, at.records, at=number)]
        charts[at.scale] = [_renamed(chart, at.scale) for chart in made]
    body = study_body(study, scales, charts=charts, command=command)
    shown = [chart for listed in charts.values() for chart in listed]
    return document(
        study.title, body=body, figures=figures_json(shown), plotly="", style=STYLE, beside=_SCRIPT if shown else ""
    )


def _renamed(chart: Chart, scale: str) -> Chart:
    return Chart(f"{scale}-{chart.id}", chart.title, chart.traces, chart.layout, chart.key, chart.note, chart.wide)


def _first_page(studies: Mapping[str, Study], found: Mapping[str, Sequence[At]]) -> str:
    words = [best(found[name], place).word for name, study in studies.items() for place in range(len(study.claims))
             if found[name]]  # fmt: skip
    tally = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words)))
    head = (
        "<header><p class=kicker>fedmezo studies</p><h1>The paper, checked</h1>"
        f"<p class=lead>{safe(_LEAD)}<br>"
        f"<small>{safe(tally or 'No record yet')}. fedmezo {safe(__version__)}.</small></p></header>"
    )
    parts = [_claims_of(study, found[name]) for name, study in studies.items()]
    body = head + _contradicted(studies, found) + "".join(parts)
    return document("The paper, checked", body=body, figures="{}", plotly="", style=STYLE)


def _contradicted(studies: Mapping[str, Study], found: Mapping[str, Sequence[At]]) -> str:
    """Returns the claims that do not hold, or hold in part, before all others: for those who know the papers."""
    rows = []
    for name, study in studies.items():
        for place, claim in enumerate(study.claims if found[name] else ()):
            verdict = best(found[name], place)
            if verdict.word in ("does not hold", "holds in part"):
                rows.append(
                    f"<tr><td class=w><a href='{safe(name)}.html#{safe(claim.id)}'>{safe(claim.where)}</a></td>"
                    f"<td>{safe(claim.text)}</td><td>{badge(verdict.word)}</td>"
                    f"<td class=e>{safe(effect_text(verdict.effect))}<small> {safe(claim.meaning)}</small></td>"
                    f"<td class='w s'>{safe(verdict.scale)}</td></tr>"
                )
    if not rows:
        return ""
    heads = ("Where", "The claim", "Our verdict", "Effect, 95 % interval", "Scale")
    return f"<section><h2>What the runs do not bear out</h2>{fold(heads, rows)}</section>"


def best(scales: Sequence[At], place: int) -> Verdict:
    """Returns the verdict of the largest scale at which a claim could be tested, else of the largest that has a value.

    Args:
      scales: of a study, the smallest first; at least one.
      place: of the claim in the study's list.
    """
    listed = [at.verdicts[place] for at in scales]
    tested = [verdict for verdict in listed if verdict.word != "not testable at this scale"]
    known = [verdict for verdict in listed if verdict.tested]
    return (tested or known or listed)[-1]


def beside(scales: Sequence[At], place: int) -> list[Verdict]:
    """Returns the verdicts on a claim at the other scales that have a value, the smallest first.

    Args:
      scales: of a study, the smallest first; at least one.
      place: of the claim in the study's list.
    """
    chosen = best(scales, place)
    return [at.verdicts[place] for at in scales if at.verdicts[place] is not chosen and at.verdicts[place].tested]


def _claims_of(study: Study, scales: Sequence[At]) -> Html:
    """Returns a study's claims, each a card that is a row on a wide screen."""
    link = f"<a href='{safe(study.name)}.html'>{safe(study.title)}</a>"
    if not scales:
        return Html(f"<section><h2>{link}</h2><p class=note>{safe(study.question)} No record yet.</p></section>")
    rows = []
    for place, claim in enumerate(study.claims):
        verdict = best(scales, place)
        also = "".join(f"<small> {safe(it.scale)}: {safe(it.word)}</small>" for it in beside(scales, place))
        said = f". {verdict.reason}" if verdict.reason else ""
        rows.append(
            f"<tr><td class=w><a href='{safe(study.name)}.html#{safe(claim.id)}'>{safe(claim.where)}</a></td>"
            f"<td>{safe(claim.text)}</td><td>{badge(verdict.word)}{also}</td>"
            f"<td class=e>{safe(effect_text(verdict.effect))}<small> {safe(claim.meaning)}{safe(said)}</small></td>"
            f"<td class='w s'>{safe(verdict.scale)}</td></tr>"
        )
    heads = ("Where", "What the paper claims", "Our verdict", "Effect, 95 % interval", "Scale")
    return Html(f"<section><h2>{link}</h2><p class=note>{safe(study.question)}</p>{fold(heads, rows)}</section>")
