"""The stage evaluate, on a few images and an untrained network."""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ddpm.config.load import check
from ddpm.config.schema import NfeCurve, Sample
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.errors import UserError
from ddpm.evaluation import cache, distances
from ddpm.evaluation.features import Extractor
from ddpm.model_folder import save_model
from ddpm.runtime.resume import ResumeState
from ddpm.sampling import Classes, draw
from stages import evaluate
from tests.conftest import composed, small_unet

pytestmark = pytest.mark.process
DIFFUSION = DiffusionConfig(20, "cosine", "v")
SETTINGS = (
    "diffusion.timesteps=20", "sample.count=24", "sample.batch_size=10", "sample.steps=4", "evaluate.loss_bins=2",
    "evaluate.nfe_samples=12", "evaluate.batch_size=16", "runtime.threads=1",
)  # fmt: skip
OUTPUTS = (
    "metrics.json", "card.md", "neighbours.png", "loss_by_timestep.json", "bound_by_timestep.json", "fd_by_nfe.json",
)  # fmt: skip


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


def drawn(seed, count=24, **changes):
    """The samples of a seed, as drawn by the stage sample."""
    settings = check(composed(*SETTINGS)).sample.model_copy(update={"seed": seed, "count": count} | changes)
    return draw(small_unet(), GaussianDiffusion(DIFFUSION), settings)


def distance(samples):
    """The distance to the reference, which is all of the data."""
    real = np.concatenate([np.load(f"data/prepared/{split}/images.npy") for split in ("train", "test")])
    return distances.frechet_distance(*(distances.Normal(x.reshape(len(x), -1)) for x in (samples, real))).value


def write_info(test, train=60, **more):
    """Write dataset.json for this many images in each split."""
    counts = {"train": train, "test": test}
    parts = [np.load(f"data/prepared/{split}/{kind}.npy") for split in counts for kind in ("images", "labels")]
    content = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    info = {"name": "digits", "shape": [8, 8, 1], "counts": counts, "classes": [], "class_counts": []}
    info |= {"broken": 0, "sha256": content} | more
    info["class_counts"] = [1] * len(info["classes"])
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
    write_info(test=30)
    save_model("models/ddpm", small_unet(), DIFFUSION, {"run": "0123456789abcdef"})
    Path("samples").mkdir()
    np.save("samples/images.npy", drawn(seed=0))
    return tmp_path


def split(name, count):
    """Replace the images of a split by so many others."""
    np.save(f"data/prepared/{name}/images.npy", images(count, seed=count + 1000 * len(name)))
    np.save(f"data/prepared/{name}/labels.npy", np.zeros(count, dtype=np.int64))


def run(*overrides):
    params = check(composed(*SETTINGS, *overrides))
    evaluate.main(SimpleNamespace(**{section: getattr(params, section) for section in evaluate.SECTIONS}))
    return json.loads(Path("results/evaluate/metrics.json").read_text())


def rows():
    return json.loads(Path("results/evaluate/fd_by_nfe.json").read_text())


def test_a_second_run_gives_the_same_bytes_without_paths(inside):
    run()
    before = {name: Path("results/evaluate", name).read_bytes() for name in OUTPUTS}
    torch.manual_seed(1)
    run()
    assert before == {name: Path("results/evaluate", name).read_bytes() for name in OUTPUTS}
    assert {path.name for path in Path("results/evaluate").iterdir()} == set(OUTPUTS)
    assert not any(str(inside).encode() in content for content in before.values())


def test_the_bound_is_reported_only_where_images_are_set_for_it(inside):
    values = run("evaluate.bound_images=5")
    assert values["bits_per_dim_se"] > 0
    terms = json.loads(Path("results/evaluate/bound_by_timestep.json").read_text())
    assert values["bits_per_dim"] == pytest.approx(sum(row["bits_per_dim"] for row in terms), rel=0.01)  # but L_T
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
    for text in (str(values["frechet_distance"]), "dpm_solver", "pixels", "digits, all: 90 images of 8x8x1", digest):
        assert text in card


def test_distances_to_train_and_test_are_there_for_any_reference(inside):
    by_reference = {name: run(f"evaluate.reference={name}") for name in ("train", "test", "all")}
    for name in ("train", "test"):
        assert by_reference[name]["frechet_distance"] == by_reference["all"][f"frechet_distance_{name}"]
        assert by_reference[name]["frechet_distance_real_test"] == by_reference["all"]["frechet_distance_real_test"]


