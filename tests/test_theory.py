"""The theory's constants, caps and recommendations."""

import ast
import importlib
import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo.errors import ConfigError
from fedmezo.theory.beside import global_bounds, step_bounds
from fedmezo.theory.caps import b1_caps, b1_growth, b2_caps, paper_caps
from fedmezo.theory.constants import (
    Constants,
    Setting,
    capital_gamma,
    capital_gamma_tilde,
    for_batch,
    gamma,
    norm_ratio,
    sigma_tilde2,
    zeta,
)
from fedmezo.theory.corrected import b1, b2, b2_step
from fedmezo.theory.errata import ERRATA
from fedmezo.theory.printed import corollary_3_2
from fedmezo.theory.recommend import b1_advice, b1_best_rate, b2_advice, b2_best_rate, paper_choice, paper_rate

ROOT = Path(__file__).parent.parent
THEORY = ROOT / "src" / "fedmezo" / "theory"
LARGE = Constants(dim=42_598_400, effective_rank=200, smoothness=1)
NOISY = Constants(dim=100, effective_rank=4, smoothness=2.0, c_g=1.5, sigma_g2=1.0, c_h=0.5, sigma_h2=0.3)

PROBLEMS = st.builds(
    Constants,
    dim=st.integers(2, 10**8),
    effective_rank=st.floats(1, 500),
    smoothness=st.floats(1e-3, 1e3),
    c_g=st.floats(1, 10),
    sigma_g2=st.sampled_from([0.0, 0.5, 20.0]),
    c_h=st.sampled_from([0.0, 0.5, 20.0]),
    sigma_h2=st.sampled_from([0.0, 0.5, 20.0]),
)


def test_the_constants_of_the_papers_model():
    assert gamma(LARGE, kind="paper") == pytest.approx(201.0, abs=1e-4)
    assert zeta(LARGE, kind="paper") == pytest.approx(1.17e-10, rel=0.005)
    assert capital_gamma(LARGE, kind="paper") == pytest.approx(4.98e-3, rel=0.002)
    assert gamma(LARGE) == 202
    assert gamma(LARGE, kind="sphere") == pytest.approx(202, abs=1e-3)


@given(PROBLEMS, st.integers(1, 50))
def test_the_identities_of_the_printed_constants(constants, clients):
    rank = gamma(constants, kind="paper")
    size = zeta(constants, kind="paper")
    assert size * rank == pytest.approx(1 / constants.dim)
    assert capital_gamma(constants, kind="paper") == pytest.approx((1 - 1 / constants.dim**2) / rank)
    tilde = capital_gamma_tilde(constants, clients=clients, kind="paper")
    d = constants.dim
    printed = (d - clients * rank * size) / (d * rank * clients)
    assert tilde == pytest.approx(printed, rel=1e-9, abs=1e-12 / rank)


@given(PROBLEMS, st.integers(1, 8), st.sampled_from(["paper", "sphere", "gaussian"]))
def test_zeta_puts_the_estimate_in_the_place_of_the_gradient(constants, directions, kind):
    options = {"directions": directions, "kind": kind}
    product = zeta(constants, **options) * gamma(constants, **options) * norm_ratio(constants, **options)
    assert product == pytest.approx(1)
    printed = (
        directions**2
        * (constants.dim + 2)
        / ((constants.dim * constants.effective_rank + constants.dim - 2) * (constants.dim + directions - 1))
    )
    assert zeta(constants, directions=directions, kind="paper") == pytest.approx(printed)


def test_the_printed_zeta_refuses_one_dimension():
    with pytest.raises(ConfigError, match="gamma is 0"):
        zeta(Constants(dim=1, effective_rank=1, smoothness=1), kind="paper")
    assert zeta(Constants(dim=1, effective_rank=1, smoothness=1)) == pytest.approx(1 / 9)


def test_larger_batches_keep_a_mean_of_independent_gradients_inside_assumption_4():
    # E|g|^2 of a mean of b equals |m|^2 + variance / b; single ones reach their bound.
    single, gradient2 = Constants(dim=9, effective_rank=2, smoothness=1, c_g=3.0, sigma_g2=5.0), 7.0
    variance = (single.c_g - 1) * gradient2 + single.sigma_g2
    for batch in (1, 2, 10):
        own = for_batch(single, batch)
        assert own.c_g * gradient2 + own.sigma_g2 == pytest.approx(gradient2 + variance / batch)
    with pytest.raises(ConfigError, match="batch"):
        for_batch(single, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dim", 0),
        ("effective_rank", 0.5),
        ("smoothness", 0.0),
        ("smoothness", math.inf),
        ("c_g", 0.9),
        ("sigma_g2", -1.0),
        ("c_h", math.nan),
        ("sigma_h2", -1e-9),
    ],
)
def test_impossible_constants_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        replace(LARGE, **{name: value})


