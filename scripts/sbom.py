"""The bill of materials of a release: every package of the tested set (constraints.txt), as CycloneDX 1.6 in JSON.

Run: python scripts/sbom.py --out dist/sbom.json          (or: make sbom)

A package is "required" when an installation without extras has it, "optional" when one of the extras for users brings
it, and "excluded" when only development does. Licences and who needs whom are what the packages installed here say of
themselves. The same set gives the same bytes; the time is that of SOURCE_DATE_EPOCH, when that is set.
"""

import argparse
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "fedmezo"
LOCKED = Path(__file__).parent.parent / "constraints.txt"
DEVELOPMENT = "dev"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", re.MULTILINE)


def pins_of(text: str) -> dict[str, str]:
    """Returns name -> version of every pin of a constraints file."""
    return {canonicalize_name(name): version for name, version in _PIN.findall(text)}


def installed(name: str) -> Distribution | None:
    """Returns what is installed under a name."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def needs(name: str, extras: Iterable[str] = ()) -> Iterator[tuple[str, frozenset[str]]]:
    """Yields what a package needs on this machine, and with which extras."""
    found = installed(name)
    for text in (found.requires or ()) if found is not None else ():
        wanted = Requirement(text)
        asked = [{"extra": extra} for extra in ("", *extras)]
        if wanted.marker is None or any(map(wanted.marker.evaluate, asked)):
            yield canonicalize_name(wanted.name), frozenset(wanted.extras)


def reached(extras: Iterable[str]) -> set[str]:
    """Returns every package that an installation with these extras has."""
    waiting, seen = [(ROOT, frozenset(extras))], set()
    while waiting:
        asked = waiting.pop()
        if asked not in seen:
            seen.add(asked)
            waiting += needs(*asked)
    return {name for name, _ in seen}


def component(name: str, version: str, scope: ComponentScope | None) -> Component:
    """Returns a package of the set."""
    found, factory = installed(name), LicenseFactory()
    told = found.metadata if found is not None else {}
    licence = told.get("License-Expression") or (told.get("License") or "").strip()
    short = licence if licence and len(licence) < 80 and "\n" not in licence else None
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"{name}=={version}",
        purl=PackageURL("pypi", None, name, version),
        scope=scope,
        licenses=[factory.make_from_string(short)] if short else (),
    )


def bill(pins: Mapping[str, str], *, version: str, moment: datetime) -> Bom:
    """Returns the bill of a release."""
    extras = {extra for extra in (distribution(ROOT).metadata.get_all("Provides-Extra") or ()) if extra != DEVELOPMENT}
    scopes = dict.fromkeys(pins, ComponentScope.EXCLUDED)
    scopes |= dict.fromkeys(reached(extras), ComponentScope.OPTIONAL)
    scopes |= dict.fromkeys(reached(()), ComponentScope.REQUIRED)
    root = component(ROOT, version, None)
    parts = {name: component(name, pin, scopes[name]) for name, pin in sorted(pins.items())}
    serial = uuid.uuid5(uuid.NAMESPACE_URL, repr((version, sorted(pins.items()))))
    bom = Bom(components=parts.values(), serial_number=serial)
    bom.metadata.component, bom.metadata.timestamp = root, moment
    for name, part in [(ROOT, root), *parts.items()]:
        wanted = {other for other, _ in needs(name, extras if name == ROOT else ())}
        bom.register_dependency(part, [parts[other] for other in sorted(wanted & parts.keys())])
    return bom


def main() -> None:
    """Writes the file."""
    from fedmezo import __version__

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist/sbom.json"))
    given = parser.parse_args()
    moment = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())), UTC)
    made = bill(pins_of(LOCKED.read_text(encoding="utf-8")), version=__version__, moment=moment)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(JsonV1Dot6(made).output_as_string(indent=2) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(made.components)} packages")


if __name__ == "__main__":
    main()
