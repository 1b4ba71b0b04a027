import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ddpm.evaluation import blocks
from ddpm.evaluation.neighbours import copies, memorisation_ratio, nearest
from tests.evaluation.known import gaussian, pixels


def digits():
    return np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(-1, 64)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_two_nearest_points_are_found_across_all_chunks(dtype):
    points, queries = gaussian(20_000, dim=2).astype(dtype), gaussian(1000, dim=2, seed=1).astype(dtype)
    queries[17], queries[999] = points[19_999], points[8192]
    near = nearest(queries, points)
    a, b = (torch.from_numpy(x.astype(np.float64)) for x in (queries, points))
    expected = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False)
    np.testing.assert_array_equal(near.place, expected.indices[:, 0].numpy())
    np.testing.assert_allclose(near.first, expected.values[:, 0].numpy(), rtol=1e-12)
    np.testing.assert_allclose(near.second, expected.values[:, 1].numpy(), rtol=1e-12)
    assert near.first[17] == near.first[999] == 0  # a copy


def test_of_equal_training_images_only_the_first_is_near():
    points = np.tile(gaussian(10), (2000, 1))
    near = nearest(points[13:14], points)
    assert near.place == [3]
    assert near.second[0] == pytest.approx(np.sort(np.linalg.norm(points[:10] - points[3], axis=1))[1])


@pytest.mark.parametrize("noise", [0, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_planted_copies_are_found_and_nothing_else(noise, twice):
    """2 % of the samples are (nearly) training images, whether or not the training set holds each image twice."""
    rng = np.random.default_rng(0)
    real = rng.permutation(digits())
    train, others = real[:1000], real[1000:1735]
    copied = np.clip(train[:15].astype(int) + rng.integers(-noise, noise + 1, (15, 64)), 0, 255).astype(np.uint8)
    near = nearest(np.concatenate([others, copied]), np.tile(train, (1 + twice, 1)))
    np.testing.assert_array_equal(near.suspicious(), np.arange(750) >= 735)
    np.testing.assert_array_equal(near.place[735:], np.arange(15))
    share = copies(near)
    assert share.value == pytest.approx(0.02)
    assert abs(share.value - 0.02) < 2 * share.error < 0.02
    assert copies(nearest(others, train)).value == 0


@pytest.mark.parametrize("train", [pixels(1), np.tile(pixels(1), (5, 1))])
def test_copies_are_not_defined_beside_a_single_training_image(train):
    near = nearest(np.concatenate([pixels(3, seed=1), train[:1]]), train)
    assert math.isnan(copies(near).value)
    assert not near.suspicious().any()
    assert near.first[3] == 0


def test_memorisation_is_0_for_copies_and_1_for_new_images():
    train, new, held_out = gaussian(1000), gaussian(400, seed=1), gaussian(400, seed=2)
    ratio = lambda a, b: memorisation_ratio(nearest(a, train), nearest(b, train))  # noqa: E731
    assert ratio(train[:100], held_out) == (0, 0)
    assert ratio(new, held_out).value == pytest.approx(1, abs=3 * ratio(new, held_out).error)
    assert ratio(new, held_out).error < 0.05
    assert ratio(train[:100] + 0.01, held_out).value < 0.1
    assert math.isnan(ratio(new, train).value)


@pytest.mark.parametrize("counts", [(i, j) for i in range(1, 4) for j in range(1, 4)])
def test_the_nearest_is_found_among_few_images(counts):
    n, m = counts
    near = nearest(pixels(n), pixels(m, seed=1))
    assert len(near.first) == n
    assert np.isfinite(near.first).all()
    assert np.isnan(near.second).all() == (m == 1)
    assert math.isfinite(memorisation_ratio(near, near).value)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_of_points_at_the_same_distance_the_first_is_found(monkeypatch, dtype):
    """Grey levels 0 and 1 at a few places make most distances equal, and rows equal."""
    points, queries = ((pixels(n, dim=6, seed=n) // 128).astype(dtype) for n in (45, 20))
    apart = np.square(queries[:, None].astype(float) - points).sum(2)
    first = np.unique(points, axis=0, return_index=True)[1]
    apart[:, np.setdiff1d(np.arange(45), first)] = np.inf  # of identical points only the first counts
    order = np.argsort(apart, axis=1, kind="stable")[:, :2]
    scale = 255 if dtype == np.uint8 else 1
    for tile in (1, 2, 7, 20, 1024):
        monkeypatch.setattr(blocks, "TILE", tile)
        near = nearest(queries, points)
        np.testing.assert_array_equal(near.place, order[:, 0])
        for found, which in ((near.first, order[:, :1]), (near.second, order[:, 1:])):
            np.testing.assert_allclose(found, np.sqrt(np.take_along_axis(apart, which, 1)[:, 0]) / scale, rtol=1e-12)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_nearest_do_not_depend_on_the_size_of_a_block(monkeypatch, dtype):
    a, b = (digits()[rows].astype(dtype) for rows in (slice(0, 8), slice(100, 130)))
    expected = nearest(a, b)
    for block in (1, 7, 1000):
        monkeypatch.setattr(blocks, "BLOCK", block)
        monkeypatch.setattr(blocks, "TILE", block)
        for found, known in zip(nearest(a, b), expected, strict=True):
            np.testing.assert_allclose(found, known, rtol=1e-9)
