import hashlib
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ddpm.config.load import check
from ddpm.errors import UserError
from ddpm.evaluation.features import open_extractor
from tests.conftest import composed

CPU = torch.device("cpu")


def opened(name, weights=None, size=None):
    settings = {"features": name, "weights": weights and str(weights), "input_size": size}
    return open_extractor(check(composed()).evaluate.model_copy(update=settings), CPU)


def extract(images, name, weights=None, size=None, batch_size=2):
    return opened(name, weights, size)(images, batch_size, CPU)


def photographs(count, size=32, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def test_features_of_pixels_are_the_pixels_and_no_copy_of_them():
    images = photographs(7, size=4)
    vectors = extract(images, "pixels", batch_size=3)
    np.testing.assert_array_equal(vectors, images.reshape(7, -1))
    assert np.shares_memory(vectors, images)


def inception_weights(path):
    """A weights file like torch-fidelity's, with random values."""
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
    """A weights file where torch looks for its downloads: <TORCH_HOME>/hub/checkpoints/."""
    path = tmp_path_factory.mktemp("torch") / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    inception_weights(path)
    return path


@pytest.mark.heavy
@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_come_from_the_given_weights_file(weights, channels):
    vectors = extract(photographs(3, channels=channels), "inception", weights)
    assert vectors.shape == (3, 2048)
    assert np.isfinite(vectors).all()
    assert vectors.std(axis=0).max() > 0


@pytest.mark.heavy
def test_the_digest_is_that_of_the_weights_that_were_loaded(weights, monkeypatch):
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert opened("inception", weights).digest == expected
    assert opened("pixels").digest == "none"
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))  # already downloaded: loaded with no network
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert opened("inception").digest == expected


@pytest.fixture
def models(tmp_path):
    """Weights of two small models of timm, a transformer and a convolutional network, as on timm's hub."""

    def write(name):
        torch.manual_seed(0)
        path = tmp_path / f"{name}.safetensors"
        save_file(timm.create_model(name, pretrained=False).state_dict(), path)
        return path

    return {name: write(name) for name in ("test_vit", "test_resnet")}


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "interpolation"), [("test_vit", "bicubic"), ("test_resnet", "bilinear")])
@pytest.mark.parametrize("size", [None, 64])
def test_features_of_timm_are_those_of_its_model(models, name, interpolation, size):
    """Images are resized and normalised as timm says; a transformer's position embeddings are resized to the images."""
    images, side = photographs(3), size or 160
    vectors = extract(images, f"timm:{name}", models[name], size)
    options = {"img_size": side} if name == "test_vit" else {}
    model = timm.create_model(
        name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(models[name])}, **options
    ).eval()
    mode = Image.Resampling[interpolation.upper()]
    small = np.stack([np.asarray(Image.fromarray(image).resize((side, side), mode)) for image in images])
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model((torch.from_numpy(small).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    assert vectors.shape == (3, model.num_features)
    np.testing.assert_allclose(vectors, expected, atol=0.03 * np.abs(expected).max())  # a level of rounding at most
    assert np.abs(np.diff(vectors, axis=0)).max() > 0.01 * np.abs(vectors).max()


def test_timms_features_ignore_the_batch_and_accept_grey_images(models):
    images = photographs(5, channels=1)
    vectors = extract(images, "timm:test_vit", models["test_vit"], 32, batch_size=5)
    np.testing.assert_allclose(extract(images, "timm:test_vit", models["test_vit"], 32), vectors, rtol=1e-4, atol=1e-4)
    colour = extract(images.repeat(3, axis=3), "timm:test_vit", models["test_vit"], 32, batch_size=5)
    np.testing.assert_array_equal(colour, vectors)


def test_an_extractor_lists_what_its_features_depend_on(models):
    extractor = opened("timm:test_vit", models["test_vit"], 32)
    assert extractor.digest == hashlib.sha256(models["test_vit"].read_bytes()).hexdigest()
    assert str(extractor) == "timm:test_vit, images resized to 32x32"
    assert set(extractor.facts) == {"timm", "size", "interpolation"}
    assert str(opened("pixels")) == "pixels"


def test_weights_of_the_hub_are_read_where_it_keeps_them(models, tmp_path, monkeypatch):
    from huggingface_hub import constants

    kept = tmp_path / "hub/models--timm--test_vit.r160_in1k"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("abc")
    (kept / "snapshots/abc").mkdir(parents=True)
    models["test_vit"].rename(kept / "snapshots/abc/model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert extract(photographs(2), "timm:test_vit.r160_in1k", None, 32).shape == (2, 64)


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
@pytest.mark.parametrize("name", ["inception", "timm:test_vit"])
def test_weights_that_do_not_load_are_refused_with_what_to_do(tmp_path, name, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluate.weights = .*; give its own file") as refused:
        opened(name, path)
    assert "\n" not in str(refused.value)


def test_weights_of_another_model_are_refused(models):
    with pytest.raises(UserError, match=r"does not load as the weights of timm:test_vit: .*; give its own file"):
        opened("timm:test_vit", models["test_resnet"])


@pytest.mark.parametrize("name", ["inception", "timm:test_vit"])
def test_a_weights_file_that_would_run_code_is_refused(tmp_path, name):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    for path in (tmp_path / "weights.pth", tmp_path / "weights.safetensors"):
        torch.save({"x": Code()}, path)
        with pytest.raises(UserError, match=r"evaluate.weights = .*; give its own file"):
            opened(name, path)
    assert not (tmp_path / "made").exists()
