"""Where trials lie: records, templates, references; and what a run leaves, as one number."""

import ctypes
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from crashing.fork import MODES, End, Tell, Work, forked

ROOT = Path(__file__).resolve().parent.parent.parent
Row = dict[str, Any]
Trial = tuple[str, Callable[[], Row]]
STEADY = {"rate": 2e-3, "mu": 1e-3}
ONE = {"lanes": 2, "threads": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"federation": {"rounds": 3}, "guard": {"batches": 0}, "output": {"export": True}},
    "surge": {"federation": {"rounds": 5}, "algorithm": {"rate": 0.5}, "guard": {"batches": 8, "on_surge": "rollback"}},
    "pool": {"algorithm": {"name": "fedkseed-pro", "pool": 64}, "federation": {"rounds": 3, "pull": "pairs"}},
    "fedavg": {"algorithm": {"name": "fedavg", "rate": 0.05}, "federation": {"rounds": 3}},
    "personal": {"personal": {"signal": "round-loss"}, "federation": {"rounds": 4, "cohort": 2}},
    "shared": {"algorithm": {"shared": True, "momentum": 0.5, "directions": 2}, "federation": {"rounds": 3}},
    "workers": {"runtime": {"workers": 2}, "federation": {"rounds": 4}},
}


class Bed:
    """Where trials lie: records, templates, references, and the shim."""

    def __init__(self, shim: ctypes.CDLL, home: Path) -> None:
        sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
        from tiny_runs import write_records

        self.shim, self.home, self.number = shim, home, 0
        self.records = write_records(home)
        _cache_models()
        warm = self.fresh()
        self.act("run", warm)(lambda _: None)
        self.mend("run", warm)(lambda _: None)
        shutil.rmtree(warm)

    def fresh(self) -> Path:
        """Returns a folder that is not there yet."""
        self.number += 1
        return self.home / f"trial-{self.number}"

    def config(self, name: str) -> Any:
        """Returns the configuration of a scenario."""
        from tiny_runs import small

        sections = SETTINGS[name.split(":")[0]]
        plain = {"algorithm": STEADY, "runtime": ONE, "guard": {}}
        return small(self.records, **{key: plain.get(key, {}) | sections.get(key, {}) for key in {**plain, **sections}})

    def template(self, name: str) -> Path | None:
        """Returns a finished run that the scenario begins with; None when it begins with nothing."""
        return None if ":" not in name else self._finished(name.split(":")[0])

    @cache  # noqa: B019 - a bed lives as long as the program
    def _finished(self, name: str) -> Path:
        folder = self.home / f"template-{name}"
        ended = forked(lambda tell: self.act(name, folder)(tell))
        assert not ended.error and not ended.bug, ended
        return folder

    def begin(self, name: str) -> Path:
        """Returns a folder as it is before the scenario."""
        folder, template = self.fresh(), self.template(name)
        if template is not None:
            shutil.copytree(template, folder)
        return folder

    def act(self, name: str, folder: Path) -> Work:
        """Returns what is disturbed."""
        from fedmezo.studies.run import export, resume, rollback, run

        base, _, verb = name.partition(":")

        def work(tell: Tell) -> None:
            if not verb:
                run(self.config(base), out=folder, watch=telling(tell))
            elif verb == "more":
                resume(folder, rounds=5, watch=telling(tell))
            elif verb == "rollback":
                rollback(folder, round=1)
            elif verb == "export":
                export(folder, out=folder / "adapter")
            else:
                raise ValueError(verb)

        return work

    def mend(self, name: str, folder: Path) -> Work:
        """Returns what a user does next, and says what the folder holds then."""
        from fedmezo.runtime.journal import Journal
        from fedmezo.studies.run import resume, run, verify

        def work(tell: Tell) -> None:
            journal, verb = folder / "journal.sqlite", name.partition(":")[2]
            if verb == "export":  # half an adapter is no sound one
                self.act(name, folder)(tell)
            if journal.exists():
                kept = verify(folder)
                with Journal.open(journal, readonly=True) as opened:
                    tell({"kept": opened.last, "sealed": kept["seal"] is not None})
            else:
                tell({"kept": 0, "sealed": False})
            if verb == "rollback":
                self.act(name, folder)(tell)
            if verb == "more":
                resume(folder, rounds=5)
            elif journal.exists():
                resume(folder)
            else:
                run(self.config(name), out=folder)
            tell({"whole": holds(folder)})

        return work

    @cache  # noqa: B019
    def reference(self, name: str) -> tuple[str, tuple[str, ...], float, float]:
        """Returns what an undisturbed scenario leaves, the calls it makes, and the seconds of act and mend."""
        folder = self.begin(name)
        began = time.perf_counter()
        calls = self.counted(name, folder)
        middle = time.perf_counter()
        ended = forked(self.mend(name, folder))
        assert "whole" in ended.told[-1], ended
        shutil.rmtree(folder)
        return ended.told[-1]["whole"], calls, middle - began, time.perf_counter() - middle

    def counted(self, name: str, folder: Path) -> tuple[str, ...]:
        """Returns the calls that change files, in order."""
        log = self.home / "calls"

        def work(tell: Tell) -> None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self.shim.crash_watch(str(folder).encode(), descriptor)
            self.act(name, folder)(tell)

        ended = forked(work)
        assert not ended.error and not ended.bug, ended
        return tuple(line.split(" ", 1)[1] for line in log.read_text().splitlines())

    def armed(self, name: str, folder: Path, mode: str, at: int) -> Work:
        """Returns the scenario with a fault at its n-th call."""

        def work(tell: Tell) -> None:
            self.shim.crash_watch(str(folder).encode(), -1)
            self.shim.crash_arm(MODES[mode], ctypes.c_long(at))
            try:
                self.act(name, folder)(tell)
            finally:
                tell({"count": self.shim.crash_count()})

        return work

    def judged(self, name: str, folder: Path, ended: End) -> dict[str, Any]:
        """Takes the user's next step after a fault; returns the row's last columns."""
        after = forked(self.mend(name, folder))
        kept = next((one["kept"] for one in after.told if "kept" in one), None)
        whole = next((one["whole"] for one in after.told if "whole" in one), None)
        # A surge takes rounds back, and so does the verb.
        lost = 0 if name in ("surge", "run:rollback") else max(0, ended.rounds - (kept or 0))
        row = {"told": ended.rounds, "kept": kept, "lost": lost, "equal": whole == self.reference(name)[0]}
        shutil.rmtree(folder, ignore_errors=True)
        return {**row, **({"after": after.error or after.bug} if after.error or after.bug else {})}


