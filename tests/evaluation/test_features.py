import hashlib
import os

import numpy as np
import pytest
import torch

from ddpm.errors import UserError
from ddpm.evaluation import features

CPU = torch.device("cpu")


def test_features_of_pixels_are_the_pixels_and_no_copy_of_them():
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    vectors = features.extract_features(images, "pixels", None, batch_size=3, device=CPU)
    np.testing.assert_array_equal(vectors, images.reshape(7, -1))
    assert np.shares_memory(vectors, images)


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
    vectors = features.extract_features(images, "inception", str(weights), batch_size=2, device=CPU)
    assert vectors.shape == (3, 2048)
    assert np.isfinite(vectors).all()
    assert vectors.std(axis=0).max() > 0


def test_the_digest_is_that_of_the_weights_that_were_loaded(weights, tmp_path, monkeypatch):
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert features.weights_digest("inception", str(weights)) == expected
    assert features.weights_digest("pixels", str(weights)) == "none"
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))  # already downloaded: loaded with no network
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    images = np.zeros((1, 32, 32, 3), np.uint8)
    assert features.extract_features(images, "inception", None, 1, CPU).shape == (1, 2048)
    assert features.weights_digest("inception", None) == expected


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_missing_inception_weights_are_reported_with_a_remedy(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluate.inception_weights = .*; give the file .* or use evaluate=pixels"):
        features.extract_features(np.zeros((2, 32, 32, 3), np.uint8), "inception", str(path), 2, CPU)


def test_a_weights_file_that_would_run_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "weights.pth"
    torch.save({"x": Code()}, path)
    with pytest.raises(UserError, match=r"evaluate.inception_weights = .*; give the file"):
        features.extract_features(
            np.zeros((2, 32, 32, 3), np.uint8), "inception", str(tmp_path / "weights.pth"), 2, CPU
        )
    assert not (tmp_path / "made").exists()


def test_without_a_network_the_error_says_which_file_to_give(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"inception_weights = None: .*; give the file weights-inception"):
        features.extract_features(np.zeros((2, 32, 32, 3), np.uint8), "inception", None, 2, CPU)
