"""The site of the studies, the files in studies/ and the protocol they follow."""

import json
import re
from pathlib import Path

import pytest
from test_studies_suite import SMALL
from typer.testing import CliRunner

from fedmezo.cli_study import study_app
from fedmezo.studies.suite import Store, check_one, load_studies, run_study, write_site
from fedmezo.studies.suite.cells import cells_of
from fedmezo.studies.suite.kind_run import config_of
from fedmezo.studies.suite.kinds import KINDS
from fedmezo.studies.suite.measures import measure
from fedmezo.studies.suite.records import Record
from fedmezo.studies.suite.rules import RULES
from fedmezo.studies.suite.site import best, scales_of
from fedmezo.studies.suite.statistics import Effect, summed_up
from fedmezo.studies.suite.words import protocol_of

ROOT = Path(__file__).parents[1]
STUDIES = load_studies(ROOT / "studies")
CONFIGURED = ("run", "storage", "signal", "curvature", "heterogeneity", "constants")


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "studies"
    made.mkdir()
    (made / "small.toml").write_text(SMALL)
    return made


class TestFiles:
    def test_there_are_the_eight_studies(self):
        assert [study.order for study in STUDIES.values()] == list(range(1, 9))

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_cell_is_a_valid_configuration(self, name):
        study = STUDIES[name]
        for scale in study.scales:
            cells = cells_of(study, scale)
            assert cells and len({(cell.grid, cell.key) for cell in cells}) == len(cells)
            for cell in cells:
                assert cell.kind in KINDS
                if cell.seed == 0 and cell.kind in CONFIGURED:
                    config_of(cell.settings, cell.seed)

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_claim_has_a_rule_a_meaning_and_levels_that_exist(self, name):
        study = STUDIES[name]
        blank = Record("", "", "", "", "", {}, 0, values={"x": 1})
        for claim in study.claims:
            assert claim.rule in RULES and claim.meaning and claim.text.endswith(".")
            measure(blank, claim.measure)
            factors = study.grids[claim.grid].factors
            chosen = [claim.only, *(claim.given.get(key, {}) for key in ("a", "b", "of", "over"))]
            for factor, level in (item for some in chosen for item in some.items()):
                listed = level if isinstance(level, list) else [level]
                assert {f"{one:g}" if isinstance(one, float) else str(one) for one in listed} <= set(factors[factor])
            assert set(claim.by) <= set(factors)

    @pytest.mark.parametrize("name", STUDIES)
    def test_figures_draw_factors_that_exist(self, name):
        study = STUDIES[name]
        for figure in study.figures:
            factors = set(study.grids[figure.grid].factors)
            assert {*figure.lines, *figure.panels, *figure.only} <= factors
            assert figure.kind == "curves" or figure.x in factors
        # A page has one choice of what its curves are drawn against, and shows which one it is at first.
        assert len({figure.x for figure in study.figures if figure.kind == "curves"}) <= 1

    def test_the_tiny_set_fits_two_hours_on_two_cores(self):
        assert sum(study.scales["tiny"].minutes for study in STUDIES.values()) <= 220

    @pytest.mark.parametrize("name", STUDIES)
    def test_the_protocol_says_what_the_file_does(self, name):
        protocol = (ROOT / "docs" / "studies" / "protocol.md").read_text(encoding="utf-8")
        assert protocol_of(STUDIES[name]) in protocol

    def test_the_example_of_a_study_of_ones_own_is_one(self, tmp_path):
        text = (ROOT / "docs" / "studies" / "README.md").read_text(encoding="utf-8")
        (tmp_path / "momentum.toml").write_text(re.search(r"```toml\n(.*?)```", text, re.S)[1])
        (tmp_path / "scales.toml").write_text((ROOT / "studies" / "scales.toml").read_text())
        study = load_studies(tmp_path)["momentum"]
        assert len(cells_of(study, "tiny")) == 15 and study.claims[0].rule in RULES
        config_of(cells_of(study, "tiny")[0].settings, 0)

    def test_the_protocol_has_every_rule_and_word(self):
        protocol = (ROOT / "docs" / "studies" / "protocol.md").read_text(encoding="utf-8")
        words = {summed_up(answers) for answers in (["yes"], ["no"], ["yes", "no"], [])}
        assert all(f"**{word}**" in protocol for word in words)
        assert all(f"`{rule}`" in protocol for rule in RULES)