def _cache_models() -> None:
    """A base model is loaded once for all forks; nobody trains it."""
    from fedmezo.studies import build

    build.load_model = cache(build.load_model)  # type: ignore[assignment]


def telling(tell: Tell) -> Any:
    from fedmezo.studies.watch import NullWatch

    class Telling(NullWatch):
        def round(self, report: Any) -> None:
            tell({"round": report.round})

    return Telling()


def holds(folder: Path) -> str:
    """Returns the sha256 of all that a run leaves, without what may differ; raises what `verify` finds."""
    from fedmezo.runtime.journal import Journal
    from fedmezo.studies.run import verify

    told = verify(folder)
    assert told["seal"] is not None, "not sealed"
    with Journal.open(folder / "journal.sqlite", readonly=True) as journal:
        rounds = [
            (r.entries, r.loss, r.rate, r.slowed, r.forwards, r.tokens, r.digest, r.evaluations, _events(r.events))
            for r in journal.rounds()
        ]
        said = repr((journal.header.config, rounds, journal.evaluations()))
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "peak_rss_mb", "run_dir"):
        del summary[name]
    files = [
        "config.toml",
        "data.sha256",
        "start.json",
        *(f"adapter/{p.name}" for p in sorted(folder.glob("adapter/*"))),
    ]
    digests = [(name, hashlib.sha256((folder / name).read_bytes()).hexdigest()) for name in files]
    left = sorted(path.name for path in folder.iterdir() if path.name.endswith((".new", "-wal", "-shm")))
    return hashlib.sha256(repr((told["digest"], said, summary, digests, left)).encode()).hexdigest()


def _events(events: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [(kind, detail) for kind, detail in events if kind != "rollback"]
