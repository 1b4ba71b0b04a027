import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from ddpm.evaluation import distances
from ddpm.evaluation.distances import Normal


def gaussian(n, mean=0.0, std=1.0, dim=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)) * std + mean


def pixels(n, dim=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, dim), dtype=np.uint8)


def doubles(features):
    return torch.from_numpy(features.astype(np.float64) / (255 if features.dtype == np.uint8 else 1))


def frechet(a, b):
    return distances.frechet_distance(Normal(a), Normal(b))


def peer(a, b):
    """The Fréchet distance as torch-fidelity has it."""
    statistics = [fid_features_to_statistics(doubles(features)) for features in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def digits():
    return np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(-1, 64)


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    a, b = gaussian(100_000), gaussian(100_000, mean=0.5, std=2.0, seed=1)
    assert frechet(a, b) == pytest.approx(8 * (0.5**2 + (2 - 1) ** 2), rel=0.02)


@pytest.mark.parametrize("counts", [(40, 60), (40, 600), (600, 40), (300, 600)])  # below and above the dimensions
def test_the_frechet_distance_is_that_of_its_formula_in_every_route(counts):
    a, b = (np.cumsum(gaussian(n, dim=100, seed=n), axis=1) * 0.1 for n in counts)
    rows_a, rows_b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    overlap = np.linalg.svd(rows_a @ rows_b.T, compute_uv=False).sum()  # tr (S_a S_b)^(1/2)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.sum(rows_a**2) + np.sum(rows_b**2) - 2 * overlap
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_the_frechet_distance_is_that_of_scipys_matrix_root():
    a, b = gaussian(300), gaussian(200, std=1.5, seed=1) @ gaussian(8, seed=2)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sets", [(pixels(2000), pixels(1797, seed=1)), (digits()[::2], digits()[1::2])])
def test_the_frechet_distance_equals_torch_fidelitys(sets):
    assert frechet(*sets) == pytest.approx(peer(*sets), rel=1e-6)


def test_sets_without_common_directions_add_their_spreads():
    a, b = np.zeros((2, 30, 100))  # of rank 29, in 100 dimensions
    a[:, :50], b[:, 50:] = gaussian(30, dim=50), gaussian(30, dim=50, seed=1)
    a -= a.mean(0)
    b -= b.mean(0)
    assert frechet(a, b) == pytest.approx((a.var(0, ddof=1) + b.var(0, ddof=1)).sum(), rel=1e-9)


def test_wide_images_are_measured_without_a_covariance_matrix():
    a, b = pixels(20, dim=196_608), pixels(30, dim=196_608, seed=1)  # 256x256x3: 288 GiB for one
    assert frechet(a, b) > 0
    assert Normal(a).covariance is None


@pytest.mark.parametrize("dim", [8, 900])
def test_the_same_images_are_at_distance_zero(dim):
    a = gaussian(500, dim=dim)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert distances.precision_recall(a, a, 3) == (1.0, 1.0)


def test_samples_of_one_mode_have_precision_but_no_recall():
    real = np.concatenate([gaussian(200, mean=m, std=0.1, seed=m) for m in range(5)])
    samples = gaussian(500, std=0.1, seed=9)
    precision, recall = distances.precision_recall(samples, real, 3)
    assert precision > 0.8
    assert recall < 0.3
    assert distances.kernel_distance(samples, real, subset_size=100, seed=0)[0] > 0


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("counts", "size"), [((300, 500), 200), ((60, 2500), 50)])  # all products, or each subset's
def test_kid_precision_and_recall_are_those_of_torch_fidelity(counts, size, dtype):
    rng = np.random.default_rng(0)
    a, b = (rng.permutation(digits())[:n] if n < 1700 else np.tile(digits(), (2, 1))[:n] for n in counts)
    noise = rng.integers(0, 17, a.shape, dtype=np.uint8)
    a, b = ((a // 2 + noise).astype(dtype), b.astype(dtype))
    kid = kid_features_to_metric(doubles(a), doubles(b), kid_subset_size=size, rng_seed=5, verbose=False)
    expected = kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD]
    assert distances.kernel_distance(a, b, subset_size=size, seed=5) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    peer = prc_features_to_metric(doubles(a), doubles(b), prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    expected = peer[KEY_METRIC_PRECISION], peer[KEY_METRIC_RECALL]
    assert distances.precision_recall(a, b, 3) == pytest.approx(expected, abs=2e-3)


def test_kid_follows_from_its_seed_and_takes_the_smaller_set():
    a, b = gaussian(60), gaussian(300, mean=0.3, seed=1)
    first, again, other = (distances.kernel_distance(a, b, subset_size=50, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert all(map(math.isfinite, distances.kernel_distance(a, b, subset_size=1000, seed=0)))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_distance_depends_on_the_size_of_a_block(monkeypatch, dtype):
    a, b = (digits()[rows].astype(dtype) for rows in (slice(0, 150), slice(150, 400)))

    def all_values():
        return np.array(
            [
                frechet(a, b),
                frechet(a[:20], b),
                frechet(a[:20], b[:30]),
                *distances.kernel_distance(a, b, subset_size=50, seed=0),
                *distances.precision_recall(a, b, 3),
                *distances.nearest(a, b)[0],
                *distances.nearest(a, b)[1],
            ]
        )

    expected = all_values()
    for block in (1, 1000, 20_000):
        monkeypatch.setattr(distances, "BLOCK", block)
        monkeypatch.setattr(distances, "PAIRS", block)
        np.testing.assert_allclose(all_values(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("counts", [(i, j) for i in range(1, 6) for j in range(1, 6)])
def test_of_few_images_each_measure_is_a_number_or_not_defined(counts):
    n, m = counts
    a, b = pixels(n), pixels(m, seed=1)
    assert math.isnan(frechet(a, b)) == (min(n, m) < 2)
    assert math.isnan(distances.kernel_distance(a, b, subset_size=500, seed=0)[0]) == (min(n, m) < 2)
    assert math.isnan(distances.real_floor(a, seed=0)) == (n < 4)
    for neighbours in (1, 3, 50):
        precision, recall = distances.precision_recall(a, b, neighbours)
        assert math.isnan(precision) == (m <= neighbours)
        assert math.isnan(recall) == (n <= neighbours)
    to_b = distances.nearest(a, b)[0]
    assert len(to_b) == n
    assert math.isfinite(distances.memorisation_ratio(to_b, to_b))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_nearest_point_is_found_across_all_chunks(dtype):
    points, queries = gaussian(20_000, dim=2).astype(dtype), gaussian(3000, dim=2, seed=1).astype(dtype)
    queries[17], queries[2999] = points[19_999], points[8192]
    distance, index = distances.nearest(queries, points)
    expected = torch.cdist(doubles(queries), doubles(points), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    np.testing.assert_array_equal(index, expected.indices.numpy())
    np.testing.assert_allclose(distance, expected.values.numpy(), rtol=1e-12)
    assert distance[17] == distance[2999] == 0  # a copy


def test_of_copies_in_the_training_set_the_first_is_the_nearest():
    points = np.tile(gaussian(10), (2000, 1))
    assert distances.nearest(points[13:14], points)[1] == [3]


def test_the_memorisation_ratio_is_0_for_copies_and_1_for_new_images():
    train, new, held_out = gaussian(1000), gaussian(400, seed=1), gaussian(400, seed=2)
    to_train = lambda features: distances.nearest(features, train)[0]  # noqa: E731
    assert distances.memorisation_ratio(to_train(train[:100]), to_train(held_out)) == 0
    assert distances.memorisation_ratio(to_train(new), to_train(held_out)) == pytest.approx(1, abs=0.1)
    assert distances.memorisation_ratio(to_train(train[:100] + 0.01), to_train(held_out)) < 0.1
    assert math.isnan(distances.memorisation_ratio(to_train(new), to_train(train)))
