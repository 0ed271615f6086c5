"""The parts of the run report that need no script: key figures and tables."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from fedmezo.studies.charts import MOST_LINES, client_colour
from fedmezo.studies.facts import ClientTotal, Facts, Metrics, Split, setting
from fedmezo.studies.page import (
    DASH,
    PALETTE,
    Html,
    bar,
    card,
    change,
    count,
    dot,
    duration,
    number,
    percent,
    privacy_words,
    safe,
    size,
    table,
)

__all__ = ["cards", "categories", "clients", "configuration", "evaluations", "events", "identity", "judged", "moved_by"]

_MOST_ROWS = 500
_DISTANCE = "Label distance: half the sum of the differences between the client's category shares and those of all."
_CATEGORY = re.compile(r"category/(.+)/([^/]+)")


def cards(facts: Facts) -> str:
    """Returns the key figures of the run."""
    total = facts.spent()[facts.rows[-1].round if facts.rows else -1]
    shares = sum(len(row.clients) for row in facts.rows)
    skipped = sum(client.skipped for row in facts.rows for client in row.clients.values())
    peak = facts.summary.get("peak_rss_mb")
    a_round = _share(total["seconds"], len(facts.rows), text=duration)
    parts = [
        *judged(facts),
        card("Sent by a client, per round", _share(total["up"], shares), _smaller(facts, total["up"], shares)),
        card("Sent to a client, per round", _share(total["down"], shares), _smaller(facts, total["down"], shares)),
        card("Sent in all", size(total["bytes"]), f"{size(total['up'])} up, {size(total['down'])} down"),
        card("Forward passes", count(total["forwards"]), f"{count(total['tokens'])} tokens"),
        card("Time in rounds", duration(total["seconds"]), f"{a_round} a round"),
        card("Peak memory", size(peak * 1e6) if isinstance(peak, int | float) else DASH, "of the process"),
        card("Skipped steps", count(skipped), "a loss was not finite" if skipped else "every loss was finite"),
    ]
    if facts.privacy:
        spent = facts.privacy.get("epsilon")
        value = "without bound" if spent is None else f"epsilon {number(spent, 3)}"
        parts.append(card("Privacy spent", value, privacy_words(facts.privacy)))
    return f"<div class=cards>{''.join(parts)}</div>"


def judged(facts: Facts) -> list[Html]:
    """Returns the key figures of the evaluation: loss and accuracy, at the start and now."""
    start, end = facts.ends(facts.splits[0]) if facts.splits else ({}, {})
    loss = start.get("loss"), end.get("loss")
    named = f" ({facts.splits[0]})" if facts.splits else ""
    shown = [card(f"Evaluation loss{named}", f"{number(loss[0])} → {number(loss[1])}", moved_by(change(*loss), "nats"))]
    for metric, title in (("accuracy", "Answers right"), ("token_accuracy", "Answer tokens right")):
        shares = start.get(metric), end.get(metric)
        if any(share is not None for share in shares):
            values = " → ".join(percent(share) for share in shares)
            shown.append(card(f"{title}{named}", values, moved_by(change(*shares, scale=100, digits=1), "points")))
    return shown


def moved_by(amount: str, unit: str) -> str:
    """Returns a change with its unit; "no change" has none."""
    return f"{amount} {unit}" if any(map(str.isdigit, amount)) else amount


def _share(total: float, parts: int, *, text: Callable[[float | None], str] = size) -> str:
    return text(total / parts if parts else None)


def _smaller(facts: Facts, total: float, shares: int) -> str:
    if facts.dense:
        return "the weights themselves travel"
    if not (facts.dim and total):
        return ""
    dense = 4 * facts.dim * shares
    if dense < 1.1 * total:
        return "the weights themselves travel"
    return f"{number(dense / total, 3) if dense < 1000 * total else count(dense / total)} times less than the weights"


def _head(metric: str) -> str:
    return metric.replace("_", " ").capitalize()


def _value(metric: str, value: float | None) -> str:
    if metric.endswith("accuracy"):
        return percent(value)
    return count(value) if metric in ("tokens", "examples") else number(value)


def evaluations(facts: Facts) -> str:
    """Returns every evaluation as a table, folded away."""
    if not facts.evaluations:
        return ""
    every = dict.fromkeys(name for _, _, metrics in facts.evaluations for name in metrics)
    names = [name for name in every if not _CATEGORY.fullmatch(name)]
    spent = facts.spent()
    rows = [
        [
            split,
            count(at + 1),
            *(_value(name, metrics.get(name)) for name in names),
            count(spent[at]["forwards"] if at in spent else None),
            size(spent[at]["bytes"] if at in spent else None),
        ]
        for at, split, metrics in facts.evaluations
    ]
    heads = ("Split", "Rounds done", *map(_head, names), "Forward passes", "Bytes both ways")
    return f"<details><summary>Every evaluation as a table</summary>{table(heads, rows)}</details>"


def clients(facts: Facts, split: Split) -> str:
    """Returns one row per client: what it holds, where its loss stands, what it sent."""
    known = sorted({*facts.clients, *split.sizes, *split.labels})
    if not known:
        return "<h2>Clients</h2><p>No client has answered yet.</p>"
    distant = ["Label distance"] if split.distance else []
    heads = ["Client", "Categories", "Examples", "Rounds", "Last loss", "Last rate", "Sent", "Received", "Skipped"]
    totals, drawn = facts.totals(), len(facts.clients) <= MOST_LINES
    rows = []
    for client in known[:_MOST_ROWS]:
        name = dot(str(client), colour=client_colour(client)) if drawn else str(client)
        held = (bar(_shares(split, client)), count(split.sizes.get(client)))
        sums = _sums(totals[client]) if client in totals else (DASH,) * 6
        rows.append((name, *held, *sums, *(number(split.distance.get(client), 3) for _ in distant)))
    names = "".join(dot(name, colour=colour) for name, colour in zip(split.names, PALETTE, strict=False))
    key = f"<div class=key>Categories: {names}</div>" if names else ""
    notes = [f"The first {_MOST_ROWS} of {len(known):,} clients."] if len(known) > _MOST_ROWS else []
    notes += [_DISTANCE] if distant else []
    note = f"<p class=note>{safe(' '.join(notes))}</p>" if notes else ""
    return f"<h2>Clients</h2>{key}{note}{table([*heads, *distant], rows, texts=2)}"


def _shares(split: Split, client: int) -> list[tuple[str, float, str]]:
    held = split.labels.get(client, {})
    return [(name, held.get(name, 0), colour) for name, colour in zip(split.names, PALETTE, strict=False)]


def _sums(total: ClientTotal) -> tuple[str, ...]:
    spent = (size(total.up), size(total.down), count(total.skipped))
    return (count(total.rounds), number(total.loss), number(total.rate, 3), *spent)


def categories(facts: Facts) -> str:
    """Returns how each category's metrics changed, when the run was evaluated by category."""
    parts = []
    for split in facts.splits:
        start, end = (_by_category(metrics) for metrics in facts.ends(split))
        both = {name: {**start.get(name, {}), **end.get(name, {})} for name in sorted({*start, *end})}
        kinds = list(dict.fromkeys(kind for known in both.values() for kind in known if kind != "examples"))
        heads = [text for kind in kinds for text in (f"{_head(kind)} at the start", "At the end", "Change")]
        rows = [
            [name, _value("examples", known.get("examples"))]
            + [cell for kind in kinds for cell in _moved(kind, start.get(name, {}), end.get(name, {}))]
            for name, known in both.items()
        ]
        if rows:
            parts.append(f"<h3>{safe(split)}</h3>" + table(["Category", "Examples", *heads], rows))
    return "<h2>Evaluation by category</h2>" + "".join(parts) if parts else ""


