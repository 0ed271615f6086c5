"""Writes the tables of docs/studies/protocol.md anew from studies/*.toml; what stands before them is left as it is.

python scripts/protocol.py
"""

from pathlib import Path

from fedmezo.studies.suite import load_studies, protocol_of

FIRST = "## 1. "


def main() -> None:
    root = Path(__file__).parents[1]
    path = root / "docs" / "studies" / "protocol.md"
    head, _, _ = path.read_text(encoding="utf-8").partition(FIRST)
    path.write_text(head + "\n".join(map(protocol_of, load_studies(root / "studies").values())), encoding="utf-8")


if __name__ == "__main__":
    main()