def test_further_seeds_are_drawn_as_the_stage_sample_draws_them(inside):
    alone, values = run(), run("evaluate.seeds=3")
    assert values["frechet_distance"] == alone["frechet_distance"]
    expected = [distance(drawn(seed)) for seed in (0, 1, 2)]
    assert len(set(expected)) == 3
    assert values["frechet_distance_mean"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert values["frechet_distance_mean_se"] == pytest.approx(np.std(expected, ddof=1) / 3**0.5, abs=1e-3)
    assert "3 seeds" in Path("results/evaluate/card.md").read_text()


LIVE = ("evaluate.ema_widths=[0, 0.05]", "train.ema_widths=[0.1, 0.05, 0]")


@pytest.fixture
def averages(inside):
    """The folder's model has two more averages of the weights, which draw other samples."""
    made = {"run": "0123456789abcdef", "params": {"train": {"ema_widths": [0.1, 0.05, 0.0]}}}
    others = {width: small_unet() for width in (0.05, 0.0)}
    for width, unet in others.items():
        with torch.no_grad():
            unet.conv_out.weight.mul_(1.5 + width)
    save_model("models/ddpm", small_unet(), DIFFUSION, made, others=others)
    return others


def test_other_averages_are_measured_from_the_same_noise(averages):
    alone, page = run(), Path("results/evaluate/card.md").read_text()
    values = run(*LIVE)
    assert {name: values[name] for name in alone} == alone
    for width, name in ((0.0, "frechet_distance_ema_0"), (0.05, "frechet_distance_ema_0.05")):
        settings = check(composed(*SETTINGS)).sample
        samples = draw(averages[width], GaussianDiffusion(DIFFUSION), settings)
        assert values[name] == pytest.approx(distance(samples), abs=6e-3)
        assert abs(values[name] - values["frechet_distance"]) > values[f"{name}_se"] > 0
    assert set(values) - set(alone) == {f"frechet_distance_ema_{w}{se}" for w in ("0", "0.05") for se in ("", "_se")}
    rows = [line for line in Path("results/evaluate/card.md").read_text().splitlines() if line not in page]
    assert [row.split(" | ")[0] for row in rows] == [
        "| Fréchet distance, live weights", "| Fréchet distance, averaged weights of width 0.05",
    ]  # fmt: skip
    assert f"{values['frechet_distance_ema_0']} ± " in rows[0]


def test_drawing_by_other_averages_resumes_where_it_was_killed(averages, monkeypatch):
    values = run(*LIVE)
    draws, kept, left = [], ResumeState.kept, 0

    def killed(self, name, compute):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return kept(self, name, lambda: (draws.append(name), compute())[1])

    monkeypatch.setattr(ResumeState, "kept", killed)
    for batches in range(1, 40, 3):
        left = batches
        with suppress(KeyboardInterrupt):
            assert run(*LIVE) == values
            break
    assert left >= 0
    assert batches > 5  # the run was killed on the way
    images = [name for name in draws if "-images-" in name]
    assert len(images) == len(set(images)) == 2 * 3
    assert len(draws) == len(set(draws))


def test_a_missing_average_is_refused_before_any_work(averages):
    Path("models/ddpm/unet/diffusion_pytorch_model.live.safetensors").unlink()
    with pytest.raises(UserError, match=r"^params\.yaml: evaluate\.ema_widths = 0\.0: .*; leave it out$"):
        run(*LIVE)
    assert not Path(".state").exists()


def test_without_a_curve_the_samples_are_its_only_point(inside):
    values = run()
    headline = {name: values[name] for name in ("frechet_distance", "frechet_distance_se")}
    assert rows() == [{"sampler": "dpm_solver", "nfe": 4} | headline]


def test_the_curve_has_a_point_per_sampler_and_number_of_steps(inside):
    run(
        "evaluate.nfe_curve=[{sampler: ddim, steps: [2, 5]}, {sampler: ddpm, steps: [3]}]",
        "sample.variance=fixed_large",
    )
    assert [(row["sampler"], row["nfe"]) for row in rows()] == [("ddim", 2), ("ddim", 5), ("ddpm", 3)]
    for row, settings in zip(rows(), (("ddim", 2), ("ddim", 5), ("ddpm", 3)), strict=True):
        expected = drawn(0, count=12, sampler=settings[0], steps=settings[1])
        assert row["frechet_distance"] == pytest.approx(distance(expected), abs=6e-3)


def test_copies_are_found_and_shown_beside_their_originals(inside):
    copied = np.load("data/prepared/train/images.npy")[::-1][:24]
    np.save("samples/images.npy", copied)
    values = run()
    assert (values["memorisation_ratio"], values["copies"], values["copies_held_out"]) == (0, 1, 0)
    picture = np.asarray(Image.open("results/evaluate/neighbours.png"))
    np.testing.assert_array_equal(picture[16:80, 16:80], picture[16:80, 82:146])
    np.testing.assert_array_equal(picture[16:80:8, 16:80:8], copied[0, ..., 0])


def test_suspicious_pairs_are_shown_first(inside):
    samples, train = np.load("samples/images.npy"), np.load("data/prepared/train/images.npy")
    samples[[7, 19]] = train[[40, 41]]
    np.save("samples/images.npy", samples)
    values = run()
    assert values["copies"] == pytest.approx(2 / 24, abs=1e-3)
    assert values["copies_se"] > 0
    picture = np.asarray(Image.open("results/evaluate/neighbours.png"))
    for i, place in enumerate((40, 41)):
        left = 16 + i * (2 * 64 + 2 + 16)
        np.testing.assert_array_equal(picture[16:80:8, left : left + 64 : 8], train[place, ..., 0])
        np.testing.assert_array_equal(picture[16:80, left : left + 64], picture[16:80, left + 66 : left + 130])


def test_every_number_has_its_error(inside):
    values = run("evaluate.bound_images=5", "evaluate.seeds=2")
    counts = {"samples", "seeds", "nfe", "reference_images", "train_images"}
    numbers = {name for name in values if not name.endswith("_se")} - counts
    assert {f"{name}_se" for name in numbers} == {name for name in values if name.endswith("_se")}
    assert len(numbers) >= 17


def outputs():
    return {name: Path("results/evaluate", name).read_bytes() for name in OUTPUTS}


@pytest.fixture
def network(inside):
    """The settings for features of a small model, whose weights are in the folder."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), "weights.safetensors")
    name = ("evaluate.features=timm:test_vit", "evaluate.weights=weights.safetensors", "evaluate.input_size=16")
    return ("evaluate=dinov2", *name, "evaluate.reference=all")


def test_a_networks_features_are_measured_and_its_weights_named(network):
    values = run(*network)
    assert values["frechet_distance"] > values["frechet_distance_floor"] > 0
    card = Path("results/evaluate/card.md").read_text()
    assert "| timm:test_vit, images resized to 16x16 |" in card
    assert hashlib.sha256(Path("weights.safetensors").read_bytes()).hexdigest() in card


def test_real_images_are_extracted_once_and_give_the_same_bytes(network, monkeypatch):
    monkeypatch.setattr(cache, "WORTH", 0)
    monkeypatch.setattr(distances, "FLOOR_DRAWS", 2)
    settings = (*network, "evaluate.bound_images=0", "evaluate.loss_images=2")
    extracted = []
    call = Extractor.__call__
    monkeypatch.setattr(
        Extractor, "__call__", lambda self, images, *rest: (extracted.append(rest[-1]), call(self, images, *rest))[1]
    )
    run(*settings)
    first, kept = outputs(), sorted(Path(".cache/features").iterdir())
    run(*settings)  # as another trial of a sweep
    assert outputs() == first
    assert extracted == ["samples", "train", "test", "samples"]
    assert sorted(Path(".cache/features").iterdir()) == kept
    shutil.rmtree(".cache")
    monkeypatch.setattr(cache, "WORTH", 1e30)
    run(*settings)
    assert outputs() == first


def test_other_weights_are_another_extractor(network):
    first = run(*network, "evaluate.bound_images=0")
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), "weights.safetensors")
    assert run(*network, "evaluate.bound_images=0")["frechet_distance"] != first["frechet_distance"]


def test_pixels_of_few_images_are_not_kept(inside):
    run()
    assert not Path(".cache/features").exists()


@pytest.mark.parametrize("reference", ["train", "test", "all"])
def test_the_reference_is_as_large_as_stated(inside, reference):
    """The numbers are as if the data held no more images, except the held-out loss."""
    values = run("evaluate.reference_images=20", f"evaluate.reference={reference}", "evaluate.bound_images=0")
    assert values["reference_images"] == 20
    assert values["train_images"] == (13 if reference == "all" else 20)
    parts = [np.load(f"data/prepared/{name}/images.npy") for name in ("train", "test")]
    real = {"train": parts[0], "test": parts[1], "all": np.concatenate(parts)}[reference]
    real = real[np.linspace(0, len(real) - 1, 20).astype(int)]
    pair = (distances.Normal(x.reshape(len(x), -1)) for x in (np.load("samples/images.npy"), real))
    assert values["frechet_distance"] == pytest.approx(distances.frechet_distance(*pair).value, abs=6e-3)
    assert f"{values['train_images']} of 60 training images" in Path("results/evaluate/card.md").read_text()


def test_a_copy_is_shown_with_its_original_in_a_small_reference(inside):
    train = np.load("data/prepared/train/images.npy")
    rows = np.linspace(0, 59, 20).astype(int)
    np.save("samples/images.npy", train[rows[5:]])
    assert run("evaluate.reference_images=20", "evaluate.reference=train")["copies"] == 1
    picture = np.asarray(Image.open("results/evaluate/neighbours.png"))
    np.testing.assert_array_equal(picture[16:80, 16:80], picture[16:80, 82:146])


def test_samples_equal_to_the_reference_are_at_distance_zero(inside):
    """Neither set is mirrored, scaled or read differently from the other: noise images have no symmetry."""
    for reference in ("train", "test"):
        np.save("samples/images.npy", np.load(f"data/prepared/{reference}/images.npy"))
        values = run(f"evaluate.reference={reference}")
        assert abs(values["frechet_distance"]) < 1e-3
        assert (values["precision"], values["recall"]) == (1, 1)


@pytest.mark.parametrize("counts", [(1, 1), (1, 2), (2, 1), (3, 2), (4, 4), (5, 1), (60, 1)])
@pytest.mark.parametrize("samples", [1, 3, 24])
def test_few_images_give_what_is_defined_and_name_the_rest(inside, counts, samples):
    train, test = counts
    split("train", train)
    split("test", test)
    write_info(test, train)
    np.save("samples/images.npy", images(samples, seed=1))
    values = run("evaluate.bound_images=2")
    reference = train + test
    defined = {
        "frechet_distance": min(samples, reference) > 1, "kid": min(samples, reference) > 1,
        "frechet_distance_train": min(samples, train) > 1, "frechet_distance_test": min(samples, test) > 1,
        "frechet_distance_floor": min(samples, reference) > 1, "frechet_distance_real_test": min(train, test) > 1,
        "frechet_distance_ratio": min(samples, reference) > 1, "frechet_distance_infinite": False,
        "precision": reference > 3, "density": reference > 3, "coverage": reference > 3, "recall": samples > 3,
        "memorisation_ratio": True, "copies": train > 1, "copies_held_out": train > 1, "held_out_loss": True,
        "bits_per_dim": True,
    }  # fmt: skip
    assert {name: name in values for name in defined} == defined
    card = Path("results/evaluate/card.md").read_text()
    assert ("not defined" in card) == (not all(defined.values()))
    assert "nan" not in card
    assert len(rows()) == defined["frechet_distance"]
    assert {path.name for path in Path("results/evaluate").iterdir()} == set(OUTPUTS)


def test_a_reference_below_the_neighbours_is_still_measured(inside):
    values = run("evaluate.neighbours=20", "sample.count=24", "evaluate.reference=test")
    assert {"precision", "recall"} <= set(values)
    split("test", 20)
    write_info(20)
    values = run("evaluate.neighbours=20", "evaluate.reference=test")
    assert "recall" in values
    assert "precision" not in values
    assert "| Precision / recall | not defined / " in Path("results/evaluate/card.md").read_text()


def test_no_number_depends_on_the_batch_size_beyond_rounding(inside):
    settings = ("evaluate.bound_images=5", "evaluate.nfe_curve=[{sampler: ddpm, steps: [3]}]", "evaluate.seeds=2")
    expected = run(*settings) | {"curve": rows()[0]["frechet_distance"]}
    for size in (1, 7, 100):
        values = run(*settings, f"evaluate.batch_size={size}", f"sample.batch_size={size}")
        values["curve"] = rows()[0]["frechet_distance"]
        assert values == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_the_statistics_of_each_set_are_computed_once(inside, monkeypatch):
    fitted, init = [], distances.Normal.__init__

    def spy(self, features, device, name=None):
        fitted.append(name)
        init(self, features, device, name)

    monkeypatch.setattr(distances.Normal, "__init__", spy)
    run("evaluate.seeds=2")
    expected = ["samples", "all", "train", "test", *[None] * distances.FLOOR_DRAWS, "new samples"]
    assert sorted(map(str, fitted)) == sorted(map(str, expected))


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: np.save("samples/images.npy", np.zeros((9, 16, 16, 1), np.uint8)),
         r"samples/images.npy: holds images of 16x16x1, and data/prepared of 8x8x1; run the stages train and sample"),
        (lambda: np.save("samples/images.npy", np.zeros((9, 8, 8, 3), np.uint8)), "8x8x3, and data/prepared of 8x8x1"),
        (lambda: np.save("samples/images.npy", np.zeros((0, 8, 8, 1), np.uint8)), "images.npy: holds no image; run"),
        (lambda: save_model("models/ddpm", small_unet(16), DIFFUSION, {"run": "0" * 16}),
         r"models/ddpm: draws images of 16x16x1, and data/prepared holds 8x8x1; run the stage train again"),
        (lambda: save_model("models/ddpm", small_unet(num_class_embeds=3), DIFFUSION, {"run": "0" * 16}),
         r"models/ddpm: knows 3 classes, and data/prepared 0; run the stage train again"),
    ],
)  # fmt: skip
def test_misfitting_samples_or_networks_are_refused_in_a_line(inside, make, fault):
    make()
    with pytest.raises(UserError, match=fault) as refused:
        run()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_a_learned_variance_reports_both_parts_of_the_loss(inside, capsys, variance):
    plain = run()
    hybrid = DiffusionConfig(20, "cosine", "v", learn_variance=True)
    one, two = small_unet(), small_unet(out_channels=2)
    state = one.state_dict() | {
        name: torch.cat([value, torch.zeros_like(value)])  # the same prediction, and a share of 0
        for name, value in one.state_dict().items()
        if name.startswith("conv_out")
    }
    two.load_state_dict(state)
    save_model("models/ddpm", two, hybrid, {"run": "0123456789abcdef"})
    values = run("diffusion=improved", "diffusion.timesteps=20", f"sample.variance={variance}")
    assert values["held_out_loss"] == pytest.approx(plain["held_out_loss"], abs=2e-4)
    assert values["held_out_bound_loss"] > 0
    assert "held_out_bound_loss" not in plain
    row = json.loads(Path("results/evaluate/loss_by_timestep.json").read_text())[0]
    assert set(row) == {"timestep", "loss", "bound_loss"}
    assert "Held-out loss, the bound's part" in Path("results/evaluate/card.md").read_text()
    assert ("sample.variance = fixed_large does not use it" in capsys.readouterr().out) == (variance != "learned")


def test_points_that_differ_in_their_steps_alone_are_each_drawn(inside):
    run("evaluate.nfe_curve=[{sampler: ddim, steps: [17, 18, 19, 20]}]", "sample.spacing=quadratic")
    assert [row["nfe"] for row in rows()] == [17, 18, 19, 20]
    expected = [
        distance(drawn(0, count=12, sampler="ddim", steps=steps, spacing="quadratic")) for steps in (17, 18, 19, 20)
    ]
    assert len(set(expected)) == 4
    assert [row["frechet_distance"] for row in rows()] == pytest.approx(expected, abs=6e-3)


def test_further_samples_have_the_classes_of_the_data(inside):
    unet = small_unet(num_class_embeds=2)
    write_info(30, classes=["cat", "dog"])
    save_model("models/ddpm", unet, DIFFUSION, {"run": "0" * 16, "data": {"class_counts": [50, 10]}}, ("cat", "dog"))
    options = ("model.class_conditional=true", "evaluate.nfe_curve=[{sampler: dpm_solver, steps: [3]}]")
    run(*options, "sample.class_frequencies=data")
    settings = check(
        composed(*SETTINGS, *options, "sample.class_frequencies=data", "sample.steps=3", "sample.count=12")
    ).sample
    new = draw(unet, GaussianDiffusion(DIFFUSION), settings, Classes(("cat", "dog"), (50, 10)))
    assert rows()[0]["frechet_distance"] == pytest.approx(distance(new), abs=6e-3)
    assert "as often as in the training data" in Path("results/evaluate/card.md").read_text()
    save_model("models/ddpm", unet, DIFFUSION, {"run": "0" * 16}, ("cat", "dog"))
    with pytest.raises(UserError, match="does not hold the class_counts"):
        run(*options, "sample.class_frequencies=data")


def test_the_curve_accepts_the_samplers_of_the_stage_sample():
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
