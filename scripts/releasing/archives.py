"""The two archives of a release, what lies in them, and what must or must not."""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LARGEST_KB = 100  # of one file of the wheel, the tiny model apart
WEIGHTS = "fedmezo/assets/tiny/model.safetensors"
# What may lie at the top of the wheel: the package, and what pip has to know of it.
PARTS = re.compile(r"^(fedmezo|fedmezo-[^/]+\.dist-info)/")
# A path that a test opens below the root of the project, as ROOT / "docs" / "robust.md".
OPENED = re.compile(r'(?:ROOT|HERE|parent\.parent|parents\[1\])\)? / "([\w.-]+)"((?: / "[\w.-]+")*)')


def build(source: Path, out: Path, *, kind: str) -> Path:
    """Returns the archive that `python -m build` makes of a folder; kind is "wheel" or "sdist".

    The builder is the one of this environment, or installed for it at the version of constraints.txt.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(source)]
    command += ["--no-isolation"] if find_spec("hatchling") else []
    around = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    around["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")
    done = subprocess.run(command, env=around, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"python -m build --{kind} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def unpack(sdist: Path, out: Path) -> Path:
    """Returns the one folder that a source archive holds, unpacked below `out`."""
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    (found,) = out.iterdir()
    return found


def digests(wheel: Path) -> dict[str, str]:
    """Returns path -> sha256 of every file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def sizes(wheel: Path) -> dict[str, int]:
    """Returns path -> bytes, unpacked, of every file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {member.filename: member.file_size for member in archive.infolist()}


def wheel_faults(members: Mapping[str, int]) -> list[str]:
    """Returns what does not belong into a wheel: files beside the package, tests, caches, large files."""
    faults = [f"{name} lies beside the package" for name in members if not PARTS.match(name)]
    faults += [f"{name} is no file for users" for name in members if re.search(r"(^|/)(tests?|__pycache__)/", name)]
    large = {name: size for name, size in members.items() if size > LARGEST_KB * 1000 and name != WEIGHTS}
    faults += [f"{name} has {size:,} bytes, more than {LARGEST_KB} kB" for name, size in large.items()]
    missing = {"fedmezo/py.typed", "fedmezo/__init__.py", WEIGHTS} - members.keys()
    return faults + [f"{name} is missing" for name in sorted(missing)]


def opened(project: Path) -> set[str]:
    """Returns the paths of a project, relative to its root, that its tests and the scripts they run name."""
    found = set()
    for path in sorted([*project.glob("tests/*.py"), *project.glob("scripts/**/*.py")]):
        for first, more in OPENED.findall(path.read_text(encoding="utf-8")):
            found.add("/".join([first, *re.findall(r'"([\w.-]+)"', more)]))
    return found


def sdist_faults(unpacked: Path, *, project: Path = ROOT) -> list[str]:
    """Returns what the tests open and the project has, but its source archive has not."""
    wanted = {path for path in opened(project) if (project / path).exists() and path != "dist"}
    wanted |= {"Makefile", "pyproject.toml", "constraints.txt", "README.md", "CHANGELOG.md", "LICENSE"}
    return [f"the source archive lacks {path}" for path in sorted(wanted) if not (unpacked / path).exists()]


def metadata(wheel: Path) -> dict[str, list[str]]:
    """Returns the fields of a wheel's METADATA, each with all its values; `body` is the description."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        told = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    fields: dict[str, list[str]] = {"body": [str(told.get_payload())]}
    for field, value in told.items():
        fields.setdefault(field, []).append(value)
    return fields


REQUIRED = ("Name", "Version", "Summary", "License-Expression", "License-File", "Requires-Python", "Keywords")


def metadata_faults(fields: Mapping[str, Iterable[str]], *, version: str) -> list[str]:
    """Returns what is wrong with a wheel's metadata."""
    faults = [f"the metadata lack {field}" for field in REQUIRED if not list(fields.get(field, ()))]
    if list(fields.get("Version", ())) != [version]:
        faults.append(f"the metadata say version {fields.get('Version')}, the package {version}")
    if list(fields.get("Description-Content-Type", ())) != ["text/markdown"]:
        faults.append("the description is not said to be Markdown")
    if "".join(fields.get("body", ())).strip() != (ROOT / "README.md").read_text(encoding="utf-8").strip():
        faults.append("the description is not README.md")
    return faults
