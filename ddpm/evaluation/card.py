"""Evaluation results as text: rounded numbers, and a fact sheet of the settings behind them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm.config.schema import Evaluate, Sample
from ddpm.files import write_file

DECIMALS, MOST_DECIMALS = 4, 6  # of a number without an error; of any number: more would differ between machines


def decimals(error: float | None) -> int:
    """The decimals of a number with this standard error: as many as give the error two significant digits."""
    if error is None or not 0 < error < math.inf:
        return DECIMALS
    return min(MOST_DECIMALS, max(0, 1 - math.floor(math.log10(float(f"{error:.1e}")))))


def measured(row: Mapping[str, Any], name: str) -> str:
    """A number of a row, with `name`_se where the row has it: value ± standard error."""
    value, error = row[name], row.get(f"{name}_se")
    places = decimals(error)
    return f"{value:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of values as they are written: a number and its error `..._se` to the same decimals. NaN (not defined for
    this data) is left out, since JSON has no NaN."""
    short = {}
    for key, value in row.items():
        name = key.removesuffix("_se")
        error = row.get(f"{name}_se") if name in row else None
        short[key] = round(value, decimals(error)) if isinstance(value, float) else value
    return {key: value for key, value in short.items() if value == value}


def write_json(path: Path, rows: Mapping[str, Any] | list[dict[str, Any]]) -> None:
    """Write one row of values, or a list of them; a missing folder is created."""
    content = [rounded(row) for row in rows] if isinstance(rows, list) else rounded(rows)
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def card(
    values: Mapping[str, float | int],
    evaluate: Evaluate,
    sample: Sample,
    data: Mapping[str, Any],
    extractor: str,
    digest: str,
    classes: Sequence[str],
) -> str:
    """A page of markdown: the same numbers and settings give the same bytes.

    Args:
        values: the numbers of metrics.json, unrounded.
        data: the content of dataset.json.
        extractor: the feature extractor, as text.
        digest: sha256 of its weights, or "none".
        classes: the names of the classes that were drawn; none for an unconditional model.
    """

    numbers = rounded(values)
    rows = _results(numbers, evaluate, sample.variance)
    noise = {"ddim": f", eta {sample.eta:g}", "ddpm": f", variance {sample.variance}", "dpm_solver": ""}[sample.sampler]
    rows |= {
        "Samples": f"{numbers['samples']}, seed {sample.seed}",
        "Sampler": f"{sample.sampler}, {sample.spacing} spacing{noise}",
        "NFE": str(numbers["nfe"]),
    }
    if classes:
        often = {"equal": "each as often as the others, whatever the data", "data": "as often as in the training data"}
        frequencies = often[sample.class_frequencies]
        rows["Classes"] = f"{', '.join(classes)}; {frequencies}; guidance scale {sample.guidance:g}"
    rows |= {
        "Quantiser": "uint8, round to nearest",
        "Extractor": extractor,
        "Extractor's weights, sha256": digest,
        "Reference": f"{data['name']}, {evaluate.reference}: {numbers['reference_images']} images of "
        + "x".join(map(str, data["shape"])),
        "Data set, sha256": data["sha256"],
    }
    searched, there = numbers["train_images"], data["counts"]["train"]
    if searched < there:
        rows["Searched for copies"] = f"{searched} of {there} training images; copies of the others are not found"
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["# Evaluation", "", "| | |", "|---|---|", *lines]) + "\n"


def _results(numbers: Mapping[str, Any], evaluate: Evaluate, variance: str) -> dict[str, str]:
    """The rows of the card that hold measured numbers."""

    def shown(*names: str) -> str:
        return " / ".join(measured(numbers, name) if name in numbers else "not defined" for name in names)

    distance = "FID" if evaluate.features == "inception" else "Fréchet distance"
    rows = {"Every ±": "the standard error over samples and held-out images; network and real images as they are"}
    rows[distance] = shown("frechet_distance")
    if evaluate.seeds > 1:
        rows[f"{distance}, mean of {evaluate.seeds} seeds"] = shown("frechet_distance_mean")
    for width in evaluate.ema_widths:
        weights = f"averaged weights of width {width:g}" if width else "live weights"
        rows[f"{distance}, {weights}"] = f"{shown(f'frechet_distance_ema_{width:g}')} (as many, from the same noise)"
    rows |= {
        f"{distance} of a perfect sampler": f"{shown('frechet_distance_floor')} (as many real images, resampled)",
        f"{distance} / that of a perfect sampler": shown("frechet_distance_ratio"),
        f"{distance}, infinitely many samples": shown("frechet_distance_infinite"),
        f"{distance} to train / to test": shown("frechet_distance_train", "frechet_distance_test"),
        f"{distance}, test to train": shown("frechet_distance_real_test"),
        "KID": shown("kid"),
        "Precision / recall": shown("precision", "recall"),
        "Density / coverage": shown("density", "coverage"),
        "Memorisation ratio": f"{shown('memorisation_ratio')} (1: as new as held-out images; 0: copies)",
        "Copies: share of samples / of held-out images": shown("copies", "copies_held_out"),
        "Held-out loss": shown("held_out_loss"),
    }
    if "held_out_bound_loss" in numbers:
        rows["Held-out loss, the bound's part"] = shown("held_out_bound_loss")
    rows["Bits/dim, at most"] = f"{shown('bits_per_dim')} ({evaluate.bound_images} held-out images, {variance})"
    return rows
