"""A diagnosis for people: the facts on top, then what was found, the gravest first, in the width of the terminal."""

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from rich.text import Text

from fedmezo.studies.doctor.finding import Diagnosis, Finding, Severity
from fedmezo.studies.page import count, duration, number, size

__all__ = ["diagnosis_text"]

_STYLES: Mapping[Severity, str] = {
    "problem": "bold red",
    "warning": "bold yellow",
    "good": "bold green",
    "note": "bold",
}
_INDENT = 10
_WIDEST = 100


def diagnosis_text(diagnosis: Diagnosis, *, width: int) -> Text:
    """Returns a diagnosis as text, at most `width` columns wide; only commands are never broken over lines."""
    room = min(width, _WIDEST)
    text = Text()
    for line in _facts(diagnosis.facts):
        text.append("\n".join(_wrapped(line, room, 2)) + "\n")
    for finding in diagnosis.findings:
        text.append("\n")
        _add(text, finding, room - _INDENT)
    if not diagnosis.findings:
        text.append("\nNothing stands out.\n")
    return text


def _wrapped(line: str, room: int, indent: int = 0) -> list[str]:
    return wrap(line, room, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _add(text: Text, finding: Finding, room: int) -> None:
    mark = finding.severity.upper().ljust(_INDENT)
    for place, line in enumerate(_wrapped(finding.sentence, room)):
        text.append(mark if not place else " " * _INDENT, style=_STYLES[finding.severity])
        text.append(line + "\n")
    for line in _wrapped(finding.advice, room):
        text.append(f"{' ' * _INDENT}{line}\n", style="dim")
    if finding.command:
        text.append(f"{' ' * _INDENT}  {finding.command}\n", style="cyan")


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    left = "" if facts["finished"] or facts["planned"] <= facts["rounds"] else f" of {facts['planned']}"
    head = f"{facts['run_dir']}: {facts['algorithm'] or 'a run'}, {facts['rounds']}{left} rounds"
    if not facts["rounds"]:
        yield head
        return
    yield f"{head}, {facts['cohort']:.3g} of {facts['clients']} clients a round, {facts['steps']} steps each"
    moved = facts["rate_now"] != facts["rate"]
    rate = f"rate {facts['rate']:.3g}" + (f" (now {facts['rate_now']:.3g})" if moved else "")
    settings = [rate, f"mu {facts['mu']:.3g}" if facts["mu"] else "", str(facts["dtype"] or "")]
    settings += [f"d {count(facts['dim'])}" if facts["dim"] else ""]
    yield ", ".join(filter(None, settings))
    ends = [("training loss", facts["train"]), ("evaluation loss", facts["eval"])]
    losses = [f"{name} {number(pair['start'])} -> {number(pair['end'])}" for name, pair in ends if pair]
    scatter = f"scatter of a client's loss {number(facts['noise_within'], 2)}" if "noise_within" in facts else ""
    yield ", ".join(filter(None, [*losses, scatter]))
    sent, each = facts["bytes"], facts["seconds_per_forward"]
    yield (
        f"{size(sent['up_per_client_round'])} up and {size(sent['down_per_client_round'])} down per client and round, "
        f"{duration(facts['seconds'])} of walks" + (f", {duration(each)} per forward pass" if each else "")
    )
