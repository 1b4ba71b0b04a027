import json
import math

import pytest

from ddpm.config.load import check
from ddpm.evaluation import card as cards
from tests.conftest import composed

DATA = {"name": "digits", "shape": [8, 8, 1], "counts": {"train": 1438, "test": 359}, "sha256": "f8286"}
VALUES = {
    "frechet_distance": 0.045612, "frechet_distance_se": 0.00288, "frechet_distance_mean": 0.0467,
    "frechet_distance_mean_se": 0.00123, "frechet_distance_train": 0.0512, "frechet_distance_train_se": 0.00996,
    "frechet_distance_test": math.nan, "frechet_distance_test_se": math.nan, "precision": 1.0, "precision_se": 0.0,
    "copies": 0.0, "copies_se": 0.00071, "samples": 100_000, "seeds": 3, "nfe": 1000, "reference_images": 1797,
    "train_images": 1438,
}  # fmt: skip


def card(*overrides, values=VALUES, digest="none", classes=()):
    params = check(composed(*overrides))
    text = cards.card(values, params.evaluate, params.sample, DATA, params.evaluate.features, digest, classes)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "|---" not in line]
    return dict(row for row in rows if len(row) == 2)


def test_the_card_names_what_the_distance_was_measured_with():
    shown = card("sample=ddpm", "sample.seed=7", "evaluate=inception", "dataset=cifar10", digest="672682")
    assert shown["FID"] == "0.0456 ± 0.0029"
    assert shown["Samples"] == "100000, seed 7"
    assert shown["Sampler"] == "ddpm, trailing spacing, variance fixed_small"
    assert shown["NFE"] == "1000"
    assert shown["Quantiser"] == "uint8, round to nearest"
    assert shown["Extractor"] == "inception"
    assert shown["Extractor's weights, sha256"] == "672682"
    assert shown["Reference"] == "digits, train: 1797 images of 8x8x1"
    assert shown["Data set, sha256"] == "f8286"


@pytest.mark.parametrize(
    ("frequencies", "words"),
    [("equal", "each as often as the others, whatever the data"), ("data", "as often as in the training data")],
)
def test_a_conditional_models_card_has_classes_and_guidance(frequencies, words):
    conditional = ("model.class_conditional=true", "sample.guidance=2.5", f"sample.class_frequencies={frequencies}")
    assert card(*conditional, classes=["cat", "dog"])["Classes"] == f"cat, dog; {words}; guidance scale 2.5"
    assert "Classes" not in card()


def test_a_distance_of_pixels_is_not_called_fid():
    assert "FID" not in card()
    assert card()["Fréchet distance"] == "0.0456 ± 0.0029"


def test_several_seeds_give_their_mean_and_its_error():
    assert card("evaluate.seeds=3")["Fréchet distance, mean of 3 seeds"] == "0.0467 ± 0.0012"
    assert not any("seeds" in name for name in card())


@pytest.mark.parametrize(
    ("error", "decimals"),
    [(0.0029, 4), (0.00288, 4), (0.23, 2), (2.3, 1), (23.0, 0), (230.0, 0), (0.00996, 3), (0.01, 3), (1e-12, 6),
     (0.0, 4), (math.nan, 4), (math.inf, 4), (None, 4)],
)  # fmt: skip
def test_the_decimals_follow_from_two_digits_of_the_error(error, decimals):
    assert cards.decimals(error) == decimals


def test_a_number_and_its_error_are_written_to_the_same_decimals():
    row = {"kid": -5.2341e-05, "kid_se": 7.149e-05, "fid": 3.17249, "fid_se": 0.0996, "a_se": 0.12345, "n": 7}
    short = cards.rounded(row)
    assert short == {"kid": -5.2e-05, "kid_se": 7.1e-05, "fid": 3.17, "fid_se": 0.1, "a_se": 0.1235, "n": 7}
    assert cards.rounded(short) == short
    assert [cards.measured(short, name) for name in ("kid", "fid")] == ["-0.000052 ± 0.000071", "3.17 ± 0.10"]


def test_undefined_numbers_are_named_in_the_card_and_left_out(tmp_path):
    assert card()["Fréchet distance to train / to test"] == "0.051 ± 0.010 / not defined"
    assert card()["Precision / recall"] == "1.0000 ± 0.0000 / not defined"
    cards.write_json(tmp_path / "new/metrics.json", VALUES)
    written = json.loads((tmp_path / "new/metrics.json").read_text())
    assert not {"frechet_distance_test", "frechet_distance_test_se"} & set(written)
    assert (written["frechet_distance"], written["frechet_distance_se"]) == (0.0456, 0.0029)
    assert written["samples"] == 100_000


def test_the_card_reports_how_many_images_were_searched():
    shown = card(values=VALUES | {"train_images": 1000})
    assert shown["Searched for copies"] == "1000 of 1438 training images; copies of the others are not found"
    assert "Searched for copies" not in card()


def test_a_number_without_an_error_stands_alone():
    assert card(values=VALUES | {"bits_per_dim": 4.5, "bits_per_dim_se": math.nan})["Bits/dim, at most"].startswith(
        "4.5000 ("
    )


@pytest.mark.parametrize("rows", [[], [{"nfe": 5, "frechet_distance": 1.23456}]])
def test_rows_are_written_as_a_list(tmp_path, rows):
    cards.write_json(tmp_path / "rows.json", rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == [row | {"frechet_distance": 1.2346} for row in rows]


def test_the_bounds_part_of_a_loss_stands_beside_it_in_the_card():
    losses = {"held_out_loss": 0.2111, "held_out_loss_se": 0.0022, "held_out_bound_loss": 0.0097}
    shown = card(values=VALUES | losses)
    assert (shown["Held-out loss"], shown["Held-out loss, the bound's part"]) == ("0.2111 ± 0.0022", "0.0097")
    assert not any("bound's part" in name for name in card())


@pytest.mark.parametrize(
    ("sampler", "words"), [("ddim", ", eta 0"), ("ddpm", ", variance fixed_small"), ("dpm_solver", "")]
)
def test_the_card_names_what_a_sampler_uses_and_nothing_else(sampler, words):
    assert card(f"sample={sampler}")["Sampler"] == f"{sampler}, trailing spacing{words}"
