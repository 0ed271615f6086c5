"""Epsilon against two accountants of other people, against a closed form, and its laws."""

import math
import sys
import warnings

import pytest

from fedmezo.errors import ConfigError
from fedmezo.fl.accountant import Releases, epsilon, sigma_for

# Above epsilon 30 the best order is so low that dp-accounting's series for it does not converge, and it takes a worse.
GRID = [(sigma, rate, count) for sigma in (0.9, 1.0, 2.0, 5.0) for rate in (0.01, 0.1, 1.0) for count in (10, 600)]
ORDERS = [1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 128, 256, 512, 1024]
DELTA = 1e-5


def spent(sigma, rate, count, accountant="pld", delta=DELTA):
    return epsilon([Releases(sigma, rate, count)], delta=delta, accountant=accountant)


@pytest.fixture(scope="module")
def opacus():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("opacus.accountants")


def theirs(kind, sigma, rate, count, delta=DELTA, **options):
    book = kind()
    book.history = [(sigma, rate, count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return book.get_epsilon(delta, **options)


@pytest.mark.parametrize(("sigma", "rate", "count"), GRID)
def test_divergences_add_up_as_in_opacus(opacus, sigma, rate, count):
    other = theirs(opacus.RDPAccountant, sigma, rate, count, alphas=ORDERS)
    assert spent(sigma, rate, count, "rdp") == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize(
    ("sigma", "rate", "count"), [(0.7, 0.01, 600), (1.0, 0.1, 10), (1.0, 0.05, 300), (2.0, 0.1, 600)]
)
def test_loss_distributions_add_up_as_in_opacus(opacus, sigma, rate, count):
    error = dict(eps_error=0.005, delta_error=1e-9)
    assert spent(sigma, rate, count) == pytest.approx(
        theirs(opacus.PRVAccountant, sigma, rate, count, **error), rel=0.01
    )


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("count", [1, 9])
def test_whole_samples_cost_what_the_closed_form_says(sigma, count):
    # Balle and Wang 2018, theorem 8; n releases of the Gaussian mechanism are one with sigma / sqrt(n).
    one, cdf = sigma / math.sqrt(count), lambda x: math.erfc(-x / math.sqrt(2)) / 2
    eps = spent(sigma, 1.0, count)
    delta = cdf(0.5 / one - eps * one) - math.exp(eps) * cdf(-0.5 / one - eps * one)
    assert delta == pytest.approx(DELTA, rel=0.02)


def test_epsilon_grows_with_releases_and_rate_and_falls_with_noise_and_delta():
    base = spent(1.0, 0.05, 300)
    assert spent(1.0, 0.05, 301) > base and spent(1.0, 0.06, 300) > base
    assert spent(1.1, 0.05, 300) < base and spent(1.0, 0.05, 300, delta=1e-4) < base
    assert base < spent(1.0, 0.05, 300, "rdp") < 1.25 * base


def test_nothing_costs_nothing_and_no_noise_has_no_bound():
    assert epsilon([], delta=DELTA) == spent(1.0, 0.05, 0) == spent(0.0, 0.0, 5) == 0
    assert math.isinf(epsilon([Releases(1.0, 0.1, 5), Releases(0.0, 0.1, 1)], delta=DELTA))


def test_releases_of_several_kinds_add_up_in_any_order():
    first, second = Releases(1.0, 0.1, 20), Releases(2.0, 0.02, 300)
    both = epsilon([first, second], delta=DELTA)
    assert both == pytest.approx(epsilon([second, first], delta=DELTA), rel=1e-3)
    assert max(spent(1.0, 0.1, 20), spent(2.0, 0.02, 300)) < both < spent(1.0, 0.1, 20) + spent(2.0, 0.02, 300)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("target", "rate", "count"), [(1.0, 0.05, 600), (8.0, 0.01, 300), (4.0, 1.0, 40)])
def test_the_noise_that_is_chosen_is_enough_and_hardly_more(target, rate, count, accountant):
    sigma = sigma_for(target, rate=rate, count=count, delta=DELTA, accountant=accountant)
    assert spent(sigma, rate, count, accountant) <= target < spent(0.99 * sigma, rate, count, accountant)
    assert float(f"{sigma:.6g}") == sigma


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Releases(-1.0, 0.1, 1),
        lambda: Releases(math.inf, 0.1, 1),
        lambda: Releases(1.0, 1.1, 1),
        lambda: Releases(1.0, 0.1, -1),
        lambda: spent(1.0, 0.1, 1, delta=0.0),
        lambda: sigma_for(0.0, rate=0.1, count=1, delta=DELTA),
        lambda: sigma_for(math.nan, rate=0.1, count=1, delta=DELTA),
    ],
)
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        wrong()


def test_no_accountant_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmezo\[privacy\]'"):
        spent(1.2345, 0.05, 7)
