"""The documentation: every block runs, every page is in the site, every verb and name is told of."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from blocks import ROOT, BlockError, commands, read_blocks, run_page

import fedmezo
from fedmezo.cli import _command
from fedmezo.theory.errata import ERRATA

DOCS = ROOT / "docs"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(path for path in DOCS.rglob("*.md") if "results" not in path.relative_to(DOCS).parts),
    ]
)
# What these pages tell takes hours; the verbs have tests of their own.
ONLY_PARSED = {"docs/studies/README.md": "the studies take two hours", "docs/studies/protocol.md": "the same"}
SLOW = set()  # pages of more than 20 seconds


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) in SLOW)) for page in PAGES],
)
def test_every_block_of_a_page_runs(page, tmp_path):
    run_page(page, tmp_path, only_parse=name_of(page) in ONLY_PARSED)


def test_a_fifth_of_all_blocks_at_most_is_only_parsed(capsys):
    found = [(page, block) for page in PAGES for block in read_blocks(page.read_text()) if block.counts]
    parsed = [(page, block) for page, block in found if block.parsed or name_of(page) in ONLY_PARSED]
    lines = [f"{len(parsed)} of {len(found)} blocks are only parsed:"]
    for page, block in parsed:
        reason = ONLY_PARSED.get(name_of(page)) or block.notes.get("parsed", "programs of other places")
        assert reason, f"{name_of(page)}, line {block.line}: say why it is only parsed"
        lines.append(f"  {name_of(page)}:{block.line} {block.language}: {reason}")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert len(parsed) <= len(found) / 5


def test_a_broken_block_is_told_with_its_line(tmp_path):
    page = tmp_path / "page.md"
    for number, text in enumerate(
        [
            "```python\n1 / 0\n```\n",
            "```python\n>>> 1 + 1\n3\n\n```\n",
            "```bash\nfedmezo runn\n```\n",
            "```bash\nunheard-of program\n```\n",
            "```toml\n[model]\nnmae = 'x'\n```\n",
            "<!-- parsed: why -->\n```bash\nfedmezo run --sett a.b=c\n```\n",
            "<!-- parsed: why -->\n```bash\nfedmezo run --set algorithm.rat=1\n```\n",
            "```bash\nmake nothing\n```\n",
            "```bash\npip install 'fedmezo[nothing]'\n```\n",
            "<!-- with: --no-such -->\n```bash\nfedmezo config show\n```\n",
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        page.write_text(text)
        with pytest.raises(BlockError, match=r"page\.md, line [12]"):
            run_page(page, folder)


def test_what_a_block_writes_is_there_for_the_next(tmp_path):
    (tmp_path / "folder").mkdir()
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup: printf 'one\\n' > a.txt -->\n```toml\n# file: my.toml\n[federation]\nrounds = 7\n```\n"
        "<!-- with: --set federation.clients=5 -->\n```bash\ncp a.txt b.txt  # a copy\n"
        "fedmezo config show my.toml \\\n    --json > c.json\nfedmezo config show my.toml | grep -c rounds\n```\n"
        "```python\nimport json\nfrom pathlib import Path\n"
        "shown = json.loads(Path('c.json').read_text())['federation']\n```\n"
        "<!-- exit: 2 -->\n```bash\nfedmezo config show nothing.toml\n```\n"
        "```python\n>>> shown['rounds'], shown['clients'], Path('b.txt').read_text()\n(7, 5, 'one\\n')\n\n```\n"
    )
    assert run_page(page, tmp_path / "folder") == 5


def test_a_comment_for_no_block_or_of_an_unknown_word_is_an_error():
    with pytest.raises(BlockError, match="no fence"):
        read_blocks("<!-- parsed: why -->\nwords\n")
    with pytest.raises(BlockError, match="unknown word"):
        read_blocks("<!-- parse: why -->\n")
    assert read_blocks("<!-- demo -->\n| a |\n<!-- /demo -->\n") == []


# --- what is told ----------------------------------------------------------------------------------------------------


def verbs():
    """Every verb, such as "run" or "analyze mu"."""
    waiting, found = [((), _command())], []
    while waiting:
        names, command = waiting.pop()
        below = getattr(command, "commands", {})
        waiting += [((*names, name), part) for name, part in below.items()]
        found += [" ".join(names)] if names and not below else []
    return sorted(found)


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_is_told_of_somewhere(verb):
    text = "\n".join(page.read_text() for page in PAGES)
    assert re.search(rf"fedmezo {verb}\b", text), f"no page tells of `fedmezo {verb}`"


def test_every_public_name_is_in_the_api_pages():
    told = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    missing = {name for name in fedmezo.__all__ if not re.search(rf"^::: fedmezo(\.\w+)*\.{name}$", told, re.MULTILINE)}
    assert missing - {"__version__"} == set()


def test_every_page_is_in_the_navigation_and_back():
    listed = set(re.findall(r"\b[\w./-]+\.md\b", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents}
    assert listed == pages


def test_every_link_of_a_page_leads_to_a_file():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


# --- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("needs the extra docs")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_site_builds_strictly_and_asks_no_other_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", tag) or 'rel="canonical"' in tag, (page.name, tag)
    assert not (site / "results").exists()


def test_every_link_of_the_site_leads_to_a_file_in_it(site):
    found = 0
    for page in site.rglob("*.html"):
        for target in re.findall(r"(?:href|src)=\"?([^\"\s>]+)", page.read_text()):
            if "://" in target or target.startswith(("#", "mailto:", "data:")):
                continue
            place = site / target[1:] if target.startswith("/") else page.parent / target
            assert Path(str(place).partition("#")[0].partition("?")[0]).exists(), f"{page.name}: {target}"
            found += 1
    assert found > 1000


def test_files_outside_the_docs_are_copied_and_large_results_are_not(site):
    assert (site / "files/examples/own_loop.py.txt").read_bytes() == (ROOT / "examples/own_loop.py").read_bytes()
    assert not list(site.rglob("compare-dolly*"))


def test_the_search_index_holds_every_page(site):
    index = (site / "search" / "search_index.json").read_text()
    for page in PAGES:
        if DOCS in page.parents and page.name not in ("index.md", "README.md"):
            assert page.relative_to(DOCS).with_suffix(".html").as_posix() in index
    assert (site / "search" / "search_index.js").read_text() == f"var __index = {index}"


def test_no_hidden_comment_shows_in_the_site(site):
    for page in site.rglob("*.html"):
        assert not re.search(r"<!--\s*(setup|with|parsed|file|exit):", page.read_text()), page


def test_commands_are_joined_and_heredocs_whole():
    text = "# a comment\nfedmezo run \\\n  my.toml\ncat > a <<'END'\none\nEND\nls\n"
    assert commands(text) == ["fedmezo run my.toml", "cat > a <<'END'\none\nEND", "ls"]


def test_the_errata_page_has_every_erratum_and_names_tests_that_exist():
    text = (DOCS / "errata.md").read_text()
    assert re.findall(r"^## (E\d+)$", text, re.MULTILINE) == [erratum.key for erratum in ERRATA]
    tests = {name for part in ("theory_errata", "peers_defects") for name in _tests_of(f"test_{part}.py")}
    assert set(re.findall(r"`(test_\w+)`", text)) <= tests
    shown = {name for name in _tests_of("test_theory_errata.py") if re.match(r"test_e\d+_", name)}
    assert shown <= set(re.findall(r"`(test_\w+)`", text))


def _tests_of(name):
    return re.findall(r"^def (test_\w+)", (ROOT / "tests" / name).read_text(), re.MULTILINE)


def test_every_quoted_excerpt_is_in_the_file_it_names():
    for page in PAGES:
        for block in read_blocks(page.read_text()):
            if title := re.search(r'title="(src/[^"]+|examples/[^"]+)"', block.rest):
                code = " ".join((ROOT / title[1]).read_text().split())
                for part in re.split(r"^\s*\.\.\.$", block.text, flags=re.MULTILINE):
                    assert " ".join(part.split()) in code, f"{name_of(page)}, line {block.line}: not in {title[1]}"
