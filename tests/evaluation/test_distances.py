import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from ddpm.evaluation import blocks, distances
from ddpm.evaluation.distances import Normal
from tests.evaluation.known import assert_covers, gaussian, pixels


def doubles(features):
    return torch.from_numpy(features.astype(np.float64) / (255 if features.dtype == np.uint8 else 1))


def both(a, b):
    """The Fréchet distance and its error."""
    a, b = (x if isinstance(x, Normal) else Normal(x) for x in (a, b))
    return distances.frechet_distance(a, b)


def frechet(a, b):
    return both(a, b).value


def peer(a, b):
    """The Fréchet distance by torch-fidelity."""
    statistics = [fid_features_to_statistics(doubles(features)) for features in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def digits():
    return np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(-1, 64)


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    a, b = gaussian(100_000), gaussian(100_000, mean=0.5, std=2.0, seed=1)
    assert frechet(a, b) == pytest.approx(8 * (0.5**2 + (2 - 1) ** 2), rel=0.02)


@pytest.mark.parametrize("counts", [(40, 60), (40, 600), (600, 40), (300, 600)])  # below and above the dimensions
def test_every_route_gives_the_frechet_distance_of_the_formula(counts):
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


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_distance_depends_on_the_size_of_a_block(monkeypatch, dtype):
    a, b = (digits()[rows].astype(dtype) for rows in (slice(0, 150), slice(150, 400)))

    def all_values():
        return [*both(a, b), *both(a[:20], b), *both(a, b[:20]), *both(a[:20], b[:30]), *both(a[:30], b[:20])]

    expected = all_values()
    for block in (1, 1000, 20_000):
        monkeypatch.setattr(blocks, "BLOCK", block)
        np.testing.assert_allclose(all_values(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("counts", [(i, j) for i in range(1, 4) for j in range(1, 4)])
def test_a_distance_of_few_images_is_a_number_or_not_defined(counts):
    n, m = counts
    a, b = pixels(n), pixels(m, seed=1)
    assert math.isnan(frechet(a, b)) == (min(n, m) < 2)
    assert math.isnan(distances.floor(Normal(b), n, seed=0).value) == (min(n, m) < 2)
    assert math.isnan(distances.extrapolated(Normal(a), Normal(b), both(a, b), seed=0).value)


@pytest.mark.parametrize(
    ("n", "m", "dim", "tolerance"),
    [
        (300, 500, 8, 0.02),
        (300, 60, 100, 0.05),
        (40, 500, 100, 0.25),  # with fewer samples than features, removing one is not a small change
        (40, 60, 100, 0.25),
        (60, 40, 100, 0.25),
    ],
)
def test_the_error_is_that_of_the_jackknife_in_every_route(n, m, dim, tolerance):
    a, b = gaussian(n, mean=0.4, std=1.3, dim=dim), gaussian(m, dim=dim, seed=1)
    assert distances.distance_alone(Normal(a), Normal(b)) == pytest.approx(frechet(a, b), rel=1e-9)
    without = np.array([distances.distance_alone(Normal(np.delete(a, i, axis=0)), Normal(b)) for i in range(n)])
    jackknife = math.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    assert both(a, b).error == pytest.approx(jackknife, rel=tolerance)


REAL = gaussian(3000, dim=6)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 1.05), (0.3, 1.2)])
def test_the_distance_has_the_error_of_another_draw(mean, std):
    """Also at the floor, where the error may be too large by a factor of sqrt(2), but never too small."""
    real = Normal(REAL)
    draw = lambda seed: both(gaussian(200, mean, std, dim=6, seed=100 + seed), real)  # noqa: E731
    assert_covers(draw, None, times=120, widest=1.2 if mean else 1.6)


@pytest.mark.heavy
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.3, 1.2)])
def test_extrapolation_covers_the_distance_of_infinite_samples(mean, std):
    real = Normal(REAL)
    truth = np.square(REAL.mean(0) - mean).sum() + np.square(std - np.sqrt(np.linalg.eigvalsh(np.cov(REAL.T)))).sum()

    def draw(seed):
        samples = Normal(gaussian(200, mean, std, dim=6, seed=100 + seed))
        return distances.extrapolated(samples, real, both(samples, real), seed)

    assert_covers(draw, truth, times=120, widest=1.2 if mean else 1.6)


@pytest.mark.heavy
def test_the_floor_is_the_distance_of_resampled_real_images():
    real = Normal(digits())
    floor, smaller = distances.floor(real, 2000, seed=0), distances.floor(real, 500, seed=0)
    assert 0.0130 < floor.value < 0.0165
    assert floor.value < smaller.value / 3
    rng = np.random.default_rng(9)
    again = [distances.distance_alone(Normal(digits()[rng.integers(0, 1797, 2000)]), real) for _ in range(20)]
    assert abs(floor.value - np.mean(again)) < 3 * floor.error
    assert floor == distances.floor(real, 2000, seed=0) != distances.floor(real, 2000, seed=1)


def test_the_reference_is_decomposed_once(monkeypatch):
    real, eigh, sizes = Normal(gaussian(200)), torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (sizes.append(len(matrix)), eigh(matrix))[1])
    for seed in range(3):
        both(gaussian(100, seed=seed), real)
    distances.floor(real, 100, seed=0)
    assert len(sizes) == 1 + 3  # the root of the reference, and one per distance
