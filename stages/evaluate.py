"""evaluate: samples, data/prepared and models/ddpm -> results/evaluate (metrics.json, loss by timestep)."""

import json
from pathlib import Path
from typing import Any

from ddpm.runtime import run_stage

SECTIONS = ("runtime", "evaluate")
DATA, MODEL, SAMPLES = Path("data/prepared"), Path("models/ddpm"), Path("samples/images.npy")
RESULTS = Path("results/evaluate")
DIGITS = 4  # of every number that is written: what is the same on every machine, and more than its spread


def main(params: Any) -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    import numpy as np

    from ddpm.data import load_array, load_images
    from ddpm.device import choose_device
    from ddpm.diffusion import GaussianDiffusion
    from ddpm.metrics import compare, extract_features, held_out_loss, real_floor
    from ddpm.pipeline_io import load_model

    p = params.evaluate
    device = choose_device(params.runtime)
    samples = load_array(SAMPLES, "sample", "uint8", 4)
    test = load_images(DATA, "test")
    held_out = test[np.linspace(0, len(test) - 1, min(p.loss_images or len(test), len(test))).astype(int)]
    splits = ("train", "test") if p.reference == "all" else (p.reference,)
    real = np.concatenate([load_images(DATA, split) for split in splits])

    fake_features, real_features = (
        extract_features(images, p.features, p.inception_weights, p.batch_size, device) for images in (samples, real)
    )
    metrics = compare(
        fake_features, real_features, neighbours=p.neighbours, kid_subset_size=p.kid_subset_size, seed=p.seed
    )
    metrics["frechet_distance_real_halves"] = real_floor(real_features, p.seed)
    unet, config = load_model(MODEL)
    losses = held_out_loss(
        unet.to(device),
        GaussianDiffusion(config, device),
        held_out,
        bins=p.loss_bins,
        batch_size=p.batch_size,
        seed=p.seed,
        device=device,
    )
    metrics["held_out_loss"] = sum(losses) / len(losses)

    RESULTS.mkdir(parents=True, exist_ok=True)
    rounded = {name: round(value, DIGITS) for name, value in metrics.items()}
    facts = {"samples": len(samples), "reference": p.reference, "reference_images": len(real), "features": p.features}
    (RESULTS / "metrics.json").write_text(json.dumps(rounded | facts, indent=2) + "\n", encoding="utf-8")
    rows = [
        {"timestep": round((i + 0.5) / len(losses) * config.timesteps), "loss": round(loss, DIGITS)}
        for i, loss in enumerate(losses)
    ]
    (RESULTS / "loss_by_timestep.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main, SECTIONS)
