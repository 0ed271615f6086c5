"""Builds the two archives of a release and checks them as somebody would who has nothing else.

Run: python scripts/release.py --out docs/results/release.json          (or: make release)

  archives   the wheel and the source archive; a wheel made of the source archive holds the same bytes; no test, no
             cache and no large file lies in the wheel; what the tests open lies in the source archive, and some of
             them pass there; the metadata are whole
  install    the wheel with core dependencies only, at the versions of constraints.txt, in an environment of its own
  verbs      --version, --help of every verb, a small run, its verification; a verb that needs an extra names it in one
             sentence
  start      the seconds of `import fedmezo` and `fedmezo --help`, as ratios to other starts of the same interpreter
  extras     what each extra would add, and that it is its own

Exit status 1 when something is wrong, after everything was looked at. Needs PyPI; everything is made in a temporary
folder, which takes 2 GB, and is gone afterwards; the archives are copied to dist.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from releasing import archives
from releasing.archives import ROOT
from releasing.fresh import Fresh, asked_by, extra_faults, told_extras

# What a release may take. Times are ratios to another start in the same minute, so that a slow machine is no fault.
BUDGET = {
    "wheel_mb": 5.0,  # 3.4 of it are the tiny model
    "installed_mb": 10.0,  # with the bytecode that pip makes
    "sdist_mb": 8.0,
    "import_over_stdlib": 3.0,  # import fedmezo / import typing, json
    "help_over_torch": 0.5,  # fedmezo --help / import torch
}
SMALL = (
    "model.name=builtin:tiny", "model.dtype=float32", "federation.rounds=2", "federation.local_steps=3",
    "data.limit=200", "data.eval_examples=20",
)  # fmt: skip
SILENT = ("output.report=false", "output.tensorboard=false")
# Commands that need an extra, each with the extra.
NEEDY = {
    "server": "flower",
    "client --server 127.0.0.1:1 --id 0": "flower",
    "submit --server 127.0.0.1:1 --out far": "flower",
    "certs init certs --clients 2": "flower",
    "report small": "report",
    "watch small": "report",
    "run {small} {silent} --set privacy.mode=example --set privacy.clip=0.03 --set privacy.epsilon=4 --out d": "privacy",
    "analyze rank {small} --method backprop": "analyze",
}
DEVELOPERS = ("dev", "docs")  # extras that are not for users; what they add is not looked at
# Tests that are run in the unpacked source archive: quick ones that open its files.
IN_SDIST = ("test_data_split.py", "test_contracts.py")
MB = 1e6
ABREAST = 4  # commands at once; never while starts are timed


class Findings:
    """What was measured, and what is wrong."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self.faults: list[str] = []

    def note(self, name: str, value: object) -> None:
        """Keeps a figure and says it."""
        self.told[name] = value
        shown = json.dumps(value)
        print(f"{name}: {shown if len(shown) < 160 else shown[:157] + '...'}", flush=True)

    def within(self, name: str, value: float) -> None:
        """Keeps a figure that has a budget."""
        self.note(name, round(value, 3))
        if value > BUDGET[name]:
            self.blame([f"{name} is {value:.3g}, more than its budget of {BUDGET[name]:g}"])

    def blame(self, faults: list[str]) -> None:
        """Keeps what is wrong and says it."""
        self.faults += faults
        for fault in faults:
            print(f"WRONG: {fault}", flush=True)


