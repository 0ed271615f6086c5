"""The studies: cells and their names, records, rules, verdicts; the runs are seconds long."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo.errors import ConfigError
from fedmezo.studies.suite.cells import Cell, cells_of, matches, missing_variables, nested
from fedmezo.studies.suite.claims import effect_text, judge
from fedmezo.studies.suite.execute import Progress, check_one, run_study
from fedmezo.studies.suite.lines import rows_of
from fedmezo.studies.suite.measures import measure, surge_at
from fedmezo.studies.suite.records import Record, Store
from fedmezo.studies.suite.rules import RULES, answers_of
from fedmezo.studies.suite.statistics import Effect, alike, effect_of, lower, no_worse, slope_of, summed_up, within
from fedmezo.studies.suite.study import Claim, Slope, Study, load_studies, load_study

SMALL = """
order = 3
title = "Small"
question = "Is it so?"
seeds = 3
base = { probe.dim = 6, probe.rounds = 8 }
[grids.main]
kind = "quadratic"
set = { probe.noise = 1.0 }
skip = [{ clients = 4, rate = "slow" }]
[grids.main.factors]
clients = { key = "probe.clients", values = [1, 2, 4] }
rate.slow = { probe.rate = 0.01 }
rate.fast = { probe.rate = 0.1 }
[scales.tiny]
[scales.small]
set = { probe.dim = 12 }
[scales.small.grids.main]
only = { clients = [1, 2] }
seeds = 2
levels.rate.fast = { probe.rate = 0.2 }
[[claims]]
id = "faster"
where = "Fig 1"
text = "Fast is lower."
rule = "lower"
grid = "main"
measure = "end"
by = ["clients"]
only = { clients = [1, 2] }
given = { a = { rate = "fast" }, b = { rate = "slow" }, margin = 0.0 }
[[figures]]
title = "Loss"
grid = "main"
lines = ["rate"]
panels = ["clients"]
[[figures]]
title = "End"
grid = "main"
kind = "levels"
lines = ["rate"]
x = "clients"
measure = "end"
"""


# Two seeds: two short cells, then two that would take hours.
LONG = """
order = 1
title = "Long"
question = "How long?"
seeds = 2
[grids.short]
kind = "quadratic"
set = { probe.rounds = 2 }
factors.rounds = { few = {} }
[grids.long]
kind = "quadratic"
set = { probe.rounds = 1000000000 }
factors.rounds = { many = {} }
[scales.tiny]
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    path = tmp_path / "studies" / "small.toml"
    path.parent.mkdir()
    path.write_text(SMALL)
    return load_study(path)


def record(seed=0, loss=(2.0, 1.0), *, error="", values=None, **levels) -> Record:
    points = [
        {"rounds": float(at), "forwards": 10.0 * at, "tokens": 0.0, "seconds": 0.0, "bytes": 0.0, "loss": value}
        for at, value in enumerate(loss)
    ]
    key = json.dumps([seed, levels])
    return Record(key, "s", "main", "tiny", "run", levels, seed, points, values or {}, 1.0, "0", error)


def claim(rule="lower", measure="end", **given) -> Claim:
    more = {name: given.pop(name) for name in ("by", "only", "fewest") if name in given}
    return Claim(id="c", where="", text="", rule=rule, grid="main", measure=measure, given=given, **more)


