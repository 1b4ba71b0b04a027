"""A class is lost neither by holding images out nor by taking fewer."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.data.splits import check_subset, hold_out, subset_indices
from ddpm.errors import UserError

LABELS = np.arange(100) % 7
SIDES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=40)


def test_where_no_class_is_missing_the_threshold_decides() -> None:
    number = np.random.default_rng(0).random(1000)
    for threshold in (0.1, 0.5, 0.9):
        assert np.array_equal(hold_out(number, np.arange(1000) % 10, threshold), number < threshold)


@pytest.mark.parametrize(("threshold", "held_out"), [(0.0, [0, 3]), (1.0, [0, 1, 3])])
def test_the_lowest_of_a_class_is_held_out_and_the_highest_never(threshold: float, held_out: list[int]) -> None:
    number, labels = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), np.array([0, 0, 0, 1, 1, 2])
    assert np.flatnonzero(hold_out(number, labels, threshold)).tolist() == held_out


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(SIDES, st.integers(-1, 31))
def test_each_class_is_trained_on_and_copies_stay_together(images: list[tuple[int, int]], threshold: int) -> None:
    number, labels = np.array(images).T
    held_out = hold_out(number, labels, threshold)
    assert set(labels[~held_out]) == set(labels)
    assert not set(number[held_out]) & set(number[~held_out])
    for label in set(labels):
        own = set(number[labels == label])
        shared = own & set(number[labels != label])
        if len(own) > 1 and not shared:
            assert held_out[labels == label].any()


@pytest.mark.parametrize("labels", [LABELS, np.zeros(100, np.int64)])
def test_a_smaller_subset_is_part_of_a_larger_one(labels: np.ndarray) -> None:
    chosen = [subset_indices(labels, subset) for subset in (1, 0.001, 7, 0.3, 99, 100, 1000, None)]
    assert [len(rows) for rows in chosen] == [1, 1, 7, 30, 99, 100, 100, 100]
    for small, large in pairwise(chosen):
        assert set(small) <= set(large)
        assert (np.diff(large) > 0).all()


def test_a_subset_has_as_many_classes_as_it_has_room_for() -> None:
    rare = np.array([0] * 500 + [1, 2, 3])
    for size in range(1, 6):
        assert len(set(rare[subset_indices(rare, size)])) == min(size, 4)
    check_subset(rare, 4)
    check_subset(rare, None)
    for subset in (3, 0.001):
        with pytest.raises(UserError, match=f"dataset.subset = {subset}: leaves .* for 4 classes; take 4 or more"):
            check_subset(rare, subset)
