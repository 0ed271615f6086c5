"""What the live page shows: fragments of HTML and figures, made from what was read. The report's cards and charts."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmezo.runtime.journal import SLOW
from fedmezo.studies.charts import AXES, Chart, charts, figures_html, figures_json, house_layout, line
from fedmezo.studies.doctor import Finding
from fedmezo.studies.facts import Split, setting
from fedmezo.studies.live.course import MOST_EVENTS, MOST_ROWS, Thinned
from fedmezo.studies.live.reader import Seen
from fedmezo.studies.live.shell import PARTS
from fedmezo.studies.live.situation import Situation
from fedmezo.studies.page import (
    DASH,
    PALETTE,
    Html,
    card,
    change,
    count,
    duration,
    number,
    privacy_words,
    safe,
    size,
    table,
)
from fedmezo.studies.report import title_of
from fedmezo.studies.tables import clients, judged, moved_by

__all__ = ["View", "view_of"]

_NOTHING = "<p>No round is complete yet.</p>"


@dataclass(frozen=True)
class View:
    """What a page shows.

    Attributes:
      state: see `Situation`.
      words: the state in a sentence.
      title: the page's title.
      share: share of the rounds that are done; None when not known.
      parts: name of a place -> HTML.
      figures: id of a chart -> a JSON object of that id, with its data and layout.
    """

    state: str
    words: str
    title: str
    share: float | None
    parts: Mapping[str, str]
    figures: Mapping[str, str]


def view_of(seen: Seen, *, folder: Path, findings: Sequence[Finding]) -> View:
    """Returns the view of what was seen.

    Args:
      seen: what a look found.
      folder: the run's folder, for people.
      findings: what the doctor said last.
    """
    now, facts = seen.situation, seen.facts
    words = _words(now, folder, facts)
    name = title_of(facts) if facts is not None else folder.name or str(folder)
    share = min(now.done / now.planned, 1.0) if now.planned else None
    groups = _groups(facts) if facts is not None else {}
    parts = dict.fromkeys(PARTS, "") | {
        "head": _head(name, facts, folder),
        "cards": _cards(now, facts) if facts is not None else "",
        "health": _health(findings, seen.notes) if facts is not None or seen.notes else "",
        **{group: figures_html(shown) or _NOTHING for group, shown in groups.items()},
    }
    if facts is not None:
        if facts.done > MOST_ROWS:
            parts["training"] += "<p class=note>A point stands for several rounds: the mean of their losses.</p>"
        parts |= {"clients": clients(facts, Split(seen.split or {})), "events": _events(facts)}
    drawn = [chart for shown in groups.values() for chart in shown]
    figures = {chart.id: figures_json([chart]) for chart in drawn}
    progress = f"{now.done:,}/{now.planned:,}" if now.planned else f"{now.done:,}"
    return View(now.state, words, f"{progress} {now.state}: {name}", share, parts, figures)


def _words(now: Situation, folder: Path, facts: Thinned | None) -> str:
    place, rounds = shlex.quote(str(folder)), f"{now.done:,} of {now.planned:,}" if now.planned else f"{now.done:,}"
    distant = facts is not None and facts.header.kind == "network"
    verb = "fedmezo server --resume" if distant else "fedmezo resume"
    told = {
        "waiting": f"Waiting: there is no run in {folder} yet.",
        "reading": f"Reading the journal: round {now.done:,} of {now.written:,} that are done.",
        "running": f"Running: {rounds} rounds are done.",
        "finishing": f"All {now.planned:,} configured rounds are done; the run is still at work.",
        "ended": f"Ended: {now.done:,} rounds.",
        "stopped": f"Stopped: {rounds} rounds are done and nobody is at work. Go on with: {verb} {place}",
        "unreadable": now.problem,
    }
    if now.state == "running" and not now.done:
        return "Running: the untrained model is judged, then the first round begins."
    return told[now.state]


def _head(name: str, facts: Thinned | None, folder: Path) -> str:
    title = f"<p class=kicker>fedmezo live page</p><h1>{safe(name)}</h1>"
    if facts is None:
        return title
    where = {"simulation": "simulated clients", "network": "clients on other machines"}.get(facts.header.kind)
    many = setting(facts, "federation.clients") or str(len(facts.clients))
    said = [f"{many} {where or facts.header.kind}"]
    said += [f"{facts.dim:,} trainable scalars"] if facts.dim else []
    said += [f"data: {data}"] if (data := setting(facts, "data.name", "data.path", "data.preset")) else []
    made = f"{folder}. Started {facts.header.created}, fedmezo {facts.header.package}."
    return f"{title}<p class=lead>{safe(', '.join(said))}.<br><small>{safe(made)}</small></p>"


def _cards(now: Situation, facts: Thinned) -> str:
    spent = facts.spent().get(facts.done - 1, {})
    seconds, forwards, _ = facts.lately
    total = sum(client.rounds for client in facts.sums.values())
    left = f"{now.planned - now.done:,} left" if now.planned > now.done else ""
    speed = number(forwards / seconds, 3) if seconds > 0 else DASH
    each = {way: size(spent[way] / total) if total else DASH for way in ("up", "down")}
    parts = [
        card("Rounds done", f"{now.done:,}" + (f" of {now.planned:,}" if now.planned else ""), left),
        card("Time left", _about(now.left), f"{duration(now.pace)} a round"),
        *_trained(facts),
        *(judged(facts) if facts.evaluations else ()),
        card("Forward passes per second", speed, f"{count(spent['forwards'])} in all, {count(spent['tokens'])} tokens"),
        card("Sent by the clients", size(spent["up"]), f"{each['up']} per client and round"),
        card("Sent to the clients", size(spent["down"]), f"{each['down']} per client and round"),
        _memory(now, facts),
        card("Skipped steps", count(facts.skipped), "a loss was not finite" if facts.skipped else "every loss finite"),
    ]
    if facts.privacy:
        epsilon = facts.privacy.get("epsilon")
        value = "without bound" if epsilon is None else f"epsilon {number(epsilon, 3)}"
        parts.append(card("Privacy spent", value, privacy_words(facts.privacy)))
    return f"<div class=cards>{''.join(parts)}</div>"


def _about(seconds: float) -> str:
    if not math.isfinite(seconds):
        return DASH
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"about {round(seconds)} s"
    return f"about {minutes} min" if minutes < 100 else f"about {minutes // 60} h {minutes % 60} min"


def _trained(facts: Thinned) -> list[Html]:
    losses = [row.loss for row in facts.rows if math.isfinite(row.loss)]
    if not losses:  # none told in a private run
        return []
    start, end = losses[0], losses[-1]
    return [card("Training loss", f"{number(start)} → {number(end)}", moved_by(change(start, end), "nats"))]


def _memory(now: Situation, facts: Thinned) -> Html:
    if now.memory is None:
        peak = facts.summary.get("peak_rss_mb")
        if not isinstance(peak, int | float):
            return card("Memory", DASH, "not known")
        return card("Memory", size(peak * 1e6), "at most, of the process")
    note = f"at most {size(now.memory.peak)}"
    if now.memory.helpers:
        note += f"; its {now.memory.helpers} processes {size(now.memory.others)}, shared pages in each"
    return card("Memory", size(now.memory.now), note)


def _health(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    told = "".join(map(_finding, findings)) or "<p>Nothing stands out yet.</p>"
    lines = "".join(f"<li>{safe(note)}</li>" for note in reversed(notes))
    heard = f"<details><summary>What the server said last</summary><ul>{lines}</ul></details>" if lines else ""
    return f"<h2>Health</h2><div class=health>{told}</div>{heard}"


def _finding(finding: Finding) -> str:
    command = f"<code>{safe(finding.command)}</code>" if finding.command else ""
    advice = f"<p class=note>{safe(finding.advice)} {command}</p>" if finding.advice or command else ""
    mark = f"<b class={finding.severity}>{finding.severity.capitalize()}</b>"
    return f"<div>{mark}<div><p>{safe(finding.sentence)}</p>{advice}</div></div>"


def _groups(facts: Thinned) -> dict[str, list[Chart]]:
    made = charts(facts)
    return {
        "evaluation": made["evaluation"],
        "training": [*made["training"], *made["slopes"]],
        "traffic": [*made["traffic"], *([_speed(facts)] if facts.rows else [])],
    }


def _speed(facts: Thinned) -> Chart:
    speeds: list[float] = [row.forwards / row.seconds if row.seconds > 0 else math.nan for row in facts.rows]
    trace = line("forward passes per second", [row.round + 1 for row in facts.rows], speeds, colour=PALETTE[0])
    return Chart("speed", "Forward passes per second", [trace], house_layout(AXES["rounds"], y={"rangemode": "tozero"}))


def _told(kind: str, detail: str) -> str:
    return f"later rates are {detail} times what they were" if kind == SLOW else detail


def _events(facts: Thinned) -> str:
    rows = [(count(at + 1), kind, _told(kind, detail)) for at, kind, detail in reversed(facts.happened)]
    if not rows:
        return "<h2>Events</h2><p>None: no guard or monitor had anything to report.</p>"
    note = f"<p class=note>The newest {MOST_EVENTS}.</p>" if len(rows) == MOST_EVENTS else ""
    return f"<h2>Events, newest first</h2>{note}{table(('Round', 'Kind', 'What happened'), rows, texts=3)}"
