"""evaluate, on a few images and a network that was not trained."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import metrics, samplers
from ddpm.config import NfeCurve, Sample, check
from ddpm.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.errors import UserError
from ddpm.pipeline_io import save_model
from stages import evaluate
from tests.conftest import composed, small_unet

CPU = torch.device("cpu")
DIFFUSION = DiffusionConfig(20, "cosine", "v")
SETTINGS = (
    "diffusion.timesteps=20", "sample.count=24", "sample.batch_size=10", "sample.steps=4", "evaluate.loss_bins=2",
    "evaluate.kid_subset_size=10", "evaluate.nfe_samples=12", "evaluate.batch_size=16", "runtime.threads=1",
)  # fmt: skip
OUTPUTS = (
    "metrics.json", "card.md", "neighbours.png", "loss_by_timestep.json", "bound_by_timestep.json", "fd_by_nfe.json",
)  # fmt: skip


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


def drawn(seed, count=24, **changes):
    """The samples of a seed, as the stage sample would draw them."""
    settings = check(composed(*SETTINGS)).sample.model_copy(update=changes)
    return samplers.draw(small_unet(), GaussianDiffusion(DIFFUSION), settings, seed, count, CPU)


def distance(samples):
    """To the reference, which is all of the data."""
    real = np.concatenate([np.load(f"data/prepared/{split}/images.npy") for split in ("train", "test")])
    return metrics.frechet_distance(*(metrics.extract_features(x, "pixels", None, 100, CPU) for x in (samples, real)))


def tell(test):
    """Write dataset.json, with so many held-out images."""
    counts = {"train": 60, "test": test}
    parts = [np.load(f"data/prepared/{split}/{kind}.npy") for split in counts for kind in ("images", "labels")]
    content = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    info = {"name": "digits", "shape": [8, 8, 1], "counts": counts, "classes": [], "class_counts": []}
    info |= {"broken": 0, "sha256": content}
    Path("data/prepared/dataset.json").write_text(json.dumps(info))


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A folder with prepared data, a model and its samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for split, count in (("train", 60), ("test", 30)):
        Path("data/prepared", split).mkdir(parents=True)
        np.save(f"data/prepared/{split}/images.npy", images(count, seed=count))
        np.save(f"data/prepared/{split}/labels.npy", np.zeros(count, dtype=np.int64))
    tell(test=30)
    save_model("models/ddpm", small_unet(), DIFFUSION, {"run": "0123456789abcdef"})
    Path("samples").mkdir()
    np.save("samples/images.npy", drawn(seed=0))
    return tmp_path


def run(*overrides):
    params = check(composed(*SETTINGS, *overrides))
    evaluate.main(SimpleNamespace(**{section: getattr(params, section) for section in evaluate.SECTIONS}))
    return json.loads(Path("results/evaluate/metrics.json").read_text())


def rows():
    return json.loads(Path("results/evaluate/fd_by_nfe.json").read_text())


def test_every_output_has_the_same_bytes_again_and_tells_no_path(inside):
    run()
    before = {name: Path("results/evaluate", name).read_bytes() for name in OUTPUTS}
    torch.manual_seed(1)
    run()
    assert before == {name: Path("results/evaluate", name).read_bytes() for name in OUTPUTS}
    assert {path.name for path in Path("results/evaluate").iterdir()} == set(OUTPUTS)
    assert not any(str(inside).encode() in content for content in before.values())


def test_the_bound_is_told_where_it_is_asked_for_and_only_there(inside):
    values = run("evaluate.bound_images=5")
    told = json.loads(Path("results/evaluate/bound_by_timestep.json").read_text())
    assert values["bits_per_dim"] == pytest.approx(sum(row["bits_per_dim"] for row in told), rel=0.01)  # but L_T
    assert "bits_per_dim" not in run("evaluate.bound_images=0")
    assert json.loads(Path("results/evaluate/bound_by_timestep.json").read_text()) == []


def test_samples_that_were_never_rounded_to_pixels_are_refused(inside):
    np.save("samples/images.npy", np.load("samples/images.npy") / np.float32(127.5) - 1)
    with pytest.raises(
        UserError, match=r"samples/images\.npy: holds float32 .*, not uint8; run the stage sample again"
    ):
        run()


def test_metrics_are_numbers_and_the_card_has_the_words(inside):
    values = run()
    assert all(type(value) in (int, float) for value in values.values())
    assert (values["samples"], values["seeds"], values["nfe"], values["reference_images"]) == (24, 1, 4, 90)
    card = Path("results/evaluate/card.md").read_text()
    digest = json.loads(Path("data/prepared/dataset.json").read_text())["sha256"][:8]
    for text in (str(values["frechet_distance"]), "ddim", "pixels", "digits, all: 90 images of 8x8x1", digest):
        assert text in card


def test_the_distances_to_train_and_test_are_told_whatever_the_reference(inside):
    by_reference = {name: run(f"evaluate.reference={name}") for name in ("train", "test", "all")}
    for name in ("train", "test"):
        assert by_reference[name]["frechet_distance"] == by_reference["all"][f"frechet_distance_{name}"]
        assert by_reference[name]["frechet_distance_real_test"] == by_reference["all"]["frechet_distance_real_test"]


def test_further_seeds_are_drawn_as_the_stage_sample_draws_them(inside):
    alone, values = run(), run("evaluate.seeds=3")
    assert values["frechet_distance"] == alone["frechet_distance"]
    expected = [distance(drawn(seed)) for seed in (0, 1, 2)]
    assert len(set(expected)) == 3
    assert values["frechet_distance_mean"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert values["frechet_distance_std"] == pytest.approx(np.std(expected, ddof=1), abs=1e-4)
    assert "3 seeds" in Path("results/evaluate/card.md").read_text()


def test_without_a_curve_the_headline_is_its_one_point(inside):
    values = run()
    assert rows() == [{"sampler": "ddim", "nfe": 4, "frechet_distance": values["frechet_distance"]}]


def test_the_curve_has_a_point_for_each_sampler_and_number_of_steps(inside):
    run(
        "evaluate.nfe_curve=[{sampler: ddim, steps: [2, 5]}, {sampler: ddpm, steps: [3]}]",
        "sample.variance=fixed_large",
    )
    assert [(row["sampler"], row["nfe"]) for row in rows()] == [("ddim", 2), ("ddim", 5), ("ddpm", 3)]
    for row, settings in zip(rows(), ({"steps": 2}, {"steps": 5}, {"steps": 3, "sampler": "ddpm"}), strict=True):
        assert row["frechet_distance"] == pytest.approx(distance(drawn(0, count=12, **settings)), abs=1e-4)


def test_copies_of_training_images_are_found_and_shown_beside_their_originals(inside):
    copied = np.load("data/prepared/train/images.npy")[::-1][:24]
    np.save("samples/images.npy", copied)
    assert run()["memorisation_ratio"] == 0
    picture = np.asarray(Image.open("results/evaluate/neighbours.png"))
    np.testing.assert_array_equal(picture[16:80, 16:80], picture[16:80, 82:146])
    np.testing.assert_array_equal(picture[16:80:8, 16:80:8], copied[0, ..., 0])


def test_samples_that_are_the_reference_images_are_at_distance_zero(inside):
    """Neither set is mirrored, scaled or read in another way than the other: noise images have no symmetry."""
    for reference in ("train", "test"):
        np.save("samples/images.npy", np.load(f"data/prepared/{reference}/images.npy"))
        values = run(f"evaluate.reference={reference}")
        assert abs(values["frechet_distance"]) < 1e-3
        assert (values["precision"], values["recall"]) == (1, 1)


def test_a_single_held_out_image_leaves_out_what_it_does_not_define(inside):
    np.save("data/prepared/test/images.npy", images(1, seed=0))
    np.save("data/prepared/test/labels.npy", np.zeros(1, dtype=np.int64))
    tell(test=1)
    values = run("evaluate.reference=train")
    assert values["frechet_distance"] == values["frechet_distance_train"]
    assert not {"frechet_distance_test", "frechet_distance_real_test"} & set(values)
    assert "not defined" in Path("results/evaluate/card.md").read_text()


def test_the_curve_takes_the_samplers_that_the_stage_sample_takes():
    assert NfeCurve.model_fields["sampler"].annotation == Sample.model_fields["sampler"].annotation


@pytest.mark.parametrize(
    ("curve", "fault"),
    [
        ("{sampler: ddim, steps: [5, 21]}", r"evaluate.nfe_curve.0.steps = .*: must each be at most .* = 20"),
        ("{sampler: ddim, steps: []}", r"evaluate.nfe_curve.0.steps = \[\]: "),
        ("{sampler: euler, steps: [5]}", r"evaluate.nfe_curve.0.sampler = .*euler.*: .*ddpm"),
        ("{sampler: ddim, step: [5]}", r"evaluate.nfe_curve.0.step = .*: unknown key \(did you mean steps\?\)"),
    ],
)
def test_a_wrong_curve_is_refused_before_anything_is_computed(curve, fault):
    tree = composed(*SETTINGS, f"evaluate.nfe_curve=[{curve}]")
    with pytest.raises(UserError, match=fault):
        check(tree)
