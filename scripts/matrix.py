"""Runs a part of the tests on every Python that fedmezo says it runs on and that is found here.

Run: python scripts/matrix.py --out docs/results/matrix.json [--only 3.12] [--python PATH] [--env 3.12=VENV]   (or: make matrix)

The versions are those of pyproject.toml's classifiers. A Python is looked for on the PATH, among pyenv's, and among those
named with --python. Each gets an environment of its own, with the development dependencies at the versions of
constraints.txt, in a temporary folder (some GB, from PyPI); --env takes one that is there already. The part of the tests
is what pins the contracts, the laws of noise, splits and FedMeZO, and the configuration (TESTS); then one small run from
the command line, and its verification.

For every version, found or not: no module of the standard library that is gone in it is imported (GONE), and ruff finds
no syntax that the oldest version lacks. With the Pythons that are found, all sources are compiled, warnings being errors.

One line for each version; exit status 1 when something fails, 0 when a version was not found.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_contracts.py", "test_zo_noise.py", "test_zo_coding.py", "test_fl_fedmezo.py", "test_data_split.py",
    "test_studies_config.py",
)  # fmt: skip
SMALL = (
    "model.name=builtin:tiny", "model.dtype=float32", "federation.rounds=2", "federation.local_steps=3",
    "data.limit=200", "data.eval_examples=20",
)  # fmt: skip
SOURCES = ("src", "tests", "scripts", "examples", "benchmarks")
# Modules that left the standard library, by the version in which they were gone first.
GONE = {
    "3.12": {"asynchat", "asyncore", "distutils", "imp", "smtpd"},
    "3.13": {
        "aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "lib2to3", "mailcap", "msilib", "nis", "nntplib",
        "ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib",
    },
}  # fmt: skip
COMPILE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
for path in sys.argv[1:]:
    compile(Path(path).read_bytes(), path, "exec")
print(".".join(map(str, sys.version_info[:3])))
"""


def versions() -> list[str]:
    """Returns the versions that the classifiers name, oldest first."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    found = [match.group(1) for line in told if (match := re.fullmatch(r".* :: Python :: (3\.\d+)", line))]
    return sorted(found, key=lambda version: int(version.partition(".")[2]))


def sources() -> list[Path]:
    """Returns every Python file of the project."""
    return sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yields the first names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def gone_by(version: str) -> set[str]:
    """Returns the modules that a version's standard library no longer has."""
    minor = int(version.partition(".")[2])
    return {name for first, names in GONE.items() if int(first.partition(".")[2]) <= minor for name in names}


def static_faults(version: str) -> list[str]:
    """Returns what files import that a version no longer has, and what its grammar lacks."""
    gone = gone_by(version)
    faults = [f"{path.relative_to(ROOT)} imports {name}" for path in sources() for name in set(imported(path)) & gone]
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--output-format", "concise", "--select", "F,YTT"]
    target = f"py{version.replace('.', '')}"
    done = subprocess.run([*command, "--target-version", target, *SOURCES], cwd=ROOT, capture_output=True, text=True)
    return faults + (done.stdout.splitlines() if done.returncode else [])


def candidates(version: str, named: Sequence[Path]) -> Iterator[Path]:
    """Yields where a version's interpreter may be."""
    yield from named
    on_path = shutil.which(f"python{version}")
    if on_path:
        yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)


def find(version: str, named: Sequence[Path] = ()) -> Path | None:
    """Returns an interpreter of a version that starts, or None."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in candidates(version, named):
        done = subprocess.run([str(path), "-c", ask], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return path
    return None


def make(python: Path, home: Path) -> Path:
    """Returns the interpreter of a new environment with the development dependencies.

    Raises:
      SystemExit: something could not be installed.
    """
    subprocess.run([str(python), "-m", "venv", str(home)], check=True)
    inside = home / "bin" / "python"
    command = [str(inside), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    done = subprocess.run([*command, f"{ROOT}[dev]"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The development dependencies do not install on {python}:\n{done.stderr[-3000:]}")
    return inside


def compiled(python: Path) -> tuple[str, list[str]]:
    """Returns the full version of an interpreter, and what it does not compile."""
    done = subprocess.run([str(python), "-c", COMPILE, *map(str, sources())], capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return done.stdout.strip(), [last] if done.returncode else []


def tested(python: Path) -> tuple[str, list[str]]:
    """Returns pytest's last line, and what failed."""
    around = os.environ | {"PYTHONPATH": str(ROOT / "src")}  # of an environment that was ready the package may be old
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS)]
    done = subprocess.run([str(python), *words], cwd=ROOT, env=around, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr[-500:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return lines[-1].strip("= "), failed or ([lines[-1]] if done.returncode else [])


def ran(python: Path, home: Path) -> list[str]:
    """Returns what failed of a small run and its verification."""
    around = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    small = [word for setting in SMALL for word in ("--set", setting)]
    for words in (["run", *small, "--out", "small", "--quiet"], ["verify", "small"]):
        command = [str(python), "-m", "fedmezo", *words]
        done = subprocess.run(command, cwd=home, env=around, capture_output=True, text=True)
        if done.returncode:
            return [f"fedmezo {words[0]} failed: {(done.stderr.strip().splitlines() or ['silently'])[-1]}"]
    return []


def one(version: str, python: Path | None, *, ready: Path | None) -> dict[str, Any]:
    """Returns the row of a version: what was done, and what failed."""
    row: dict[str, Any] = {"version": version, "faults": static_faults(version)}
    if python is None and ready is None:
        return {**row, "found": None, "said": "not found; sources and imports were checked by ruff and by name"}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="matrix-") as home:
        inside = ready / "bin" / "python" if ready is not None else make(python or Path(), Path(home, "venv"))
        found, uncompiled = compiled(inside)
        said, failed = tested(inside)
        row["faults"] += uncompiled + failed + ran(inside, Path(home))
    return {**row, "found": found, "said": said, "seconds": round(time.perf_counter() - began)}


def keep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows to a file, in the place of those it has of the same versions."""
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    named = {row["version"]: row for row in [*before, *rows]}
    told = {"tests": TESTS, "rows": [named[version] for version in versions() if version in named]}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Checks each version and says so in a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the rows, as JSON")
    parser.add_argument(
        "--python", type=Path, action="append", default=[], help="an interpreter, to be looked at first"
    )
    parser.add_argument("--only", action="append", metavar="3.X", help="this version; the file keeps its other rows")
    parser.add_argument("--env", action="append", default=[], metavar="3.X=DIR", help="an environment that is ready")
    asked = parser.parse_args()
    ready = {version: Path(folder).absolute() for version, _, folder in (text.partition("=") for text in asked.env)}
    rows = []
    for version in asked.only or versions():
        row = one(version, find(version, asked.python), ready=ready.get(version))
        rows.append(row)
        print(f"{version}: {row['found'] or 'not found'}; {row['said']}; {len(row['faults'])} faults", flush=True)
        for fault in row["faults"]:
            print(f"  {fault}")
    if asked.out:
        keep(asked.out, rows)
    raise SystemExit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