@pytest.mark.parametrize(("name", "kind"), [("theory", "quadratic"), ("heterogeneity", "run")])
def test_a_recorded_cell_comes_out_again(name, kind):
    store = Store(ROOT / "studies" / "records")
    if not store.of(name, "tiny"):
        pytest.skip(f"study {name} has no record at scale tiny")
    assert check_one(STUDIES[name], "tiny", store=store, kind=kind) == []


class TestSite:
    @pytest.fixture
    def site(self, folder, tmp_path):
        pytest.importorskip("plotly")
        studies, store = load_studies(folder), Store(tmp_path / "records")
        run_study(studies["small"], "tiny", store=store)
        write_site(studies, store=store, out=tmp_path / "site")
        return tmp_path / "site"

    def test_the_first_page_has_every_claim_with_its_verdict(self, site):
        page = (site / "index.html").read_text()
        assert "Fast is lower." in page and re.search(r"class='badge (holds|part|not|open)'", page)
        assert "small.html#faster" in page

    @pytest.mark.parametrize(("a", "b", "first"), [("fast", "slow", False), ("slow", "fast", True)])
    def test_claims_that_do_not_hold_stand_before_all_others(self, folder, tmp_path, a, b, first):
        swapped = SMALL.replace(
            'a = { rate = "fast" }, b = { rate = "slow" }', f'a = {{ rate = "{a}" }}, b = {{ rate = "{b}" }}'
        )
        (folder / "small.toml").write_text(swapped)
        studies, store = load_studies(folder), Store(tmp_path / "records")
        run_study(studies["small"], "tiny", store=store)
        page = write_site(studies, store=store, out=tmp_path / "site").read_text()
        assert ("What the runs do not bear out" in page) is first
        assert page.count("Fast is lower.") == 1 + first
        assert page.count("does not hold</span>") == 2 * first

    def test_a_page_has_claims_tests_figures_and_the_command(self, site):
        page = (site / "small.html").read_text()
        assert "id='faster'" in page and "fedmezo study run small --scale tiny" in page
        assert page.count("class=chart") == 4  # a chart per panel of the curves, and one of the ends
        assert "prefers-color-scheme:dark" in page and "width=device-width" in page

    def test_pages_load_nothing_but_the_script_beside_them(self, site):
        for name in ("index.html", "small.html"):
            page = (site / name).read_text()
            assert "default-src 'none'" in page and "http" not in re.sub(r"http-equiv", "", page)
            assert set(re.findall(r'src="([^"]*)"', page)) <= {"plotly.js"}
        assert (site / "plotly.js").stat().st_size > 1e6

    def test_figures_name_their_budget_and_have_bands(self, site):
        page = (site / "small.html").read_text()
        figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.S)[1])
        titles = {figure["layout"]["xaxis"]["title"]["text"] for figure in figures.values()}
        assert titles == {"Rounds done", "clients"}
        assert all(any(trace.get("fill") == "tonexty" for trace in f["data"]) for f in figures.values())

    def test_lines_that_are_numbers_say_of_what(self, folder, tmp_path):
        (folder / "small.toml").write_text(SMALL.replace('lines = ["rate"]\npanels =', "lines ="))
        studies, store = load_studies(folder), Store(tmp_path / "records")
        run_study(studies["small"], "tiny", store=store, seeds=1)
        write_site(studies, store=store, out=tmp_path / "site")
        assert "clients 2" in (tmp_path / "site" / "small.html").read_text()

    def test_memory_has_its_bytes_per_parameter(self, tmp_path):
        pytest.importorskip("plotly")
        write_site(STUDIES, store=Store(ROOT / "studies" / "records"), out=tmp_path / "site")
        page = (tmp_path / "site" / "memory.html").read_text()
        listed = page.partition("Memory per parameter, tiny")[2].partition("</table>")[0]
        cells = re.findall(r"<td[^>]*>([^<]*)", listed)
        lines = {row[0]: row for row in zip(*[iter(cells)] * 4, strict=True)}
        assert len(lines) == 16
        assert all(3.5 < float(row[1].split()[0]) < 24 and row[3].endswith(" GB") for row in lines.values())

    def test_a_scale_without_a_claims_cells_does_not_speak_for_it(self, folder, tmp_path):
        (folder / "small.toml").write_text(
            SMALL.replace("only = { clients = [1, 2] }\nseeds", "run = false\nseeds")
            + """
[grids.more]
kind = "quadratic"
[grids.more.factors]
clients = { key = "probe.clients", values = [1] }
"""
        )
        studies, store = load_studies(folder), Store(tmp_path / "records")
        run_study(studies["small"], "tiny", store=store)
        run_study(studies["small"], "small", store=store)
        scales = scales_of(studies["small"], store)
        assert [at.scale for at in scales] == ["tiny", "small"] and not scales[1].verdicts[0].tested
        assert best(scales, 0) is scales[0].verdicts[0]
        write_site(studies, store=store, out=tmp_path / "site")
        page = (tmp_path / "site" / "small.html").read_text()
        assert "There is no record of these cells" not in page

    def test_verdicts_are_written_as_json(self, site):
        told = json.loads((site / "verdicts.json").read_text())
        assert told["small"]["tiny"][0]["claim"]["id"] == "faster"

    def test_without_records_the_site_says_so(self, folder, tmp_path):
        page = write_site(load_studies(folder), store=Store(tmp_path / "none"), out=tmp_path / "site")
        assert "No record yet" in page.read_text()
        assert "No record yet" in (tmp_path / "site" / "small.html").read_text()

    def test_names_from_files_are_escaped(self, folder, tmp_path):
        (folder / "small.toml").write_text(SMALL.replace("Is it so?", "<script>alert(1)</script>"))
        write_site(load_studies(folder), store=Store(tmp_path / "none"), out=tmp_path / "site")
        assert "<script>alert" not in (tmp_path / "site" / "index.html").read_text()


