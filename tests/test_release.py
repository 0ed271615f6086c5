"""What a release is checked for: known vulnerabilities of the tested set, and its bill of materials."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import audit

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
