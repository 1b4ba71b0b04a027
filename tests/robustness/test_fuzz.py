"""The short form of tests.robustness.fuzz: the same inputs each time, about a hundred of each kind."""

import pytest

from tests.robustness.fuzz import CHECKS, fuzz

pytestmark = pytest.mark.process


@pytest.mark.parametrize("kind", CHECKS)
def test_damaged_and_hostile_input_ends_in_a_result_or_in_lines(kind):
    counts = fuzz(kind, 100)
    assert counts.total() > 50  # hypothesis counts repeated inputs once
    assert set(counts) == {"result", "reported"}