@pytest.mark.parametrize("name", ["clients", "steps", "rounds", "rate", "directions"])
def test_impossible_settings_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        replace(Setting(3, 30, 500, 1e-5, 1e-3), **{name: 0})
    with pytest.raises(ConfigError, match="mu: expected"):
        Setting(3, 30, 500, 1e-5, -1e-3)


def test_the_paper_caps_bind_in_turn():
    def binding(**changed):
        return paper_caps(replace(LARGE, **changed.pop("constants", {})), **changed).binding.formula

    assert binding(clients=3, steps=30) == "1 / (3 H L sqrt(c_g d))"
    assert binding(clients=3, steps=30, constants={"smoothness": 1e-6}) == "1 / H^2"
    assert binding(clients=1, steps=2, constants={"c_g": 1e9}) == "N / (3 H L c_g)"
    # The paper trains with 1e-5.
    assert paper_caps(replace(LARGE, smoothness=0.17), clients=3, steps=30).allow(1e-5)
    assert not paper_caps(replace(LARGE, smoothness=0.171), clients=3, steps=30).allow(1e-5)


@given(PROBLEMS, st.integers(1, 50))
def test_the_second_cap_of_b1_always_binds(constants, steps):
    caps = b1_caps(constants, steps=steps)
    assert caps.binding == caps.caps[1]
    assert b1_growth(constants) >= 18


@given(PROBLEMS, st.integers(1, 6), st.integers(1, 1000), st.floats(1e-6, 1e-2), st.floats(0.01, 100))
def test_each_corollary_is_its_theorem_summed_over_rounds(constants, clients, rounds, rate, gradient2):
    """Summing descent * |grad f|^2 <= gap / T + the rest over rounds gives the corollary, for every bound."""
    gap, setting = 3.0, Setting(clients, 1, rounds, rate, 1e-3)
    constants = replace(constants, dim=constants.dim + 10)  # Gamma-tilde is 0 for N = d^2 (erratum E12)
    steps = step_bounds(constants, setting, gradient2=gradient2)
    wholes = global_bounds(constants, setting, gap=gap)
    for step, whole in zip(steps, wholes, strict=True):
        # B2's corollary also uses its cap, which leaves half of the descent.
        kept = rate * gradient2 / 2 if whole.name == "B2" else -step.terms["descent"]
        slope = kept / gradient2
        for name, value in whole.terms.items():
            summed = gap / rounds if name == "initial gap" else step.terms[name]
            assert value == pytest.approx(summed / slope, rel=1e-6), (whole.name, name)


def test_b2_refuses_what_it_does_not_cover():
    for bound in (b2, b2_step):
        number = {"gap": 1.0} if bound is b2 else {"gradient2": 1.0}
        with pytest.raises(ConfigError, match="one local step, got steps=5"):
            bound(NOISY, Setting(3, 5, 10, 1e-3, 0.0), **number)
        with pytest.raises(ConfigError, match="printed gamma"):
            bound(NOISY, Setting(3, 1, 10, 1e-3, 0.0), kind="paper", **number)


def test_heterogeneity_raises_the_corrected_bounds():
    setting = Setting(3, 1, 10, 1e-4, 0.0)
    for bound in (b1, b2):
        totals = [bound(replace(NOISY, sigma_h2=s), setting, gap=1.0).total for s in (0.0, 1.0, 2.0)]
        assert totals == sorted(set(totals))


@given(PROBLEMS, st.integers(1, 20), st.integers(1, 10**6), st.floats(1e-3, 100), st.floats(0.01, 100))
def test_no_allowed_rate_gives_a_smaller_bound_than_the_best_rate(constants, clients, rounds, gap, factor):
    steps = clients  # any number will do
    rate = b1_best_rate(constants, steps=steps, rounds=rounds, gap=gap)
    other = min(rate * factor, b1_caps(constants, steps=steps).rate)
    ours, theirs = (b1(constants, Setting(2, steps, rounds, x, 0.0), gap=gap).total for x in (rate, other))
    assert ours <= theirs * (1 + 1e-9)
    rate = b2_best_rate(constants, clients=clients, rounds=rounds, gap=gap)
    other = min(rate * factor, b2_caps(constants, clients=clients).rate)
    ours, theirs = (b2(constants, Setting(clients, 1, rounds, x, 0.0), gap=gap).total for x in (rate, other))
    assert ours <= theirs * (1 + 1e-9)


@given(PROBLEMS, st.integers(1, 20), st.floats(1e-3, 100), st.floats(1e-3, 10))
def test_the_advised_rounds_reach_the_target_and_fewer_do_not(constants, steps, gap, target):
    advice = b1_advice(constants, steps=steps, gap=gap, target=target)
    assert b1_caps(constants, steps=steps).allow(advice.rate)

    def by_b1(rounds):
        return b1(constants, Setting(3, steps, rounds, advice.rate, advice.mu), gap=gap).total

    assert by_b1(advice.rounds) <= target * (1 + 1e-9)
    assert advice.rounds == 1 or by_b1(advice.rounds - 1) > target * (1 - 1e-9)

    advice = b2_advice(constants, clients=steps, gap=gap, target=target)
    assert b2_caps(constants, clients=steps).allow(advice.rate)

    def by_b2(rounds):
        return b2(constants, Setting(steps, 1, rounds, advice.rate, 0.0), gap=gap).total

    assert by_b2(advice.rounds) <= target * (1 + 1e-9)
    assert advice.rounds == 1 or by_b2(advice.rounds - 1) > target * (1 - 1e-9)


