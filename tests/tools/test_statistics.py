"""The statistics agree with SciPy, with simulations and with published values."""

import numpy as np
import pytest
from scipy import stats

from tools.common.statistics import holm, number, seeds_needed, standard_error, welch


def test_one_value_has_no_standard_error_and_no_test():
    assert standard_error([1.0]) is None
    assert welch([1.0], [2.0, 3.0]) is None
    assert number([1.0]) == "1.0000"
    assert number([]) == ""


def test_values_without_any_spread_are_not_tested():
    assert welch([1.0, 1.0], [2.0, 2.0]) is None
    assert welch([1.0, 1.0], [2.0, 2.5]) is not None


def test_the_standard_error_divides_by_n_minus_one():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert number([1.0, 3.0]) == "2.0 ± 1.0"


def test_decimals_follow_from_the_error_even_of_a_single_value():
    assert number([0.0505, 0.0493], 9.0) == "0.04990 ± 0.00060"
    assert number([0.0505], 0.003) == "0.0505 ± 0.0030"
    assert number([12.3456], 1.24) == "12.3 ± 1.2"


def test_the_difference_is_b_minus_a_with_scipys_p_and_interval():
    a, b = [1.0, 2.0, 4.0], [7.0, 9.0, 8.0, 8.5]
    found = welch(a, b)
    assert found is not None
    assert found.value == pytest.approx(np.mean(b) - np.mean(a))
    assert found.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert found.low < found.value < found.high


def test_an_interval_excludes_0_exactly_if_p_is_below_the_level():
    rng = np.random.default_rng(0)
    for shift in np.linspace(0, 3, 60):
        found = welch(list(rng.normal(0, 1, 4)), list(rng.normal(shift, 2, 5)))
        assert found is not None
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_holms_correction_is_the_published_one_in_any_order():
    # Holm 1979, as in R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_seeds_needed_settle_a_difference_four_times_in_five():
    a, b = [0.0, 1.0, 2.0], [1.5, 2.5, 3.5]  # standard deviations of 1, and a difference of 1.5
    n = seeds_needed(a, b)
    assert n == 9  # the textbook's n for an effect of 1.5, at 0.05 and 80 %
    draws = np.random.default_rng(0).normal(size=(2, 20_000, n))
    draws[1] += 1.5
    power = np.mean(stats.ttest_ind(*draws, axis=1, equal_var=False).pvalue < 0.05)
    assert 0.78 < power < 0.86


def test_a_difference_far_below_the_spread_needs_too_many_seeds():
    assert seeds_needed([0.0, 1.0], [0.001, 1.001]) is None