def version() -> str:
    """Returns the version that the package says it has."""
    text = (ROOT / "src" / "fedmezo" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("src/fedmezo/__init__.py says no version.")
    return found.group(1)


def check_archives(found: Findings, home: Path) -> tuple[Path, Path]:
    """Returns the wheel and the unpacked source archive, built and looked at."""
    wheel = archives.build(ROOT, home / "dist", kind="wheel")
    sdist = archives.build(ROOT, home / "dist", kind="sdist")
    unpacked = archives.unpack(sdist, home / "unpacked")
    again = archives.build(unpacked, home / "again", kind="wheel")
    if archives.digests(again) != archives.digests(wheel):
        found.blame(["the wheel of the source archive differs from the wheel of the project"])
    found.note("wheel_of_sdist_is_the_same", archives.digests(again) == archives.digests(wheel))
    members = archives.sizes(wheel)
    found.note("wheel_files", len(members))
    found.within("wheel_mb", wheel.stat().st_size / MB)
    found.within("sdist_mb", sdist.stat().st_size / MB)
    found.blame(archives.wheel_faults(members) + archives.sdist_faults(unpacked))
    found.blame(archives.metadata_faults(archives.metadata(wheel), version=version()))
    twine = shutil.which("twine")
    if twine:
        done = subprocess.run([twine, "check", "--strict", str(wheel), str(sdist)], capture_output=True, text=True)
        found.note("twine_check", "passed" if not done.returncode else done.stdout[-500:])
        found.blame(["twine check --strict failed"] if done.returncode else [])
    else:
        found.note("twine_check", "not run: twine is not installed")
    return wheel, unpacked


def check_tests(found: Findings, unpacked: Path) -> None:
    """Runs some tests in the unpacked source archive, by this interpreter and the archive's own sources."""
    tests = [f"tests/{name}" for name in IN_SDIST]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=tests src", *tests]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    found.note("tests_in_sdist", (done.stdout.strip().splitlines() or ["nothing"])[-1].strip("= "))
    found.blame([f"tests fail in the source archive:\n{done.stdout[-2000:]}"] if done.returncode else [])


def check_install(found: Findings, fresh: Fresh, wheel: Path) -> dict[str, str]:
    """Returns what the core brings, after a first run of it."""
    fresh.make()
    core = fresh.install(wheel)
    found.note("python", platform.python_version())
    found.note("core", core)
    found.within("installed_mb", fresh.own_bytes() / MB)
    said = fresh.run("fedmezo", "--version").stdout.strip()
    found.blame([] if said == f"fedmezo {version()}" else [f"fedmezo --version says {said!r}"])
    small = [word for setting in SMALL for word in ("--set", setting)]
    # Curves, report and tracker are asked for and cannot be had: the run says so and goes on.
    runs = {"run": [*small, "--set", "output.wandb=true", "--out", "small"], "verify": ["small"]}
    for verb, words in runs.items():
        done = fresh.run("fedmezo", verb, *words, "--json")
        found.note(f"{verb}_works", done.returncode == 0)
        found.blame([f"fedmezo {verb} failed:\n{done.stderr[-2000:]}"] if done.returncode else [])
        lacks = ["report", "report", "wandb"] if verb == "run" else []
        if told_extras(done) != lacks:
            found.blame(
                [f"fedmezo {verb} tells that it lacks {told_extras(done)}, not {lacks}:\n{done.stderr[-2000:]}"]
            )
    return core


def check_verbs(found: Findings, fresh: Fresh) -> None:
    """Asks every verb for help, and those that need an extra which."""
    helps = fresh.helps()
    found.note("verbs_with_help", len(helps["verbs"]))
    found.blame([f"fedmezo {verb} --help fails without extras" for verb in helps["bad"]])
    small, quiet = (" ".join(f"--set {setting}" for setting in settings) for settings in (SMALL, SILENT))
    silent = []
    with ThreadPoolExecutor(ABREAST) as pool:
        ends = pool.map(lambda words: fresh.run("fedmezo", *words.format(small=small, silent=quiet).split()), NEEDY)
    for (words, extra), done in zip(NEEDY.items(), ends, strict=True):
        if told_extras(done) != [extra]:
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            silent.append(f"fedmezo {words} does not name fedmezo[{extra}] in one sentence: {last}")
    found.note("verbs_that_name_their_extra", len(NEEDY) - len(silent))
    found.blame(silent)


def check_start(found: Findings, fresh: Fresh) -> None:
    """Compares how long starts take."""
    commands = {
        "stdlib": ["python", "-c", "import typing, json"],
        "import": ["python", "-c", "import fedmezo"],
        "help": ["fedmezo", "--help"],
        "torch": ["python", "-c", "import torch"],
    }
    seconds = fresh.seconds(commands, times=3)
    found.note("start_seconds", {name: round(value, 3) for name, value in seconds.items()})
    found.within("import_over_stdlib", seconds["import"] / seconds["stdlib"])
    found.within("help_over_torch", seconds["help"] / seconds["torch"])


def check_extras(found: Findings, fresh: Fresh, wheel: Path, core: dict[str, str]) -> None:
    """Asks pip what each extra would add."""
    fields = archives.metadata(wheel)
    named = [extra for extra in fields["Provides-Extra"] if extra not in DEVELOPERS]
    with ThreadPoolExecutor(ABREAST) as pool:
        added = pool.map(lambda extra: fresh.adds(wheel, extra), named)
    asked = [sorted(asked_by(extra, fields["Requires-Dist"])) for extra in named]
    extras = {one: {"asks": asks, "adds": adds} for one, asks, adds in zip(named, asked, added, strict=True)}
    found.note("extras", extras)
    found.blame(extra_faults(extras, core))


def main() -> None:
    """Checks everything, writes what was found, and copies sound archives to dist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write what was found, as JSON")
    parser.add_argument("--archives-only", action="store_true", help="install nothing")
    parser.add_argument(
        "--environment", type=Path, help="a virtual environment of an earlier call, to install into again"
    )
    asked = parser.parse_args()
    found = Findings()
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        home = Path(folder)
        if asked.environment:
            (home / "venv").symlink_to(asked.environment.absolute())
        wheel, unpacked = check_archives(found, home)
        with ThreadPoolExecutor(ABREAST) as pool:
            going = [pool.submit(check_tests, found, unpacked)]
            if not asked.archives_only:
                fresh = Fresh(home, ROOT / "constraints.txt")
                core = check_install(found, fresh, wheel)
                going += [pool.submit(check_verbs, found, fresh), pool.submit(check_extras, found, fresh, wheel, core)]
            for one in going:
                one.result()
        if not asked.archives_only:
            check_start(found, fresh)
        if not found.faults:
            shutil.copytree(home / "dist", ROOT / "dist", dirs_exist_ok=True)
    if asked.out:
        told = {"version": version(), "budget": BUDGET, **found.told, "faults": found.faults}
        asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(
        f"{len(found.faults)} faults; " + ("the archives are in dist." if not found.faults else "nothing is released.")
    )
    raise SystemExit(bool(found.faults))


if __name__ == "__main__":
    main()
