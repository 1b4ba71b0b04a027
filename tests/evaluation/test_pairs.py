import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from ddpm.evaluation import blocks, pairs
from ddpm.evaluation.pairs import compare, real_pairs
from tests.evaluation.known import assert_covers, gaussian, pixels


def measure(samples, real, neighbours=3, seed=0):
    return compare(samples, real_pairs(real, neighbours), neighbours, seed)


def digits():
    return np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(-1, 64)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("counts", [(300, 300), (60, 1700)])
def test_kid_precision_and_recall_are_those_of_torch_fidelity(counts, dtype):
    rng = np.random.default_rng(0)
    a, b = (rng.permutation(digits())[:n] for n in counts)
    a, b = (a // 2 + rng.integers(0, 17, a.shape, dtype=np.uint8)).astype(dtype), b.astype(dtype)
    x, y = (torch.from_numpy(features.astype(np.float64) / (255 if dtype == np.uint8 else 1)) for features in (a, b))
    found = measure(a, b)
    if counts[0] == counts[1]:  # a single subset of all images: torch-fidelity takes as many of both
        kid = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=len(a), verbose=False)
        assert found["kid"].value == pytest.approx(kid[KEY_METRIC_KID_MEAN], rel=1e-9, abs=1e-12)
    peer = prc_features_to_metric(x, y, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    assert found["precision"].value == pytest.approx(peer[KEY_METRIC_PRECISION], abs=2e-3)
    assert found["recall"].value == pytest.approx(peer[KEY_METRIC_RECALL], abs=2e-3)


def test_density_and_coverage_are_those_of_their_formulas():
    """Naeem et al. 2020, eq. 3 and 4."""
    samples, real = gaussian(70, mean=0.3), gaussian(90, seed=1)
    apart = np.linalg.norm(real[:, None] - real, axis=2)
    inside = np.linalg.norm(samples[:, None] - real, axis=2) <= np.sort(apart, axis=1)[:, 5]
    found = measure(samples, real, neighbours=5)
    assert found["density"].value == pytest.approx(inside.sum() / (5 * 70))
    assert found["coverage"].value == pytest.approx(inside.any(axis=0).mean())


def test_samples_of_one_mode_have_precision_but_no_recall():
    real = np.concatenate([gaussian(200, mean=m, std=0.1, seed=m) for m in range(5)])
    found = measure(gaussian(500, std=0.1, seed=9), real)
    assert found["precision"].value > 0.8
    assert found["recall"].value < 0.3
    assert found["coverage"].value < 0.3
    assert found["kid"].value > 10 * found["kid"].error


def test_a_real_outlier_changes_precision_but_not_density():
    real = np.concatenate([gaussian(300, std=0.1), np.full((1, 8), 30.0)])
    found = measure(gaussian(300, mean=2.0, std=0.1, seed=1), real)
    assert found["precision"].value == 1
    assert found["density"].value < 0.5


ATOMS, REAL = gaussian(40, mean=0.6, std=1.2, dim=3, seed=1), gaussian(80, dim=3, seed=2)


def drawn(seed, n=200):
    """Samples of a known sampler: it draws these points, each equally often."""
    return ATOMS[np.random.default_rng(seed).integers(0, len(ATOMS), n)]


@pytest.mark.heavy
def test_kid_precision_and_density_cover_the_known_truth():
    truth = measure(ATOMS, REAL)  # over all points of the sampler: precision and density are means over samples
    found = [measure(drawn(seed), REAL) for seed in range(60)]
    for name in ("precision", "density"):
        assert_covers(lambda seed, name=name: found[seed][name], truth[name].value, times=60)
    kernel = lambda a, b: (a @ b.T / 3 + 1) ** 3  # noqa: E731
    own = kernel(REAL, REAL)
    expected = (own.sum() - np.trace(own)) / 80 / 79 + kernel(ATOMS, ATOMS).mean() - 2 * kernel(ATOMS, REAL).mean()
    assert_covers(lambda seed: found[seed]["kid"], expected, times=60)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["recall", "coverage"])
def test_recall_and_coverage_have_the_error_of_another_draw(name):
    around = real_pairs(gaussian(150, dim=4), 3)
    samples = lambda seed: gaussian(120, mean=0.2, std=0.8, dim=4, seed=100 + seed)  # noqa: E731
    assert_covers(lambda seed: compare(samples(seed), around, 3, seed)[name], None, times=60, widest=1.6)


def test_the_seed_changes_only_errors_of_recall_and_coverage():
    a, b = gaussian(60), gaussian(100, mean=0.3, seed=1)
    assert measure(a, b) == measure(a, b)
    other = measure(a, b, seed=1)
    assert {name for name, found in measure(a, b).items() if found != other[name]} == {"recall", "coverage"}
    assert {name for name, found in measure(a, b).items() if found.value != other[name].value} == set()


