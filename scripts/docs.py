"""What the site needs beyond its Markdown; a hook of mkdocs (mkdocs.yml).

- A link to a file outside docs/, or to a raw result, leads to a copy of that file in the site. What is large, or a
  folder, is named without a link.
- Links and search work in a site that is opened from a folder.
- The comments that tell the tests how to run a block (tests/blocks.py) are taken out.
- `<!-- verbs -->` becomes the list of all commands, `<!-- keys -->` that of all keys of a configuration.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LARGEST = 300_000  # bytes of a file that is copied into the site
LINK = re.compile(r"(?P<text>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"<!--\s*(?:setup|with|parsed|file|exit):.*?-->\n?", re.DOTALL)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Adds the files that pages link to from outside the site."""
    from mkdocs.structure.files import File

    wanted = {path for page in files.documentation_pages() for path in _outside(page.content_string, page.src_uri)}
    for path in sorted(wanted):
        if _fits(path):
            files.append(File.generated(config, _copy_of(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Returns the page's Markdown for the site."""
    text = _between_fences(markdown, lambda part: _rewritten(part, page.file.src_uri))
    for mark, made in (("<!-- verbs -->", verbs_text), ("<!-- keys -->", keys_text)):
        if mark in text:
            text = text.replace(mark, made())
    return text


def on_post_build(config: "MkDocsConfig") -> None:
    """Writes the search index as a script, too: pages that are opened from a folder can read no other file."""
    index = Path(config.site_dir, "search", "search_index.json")
    index.with_suffix(".js").write_text(f"var __index = {index.read_text(encoding='utf-8')}", encoding="utf-8")


def _between_fences(text: str, change: Callable[[str], str]) -> str:
    parts: list[str] = []
    at = 0
    for fence in FENCE.finditer(text):
        parts += [change(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(text[at:])])


def _target(link: re.Match[str], page: str) -> Path | None:
    """Returns the file outside the site that a link leads to."""
    if "://" in link["target"] or link["target"].startswith(("mailto:", "/")):
        return None
    path = Path(posixpath.normpath(posixpath.join((DOCS / page).parent.as_posix(), link["target"])))
    inside = DOCS in path.parents and DOCS / "results" not in path.parents
    return None if inside or not path.exists() else path


def _outside(text: str, page: str) -> Iterator[Path]:
    links = LINK.finditer(FENCE.sub("", text))
    yield from (path for link in links if (path := _target(link, page)) is not None)


def _fits(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= LARGEST


def _copy_of(path: Path) -> str:
    # As text, so that a browser shows it whatever it is.
    return f"files/{path.relative_to(ROOT).as_posix()}.txt"


def _rewritten(text: str, page: str) -> str:
    def led(link: re.Match[str]) -> str:
        path = _target(link, page)
        if path is None:
            return link[0]
        if not _fits(path):
            return link["text"][1:-1]
        return f"{link['text']}({posixpath.relpath(_copy_of(path), posixpath.dirname(page) or '.')})"

    return LINK.sub(led, HIDDEN.sub("", text))


# --- reference pages -------------------------------------------------------------------------------------------------


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _walk(names: tuple[str, ...], command: click.Command) -> Iterator[tuple[str, click.Command]]:
    below = getattr(command, "commands", {})
    if names and not below:
        yield " ".join(names), command
    for name in sorted(below):
        yield from _walk((*names, name), below[name])


def verbs_text() -> str:
    """Returns every command with its usage, help and options, as Markdown."""
    from fedmezo.cli import _command

    return "\n\n".join(_verb_text(name, command) for name, command in _walk((), _command()))


def _verb_text(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name)
    usage = " ".join(["fedmezo", name, *command.collect_usage_pieces(context)])
    lines = [f"## fedmezo {name}", "", f"```text\n{usage}\n```", "", (command.help or "").strip(), ""]
    records = [record for option in command.params if (record := option.get_help_record(context))]
    if records:
        lines += ["| | |", "|---|---|", *(f"| `{left}` | {_cell(right)} |" for left, right in records)]
    return "\n".join(lines)


def keys_text() -> str:
    """Returns every key of a configuration with its default and meaning, as Markdown."""
    from fedmezo.studies.config import Config
    from fedmezo.studies.keys import note_of
    from fedmezo.studies.tomltext import value_text

    parts = []
    for name, field in Config.model_fields.items():
        kind = field.annotation
        section = kind()
        lines = [f"## {name}", "", (kind.__doc__ or "").strip(), "", "| key | default | |", "|---|---|---|"]
        for key, about in kind.model_fields.items():
            also = note_of(kind, key, "also")
            known = f" Also called {', '.join(f'`{word}`' for word in also)}." if also else ""
            default = value_text(section, key)
            shown = f"`{default}`" if default is not None else "none"
            lines.append(f"| `{key}` | {shown} | {_cell(about.description)}{known} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
