import numpy as np
import pytest
import torch

from ddpm.evaluation import distances, pairs
from ddpm.evaluation.sets import chosen_rows
from tests.evaluation.known import gaussian, pixels


@pytest.mark.parametrize("reference", ["train", "test", "all"])
@pytest.mark.parametrize("limit", [None, 2, 50, 1000])
@pytest.mark.parametrize("counts", [(60, 30), (2, 1), (5, 200)])
def test_the_reference_is_as_large_as_stated_and_evenly_spaced(counts, reference, limit):
    train, test = counts
    rows = chosen_rows(train, test, reference, limit)
    both = np.concatenate([rows["train"], rows["test"] + train]) if reference == "all" else rows[reference]
    there = train + test if reference == "all" else counts[reference == "test"]
    assert len(both) == min(limit or there, there)
    assert (np.diff(both) > 0).all()
    assert len(both) < 3 or np.ptp(np.diff(both)) <= 1
    assert rows["train"].max() < train
    assert rows["test"].max() < test


def test_packed_statistics_are_the_same_to_the_last_bit():
    features, samples = gaussian(100), distances.Normal(gaussian(60, mean=0.2, seed=1))
    normal = distances.Normal(features)
    again = distances.Normal.unpacked(features, normal.packed())
    assert distances.frechet_distance(samples, again) == distances.frechet_distance(samples, normal)
    for name in ("covariance", "root", "mean"):
        torch.testing.assert_close(getattr(again, name), getattr(normal, name), rtol=0, atol=0)
    assert again.trace == normal.trace


def test_packed_neighbourhoods_are_the_same_to_the_last_bit():
    real = pairs.real_pairs(pixels(40), 3)
    again = pairs.Real.unpacked(real.features, real.packed())
    assert pairs.compare(pixels(30, seed=1), again, 3, 0) == pairs.compare(pixels(30, seed=1), real, 3, 0)
