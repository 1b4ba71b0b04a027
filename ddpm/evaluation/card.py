"""How an evaluation is reported: numbers to compare, and a fact sheet with all that they were measured with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm.config.schema import Evaluate, Sample
from ddpm.files import write_file

DIGITS = 4  # of every number that is written: what is the same on every machine, and more than its spread


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of values as they are written. NaN, what is not defined for the data, is left out: JSON has none."""
    short = {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in row.items()}
    return {key: value for key, value in short.items() if value == value}


def write_json(path: Path, rows: Mapping[str, Any] | list[dict[str, Any]]) -> None:
    """Write one row of values, or a list of them; the folder is made."""
    content = [rounded(row) for row in rows] if isinstance(rows, list) else rounded(rows)
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def card(
    values: Mapping[str, float | int],
    evaluate: Evaluate,
    sample: Sample,
    data: Mapping[str, Any],
    digest: str,
    classes: Sequence[str],
) -> str:
    """A page of markdown: the same numbers and settings give the same bytes.

    Args:
        values: what metrics.json holds.
        data: the content of dataset.json.
        digest: sha256 of the extractor's weights, or "none".
        classes: the names of the classes that were drawn; none for an unconditional model.
    """

    numbers = rounded(values)

    def shown(*names: str) -> str:
        return " / ".join(f"{numbers[name]:g}" if name in numbers else "not defined" for name in names)

    distance = "FID" if evaluate.features == "inception" else "Fréchet distance"
    noise = {"ddim": f", eta {sample.eta:g}", "ddpm": f", variance {sample.variance}", "dpm_solver": ""}[sample.sampler]
    rows = {distance: shown("frechet_distance")}
    if evaluate.seeds > 1:
        spread = f"{shown('frechet_distance_mean')} ± {shown('frechet_distance_std')}"
        rows[f"{distance}, {evaluate.seeds} seeds"] = f"{spread} (mean ± standard deviation)"
    rows |= {
        f"{distance} to train / to test": shown("frechet_distance_train", "frechet_distance_test"),
        "Floor: two halves of the reference": shown("frechet_distance_real_halves"),
        "Floor: test to train": shown("frechet_distance_real_test"),
        "KID": f"{shown('kid')} ± {shown('kid_std')} (over subsets)",
        "Precision / recall": shown("precision", "recall"),
        "Memorisation ratio": f"{shown('memorisation_ratio')} (1: as new as held-out images; 0: copies)",
        "Held-out loss": shown("held_out_loss"),
    }
    if "held_out_bound_loss" in values:
        rows["Held-out loss, the bound's part"] = shown("held_out_bound_loss")
    rows |= {
        "Bits/dim, at most": f"{shown('bits_per_dim')} ({evaluate.bound_images} held-out images, {sample.variance})",
        "Samples": f"{numbers['samples']}, seed {sample.seed}",
        "Sampler": f"{sample.sampler}, {sample.spacing} spacing{noise}",
        "NFE": shown("nfe"),
    }
    if classes:
        often = {"equal": "each as often as the others, whatever the data", "data": "as often as in the training data"}
        frequencies = often[sample.class_frequencies]
        rows["Classes"] = f"{', '.join(classes)}; {frequencies}; guidance scale {sample.guidance:g}"
    rows |= {
        "Quantiser": "uint8, round to nearest",
        "Extractor": evaluate.features,
        "Extractor's weights, sha256": digest,
        "Reference": f"{data['name']}, {evaluate.reference}: {numbers['reference_images']} images of "
        + "x".join(map(str, data["shape"])),
        "Data set, sha256": data["sha256"],
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["# Evaluation", "", "| | |", "|---|---|", *lines]) + "\n"