def alive(pid: int) -> bool:
    """Whether a process is there and not merely unburied."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(done, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


class TestCells:
    def test_every_combination_that_is_not_skipped_is_a_cell_of_every_seed(self, study):
        cells = cells_of(study, "tiny")
        assert len(cells) == 3 * (3 * 2 - 1)
        assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
        assert not any(matches(cell.levels, {"clients": 4, "rate": "slow"}) for cell in cells)

    def test_a_scale_changes_settings_levels_and_seeds(self, study):
        cells = cells_of(study, "small")
        assert len(cells) == 2 * 2 * 2 and {cell.settings["probe"]["dim"] for cell in cells} == {12}
        assert {cell.settings["probe"]["rate"] for cell in cells if cell.levels["rate"] == "fast"} == {0.2}

    def test_the_seeds_asked_for_win(self, study):
        assert {cell.seed for cell in cells_of(study, "small", seeds=5)} == set(range(5))

    def test_a_grid_and_levels_can_be_chosen(self, study):
        cells = cells_of(study, "tiny", seeds=1, grids=["main"], only={"rate": ["slow"], "clients": ["1", "2"]})
        assert [(cell.levels["clients"], cell.levels["rate"]) for cell in cells] == [("1", "slow"), ("2", "slow")]

    @pytest.mark.parametrize(
        ("grids", "only", "word"),
        [(["odd"], {}, "no grid 'odd'"), ([], {"rate": ["odd"]}, "slow, fast"), ([], {"odd": ["1"]}, "no factor odd")],
    )
    def test_a_grid_or_level_that_is_not_there_is_an_error_that_tells_what_is(self, study, grids, only, word):
        with pytest.raises(ConfigError, match=word):
            cells_of(study, "tiny", grids=grids, only=only)

    def test_keys_name_what_is_run_and_nothing_else(self, study):
        cells = cells_of(study, "tiny")
        assert len({cell.key for cell in cells}) == len(cells)
        assert replace(cells[0], study="other", grid="g", levels={}).key == cells[0].key
        assert replace(cells[0], seed=99).key != cells[0].key

    def test_a_key_is_the_same_on_every_machine(self):
        cell = Cell("s", "g", "tiny", "run", {}, 0, {"model": {"name": "builtin:tiny"}})
        assert cell.key == "c4b572fa5a70ff2d"

    def test_later_settings_win_and_a_path_takes_the_place_of_a_name(self):
        assert nested({"a": {"x": 1, "y": 2}}, {"a.x": 3}) == {"a": {"x": 3, "y": 2}}
        assert nested({"data": {"name": "n"}}, {"data.path": "p"}) == {"data": {"path": "p"}}
        with pytest.raises(ConfigError, match=r"section\.key"):
            nested({"a": 1})

    def test_a_cell_tells_which_variables_it_lacks(self, monkeypatch):
        cell = Cell("s", "g", "tiny", "run", {}, 0, {"data": {"path": "${SOME_FOLDER}/x"}})
        assert missing_variables(cell) == ["SOME_FOLDER"]
        monkeypatch.setenv("SOME_FOLDER", "there")
        assert missing_variables(cell) == []


class TestFiles:
    def test_an_unknown_key_grid_or_scale_is_an_error_that_names_it(self, tmp_path):
        path = tmp_path / "odd.toml"
        for text, word in (("seedz = 3\n" + SMALL, "seedz"), (SMALL.replace('grid = "main"', 'grid = "man"', 1), "man"),
                           (SMALL.replace("[scales.tiny]", "[scales.huge]"), "huge")):  # fmt: skip
            path.write_text(text)
            with pytest.raises(ConfigError, match=word):
                load_study(path)

    def test_a_folder_without_studies_is_an_error(self, tmp_path):
        with pytest.raises(ConfigError, match="no study"):
            load_studies(tmp_path)

    def test_a_scale_that_is_not_offered_is_an_error(self, study):
        with pytest.raises(ConfigError, match="paper"):
            cells_of(study, "paper")


class TestRecords:
    def test_a_record_survives_its_line(self):
        one = record(1, (2.0, 0.123456789), rate="fast", values={"dim": 7})
        assert Record.from_json(one.to_json()) == replace(
            one, points=[*one.points[:1], {**one.points[1], "loss": 0.12345679}]
        )

    def test_numbers_that_are_not_finite_are_null(self):
        assert json.loads(record(loss=(1.0, math.nan)).to_json())["points"][1]["loss"] is None

    def test_the_newest_record_of_a_cell_counts(self, tmp_path):
        store = Store(tmp_path)
        for loss in (1.5, 1.0):
            store.append(record(loss=(2.0, loss), rate="fast"))
        assert [measure(one, "end") for one in store.of("s", "tiny")] == [1.0]

    def test_half_a_line_is_passed_over_and_the_next_record_is_whole(self, tmp_path):
        store = Store(tmp_path)
        store.append(record(0, rate="fast"))
        path = store.path("s", "tiny")
        path.write_text(path.read_text() + '{"key": "torn", "po')
        store.append(record(1, rate="fast"))
        assert [one.seed for one in store.of("s", "tiny")] == [0, 1]

    def test_a_line_that_is_no_record_is_an_error_with_its_number(self, tmp_path):
        store = Store(tmp_path)
        store.append(record())
        path = store.path("s", "tiny")
        path.write_text('{"a": 1}\n' + path.read_text())
        with pytest.raises(ConfigError, match="line 1"):
            store.of("s", "tiny")


class TestMeasures:
    def test_area_is_the_mean_over_the_rounds(self):
        assert measure(record(loss=(4.0, 2.0, 2.0)), "area") == pytest.approx(2.5)

    def test_a_loss_counts_at_most_one_nat_above_the_start(self):
        assert measure(record(loss=(2.0, 300.0)), "end") == measure(record(loss=(2.0, math.nan)), "end") == 3.0

    def test_at_reads_between_evaluations_and_not_beyond(self):
        one = record(loss=(4.0, 2.0, 1.0))
        assert measure(one, "at:forwards:15") == pytest.approx(1.5)
        assert math.isnan(measure(one, "at:forwards:21"))

    def test_a_surge_is_a_rise_over_the_lowest_before(self):
        assert surge_at([2.0, 1.0, 1.2, 1.26]) == 3
        assert surge_at([2.0, 1.0, 1.2, 1.24]) is None
        assert surge_at([2.0, math.inf]) == 1

    def test_minus_turns_a_metric_round(self):
        one = record()
        told = replace(one, points=[*one.points[:-1], {**one.points[-1], "rouge_l": 0.4}])
        assert measure(told, "metric:rouge_l") == -measure(told, "minus:rouge_l") == 0.4

    def test_what_failed_or_is_not_there_is_nan(self):
        assert math.isnan(measure(record(error="why"), "end")) and math.isnan(measure(record(), "dim"))
        assert measure(record(rate="0.5", values={"dim": 3}), "level:rate") == 0.5


class TestAnswers:
    margins = st.floats(0.001, 1)
    effects = st.tuples(st.floats(-5, 5), st.floats(0, 5)).map(lambda p: Effect(p[0], p[0] - p[1], p[0] + p[1], 5))

    @given(effects, margins)
    def test_lower_and_no_worse_never_contradict_each_other(self, effect, margin):
        assert not (lower(effect, margin=margin) == "yes" and no_worse(effect, margin=margin) == "no")
        assert not (alike(effect, margin=margin) == "yes" and lower(effect, margin=margin) == "yes")

    @given(effects, margins)
    def test_a_mirrored_difference_is_as_alike(self, effect, margin):
        mirrored = Effect(-effect.mean, -effect.high, -effect.low, effect.seeds)
        assert alike(effect, margin=margin) == alike(mirrored, margin=margin)

    def test_the_limits_of_lower(self):
        assert lower(Effect(-1.0, -1.5, -0.5, 3), margin=0.5) == "yes"
        assert lower(Effect(-0.1, -0.2, -0.05, 3), margin=0.5) == "no"
        assert lower(Effect(-1.0, -3.0, 1.0, 3), margin=0.5) == "open"

    def test_within_needs_the_whole_interval(self):
        assert within(Effect(1.0, 0.9, 1.1, 3), least=0.8, most=1.2) == "yes"
        assert within(Effect(1.0, 0.5, 1.1, 3), least=0.8, most=1.2) == "open"
        assert within(Effect(2.0, 1.9, 2.1, 3), least=0.8, most=1.2) == "no"

    def test_one_value_has_no_interval_and_decides_nothing(self):
        assert lower(effect_of([-9.0]), margin=0.1) == "open"

    def test_a_power_law_is_read_from_logarithms(self):
        assert slope_of([1, 2, 4], [3, 3 / 2, 3 / 4]) == pytest.approx(-1)
        assert math.isnan(slope_of([2, 2], [1, 5]))

    def test_verdicts_from_answers(self):
        assert summed_up(["yes", "yes", "open"]) == "holds"
        assert summed_up(["yes", "no"]) == "holds in part"
        assert summed_up(["no", "no", "open"]) == "does not hold"
        assert summed_up([]) == summed_up(["open", "open", "yes"]) == "not testable at this scale"


class TestSlopes:
    asked = Slope(title="t", grid="main", by=["mode"], weights="w", measure="v", weight_bytes={"small": 2},
                  ahead={"big": 1000.0})  # fmt: skip

    def records(self, *sizes, mode="walk"):
        """Six bytes per parameter of four, and 50 MB; the largest has 10 MB more."""
        return [
            record(s, mode=mode, size=str(n), values={"w": 4.0 * n, "v": 50 + s + 6.0 * n + 10 * (n == 400)})
            for s in range(3) for n in sizes
        ]  # fmt: skip

    def test_a_line_tells_bytes_per_parameter_and_how_far_it_misses_the_largest(self):
        (row,) = rows_of(self.asked, self.records(100, 200, 400), scale="tiny")
        assert row.label == "walk" and row.sizes == 3 and row.slope.seeds == 3
        assert row.slope.mean == pytest.approx(6.0, rel=0.02)
        assert row.missed.mean == pytest.approx(-10 / 2461, rel=0.02)
        assert row.ahead["big"].mean == pytest.approx(51 + 1000 * row.slope.mean, rel=0.01)

    def test_a_parameter_has_the_bytes_of_its_scale(self):
        four, two = (next(iter(rows_of(self.asked, self.records(100, 200), scale=s))) for s in ("tiny", "small"))
        assert two.slope.mean == pytest.approx(four.slope.mean / 2) and math.isnan(two.missed.mean)

    def test_one_size_or_a_failed_cell_makes_no_line(self):
        failed = [replace(one, error="why") for one in self.records(200, mode="other")]
        assert list(rows_of(self.asked, self.records(100) + failed, scale="tiny")) == []


def both(differences, a="x", b="y"):
    """Records of two arms whose ends differ by so much, seed by seed."""
    return [
        record(seed, (9.0, 5.0 + extra + 0.3 * seed), arm=arm)
        for seed, gap in enumerate(differences)
        for arm, extra in ((a, gap), (b, 0.0))
    ]


class TestRules:
    def test_pairs_take_the_seeds_spread_away(self):
        (test,) = answers_of(claim(a={"arm": "x"}, b={"arm": "y"}, margin=0.01), both([-0.10, -0.11, -0.09]))
        assert test.answer == "yes" and test.effect.mean == pytest.approx(-0.1)

    def test_a_share_is_of_how_far_the_second_arm_falls(self):
        # b falls by about 4: a tenth of that is more than 0.1, a hundredth less.
        wide, narrow = (
            answers_of(claim(a={"arm": "x"}, b={"arm": "y"}, share=s), both([-0.1] * 3)) for s in (0.1, 0.01)
        )
        assert (wide[0].answer, narrow[0].answer) == ("no", "yes")

    def test_fewer_seeds_than_asked_for_leave_it_open(self):
        (test,) = answers_of(claim(a={"arm": "x"}, b={"arm": "y"}, margin=0.01, fewest=4), both([-0.1, -0.11, -0.09]))
        assert test.answer == "open"

    def test_every_level_of_by_is_a_test(self):
        records = [replace(r, levels={**r.levels, "t": t}) for t in ("a", "b") for r in both([-0.1, -0.1, -0.1])]
        found = answers_of(claim(a={"arm": "x"}, b={"arm": "y"}, margin=0.01, by=["t"]), records)
        assert [test.label for test in found] == ["a", "b"]

    def test_ordered_tests_neighbours(self):
        records = [record(s, (9.0, 5.0 + at + 0.1 * s), k=k) for s in range(3) for at, k in enumerate("abc")]
        found = answers_of(claim("ordered", factor="k", levels=["a", "b", "c"], margin=0.5), records)
        assert [test.answer for test in found] == ["yes", "yes"]

    def test_within_takes_ratios_seed_by_seed(self):
        records = [record(s, m=m, values={"v": v * (1 + s)}) for s in range(3) for m, v in (("p", 2.0), ("q", 4.0))]
        (test,) = answers_of(claim("within", "v", of={"m": "p"}, over={"m": "q"}, least=0.45, most=0.55), records)
        assert test.answer == "yes" and test.effect.mean == pytest.approx(0.5)

    def test_exponent_fits_every_seed(self):
        records = [record(s, n=str(n), values={"v": (1 + s) / n}) for s in range(3) for n in (1, 2, 8)]
        (test,) = answers_of(claim("exponent", "v", x="level:n", least=-1.1, most=-0.9), records)
        assert test.answer == "yes"

    def test_tuned_takes_the_rate_that_is_best_on_the_other_seeds(self):
        # On its own seed every rate looks good once: choosing there would flatter the arm by 3.
        losses = {"1": (2.0, 5.0, 5.0), "2": (5.0, 2.0, 5.0), "3": (5.0, 5.0, 2.0)}
        records = [record(s, (9.0, row[s]), arm="x", rate=rate) for rate, row in losses.items() for s in range(3)]
        records += [record(s, (9.0, 4.0), arm="y", rate="1") for s in range(3)]
        (test,) = answers_of(claim("tuned", a={"arm": "x"}, b={"arm": "y"}, rates="rate", margin=0.1), records)
        assert test.answer == "no" and test.effect.mean == pytest.approx(1.0)

    def test_a_seed_that_lacks_a_rate_does_not_count_where_rates_are_chosen(self):
        records = [record(s, (9.0, 5.0 - rate), arm=arm, rate=str(rate)) for s in range(3) for rate in (1, 2)
                   for arm in "xy"]  # fmt: skip
        lonely = [record(s, (9.0, 1.0 if arm == "x" else 8.0), arm=arm, rate="1") for s in (3, 4) for arm in "xy"]
        (test,) = answers_of(claim("tuned", a={"arm": "x"}, b={"arm": "y"}, rates="rate", margin=0.1), records + lonely)
        assert test.effect.seeds == 3 and test.effect.mean == 0.0

    def test_foretold_draws_the_line_of_the_smaller_ones_out(self):
        def of(bend):
            return [record(s, n=str(n), values={"n": n, "v": 10 + s + 3 * n + bend * n * n})
                    for s in range(3) for n in (1, 2, 4)]  # fmt: skip

        rule = claim("foretold", "v", x="n", least=0.9, most=1.1)
        assert answers_of(rule, of(0.0))[0].effect.mean == pytest.approx(1.0)
        assert [answers_of(rule, of(bend))[0].answer for bend in (0.0, 2.0)] == ["yes", "no"]

    def test_threshold_is_the_largest_calm_rate(self):
        def loss(rate, limit):
            return (2.0, 1.9, 1.8) if rate <= limit else (2.0, 1.9, 4.0)

        records = [
            record(s, loss(rate, 8.0 / d), size=str(d), rate=str(rate), values={"d": d})
            for s in range(3) for d in (1, 2, 4) for rate in (1.0, 2.0, 4.0, 8.0, 16.0)
        ]  # fmt: skip
        rule = claim("threshold", "surged", x="d", rates="rate", sizes="size", least=-1.1, most=-0.9)
        (test,) = answers_of(rule, records)
        assert test.answer == "yes" and test.effect.mean == pytest.approx(-1)

    def test_best_ranks_tasks_by_another_grid(self):
        best = {"p": "1", "q": "2", "r": "4"}
        records = [
            record(s, (9.0, 1.0 if best[t] == k else 2.0), task=t, k=k) for s in range(3) for t in best for k in "124"
        ]
        ranks = {"p": 10.0, "q": 20.0, "r": 40.0}
        beside = [
            replace(record(s, task=t, values={"rank": v}), grid="other") for s in range(3) for t, v in ranks.items()
        ]
        rule = claim("best", x="rank", beside="other", tasks="task", sizes="k", least=0.5)
        (test,) = answers_of(rule, records + beside)
        assert test.answer == "yes" and test.effect.mean == pytest.approx(1)

    def test_always_and_never(self):
        calm = [record(s, (2.0, 1.0)) for s in range(3)]
        wild = [record(s, (2.0, 9.0)) for s in range(3)]
        assert [answers_of(claim(rule, "surged"), calm)[0].answer for rule in ("always", "never")] == ["no", "yes"]
        assert answers_of(claim("always", "surged"), wild[:2] + calm[2:])[0].answer == "open"

    def test_an_unknown_rule_or_a_missing_argument_is_a_sentence(self):
        with pytest.raises(ConfigError, match="rule is one of"):
            answers_of(claim("best-of-three"), both([0.0]))
        with pytest.raises(ConfigError, match="margin"):
            answers_of(claim(a={"arm": "x"}, b={"arm": "y"}), both([0.0, 0.0]))

    @pytest.mark.parametrize("rule", sorted(RULES))
    def test_no_record_means_no_test(self, rule):
        assert answers_of(claim(rule), []) == []


class TestRuns:
    def test_what_has_a_record_is_not_run_again(self, study, tmp_path):
        class Count(Progress):
            ran = 0

            def done(self, cell, record, *, left):
                self.ran += 1

        store, first, second = Store(tmp_path / "r"), Count(), Count()
        found = run_study(study, "tiny", store=store, seeds=1, watch=first)
        assert len(found) == first.ran == 5 and not any(one.error for one in found)
        assert run_study(study, "tiny", store=store, seeds=1, watch=second) == found and second.ran == 0
        assert len(run_study(study, "tiny", store=store, watch=second)) == 15 and second.ran == 10

    def test_another_study_with_the_same_cell_takes_its_record(self, study, tmp_path):
        store, twin = Store(tmp_path / "r"), study.model_copy(update={"name": "twin"})
        first = run_study(study, "tiny", store=store, seeds=1)
        second = run_study(twin, "tiny", store=store, seeds=1)
        assert [one.points for one in first] == [one.points for one in second]
        assert {one.study for one in store.of("twin", "tiny")} == {"twin"}

    def test_what_fails_is_a_record_and_is_tried_again(self, study, tmp_path):
        odd = study.model_copy(update={"base": {**study.base, "probe.nonsense": 1}})
        store = Store(tmp_path / "r")
        (one, *_) = run_study(odd, "tiny", store=store, seeds=1)
        assert "nonsense" in one.error
        assert not any(record.error for record in run_study(study, "tiny", store=store, seeds=1))

    def test_changed_settings_do_not_use_old_records(self, study, tmp_path):
        store = Store(tmp_path / "r")
        run_study(study, "tiny", store=store, seeds=1)
        other = study.model_copy(update={"base": {**study.base, "probe.dim": 7}})
        assert store.current(cells_of(other, "tiny")) == []

    def test_a_check_tells_a_record_that_was_changed(self, study, tmp_path):
        store = Store(tmp_path / "r")
        run_study(study, "tiny", store=store, seeds=1)
        assert check_one(study, "tiny", store=store) == []
        path = store.path("small", "tiny")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["points"][-1]["loss"] *= 1.5
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert any("end" in text for text in check_one(study, "tiny", store=store))

    @pytest.mark.slow
    def test_processes_give_the_records_of_one(self, study, tmp_path):
        alone = run_study(study, "tiny", store=Store(tmp_path / "a"), seeds=1)
        both = run_study(study, "tiny", store=Store(tmp_path / "b"), seeds=1, workers=2)
        assert [(one.key, one.points) for one in alone] == [(one.key, one.points) for one in both]

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
    def test_a_command_that_is_stopped_leaves_no_process(self, tmp_path, number, code):
        (tmp_path / "long.toml").write_text(LONG)
        places = ["--studies", str(tmp_path), "--records", str(tmp_path / "records")]
        command = [sys.executable, "-m", "fedmezo", "study", "run", "long", "--workers", "2", *places]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            said = [process.stderr.readline() for _ in range(3)]  # planned, and two short cells that are done
            assert "(2 left)" in said[-1]
            workers = children(process.pid)
            assert len(workers) >= 2
            process.send_signal(number)
            told = process.stderr.read()
        assert process.returncode == code
        assert code < 0 or told.splitlines()[-1].endswith("Go on with the same command.")
        until(lambda: not any(map(alive, workers)))
        assert len((tmp_path / "records" / "tiny" / "long.jsonl").read_text().splitlines()) == 2


class TestVerdicts:
    def test_a_claim_is_judged_from_records(self, study, tmp_path):
        records = run_study(study, "tiny", store=Store(tmp_path / "r"))
        (verdict,) = judge(study, records, scale="tiny")
        assert len(verdict.tests) == 2 and verdict.word in ("holds", "holds in part", "does not hold")
        assert verdict.effect.seeds == 3

    def test_without_records_it_is_not_testable_and_says_why(self, study):
        (verdict,) = judge(study, [], scale="tiny")
        assert verdict.word == "not testable at this scale" and "no record" in verdict.reason

    def test_a_scale_may_measure_a_claim_by_another_amount(self, study):
        sized = study.scales["small"].model_copy(update={"measures": {"faster": "at:rounds:4"}})
        other = study.model_copy(update={"scales": {**study.scales, "small": sized}})
        assert [judge(other, [], scale=scale)[0].claim.measure for scale in ("tiny", "small")] == ["end", "at:rounds:4"]

    def test_a_measure_without_values_is_another_reason_than_no_record(self, study):
        blank = [replace(record(s, clients="1", rate=r), points=()) for s in range(3) for r in ("slow", "fast")]
        (verdict,) = judge(study, blank, scale="tiny")
        assert "no value" in verdict.reason

    def test_few_seeds_are_the_reason(self, study, tmp_path):
        records = run_study(study, "tiny", store=Store(tmp_path / "r"), seeds=2)
        (verdict,) = judge(study, records, scale="tiny")
        assert verdict.word == "not testable at this scale" and "fewer than 3 seeds" in verdict.reason

    def test_effects_have_a_real_minus_sign(self):
        assert (
            effect_text(Effect(-0.5, -0.6, -0.4, 3))
            == "\N{MINUS SIGN}0.500 (\N{MINUS SIGN}0.600 to \N{MINUS SIGN}0.400)"
        )
