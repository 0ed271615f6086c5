"""The pages that explain: excerpts are the source, pictures are their script's, figures are those of the records."""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from textwrap import dedent
from xml.etree import ElementTree

import pytest

from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.wire import encode_reply, encode_task
from fedmezo.studies.config import Config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
SOURCE = ROOT / "src" / "fedmezo"
ALGORITHMS = sorted((DOCS / "algorithms").glob("*.md"))
OURS = [DOCS / "concepts.md", DOCS / "choosing.md", *ALGORITHMS]
EXCERPT = re.compile(r'^```py title="(?P<file>[^"]+)"\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
SVG = "{http://www.w3.org/2000/svg}"

sys.path.insert(0, str(ROOT / "scripts"))
import pictures  # noqa: E402


def name_of(page):
    return page.relative_to(DOCS).as_posix()


# --- excerpts --------------------------------------------------------------------------------------------------------


def is_in(part, source):
    """Whether these lines stand in a file one after another, at whatever indentation; empty lines do not count."""
    wanted = [line for line in dedent(part).splitlines() if line.strip()]
    lines = [line for line in source.splitlines() if line.strip()]
    return any(
        dedent("\n".join(lines[at : at + len(wanted)])).splitlines() == wanted
        for at in range(len(lines) - len(wanted) + 1)
    )


def excerpts():
    pages = sorted(DOCS.rglob("*.md"))
    return [(page, found["file"], found["text"]) for page in pages for found in EXCERPT.finditer(page.read_text())]


@pytest.mark.parametrize(("page", "file", "text"), [pytest.param(*one, id=name_of(one[0])) for one in excerpts()])
def test_an_excerpt_is_what_the_source_says(page, file, text):
    source = (ROOT / file).read_text()
    for part in re.split(r"^\.\.\.\n", text, flags=re.MULTILINE):
        assert part.strip() and is_in(part, source), f"{name_of(page)}: not in {file}:\n{part}"


def test_a_stale_excerpt_is_found():
    source = "def f(x):\n    if x:\n        return 1\n    return 2\n"
    assert is_in("    if x:\n        return 1\n", source) and is_in("return 2\n", source)
    assert not is_in("    if x:\n        return 2\n", source) and not is_in("if x:\nreturn 1\n", source)


def test_every_algorithm_is_read_beside_its_code():
    files = defaultdict(set)
    for page, file, _ in excerpts():
        files[page.stem].add(file)
    for page in ALGORITHMS:
        assert files[page.stem], page
    for name in ("fedmezo", "fedkseed", "fedavg"):
        assert f"src/fedmezo/fl/{name}.py" in files[name]


def test_what_a_table_points_to_exists():
    """The last column of a line-by-line table: paths are there, names are defined somewhere."""
    sources = "\n".join(path.read_text() for path in SOURCE.rglob("*.py"))
    checked = 0
    for page in ALGORITHMS:
        for row in re.findall(r"^\| (?:S|[SCP]\d(?:, \w\d)?) \|.*\|(.*)\|$", page.read_text(), re.MULTILINE):
            for name in re.findall(r"`([^`]+)`", row):
                if name.endswith(".py"):
                    assert (SOURCE / name).is_file(), (page.name, name)
                else:
                    last = re.escape(name.rpartition(".")[2])
                    assert re.search(rf"\b(?:def|class) {last}\b|^    {last}: ", sources, re.MULTILINE), name
                checked += 1
    assert checked > 30


def test_every_key_that_a_page_lists_is_a_key():
    known = {
        name: set(field.annotation.model_fields) for name, field in Config.model_fields.items() if field.annotation
    }
    for page in ALGORITHMS:
        keys = page.read_text().partition("\n## Keys\n")[2]
        for word in re.findall(r"`([a-z_.]+)(?: = [^`]*)?`", keys):
            section, _, key = word.rpartition(".")
            assert key in known[section] if section else any(key in names for names in known.values()), (page, word)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_the_pictures_are_what_their_script_draws():
    assert {path.name for path in pictures.FOLDER.iterdir()} == set(pictures.PICTURES)
    for name, draw in pictures.PICTURES.items():
        assert (pictures.FOLDER / name).read_text(encoding="utf-8") == draw(), "run: python scripts/pictures.py"


def test_every_picture_is_shown_with_words_for_those_who_do_not_see_it():
    shown = {path: words for words, path in re.findall(r"!\[([^\]]*)\]\(pictures/([^)]+)\)", (OURS[0]).read_text())}
    assert set(shown) == set(pictures.PICTURES)
    assert all(len(words.split()) >= 10 for words in shown.values())


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_legible_on_a_phone(name):
    root = ElementTree.fromstring(pictures.PICTURES[name]())
    assert root.find(f"{SVG}title").text and len(root.find(f"{SVG}desc").text.split()) > 15
    style = root.find(f"{SVG}style").text
    sizes = [int(size) for size in re.findall(r"font-size:(\d+)px", style)]
    # 320 pixels are what is left of a small phone's width; 11 pixels are the smallest print that is read.
    assert min(sizes) * 320 / pictures.WIDTH > 11
    for words in root.iter(f"{SVG}text"):
        kind, x = words.get("class", ""), float(words.get("x"))
        # What DejaVu Sans, a wide one, takes.
        wide = len(words.text) * (8.2 if "strong" in kind else 7.4 if "small" in kind else 7.7)
        left = x - (wide / 2 if "mid" in kind else wide if "end" in kind else 0)
        assert left > 0 and left + wide < pictures.WIDTH, words.text


def colours(style):
    """Returns class -> fill of a style's rules."""
    return {
        name: fill
        for names, rule in re.findall(r"([^{}]+)\{([^{}]*)\}", style)
        for fill in re.findall(r"(?:^|;)fill:(#[0-9a-f]{3,6})", rule)
        for name in [names.strip()]
    }


def light(colour):
    digits = "".join(2 * c for c in colour[1:]) if len(colour) == 4 else colour[1:]
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(scheme):
    day, night = pictures.STYLE.split("@media (prefers-color-scheme:dark){")
    fills = colours(day) | (colours(night) if scheme == "dark" else {})
    grounds = [fills[name] for name in (".ground", ".box", ".now", ".one", ".two", ".three")]
    for words, under in [
        ("text", grounds),
        (".soft", grounds[:3]),
        ("text.plus", grounds[:1]),
        ("text.minus", grounds[:1]),
    ]:
        for ground in under:
            high, low = sorted((light(fills[words]), light(ground)), reverse=True)
            assert (high + 0.05) / (low + 0.05) > 4.5, (scheme, words, ground)


def test_the_bytes_in_the_picture_of_a_round_are_those_of_the_wire():
    drawn = pictures.round_()
    assert f"task: {len(encode_task(Task(0, 0, 0, 1e-3, 1e-3, 30)))} bytes" in drawn
    for steps in (1, 30):
        assert len(encode_reply(Reply(0, 0, steps, 2.0, (0.5,) * steps))) == 36 + 4 * steps
    assert "reply: 36 + 4H bytes" in drawn


# --- figures ---------------------------------------------------------------------------------------------------------


def table(name):
    """Returns the rows of a marked table of choosing.md."""
    text = (DOCS / "choosing.md").read_text()
    marked = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in marked[1].strip().splitlines()[2:]]


