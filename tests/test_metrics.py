import hashlib
import math
import os

import numpy as np
import pytest
import torch

from ddpm import metrics
from ddpm.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.errors import UserError
from tests.conftest import small_unet

CPU = torch.device("cpu")


def gaussian(n, mean=0.0, std=1.0, dim=8, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std + mean


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    a, b = gaussian(100_000), gaussian(100_000, mean=0.5, std=2.0, seed=1)
    assert metrics.frechet_distance(a, b) == pytest.approx(8 * (0.5**2 + (2 - 1) ** 2), rel=0.02)


def test_the_same_images_are_at_distance_zero():
    a = gaussian(500)
    values = metrics.compare(a, a, neighbours=3, kid_subset_size=100, seed=0)
    assert values["frechet_distance"] == pytest.approx(0, abs=1e-8)
    assert values["precision"] == values["recall"] == 1.0


def test_samples_of_one_mode_have_precision_but_no_recall():
    real = torch.cat([gaussian(200, mean=m, std=0.1, seed=m) for m in range(5)])
    values = metrics.compare(gaussian(500, std=0.1, seed=9), real, neighbours=3, kid_subset_size=100, seed=0)
    assert values["precision"] > 0.8
    assert values["recall"] < 0.3
    assert values["kid"] > 0


def test_kid_follows_from_its_seed_and_takes_the_smaller_set():
    a, b = gaussian(60), gaussian(300, mean=0.3, seed=1)
    first, again, other = (metrics.compare(a, b, neighbours=3, kid_subset_size=50, seed=s)["kid"] for s in (0, 0, 1))
    assert first == again != other
    metrics.compare(a, b, neighbours=3, kid_subset_size=1000, seed=0)


def test_the_floor_is_what_two_halves_of_the_data_give():
    real = gaussian(2000)
    assert metrics.real_floor(real, seed=0) == metrics.real_floor(real, seed=0)
    assert 0 < metrics.real_floor(real, seed=0) < 0.1


def test_pixel_features_are_the_pixels_between_0_and_1():
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    features = metrics.extract_features(images, "pixels", None, batch_size=3, device=CPU)
    assert features.dtype == torch.float64
    expected = images.transpose(0, 3, 1, 2).reshape(7, -1) / 255
    np.testing.assert_array_equal(features.numpy(), expected)


def inception_weights(path):
    """A weights file as torch-fidelity's own, with random values."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    blank = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    original = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    torch.save({}, path)
    try:
        blank.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = original
    torch.save(blank.state_dict(), path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file where torch looks for what it has downloaded: <TORCH_HOME>/hub/checkpoints/."""
    path = tmp_path_factory.mktemp("torch") / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    inception_weights(path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_come_from_the_given_weights_file(weights, channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, channels), dtype=np.uint8)
    features = metrics.extract_features(images, "inception", str(weights), batch_size=2, device=CPU)
    assert features.shape == (3, 2048)
    assert features.isfinite().all()
    assert features.std(dim=0).max() > 0


def test_the_digest_is_that_of_the_weights_that_were_loaded(weights, tmp_path, monkeypatch):
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert metrics.weights_digest("inception", str(weights)) == expected
    assert metrics.weights_digest("pixels", str(weights)) == "none"
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))  # already downloaded: loaded with no network
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    images = np.zeros((1, 32, 32, 3), np.uint8)
    assert metrics.extract_features(images, "inception", None, 1, CPU).shape == (1, 2048)
    assert metrics.weights_digest("inception", None) == expected


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_missing_inception_weights_are_told_with_what_to_do(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluate.inception_weights = .*; give the file .* or use evaluate=pixels"):
        metrics.extract_features(np.zeros((2, 32, 32, 3), np.uint8), "inception", str(path), 2, CPU)


def test_a_weights_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"x": Code()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"evaluate.inception_weights = .*; give the file"):
        metrics.extract_features(np.zeros((2, 32, 32, 3), np.uint8), "inception", str(tmp_path / "weights.pth"), 2, CPU)
    assert not (tmp_path / "made").exists()


def test_without_a_network_the_error_says_which_file_to_give(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"inception_weights = None: .*; give the file weights-inception"):
        metrics.extract_features(np.zeros((2, 32, 32, 3), np.uint8), "inception", None, 2, CPU)


def test_a_distance_to_a_single_image_is_not_defined():
    assert math.isnan(metrics.frechet_distance(gaussian(10), gaussian(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_point_is_found_across_all_chunks(dtype):
    points, queries = gaussian(20_000, dim=2).to(dtype), gaussian(3000, dim=2, seed=1).to(dtype)
    queries[17], queries[2999] = points[19_999], points[8192]
    distance, index = metrics.nearest(queries, points, CPU)
    expected = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    np.testing.assert_array_equal(index, expected.indices.numpy())
    np.testing.assert_allclose(distance, expected.values.numpy(), rtol=1e-12)
    assert distance[17] == distance[2999] == 0  # a copy


def test_of_copies_in_the_training_set_the_first_is_the_nearest():
    points = gaussian(10).repeat(2000, 1)
    assert metrics.nearest(points[13:14], points, CPU)[1] == [3]


def test_the_memorisation_ratio_is_0_for_copies_and_1_for_new_images():
    train, new, held_out = gaussian(1000), gaussian(400, seed=1), gaussian(400, seed=2)
    to_train = lambda features: metrics.nearest(features, train, CPU)[0]  # noqa: E731
    assert metrics.memorisation_ratio(to_train(train[:100]), to_train(held_out)) == 0
    assert metrics.memorisation_ratio(to_train(new), to_train(held_out)) == pytest.approx(1, abs=0.1)
    assert metrics.memorisation_ratio(to_train(train[:100] + 0.01), to_train(held_out)) < 0.1
    assert math.isnan(metrics.memorisation_ratio(to_train(new), to_train(train)))


def test_the_held_out_loss_of_a_known_network_is_its_closed_form():
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon"))
    images = np.full((200, 8, 8, 1), 127, dtype=np.uint8)
    half = lambda x, t: x * 0  # noqa: E731  predicts zero: the loss is the noise's power
    losses = metrics.held_out_loss(half, d, images, None, bins=4, batch_size=64, seed=0, device=CPU)
    assert losses == pytest.approx([1.0] * 4, abs=0.04)


def test_the_held_out_loss_is_told_by_timestep_from_clean_to_noisy():
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon"))
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    images = np.zeros((10, 8, 8, 1), dtype=np.uint8)
    losses = metrics.held_out_loss(model, d, images, None, bins=5, batch_size=10, seed=0, device=CPU)
    assert [(int(t.min()) // 20, int(t.max()) // 20) for t in seen] == [(i, i) for i in range(5)]
    assert all(math.isfinite(loss) for loss in losses)
    again = metrics.held_out_loss(small_unet(), d, images, None, bins=5, batch_size=10, seed=0, device=CPU)
    assert again == metrics.held_out_loss(small_unet(), d, images, None, bins=5, batch_size=10, seed=0, device=CPU)