class TestCommand:
    def asked(self, folder, tmp_path, *words):
        return CliRunner().invoke(study_app, [*words, "--studies", str(folder), "--records", str(tmp_path / "records")])

    def test_list_run_check_and_report(self, folder, tmp_path):
        pytest.importorskip("plotly")
        assert "small" in self.asked(folder, tmp_path, "list").output
        assert self.asked(folder, tmp_path, "run", "small", "--seeds", "1", "--quiet").exit_code == 0
        listed = self.asked(folder, tmp_path, "list", "--json").output
        assert next(row for row in json.loads(listed)["studies"] if row["scale"] == "tiny")["records"] == 5
        assert "stand" in self.asked(folder, tmp_path, "check", "small").output
        assert self.asked(folder, tmp_path, "report", "--out", str(tmp_path / "site")).exit_code == 0
        assert (tmp_path / "site" / "index.html").exists()

    def test_one_grid_and_some_levels_may_be_run(self, folder, tmp_path):
        words = ("run", "small", "--seeds", "1", "--grid", "main", "--only", "rate=slow", "--only", "clients=2")
        assert "1 cells" in self.asked(folder, tmp_path, *words).output
        records = Store(tmp_path / "records").of("small", "tiny")
        assert [dict(record.levels) for record in records] == [{"clients": "2", "rate": "slow"}]

    @pytest.mark.parametrize(
        ("words", "told"), [(("--only", "rate"), "FACTOR=LEVEL"), (("--grid", "odd"), "it has main")]
    )
    def test_a_choice_that_is_none_is_told(self, folder, tmp_path, words, told):
        assert told in str(self.asked(folder, tmp_path, "run", "small", *words).exception)

    def test_an_unknown_study_is_told_with_those_there_are(self, folder, tmp_path):
        result = self.asked(folder, tmp_path, "run", "nonsense")
        assert result.exit_code != 0 and "small" in str(result.exception)


def test_an_effect_without_seeds_is_a_dash():
    from fedmezo.studies.suite.claims import effect_text

    assert effect_text(Effect(float("nan"), float("-inf"), float("inf"), 0)) == "–"  # noqa: RUF001