@pytest.mark.parametrize("counts", [(i, j) for i in (1, 2, 3, 4, 5) for j in (1, 2, 4, 5)])
def test_each_measure_of_few_images_is_a_number_or_undefined(counts):
    n, m = counts
    for k in (1, 3, 50):
        found = measure(pixels(n), pixels(m, seed=1), neighbours=k)
        assert math.isnan(found["kid"].value) == (min(n, m) < 2)
        for name in ("precision", "density", "coverage"):
            assert math.isnan(found[name].value) == (m <= k)
        assert math.isnan(found["recall"].value) == (n <= k)


def test_the_same_images_have_precision_and_recall_1():
    a = gaussian(300)
    found = measure(a, a)
    assert (found["precision"].value, found["recall"].value, found["coverage"].value) == (1, 1, 1)


def test_neighbours_beyond_those_kept_are_not_needed(monkeypatch):
    a, b = gaussian(200), gaussian(150, seed=1)
    expected = measure(a, b)
    monkeypatch.setattr(pairs, "SPARE", 1000)
    assert measure(a, b) == expected


def brute_force(samples, real, k):
    """The numbers from whole matrices of distances and kernels, by their definitions."""
    a, b = (x.astype(np.float64) / (255 if x.dtype == np.uint8 else 1) for x in (samples, real))
    apart = lambda x, y: np.square(x[:, None] - y).sum(2)  # noqa: E731
    others = lambda m: (m.sum() - np.trace(m)) / len(m) / (len(m) - 1)  # noqa: E731
    kernel = lambda x, y: (x @ y.T / a.shape[1] + 1) ** 3  # noqa: E731
    reach = lambda x: np.sort(apart(x, x), axis=1)[:, k] + 1e-9  # noqa: E731  those on the edge are inside
    found = (
        {"kid": others(kernel(a, a)) + others(kernel(b, b)) - 2 * kernel(a, b).mean()}
        if min(map(len, (a, b))) > 1
        else {}
    )
    if len(b) > k:
        inside = apart(a, b) <= reach(b)
        found |= {
            "precision": inside.any(1).mean(),
            "density": inside.sum() / k / len(a),
            "coverage": inside.any(0).mean(),
        }
    if len(a) > k:
        found["recall"] = (apart(a, b) <= reach(a)[:, None]).any(0).mean()
    return found


def with_copies(n, start, dtype):
    """Digits, of which the last ones are the first ones again."""
    images = digits()[start : start + n]
    images[n - n // 5 :] = images[: n // 5]
    return images.astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("counts", [(25, 40), (32, 16), (17, 33), (1, 20), (20, 1), (3, 5), (5, 3)])
def test_the_numbers_are_those_of_their_definitions(monkeypatch, counts, dtype):
    samples, real = with_copies(counts[0], 0, dtype), with_copies(counts[1], 40, dtype)
    expected = brute_force(samples, real, 3)
    whole = measure(samples, real)
    for tile in (3, 16, 1024):
        monkeypatch.setattr(blocks, "TILE", tile)
        for name, found in measure(samples, real).items():
            assert found.value == pytest.approx(expected.get(name, math.nan), rel=1e-9, abs=1e-9, nan_ok=True), name
            assert found == pytest.approx(whole[name], rel=1e-6, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("tile", [7, 1024])
def test_the_order_of_the_real_images_does_not_matter(monkeypatch, tile):
    monkeypatch.setattr(blocks, "TILE", tile)
    samples, real = with_copies(50, 0, np.uint8), with_copies(80, 30, np.uint8)
    order = np.random.default_rng(0).permutation(80)
    around, other = real_pairs(real, 3), real_pairs(real[order], 3)
    np.testing.assert_array_equal(other.radii.numpy(), around.radii.numpy()[order])
    expected = compare(samples, around, 3, 0)
    for name, found in compare(samples, other, 3, 0).items():
        assert found == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("tile", [7, 64, 1024])
def test_images_on_the_edge_of_a_ball_are_inside(monkeypatch, tile):
    monkeypatch.setattr(blocks, "TILE", tile)
    images = pixels(150)
    found = measure(images, images)
    assert (found["precision"].value, found["recall"].value, found["coverage"].value) == (1, 1, 1)
    assert found["density"].value == pytest.approx(4 / 3)  # each of 150 balls holds its own image and three more


def test_broken_features_do_not_hide_the_others(monkeypatch):
    monkeypatch.setattr(blocks, "TILE", 32)
    images = gaussian(100)
    expected = real_pairs(images, 3)
    broken = np.concatenate([images, np.full((1, 8), math.nan)])
    assert torch.equal(real_pairs(broken, 3).radii[:100], expected.radii)
    assert math.isnan(real_pairs(broken, 3).kernel)