def _by_category(metrics: Metrics) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if match := _CATEGORY.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = value
    return found


def _moved(kind: str, start: Metrics, end: Metrics) -> tuple[str, str, str]:
    before, after = start.get(kind), end.get(kind)
    moved = change(before, after, scale=100, digits=1) if kind.endswith("accuracy") else change(before, after)
    return _value(kind, before), _value(kind, after), moved


def events(facts: Facts) -> str:
    """Returns what guards and monitors reported, newest last."""
    found = [(count(row.round + 1), kind, detail) for row in facts.rows for kind, detail in row.events]
    if not found:
        return "<h2>Events</h2><p>None: no guard or monitor had anything to report.</p>"
    sums = ", ".join(f"{kind}: {amount:,}" for kind, amount in Counter(kind for _, kind, _ in found).most_common())
    left = f" The newest {_MOST_ROWS} are shown." if len(found) > _MOST_ROWS else ""
    listed = table(("Round", "Kind", "What happened"), found[-_MOST_ROWS:], texts=3)
    return f"<h2>Events</h2><p class=note>{safe(sums)}.{left}</p>{listed}"


def identity(facts: Facts, folder: str) -> str:
    """Returns what pins the run down, and the commands that check it and go on with it."""
    header, place = facts.header, shlex.quote(folder)
    digests = [row.digest for row in facts.rows if row.digest]
    digest = facts.summary.get("digest") or (digests[-1] if digests else DASH)
    pins = {
        "Digest of the tuned parameters": digest,
        "Fingerprint of the base model": header.fingerprint,
        "Layout of the parameters": header.layout,
        "Law and version of the noise": f"{header.law}, version {header.noise_version}",
        "Perturbation scale mu": number(facts.mu, 3),
    }
    planned = setting(facts, "federation.rounds")
    more = f" --rounds {2 * len(facts.rows)}" if planned == str(len(facts.rows)) else ""
    commands = (
        f"fedmezo verify {place}   # replay the journal and compare the digests\n"
        f"fedmezo resume {place}{more}   # go on with it\n"
        f"fedmezo export {place}   # write the tuned adapter or model"
    )
    rows = [(name, Html(f"<code>{safe(value or DASH)}</code>")) for name, value in pins.items()]
    return f"<h2>Check it, go on with it</h2><pre>{safe(commands)}</pre>{table(('What', 'Value'), rows, texts=2)}"


def configuration(facts: Facts) -> str:
    """Returns the resolved configuration, one row per key."""
    rows = [(Html(f"<code>{safe(key)}</code>"), value) for key, value in _flat(facts.config)]
    return "<h2>Configuration</h2>" + (table(("Key", "Value"), rows, texts=2) if rows else "<p>None was recorded.</p>")


def _flat(config: Mapping[str, object], path: str = "") -> Iterator[tuple[str, str]]:
    """Yields dotted keys and values as text."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{path}{name}", ", ".join(map(str, value)) or DASH
        else:
            shown = {True: "yes", False: "no"}.get(value) if isinstance(value, bool) else value
            yield f"{path}{name}", DASH if shown is None or shown in ("", {}) else str(shown)
