import hashlib
import math
import os

import numpy as np
import pytest
import torch

from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.errors import UserError
from ddpm.evaluation import metrics
from tests.conftest import small_unet

CPU = torch.device("cpu")


def test_features_of_pixels_are_the_pixels_and_no_copy_of_them():
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    features = metrics.extract_features(images, "pixels", None, batch_size=3, device=CPU)
    np.testing.assert_array_equal(features, images.reshape(7, -1))
    assert np.shares_memory(features, images)


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
    assert np.isfinite(features).all()
    assert features.std(axis=0).max() > 0


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


def test_the_held_out_loss_of_a_known_network_is_its_closed_form():
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon"))
    images = np.full((200, 8, 8, 1), 127, dtype=np.uint8)
    half = lambda x, t: x * 0  # noqa: E731  predicts zero: the loss is the noise's power
    losses, bound = metrics.held_out_loss(half, d, images, None, bins=4, batch_size=64, seed=0, device=CPU)
    assert losses == pytest.approx([1.0] * 4, abs=0.04)
    assert bound is None


def test_the_held_out_loss_is_told_by_timestep_from_clean_to_noisy():
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon"))
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    images = np.zeros((10, 8, 8, 1), dtype=np.uint8)
    losses, _ = metrics.held_out_loss(model, d, images, None, bins=5, batch_size=10, seed=0, device=CPU)
    assert [(int(t.min()) // 20, int(t.max()) // 20) for t in seen] == [(i, i) for i in range(5)]
    assert all(math.isfinite(loss) for loss in losses)
    again = metrics.held_out_loss(small_unet(), d, images, None, bins=5, batch_size=10, seed=0, device=CPU)
    assert again == metrics.held_out_loss(small_unet(), d, images, None, bins=5, batch_size=10, seed=0, device=CPU)


def photographs(count, size=8, channels=1):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("learned", [False, True])
def test_the_held_out_loss_follows_from_each_image_alone(learned):
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon", learn_variance=learned))
    images, unet = photographs(23), small_unet(out_channels=1 + learned)

    def loss(rows, batch_size):
        options = {"bins": 3, "batch_size": batch_size, "seed": 0, "device": CPU}
        simple, bound = metrics.held_out_loss(unet, d, images[rows], None, np.array(rows), **options)
        return np.array([simple, bound or simple]) * len(rows)

    every = list(range(23))
    whole = loss(every, 23)
    for batch_size in (1, 2, 5, 22, 100):
        np.testing.assert_allclose(loss(every, batch_size), whole, rtol=1e-5)
    np.testing.assert_allclose(loss(every[::-1], 4), whole, rtol=1e-5)  # in another order
    np.testing.assert_allclose(loss(every[::2], 4) + loss(every[1::2], 7), whole, rtol=1e-5)  # others left out
    assert np.abs(loss(every[::2], 4) - loss(every[1::2], 4)).min() > 0


def test_the_held_out_loss_shared_by_processes_is_that_of_one():
    d, images = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon")), photographs(11)

    def shared(parts):
        """Each process computes its parts, the last first."""
        arrays = [compute() for _, compute in list(parts)[::-1]]
        return iter(arrays[::-1])

    options = {"bins": 3, "batch_size": 2, "seed": 0, "device": CPU}
    alone, together = (
        metrics.held_out_loss(small_unet(), d, images, None, **options, **more) for more in ({}, {"keep": shared})
    )
    assert alone == together


def test_with_a_learned_variance_the_held_out_loss_is_the_simple_one():
    """A network with the same prediction has the same loss, whether or not it also has a variance."""
    images, unet = photographs(9), small_unet()
    plain = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon"))
    hybrid = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon", learn_variance=True))
    options = {"bins": 3, "batch_size": 4, "seed": 0, "device": CPU}
    expected, none = metrics.held_out_loss(unet, plain, images, None, **options)
    both = lambda x, t: torch.cat([unet(x, t), torch.zeros_like(x)], dim=1)  # noqa: E731
    simple, bound = metrics.held_out_loss(both, hybrid, images, None, **options)
    assert simple == expected
    assert none is None
    assert len(bound) == 3
    assert min(bound) > 0


def test_a_timestep_that_rounding_lifts_to_the_end_stays_inside(monkeypatch):
    class Highest:
        def random(self):
            return 1 - 2**-53

        def standard_normal(self, shape, dtype):
            return np.zeros(shape, dtype)

    monkeypatch.setattr(metrics, "generator", lambda *seed: Highest())
    seen = []
    model = lambda x, t: (seen.append(int(t.max())), x)[1]  # noqa: E731
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon"))
    metrics.held_out_loss(model, d, photographs(2), None, bins=5, batch_size=2, seed=0, device=CPU)
    assert max(seen) == 9
