"""What a release is checked for: known vulnerabilities, bill of materials, archives, accompanying files, budgets."""

import json
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import yaml

import fedmezo
from fedmezo.errors import missing

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import audit  # noqa: E402
import matrix  # noqa: E402
import release  # noqa: E402
from releasing import archives, fresh  # noqa: E402

PINS = ["good==1.0", "bad==2.0"]
FLAW = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1"]}
CANARY = {"name": "jinja2", "version": "2.10", "vulns": [FLAW]}


def database(*known):
    """Returns what answers as pip-audit does."""
    return lambda pins: [CANARY] if pins == [audit.CANARY] else list(known)


def found(name, *, vulns=()):
    return {"name": name, "version": "2.0", "vulns": list(vulns)}


def test_a_known_vulnerability_fails():
    status, lines = audit.audit(PINS, ask=database(found("good"), found("bad", vulns=[FLAW])))
    assert status == 1
    assert lines[0] == "bad 2.0: PYSEC-1, mended in 2.1"


def test_a_sound_set_passes():
    status, lines = audit.audit(PINS, ask=database(found("good"), found("bad")))
    assert (status, lines) == (0, ["2 of 2 packages audited, 0 known vulnerabilities."])


def test_an_accepted_vulnerability_passes_by_any_of_its_names(monkeypatch):
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-1": "its parser is not used here"})
    assert audit.audit(PINS, ask=database(found("bad", vulns=[FLAW])))[0] == 0


def test_a_database_that_cannot_be_asked_is_said_loudly():
    def unreachable(pins):
        raise audit.UnreachableError("no route to host")

    status, lines = audit.audit(PINS, ask=unreachable)
    assert status == 0
    assert lines[0].startswith("SKIPPED the audit of 2 packages") and "no route to host" in lines[0]


def test_a_database_that_knows_nothing_is_no_database():
    status, lines = audit.audit(PINS, ask=lambda pins: [found(pin.partition("=")[0]) for pin in pins])
    assert status == 0 and lines[0].startswith("SKIPPED")


def test_a_package_the_database_does_not_know_is_named():
    gone = {"name": "bad", "skip_reason": "Dependency not found"}
    _, lines = audit.audit(PINS, ask=database(found("good"), gone))
    assert lines == ["NOT AUDITED bad: Dependency not found", "1 of 2 packages audited, 0 known vulnerabilities."]


def test_an_answer_that_is_none_is_unreachable(monkeypatch):
    monkeypatch.setattr(audit.sys, "executable", "/bin/false")
    with pytest.raises(audit.UnreachableError, match="it wrote nothing"):
        audit.ask(PINS)


def test_every_pin_of_the_tested_set_is_audited():
    lines = [line for line in audit.LOCKED.read_text().splitlines() if line and not line.startswith("#")]
    assert [pin.partition("==")[0] for pin in audit.pins_of(audit.LOCKED.read_text())] == [
        line.partition("==")[0] for line in lines
    ]


def test_the_bill_of_materials_names_every_pin_once_and_always_alike():
    pytest.importorskip("cyclonedx")
    import sbom
    from cyclonedx.output.json import JsonV1Dot6

    pins = sbom.pins_of(sbom.LOCKED.read_text())
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    texts = [JsonV1Dot6(sbom.bill(pins, version="1.0", moment=moment)).output_as_string() for _ in range(2)]
    assert texts[0] == texts[1]
    told = json.loads(texts[0])
    assert {part["name"]: part["version"] for part in told["components"]} == pins
    scopes = {part["name"]: part["scope"] for part in told["components"]}
    assert (scopes["torch"], scopes["plotly"], scopes["pytest"]) == ("required", "optional", "excluded")
    needed = {edge["ref"]: edge.get("dependsOn", []) for edge in told["dependencies"]}
    assert f"torch=={pins['torch']}" in needed["fedmezo==1.0"]


