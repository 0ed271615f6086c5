"""Whether a package of the tested set (constraints.txt) has a known vulnerability, by pip-audit.

Run: python scripts/audit.py          (or: make audit)

It fails when one has. Where the database cannot be asked it says so in one line that begins with SKIPPED, and does not
fail: a build without a network must be possible, a silent one must not. A mirror of PyPI may serve packages and know of
no vulnerability, so that everything looks sound; so first it is asked about a package that is known not to be.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LOCKED = Path(__file__).parent.parent / "constraints.txt"
CANARY = "jinja2==2.10"  # its sandbox can be left: CVE-2019-10906
# Vulnerabilities that were looked at and do not reach this program: id -> why.
ACCEPTED: Mapping[str, str] = {}
LONGEST = 300.0  # seconds
Ask = Callable[[Sequence[str]], list[dict[str, Any]]]


class UnreachableError(Exception):
    """The database gave no answer."""


def ask(pins: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what pip-audit says of some pinned packages: name, version, vulns, or skip_reason.

    Raises:
      UnreachableError: it could not ask.
    """
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--no-deps"]
    try:
        found = subprocess.run(
            [*command, "--disable-pip", "--requirement", "/dev/stdin"],
            input="\n".join(pins), capture_output=True, text=True, timeout=LONGEST,
        )  # fmt: skip
        told = json.loads(found.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnreachableError(f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        last = (found.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise UnreachableError(last[:300]) from error
    return list(told["dependencies"])


def pins_of(text: str) -> list[str]:
    """Returns the lines of a constraints file that pin something."""
    return re.findall(r"^[\w.-]+==[^\s;#]+", text, re.MULTILINE)


def audit(pins: Sequence[str], *, ask: Ask = ask) -> tuple[int, list[str]]:
    """Returns the exit status, 1 for a known vulnerability, and what is to be said.

    Args:
      pins: name==version of each package.
      ask: what is known of some pins.
    """
    try:
        if not any(one.get("vulns") for one in ask([CANARY])):
            raise UnreachableError(f"of {CANARY}, which has known vulnerabilities, it knows none")
        found = ask(pins)
    except UnreachableError as error:
        why = str(error).rstrip(".")
        return 0, [f"SKIPPED the audit of {len(pins)} packages: no database of vulnerabilities is reachable ({why})."]
    bad = [
        f"{one['name']} {one['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no version yet'}"
        for one in found
        for flaw in one.get("vulns", ())
        if not {flaw["id"], *flaw.get("aliases", ())} & ACCEPTED.keys()
    ]
    unknown = [f"NOT AUDITED {one['name']}: {one['skip_reason']}" for one in found if "skip_reason" in one]
    good = len(found) - len(unknown)
    return bool(bad), [*bad, *unknown, f"{good} of {len(pins)} packages audited, {len(bad)} known vulnerabilities."]


def main() -> None:
    """Says what was found; the exit status is 1 for a known vulnerability, or where pip-audit is not installed."""
    if find_spec("pip_audit") is None:
        raise SystemExit("pip-audit is not installed; run: pip install -e '.[dev]'")
    status, lines = audit(pins_of(LOCKED.read_text(encoding="utf-8")))
    print("\n".join(lines))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
