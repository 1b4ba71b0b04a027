"""The networks that may be named, and their weights: a fault stops the first stage, in one line."""

import io
import json

import pytest

from ddpm.config import extractors
from ddpm.config.checks import check_data
from ddpm.config.load import check
from ddpm.errors import UserError
from tests.conftest import composed

INFO = {"shape": [8, 8, 1], "counts": {"train": 130, "test": 20}, "classes": []}
HEADER = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
TINY = ("evaluate=dinov2", "evaluate.features=timm:test_vit.r160_in1k")


def fault(*overrides):
    with pytest.raises(UserError) as caught:
        check_data(check(composed(*overrides)), INFO)
    (line,) = str(caught.value).split("\n")
    return line


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + bytes(4))
    return path


@pytest.mark.parametrize(
    ("features", "line"),
    [
        ("timm:test_vot.r160_in1k", "timm has no such model (did you mean test_vit?)"),
        ("timm:q9", "timm has no such model; python -c 'import timm; print(timm.list_pretrained())' lists them"),
        ("timm:test_vit", "its weights are test_vit.r160_in1k; name one of them, or give a file by evaluate.weights"),
        (
            "timm:test_vit.r161_in1k",
            "its weights are test_vit.r160_in1k; name one of them, or give a file by evaluate.weights",
        ),
        ("dinov2", "should be pixels, inception, or timm:<name> of a model of the library timm"),
        ("timm:../../x", "should be pixels, inception, or timm:<name> of a model of the library timm"),
    ],
)
def test_an_unknown_network_is_refused_with_the_known_ones(features, line):
    assert fault("evaluate=dinov2", f"evaluate.features={features}").endswith(
        f"evaluate.features = {features!r}: {line}"
    )


def test_with_a_file_the_name_of_its_weights_may_be_left_out(weights):
    check_data(
        check(composed("evaluate=dinov2", "evaluate.features=timm:test_vit", f"evaluate.weights={weights}")), INFO
    )


def test_all_weights_that_timm_lists_are_known():
    import timm

    names = timm.list_pretrained()
    assert len(names) > 1000
    assert [name for name in names[::20] if extractors.name_fault(f"timm:{name}", None)] == []


def test_without_timm_the_error_names_the_command(monkeypatch):
    extractors._timm.cache_clear()
    monkeypatch.setattr(extractors, "find_spec", lambda name: None)
    try:
        assert "timm is not installed: run make repro, or pip install -r requirements.txt" in fault(*TINY)
    finally:
        extractors._timm.cache_clear()


def test_weights_that_are_not_safetensors_are_refused(tmp_path, weights):
    other = tmp_path / "model.bin"
    other.write_bytes(weights.read_bytes())
    for path, content in ((other, None), (weights, b""), (weights, HEADER), (weights, b"PK" + bytes(100))):
        if content is not None:
            path.write_bytes(content)
        line = fault(*TINY, f"evaluate.weights={path}")
        assert "is not a safetensors file; give the file model.safetensors of huggingface.co/timm/test_vit.r160" in line


@pytest.mark.parametrize("content", [b"", b"<html>", b"P"])
def test_a_web_page_as_inceptions_weights_is_refused(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    line = fault("evaluate=inception", f"evaluate.weights={tmp_path}/weights.pth")
    assert "is not a file written by torch.save; give the file weights-inception-2015-12-05-6726825d.pth of" in line


@pytest.mark.parametrize("choice", [TINY, ("evaluate=inception",)])
def test_without_network_and_weights_the_first_stage_stops(tmp_path, monkeypatch, choice):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    line = fault(*choice)
    assert line.startswith("params.yaml: evaluate.weights = None: the weights of ")
    assert "cannot be downloaded: " in line
    assert "; give the file " in line
    assert line.endswith("or use evaluate=pixels")


def test_inceptions_file_is_the_one_that_torch_fidelity_loads():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert URL_INCEPTION_V3 == extractors.INCEPTION


def test_a_download_with_a_wrong_checksum_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(extractors, "urlopen", lambda *address, **options: io.BytesIO(b"a page of a captive portal"))
    assert "checksum of the downloaded file is wrong; give the file weights-inception" in fault("evaluate=inception")
    assert not list(tmp_path.rglob("*.*"))
