"""Symptoms of a run over a network: clients that are asked and do not answer, and rounds that mostly wait."""

import re
from collections import defaultdict
from collections.abc import Iterator

from fedmezo.studies.doctor.finding import Finding
from fedmezo.studies.doctor.vitals import Vitals

__all__ = ["silent", "turned_away"]

_SHARE = 0.2  # of the rounds a client was asked in
_CURES = {
    "did not answer": "raise network.deadline, give it fewer local_steps, or a machine that is not busy",
    "failed": "look at what its `fedmezo client` says: its worker has died, perhaps for lack of memory",
    "refused": "look at what its `fedmezo client` says",
    "sent something": "see that it runs the same version of fedmezo, and that it is who you think it is",
    "answered with": "see that it runs the same version of fedmezo, and that it is who you think it is",
}


def silent(run: Vitals) -> Iterator[Finding]:
    """Yields clients that did not answer in over a fifth of the rounds they were asked in, twice at least."""
    missed: dict[int, list[str]] = defaultdict(list)
    for _, kind, detail in run.events:
        if kind == "absent" and (told := re.match(r"client (\d+) (.*)", detail)):
            missed[int(told[1])].append(told[2])
    for client, reasons in sorted(missed.items()):
        asked = len(reasons) + len(run.clients.get(client, ()))
        if len(reasons) < 2 or len(reasons) <= _SHARE * asked:
            continue
        cure = next((cure for start, cure in _CURES.items() if reasons[-1].startswith(start)), "see whether it is up")
        yield Finding(
            "silent-client",
            "warning",
            f"Client {client} did not answer in {len(reasons)} of the {asked} rounds it was asked in; the last time it "
            f"{reasons[-1].rstrip('.')}.",
            f"{cure[0].upper()}{cure[1:]}.",
            numbers={"client": client, "missed": len(reasons), "asked": asked},
        )


def turned_away(run: Vitals) -> Iterator[Finding]:
    """Yields why clients could not take part, the newest reason of each kind."""
    reasons = {detail: at for at, kind, detail in run.events if kind == "network" and _REFUSED.match(detail)}
    for detail in list(reasons)[-3:]:
        yield Finding("turned-away", "warning", detail, numbers={"round": reasons[detail]})


_REFUSED = re.compile(r"A client (cannot|was turned)|A second client|A node was turned")