def test_no_other_rate_reaches_the_target_in_fewer_rounds():
    advice = b2_advice(NOISY, clients=3, gap=5.0, target=0.1)
    assert advice.binding == "noise"
    for factor in (0.5, 0.9, 1.1, 1.5):
        setting = Setting(3, 1, advice.rounds - 1, advice.rate * factor, 0.0)
        assert b2(NOISY, setting, gap=5.0).total > 0.1
    easy = b2_advice(replace(NOISY, sigma_g2=0.0, sigma_h2=0.0), clients=3, gap=5.0, target=0.1)
    assert easy.binding == "1 / (L (1 + c_g (1 + c_h) gamma / N))"


def test_a_target_must_be_positive():
    for advise in (
        lambda x: b1_advice(NOISY, steps=1, gap=1, target=x),
        lambda x: b2_advice(NOISY, clients=1, gap=1, target=x),
    ):
        for target in (0.0, -1.0, math.nan):
            with pytest.raises(ConfigError, match="target: expected"):
                advise(target)


def test_the_recommended_choice_uses_c_h_tilde_where_clients_differ():
    same = paper_choice(LARGE, clients=3, steps=30, rounds=500)
    apart = paper_choice(replace(LARGE, c_h=1.0, sigma_h2=2.0), clients=3, steps=30, rounds=500)
    assert apart.rate == pytest.approx(same.rate / 2)  # c-tilde_h = 1 + 3
    assert apart.mu == pytest.approx(same.mu * 4**0.25)
    assert apart.min_rounds == pytest.approx(same.min_rounds / 4)
    assert set(paper_rate(LARGE, clients=3, steps=30, rounds=500)) == {"rounds", "perturbation"}
    rate = paper_rate(replace(LARGE, c_h=1.0, sigma_h2=2.0), clients=3, steps=30, rounds=500)
    assert rate["heterogeneity"] == pytest.approx(-2 / (4 * 3))
    assert rate["rounds"] == pytest.approx(200**1.5 / math.sqrt(4 * 3 * 30 * 500))


def test_the_first_term_of_corollary_3_2_has_the_printed_rate():
    def first(**changed):
        constants = replace(LARGE, effective_rank=changed.get("r", 200))
        clients, rounds = changed.get("n", 3), changed.get("t", 500)
        chosen = paper_choice(constants, clients=clients, steps=30, rounds=rounds)
        setting = Setting(clients, 30, rounds, chosen.rate, chosen.mu)
        printed = paper_rate(constants, clients=clients, steps=30, rounds=rounds)["rounds"]
        return corollary_3_2(constants, setting, gap=1.0).terms["initial gap"] / printed

    assert [first(r=100), first(r=400), first(n=30), first(t=5)] == pytest.approx([0.5] * 4, rel=0.02)


def test_sigma_tilde_counts_heterogeneity_three_times():
    assert sigma_tilde2(NOISY) == pytest.approx(3 * 1.5 * 0.3 + 1.0)


def test_every_erratum_is_documented_word_for_word_and_has_a_test():
    text = (ROOT / "docs" / "theory.md").read_text().replace("\\|", "|")
    tests = (ROOT / "tests" / "test_theory_errata.py").read_text()
    assert [erratum.key for erratum in ERRATA] == [f"E{number}" for number in range(1, 21)]
    for erratum in ERRATA:
        assert f"| {erratum.key} | {erratum.where} | {erratum.printed} | {erratum.here} |" in text
        assert f"def test_{erratum.key.lower()}_" in tests


def public_functions():
    """Returns every public function of the package with its module."""
    for path in sorted(THEORY.glob("*.py")):
        module = importlib.import_module(f"fedmezo.theory.{path.stem}")
        for name in getattr(module, "__all__", ()):
            if inspect.isfunction(getattr(module, name)):
                yield path.stem, name, getattr(module, name)


def test_every_formula_cites_its_equation():
    formulas = [f for home, _, f in public_functions() if home not in ("bound", "beside")]
    assert len(formulas) > 35
    for function in formulas:
        assert re.search(r"Source:|erratum E\d|bound B\d|Assumption|independent gradients", function.__doc__), function


def test_the_package_imports_only_errors_numpy_and_the_standard_library():
    allowed = {"fedmezo", "math", "dataclasses", "typing", "collections", "numpy"}
    for path in THEORY.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed
                if node.module.startswith("fedmezo"):
                    assert node.module.startswith(("fedmezo.theory", "fedmezo.errors"))
            elif isinstance(node, ast.Import):
                assert {name.name for name in node.names} <= allowed
