"""The comparison as one HTML page that needs no network."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmezo import __version__
from fedmezo.studies.charts import AXES, Chart, figures_html, figures_json, plotly_script
from fedmezo.studies.compare.charts import colours, curve_charts, log_axes, tuning_chart
from fedmezo.studies.compare.curves import Point, read_curve
from fedmezo.studies.compare.rows import COLUMNS, MEASURES, Measure, Row, measured, rate_text, spread_text
from fedmezo.studies.compare.terms import Terms
from fedmezo.studies.config import Config
from fedmezo.studies.folder import writing
from fedmezo.studies.page import DASH, Html, count, document, dot, duration, number, safe, size, switch, table

__all__ = ["amount_text", "write_page"]

# The first column stays in sight while the others scroll; two rows of heads cannot both stick to the top.
_STYLE = """
.verdicts{padding:0;margin:.4em 0 1em;list-style:none;max-width:95ch}
.verdicts li{padding:5px 0;border-bottom:1px solid var(--line)}.verdicts li:last-child{border-bottom:0}
.duo th{position:static}.duo th[colspan]{text-align:center}.duo thead tr:first-child th{border-bottom:0}
.duo th.g,.duo td.g{border-left:1px solid var(--line)}
.duo th:first-child,.duo td:first-child{position:sticky;left:0;background:var(--card);z-index:1;white-space:nowrap}
.duo td small{color:var(--soft)}.runs td{white-space:nowrap}
h2+h3,.verdicts+h3{margin-top:1em}
.figures:has(>:only-child){grid-template-columns:1fr}
"""
_MEMORY = (
    "Memory is the peak of the whole process, Python and torch included. Training time leaves evaluation out. A "
    "backward pass counts as two forward passes and reads no tokens."
)
# What the comparison itself sets.
_TERMS = (("federation", "rounds"), ("federation", "seed"), ("federation", "budget"))
_UNITS = {"seconds": duration, "bytes": size}


def amount_text(budget: Mapping[str, float]) -> str:
    """Returns a budget in words, such as "2,000 forward passes"."""
    ((kind, amount),) = budget.items()
    return _UNITS[kind](amount) if kind in _UNITS else f"{count(amount)} {AXES[kind].lower().replace(' done', '')}"


def write_page(result: Mapping[str, Any], *, arms: Mapping[str, Config], terms: Terms, out: Path) -> Path:
    """Returns the path of the page it writes, `out`/compare.html; it appears whole or not at all.

    Args:
      result: the comparison as plain values; see `compare`.
      arms: the arms' configurations as given.
      terms: what they share.
      out: the comparison's folder.

    Raises:
      ConfigError: plotly is not installed, or the folder cannot be written.
      JournalError: the journal of a finished run cannot be read.
    """
    script, named = plotly_script(), colours(list(arms))
    curves = {column: _curves(result["rows"], column) for column in COLUMNS}
    curves = {column: found for column, found in curves.items() if found}
    logs = log_axes(list(curves.values()))
    groups = {
        column: curve_charts(found, column=column, axis=terms.kind, named=named, logs=logs)
        for column, found in curves.items()
    }
    search = tuning_chart(result["tuning"], named=named)
    title = f"{', '.join(arms)}: {amount_text(terms.budget)} each"
    shown = [chart for group in groups.values() for chart in group] + ([search] if search else [])
    parts = [
        _verdicts(result),
        _tables(result, named),
        _evaluation(groups, axis=terms.kind, logs=logs),
        _search(result, search, named),
        _every_run(result["rows"]),
        _settings(arms),
        _commands(result["rows"]),
    ]
    body = "\n".join([_head(title, arms, terms), *(f"<section>{part}</section>" for part in parts if part)])
    page = document(title, body=body, figures=figures_json(shown), plotly=script, style=_STYLE)
    target = out / "compare.html"
    half = target.with_name(f".{target.name}.half")
    with writing(out):
        half.write_text(page, encoding="utf-8")
        os.replace(half, target)
    return target


def _curves(rows: Sequence[Row], column: str) -> dict[str, list[list[Point]]]:
    found: dict[str, list[list[Point]]] = {}
    for row in rows:
        if row["column"] == column and row["error"] is None:
            found.setdefault(row["arm"], []).append(read_curve(Path(row["run_dir"])))
    return found


def _head(title: str, arms: Mapping[str, Config], terms: Terms) -> Html:
    first = next(iter(arms.values()))
    said = [
        f"model: {first.model.name}",
        f"data: {first.data.name or first.data.path}, {first.split.kind}",
        f"{first.federation.clients} clients",
        f"seed{'s' if len(terms.seeds) > 1 else ''} {', '.join(map(str, terms.seeds))}",
        f"every run ends after the first round at which {amount_text(terms.budget)} are spent",
    ]
    words = f"<p class=lead>{safe('; '.join(said))}.<br><small>fedmezo {safe(__version__)}.</small></p>"
    return Html(f"<header><p class=kicker>fedmezo comparison</p><h1>{safe(title)}</h1>{words}</header>")


def _heading(result: Mapping[str, Any], column: str) -> str:
    rates = {row["rate"] for row in result["rows"] if row["column"] == "equal"}
    return (
        f"Equal rate {next(iter(rates)):g}" if column == "equal" and len(rates) == 1 else COLUMNS[column].capitalize()
    )


def _verdicts(result: Mapping[str, Any]) -> str:
    parts = []
    for column in ("both", *COLUMNS):
        said = [_sentence(entry["text"]) for entry in result["verdicts"] if entry["column"] == column]
        if said:
            head = "" if column == "both" else f"<h3>{safe(_heading(result, column))}</h3>"
            parts.append(f"{head}<ul class=verdicts>{''.join(said)}</ul>")
    notes = "".join(f"<li>{safe(note)}</li>" for note in result["notes"])
    asides = f"<h3>To be read with</h3><ul class=verdicts>{notes}</ul>" if notes else ""
    return f"<h2>What the runs say</h2>{''.join(parts) or '<p>Nothing: fewer than two arms have a result.</p>'}{asides}"


def _sentence(text: str) -> str:
    """Returns a verdict with what it is about in bold."""
    head, colon, rest = text.partition(": ")
    named = colon and head in [measure.title for measure in MEASURES]
    return f"<li><b>{safe(head)}:</b> {safe(rest)}</li>" if named else f"<li>{safe(text)}</li>"


def _tables(result: Mapping[str, Any], named: Mapping[str, str]) -> str:
    known = measured(result["rows"])
    results = _side_by_side(result, [measure for measure in known if not measure.cost], named, rates=True)
    costs = _side_by_side(result, [measure for measure in known if measure.cost], named)
    legend = "Mean ± standard deviation over the seeds; the mean alone where they agree."
    return f"<h2>Results</h2><p class=note>{legend}</p>{results}<h2>What it cost</h2><p class=note>{_MEMORY}</p>{costs}"


def _side_by_side(
    result: Mapping[str, Any], shown: Sequence[Measure], named: Mapping[str, str], *, rates: bool = False
) -> Html:
    """Returns one row per arm, and under every measure one column for each kind of rate."""
    found = {(entry["arm"], entry["column"]): entry for entry in result["arms"]}
    columns = [column for column in COLUMNS if any(column == at for _, at in found)]
    heads = [*(["Rate"] if rates else []), *(measure.title for measure in shown), *(["Runs"] if rates else [])]
    top = "".join(f"<th scope=colgroup class=g colspan={len(columns)}>{safe(head)}</th>" for head in heads)
    names = "".join(
        f"<th scope=col class='n{'' if at else ' g'}'>{safe(COLUMNS[column])}</th>"
        for _ in heads
        for at, column in enumerate(columns)
    )
    body = ""
    for arm in named:
        entries = [found.get((arm, column)) for column in columns]
        cells = [[_rate(entry) for entry in entries]] if rates else []
        cells += [[spread_text(entry and entry[measure.name], measure) for entry in entries] for measure in shown]
        cells += [[_runs(entry) for entry in entries]] if rates else []
        line = "".join(
            f"<td class='n{'' if at else ' g'}'>{safe(cell)}</td>" for group in cells for at, cell in enumerate(group)
        )
        body += f"<tr><td>{dot(arm, colour=named[arm])}</td>{line}</tr>"
    head = f"<tr><th scope=col>Arm</th>{top}</tr><tr><th></th>{names}</tr>"
    return Html(f"<div class='scroll duo' tabindex=0><table><thead>{head}</thead><tbody>{body}</tbody></table></div>")


def _rate(entry: Row | None) -> str:
    return rate_text(entry["rate"]) if entry else DASH


def _runs(entry: Row | None) -> str:
    if entry is None:
        return DASH
    done, failed = len(entry["seeds"]), len(entry["failed"])
    return f"{done} of {done + failed}" if failed else str(done)


def _evaluation(groups: Mapping[str, Sequence[Chart]], *, axis: str, logs: set[str]) -> str:
    parts = [
        f"<h2>Evaluation, {safe(COLUMNS[column])}</h2>{figures_html(shown)}"
        for column, shown in groups.items()
        if shown
    ]
    if not parts:
        return ""
    told = " and ".join(AXES[name].lower() for name in AXES if name in logs)
    note = f"<p class=note>Logarithmic, so without the start: {safe(told)}.</p>" if logs else ""
    return f"<h2>Curves</h2>{switch(AXES, chosen=axis, logs=logs)}{note}{''.join(parts)}"


def _search(result: Mapping[str, Any], chart: Chart | None, named: Mapping[str, str]) -> str:
    if not result["tuning"]:
        return ""
    rows = [
        (
            dot(point["arm"], colour=named[point["arm"]]),
            point["error"] or "",
            rate_text(point["rate"]),
            number(point["loss"]),
            ("taken" if point["chosen"] else "") + (" added" if point["added"] else ""),
        )
        for point in result["tuning"]
    ]
    first = result["tuning"][0]
    lead = (
        f"Seed {first['seed']} for the runs and for the data, so no reported run and no reported draw of evaluation "
        "examples was used to choose a rate."
    )
    listed = table(("Arm", "What went wrong", "Rate", "Final loss", ""), rows, texts=2)
    drawn = figures_html([chart] if chart else [])
    return (
        f"<h2>Choosing the rates</h2><p class=note>{lead}</p>{drawn}"
        f"<details><summary>Every tuning run as a table</summary>{listed}</details>"
    )


def _every_run(rows: Sequence[Row]) -> str:
    names = [measure for measure in MEASURES if measure in measured(rows)]
    heads = ["Arm", "Rates", "Folder", "Seed", "Rate", *(measure.title for measure in names), "What went wrong"]
    listed = [
        [
            row["arm"],
            COLUMNS[row["column"]],
            row["run_dir"],
            str(row["seed"]),
            rate_text(row["rate"]),
            *(measure.text(row[measure.name]) for measure in names),
            row["error"] or "",
        ]
        for row in rows
    ]
    drawn = table(heads, listed, texts=3)
    return f"<h2>Every run</h2><details class=runs><summary>{len(rows)} runs as a table</summary>{drawn}</details>"


def _settings(arms: Mapping[str, Config]) -> str:
    """Returns the keys in which the arms differ, and the configuration they share."""
    dumps = {arm: dict(_flat(config)) for arm, config in arms.items()}
    keys = list(next(iter(dumps.values())))
    differ = [key for key in keys if len({repr(dump[key]) for dump in dumps.values()}) > 1]
    rows = [[Html(f"<code>{safe(key)}</code>"), *(_shown(dump[key]) for dump in dumps.values())] for key in differ]
    same = [
        [Html(f"<code>{safe(k)}</code>"), _shown(v)] for k, v in next(iter(dumps.values())).items() if k not in differ
    ]
    first = table(["Key", *dumps], rows, texts=1 + len(dumps)) if rows else "<p>They differ in nothing.</p>"
    shared = table(("Key", "Value"), same, texts=2)
    folded = f"<details><summary>What they share, as configured</summary>{shared}</details>"
    return f"<h2>How the arms differ</h2>{first}{folded}"


def _flat(config: Config) -> Iterator[tuple[str, object]]:
    for section, values in config.model_dump(mode="json").items():
        for name, value in values.items():
            if section != "output" and (section, name) not in _TERMS:
                yield f"{section}.{name}", value


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or DASH
    return DASH if value is None or value in ("", {}) else str(value)


def _commands(rows: Sequence[Row]) -> str:
    done = [row for row in rows if row["error"] is None]
    if not done:
        return ""
    place = shlex.quote(done[0]["run_dir"])
    lines = (
        f"fedmezo report {place}   # the page of one run\n"
        f"fedmezo verify {place}   # rebuild it from its journal and compare the digests\n"
        f"fedmezo export {place}   # its tuned adapter or model"
    )
    return f"<h2>Look at one run</h2><pre>{safe(lines)}</pre>"