def test_the_changelog_keeps_its_form_and_names_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert text.startswith("# Changelog\n") and "keepachangelog.com" in text
    assert heads[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", head) for head in heads[1:]]
    assert all(released)
    dates = [date.fromisoformat(found.group(2)) for found in released]
    assert dates == sorted(dates, reverse=True)
    numbers = [tuple(map(int, found.group(1).split("."))) for found in released]
    assert numbers == sorted(set(numbers), reverse=True)
    # Before the first release there is no number; afterwards the newest one is the package's.
    assert not released or heads[1].startswith(f"[{fedmezo.__version__}]")
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds
    assert re.search(r"^- ", text, re.MULTILINE)


def test_the_citation_is_valid_and_of_this_version():
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert told["cff-version"] == "1.2.0" and told["version"] == fedmezo.__version__
    assert told["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    known = {
        "cff-version",
        "message",
        "title",
        "abstract",
        "type",
        "version",
        "license",
        "authors",
        "keywords",
        "references",
    }
    assert {"cff-version", "message", "title", "authors"} <= told.keys() <= known
    for work in [told, *told["references"]]:
        assert work["title"] and work["type"] in {"software", "article"}
        for author in work["authors"]:
            assert author.keys() in ({"name"}, {"family-names", "given-names"})
    values = {one["value"] for work in told["references"] for one in work["identifiers"]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert values == {"arXiv:2402.05926", "arXiv:2312.06353"}
    assert all(value.replace("arXiv:", "abs/") in readme for value in values)


def test_contributing_has_four_commands_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    asked = re.findall(r"^make (\S+)", text, re.MULTILINE)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert len(asked) == 4
    assert set(asked) | set(re.findall(r"`make ([a-z -]+)`", text)[0].split()) <= targets
    for name in re.findall(r"`((?:zo|fl|runtime)/\w+\.py)`", text):
        assert (ROOT / "src" / "fedmezo" / name).is_file()


def test_what_does_not_belong_into_a_wheel_is_named():
    good = {
        "fedmezo/__init__.py": 9,
        "fedmezo/py.typed": 0,
        archives.WEIGHTS: 3_400_000,
        "fedmezo-1.dist-info/RECORD": 9,
    }
    assert archives.wheel_faults(good) == []
    bad = {
        "tests/test_a.py": 9,
        "fedmezo/tests/a.py": 9,
        "fedmezo/zo/__pycache__/a.pyc": 9,
        "fedmezo/big.json": 100_001,
    }
    assert len(archives.wheel_faults(good | bad)) == 5
    assert archives.wheel_faults({name: size for name, size in good.items() if name != archives.WEIGHTS}) == [
        f"{archives.WEIGHTS} is missing"
    ]


def test_what_a_source_archive_lacks_is_named(tmp_path):
    assert {"docs/robust.md", "examples", "benchmarks/results", "scripts/results.py"} <= archives.opened(ROOT)
    assert archives.sdist_faults(ROOT) == []
    (tmp_path / "Makefile").touch()
    faults = archives.sdist_faults(tmp_path)
    assert "the source archive lacks docs/robust.md" in faults and "the source archive lacks Makefile" not in faults


def test_the_source_archive_takes_whatever_the_tests_open():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    tops = {path.partition("/")[0] for path in archives.opened(ROOT) if (ROOT / path).exists()}
    assert {top for top in tops if f"/{top}" not in told and not top.endswith(".md")} <= {"pyproject.toml", "dist"}


def test_metadata_of_a_wheel_are_compared_with_the_project(tmp_path):
    lines = [
        "Metadata-Version: 2.4", "Name: fedmezo", f"Version: {fedmezo.__version__}", "Summary: a", "Keywords: b",
        "License-Expression: Apache-2.0", "License-File: LICENSE", "Requires-Python: >=3.11",
        "Description-Content-Type: text/markdown", "Requires-Dist: torch", "Requires-Dist: plotly; extra == 'report'",
    ]  # fmt: skip
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("fedmezo-1.dist-info/METADATA", "\n".join(lines) + "\n\n" + (ROOT / "README.md").read_text())
    fields = archives.metadata(path)
    assert archives.metadata_faults(fields, version=fedmezo.__version__) == []
    assert len(archives.metadata_faults(fields | {"Keywords": [], "body": ["else"]}, version="9")) == 3
    assert fresh.asked_by("report", fields["Requires-Dist"]) == {"plotly"}


def test_an_extra_that_brings_anothers_package_or_the_cores_is_named():
    extras = {
        "report": {"asks": ["plotly"], "adds": {"plotly": "1", "narwhals": "1"}},
        "flower": {"asks": ["flwr"], "adds": {"flwr": "1", "grpcio": "1"}},
        "dev": {"asks": ["fedmezo", "pytest"], "adds": {"plotly": "1", "flwr": "1", "pytest": "1"}},
    }
    core = {"torch": "1", "rich": "1"}
    assert fresh.extra_faults(extras, core) == []
    extras["flower"]["adds"] |= {"plotly": "1", "rich": "2"}
    extras["report"]["asks"] = ["plotly", "torch", "gone"]
    faults = fresh.extra_faults(extras, core)
    assert [fault.split("]")[0] for fault in faults[:3]] == ["fedmezo[report", "fedmezo[flower", "fedmezo[flower"]
    assert len(faults) == 4 and faults[3] == "the core brings torch, which an extra names"


def test_extras_of_this_project_name_only_their_own():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requires = [
        f"{one}; extra == '{extra}'"
        for extra, ones in told["optional-dependencies"].items()
        for one in ones
        if ";" not in one
    ]
    asked = {extra: fresh.asked_by(extra, requires) for extra in told["optional-dependencies"]}
    core = {re.split(r"[<>=\[;~! ]", one)[0].lower() for one in told["dependencies"]}
    assert core & {"flwr", "plotly", "tensorboard", "wandb", "mkdocs", "mkdocs-material"} == set()
    for extra, names in asked.items():
        assert names, extra
        assert not names & core, extra


@pytest.mark.parametrize("words", sorted(release.NEEDY))
def test_every_verb_that_needs_an_extra_is_a_verb_and_the_extra_is_one(words):
    from typer.main import get_command

    from fedmezo.cli import app

    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert release.NEEDY[words] in told
    command = get_command(app)
    for word in words.split():
        if hasattr(command, "commands"):
            command = command.commands[word]


def test_the_extras_that_a_command_lacks_are_read_from_what_it_said():
    said = [str(missing("A needs b", extra="one")), "round 1", f"error: {missing('This needs c', extra='two-x')}"]
    done = subprocess.CompletedProcess([], 2, "", "\n".join(said))
    assert fresh.told_extras(done) == ["one", "two-x"]
    assert fresh.told_extras(subprocess.CompletedProcess([], 1, "", "\n".join(["Traceback (most", *said]))) == []
    assert fresh.told_extras(subprocess.CompletedProcess([], 2, "", "c is not installed")) == []


def test_no_error_tells_of_an_extra_in_words_of_its_own():
    for path in (ROOT / "src" / "fedmezo").rglob("*.py"):
        told = re.findall(r"pip install \S*fedmezo\[\S*", path.read_text(encoding="utf-8"))
        # A shell takes brackets for a pattern, unless they are quoted.
        assert all(re.match(r"pip install 'fedmezo\[[\w{}-]+\]'", one) for one in told), path


def test_importing_the_package_takes_hardly_longer_than_starting_python():
    """A ratio of two starts, taken in turns: the budget of release.py, twice as wide for machines that are busy."""
    commands = {"stdlib": "import typing, json", "import": "import fedmezo"}
    taken = {name: [] for name in commands}
    for _ in range(5):
        for name, code in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            taken[name].append(time.perf_counter() - began)
    seconds = {name: min(values) for name, values in taken.items()}
    assert seconds["import"] < 2 * release.BUDGET["import_over_stdlib"] * seconds["stdlib"]


def test_the_package_stays_small_and_has_no_large_file_but_the_tiny_model():
    files = [
        path for path in (ROOT / "src" / "fedmezo").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    sizes = {f"fedmezo/{path.relative_to(ROOT / 'src' / 'fedmezo').as_posix()}": path.stat().st_size for path in files}
    assert archives.wheel_faults(sizes) == []
    assert sum(sizes.values()) < release.BUDGET["installed_mb"] * release.MB


def test_the_kept_result_of_a_release_has_no_fault_and_is_of_this_version():
    told = json.loads((ROOT / "docs" / "results" / "release.json").read_text())
    assert told["faults"] == [] and told["version"] == fedmezo.__version__
    assert told["budget"] == release.BUDGET
    for name, most in release.BUDGET.items():
        assert told[name] <= most
    assert not told["core"].keys() & {"flwr", "plotly", "tensorboard", "mkdocs"}


def test_the_matrix_covers_every_version_that_is_promised():
    assert matrix.versions() == ["3.11", "3.12", "3.13"]
    assert all((ROOT / "tests" / name).is_file() for name in matrix.TESTS)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert matrix.find(here, [Path(sys.executable)]) == Path(sys.executable)
    assert matrix.find("3.1", [Path(sys.executable)]) is None
    assert matrix.compiled(Path(sys.executable))[1] == []


@pytest.mark.parametrize(("version", "gone"), [("3.11", set()), ("3.12", {"imp"}), ("3.13", {"imp", "cgi"})])
def test_imports_of_modules_that_a_version_lacks_are_named(tmp_path, monkeypatch, version, gone):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text(
        "import cgi.x\nfrom imp import reload\nfrom . import pipes\n__all__ = ['cgi', 'reload', 'pipes']\n"
    )
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "SOURCES", ("src",))
    assert {fault.split()[-1] for fault in matrix.static_faults(version)} == gone
