"""An environment that holds a wheel and its core dependencies, and nothing else: what is asked of it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN = "fedmezo"
# Of an extra that asks for others, what it brings is theirs too.
TOGETHER = ("dev",)
HELPS = """
import json, typer
from typer.testing import CliRunner
from fedmezo.cli import app
def verbs(command, words=()):
    yield words
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from verbs(below, (*words, name))
found = list(verbs(typer.main.get_command(app)))
bad = [" ".join(words) for words in found if CliRunner().invoke(app, [*words, "--help"]).exit_code]
print(json.dumps({"verbs": [" ".join(words) for words in found if words], "bad": bad}))
"""
FILES = """
import json
from importlib.metadata import files
print(json.dumps(sum(path.locate().stat().st_size for path in files("fedmezo") if path.locate().is_file())))
"""


@dataclass(frozen=True)
class Fresh:
    """A virtual environment and an empty folder to work in, both below `home`."""

    home: Path
    pins: Path

    @property
    def binaries(self) -> Path:
        """Where its programs lie."""
        return self.home / "venv" / "bin"

    @property
    def work(self) -> Path:
        """The folder in which its commands run."""
        return self.home / "work"

    def make(self) -> None:
        """Makes both; an environment that an earlier call has left is kept, all but the package itself."""
        self.work.mkdir()
        if self.binaries.exists():
            self.pip("uninstall", "--quiet", "--yes", OWN)
        else:
            subprocess.run([sys.executable, "-m", "venv", str(self.home / "venv")], check=True)

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Returns a command's end; it sees nothing of the project, and no settings of ours."""
        ours = ("FEDMEZO_", "PYTHON", "VIRTUAL_ENV")
        around = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        around["FEDMEZO_CACHE"] = str(self.home / "cache")
        command = [str(self.binaries / program), *words]
        return subprocess.run(command, cwd=self.work, env=around, capture_output=True, text=True, timeout=1800)

    def pip(self, *words: str) -> str:
        """Returns what pip prints.

        Raises:
          SystemExit: it failed.
        """
        done = self.run("python", "-m", "pip", *words)
        if done.returncode:
            raise SystemExit(f"pip {' '.join(words)} failed:\n{done.stderr[-3000:]}")
        return done.stdout

    def install(self, wheel: Path) -> dict[str, str]:
        """Returns name -> version of what an installation without extras brings."""
        self.pip("install", "--quiet", "--constraint", str(self.pins), str(wheel))
        listed = json.loads(self.pip("list", "--format", "json"))
        # pip and setuptools come with the environment, not with us.
        return {
            canonicalize_name(one["name"]): one["version"] for one in listed if one["name"] not in {"pip", "setuptools"}
        }

    def adds(self, wheel: Path, extra: str) -> dict[str, str]:
        """Returns name -> version of what an extra would install beyond what is there."""
        asked = f"{OWN}[{extra}] @ {wheel.resolve().as_uri()}"
        report = self.home / f"{extra}.json"
        self.pip("install", "--quiet", "--dry-run", "--constraint", str(self.pins), "--report", str(report), asked)
        told = [one["metadata"] for one in json.loads(report.read_text(encoding="utf-8"))["install"]]
        found = {canonicalize_name(one["name"]): one["version"] for one in told}
        return {name: version for name, version in sorted(found.items()) if name != OWN}

    def own_bytes(self) -> int:
        """Returns the bytes of the package's own installed files."""
        return int(json.loads(self.run("python", "-c", FILES).stdout))

    def helps(self) -> dict[str, list[str]]:
        """Returns all verbs, and those whose help fails."""
        done = self.run("python", "-c", HELPS)
        if done.returncode:
            raise SystemExit(f"the list of verbs failed:\n{done.stderr[-3000:]}")
        return dict(json.loads(done.stdout))

    def seconds(self, commands: Mapping[str, Sequence[str]], *, times: int) -> dict[str, float]:
        """Returns the median seconds of each command, taken in turns, so that a busy moment meets all alike."""
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(times + 1):
            for name, words in commands.items():
                began = time.perf_counter()
                done = self.run(*words)
                if done.returncode:
                    raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
                if turn:  # the first one compiles and warms the disk's cache
                    taken[name].append(time.perf_counter() - began)
        return {name: median(values) for name, values in taken.items()}


def asked_by(extra: str, requires: Sequence[str]) -> set[str]:
    """Returns the packages that an extra names itself, of a wheel's Requires-Dist."""
    wanted = (Requirement(text) for text in requires)
    return {
        canonicalize_name(one.name)
        for one in wanted
        if one.marker is not None and not one.marker.evaluate({"extra": ""}) and one.marker.evaluate({"extra": extra})
    }


def extra_faults(extras: Mapping[str, Mapping[str, Any]], core: Mapping[str, str]) -> list[str]:
    """Returns what an extra brings that is another's, or that the core has.

    Args:
      extras: extra -> asks (the packages it names), adds (name -> version of what it would install).
      core: name -> version of what is there without extras.
    """
    faults = []
    for extra, told in extras.items():
        twice = sorted(told["adds"].keys() & core.keys())
        faults += [f"fedmezo[{extra}] installs {name} again, which the core has" for name in twice]
        missing = sorted(set(told["asks"]) - {OWN} - told["adds"].keys() - core.keys())
        faults += [f"fedmezo[{extra}] names {name} and does not install it" for name in missing]
        if extra in TOGETHER:
            continue
        others = {name: other for other, its in extras.items() if other not in TOGETHER for name in its["asks"]}
        foreign = sorted((told["adds"].keys() & others.keys()) - set(told["asks"]))
        faults += [f"fedmezo[{extra}] brings {name}, which is of fedmezo[{others[name]}]" for name in foreign]
    named = {name for its in extras.values() for name in its["asks"]} - {OWN}
    return faults + [f"the core brings {name}, which an extra names" for name in sorted(named & core.keys())]


def told_extras(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Returns the extras that a command said it lacks, one a sentence; none after a traceback."""
    said = re.findall(r"^.+, which is not installed; run: pip install '(.+)'$", done.stderr, re.MULTILINE)
    named = [re.sub(rf"^{OWN}\[(.+)\]$", r"\1", one) for one in said]
    return [] if "Traceback" in done.stderr else sorted(named)