def test_the_table_of_rates_is_that_of_the_records():
    falls, dims = defaultdict(lambda: defaultdict(list)), {}
    for row in map(json.loads, (RESULTS / "rates.jsonl").read_text().splitlines()):
        dims[row["task"]] = row["dim"]
        if row["arm"] == "grid":
            falls[row["task"]][row["rate"]].append(row["start"] - (math.inf if row["end"] is None else row["end"]))
    expected = []
    for task, grid in falls.items():
        best = max((rate for rate, seen in grid.items() if len(seen) == 3), key=lambda rate: fmean(grid[rate]))
        lost = [rate for rate, seen in grid.items() if rate > best and min(seen) < 0]
        start = 0.3 / math.sqrt(dims[task])
        expected.append(
            [task, f"{dims[task]:,}", f"{start:.3g}", f"{best:.3g}", f"{best / start:.2g} times",
             f"{min(lost):.3g}" if lost else "not in the grid"]
        )  # fmt: skip
    assert sorted(table("best")) == sorted(expected)


def test_the_table_of_mus_is_that_of_the_records():
    rows = json.loads((RESULTS / "signal.json").read_text())
    plain = [row for row in rows if row["quantize"] == "none" and row["spread"] == 0]
    bends = {row["mu"]: row["bend"] for row in plain if row["dtype"] == "float32"}
    expected = [
        [f"{row['mu']:g}", f"{row['signal']:.3g}", f"{row['noise']:.3g}", f"{bends[row['mu']]:.3g}"]
        for row in plain
        if row["dtype"] == "bfloat16"
    ]
    assert table("signal") == expected
    assert {(row["directions"], row["tokens"]) for row in rows} == {(32, 64)}


def test_the_figures_behind_the_local_steps_are_those_of_the_records():
    start = next(row for row in json.loads((RESULTS / "constants.json").read_text())["rows"] if row["point"] == "start")
    text = (DOCS / "choosing.md").read_text()
    told = {name: float(f"{start[name]:.3g}") for name in ("gradient2", "along", "stretch")}
    assert f"start = {json.dumps(told)}" in text
    assert (
        f"{start['batch2'] / start['gradient2']:.1f} times |∇f|² ({start['batch2']:.2f} and {told['gradient2']}" in text
    )
    low, high = start["intervals"]["along"]
    assert low < 0 < high, "the page says that the sign is open"
