"""Number formats on the wire: representable, idempotent, within half a unit, nothing turned infinite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmezo.zo.coding import CODINGS, SUMS_CODINGS, coded, coded_sums, sums_scale

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
KINDS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float8": torch.float8_e5m2}


@given(FLOATS, st.sampled_from(CODINGS))
def test_coding_twice_changes_nothing_and_nothing_becomes_infinite(slope, coding):
    once = coded(slope, coding)
    assert math.isfinite(once)
    assert coded(once, coding) == once
    assert once * slope >= 0


@given(st.floats(-50, 50, width=32), st.sampled_from(sorted(KINDS)))
def test_the_error_is_half_a_unit_of_the_format(slope, coding):
    unit = torch.finfo(KINDS[coding]).eps
    smallest = torch.finfo(KINDS[coding]).smallest_normal
    assert abs(coded(slope, coding) - slope) <= 0.5 * unit * max(abs(slope), smallest) * 1.0001


@pytest.mark.parametrize("coding", CODINGS)
def test_a_skipped_step_stays_skipped(coding):
    assert math.isnan(coded(math.nan, coding))


def test_a_slope_beyond_the_format_is_its_largest():
    assert coded(1e6, "float16") == 65504
    assert coded(-1e6, "float8") == -57344
    assert coded(-1e6, "sign") == -1
    assert coded(0.0, "sign") == 0


@given(st.lists(FLOATS.filter(lambda x: abs(x) < 1e30), max_size=20), st.sampled_from(SUMS_CODINGS))
def test_coded_sums_are_idempotent(values, coding):
    once = coded_sums(values, coding)
    assert np.array_equal(coded_sums(once.astype(np.float64), coding), once)
    assert np.isfinite(once).all()


def test_coded_sums_are_idempotent_when_the_largest_rounds_up_to_its_power_of_two():
    once = coded_sums([1 - 2**-13, 2**-24], "float16")
    assert once[0] == 1
    assert np.array_equal(coded_sums(once.astype(np.float64), "float16"), once)


def test_half_sums_do_not_vanish_however_small_they_are():
    values = np.array([3e-9, -1.7e-9, 2.5e-10, 0.0])
    plain = values.astype(np.float16)
    assert not plain.any()
    got = coded_sums(values, "float16")
    assert got == pytest.approx(values, rel=2**-11)
    assert sums_scale(values.astype(np.float32)) == 2.0**-28
    assert coded_sums(values, "bfloat16") == pytest.approx(values, rel=2**-8)


def test_float32_sums_are_the_nearest_float32():
    values = np.array([0.1, 1 / 3, -1e-20])
    assert np.array_equal(coded_sums(values, "float32"), values.astype(np.float32))
