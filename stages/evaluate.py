"""evaluate: samples, data/prepared and models/ddpm -> results/evaluate.

Writes metrics.json, card.md (what the numbers were measured with), neighbours.png (samples beside their nearest
training images), loss_by_timestep.json, bound_by_timestep.json and fd_by_nfe.json.
"""

from pathlib import Path
from typing import Any

from ddpm.runtime import run_stage

SECTIONS = ("runtime", "sample", "evaluate")
DATA, MODEL, SAMPLES = Path("data/prepared"), Path("models/ddpm"), Path("samples/images.npy")
RESULTS = Path("results/evaluate")
PAIRS, PAIR_COLUMNS = 24, 4  # of neighbours.png
BOUND_RANGES = 50  # points of the plots of the bound


def main(params: Any) -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    import numpy as np
    import torch

    from ddpm import metrics, pictures, report, samplers
    from ddpm.bound import variational_bound
    from ddpm.data import load_array, load_images, load_info
    from ddpm.device import choose_device
    from ddpm.diffusion import GaussianDiffusion
    from ddpm.pipeline_io import load_model

    p, drawn = params.evaluate, params.sample
    device = choose_device(params.runtime)
    samples = load_array(SAMPLES, "sample", "uint8", 4)
    train, test, info = load_images(DATA, "train"), load_images(DATA, "test"), load_info(DATA)
    unet, config = load_model(MODEL)
    unet, diffusion = unet.to(device), GaussianDiffusion(config, device)

    def features(images: np.ndarray) -> torch.Tensor:
        return metrics.extract_features(images, p.features, p.inception_weights, p.batch_size, device)

    def nfe(settings: Any) -> int:
        return len(samplers.timesteps(config.timesteps, settings.steps, settings.spacing))

    def distance(settings: Any, seed: int, count: int) -> float:
        """The Fréchet distance of newly drawn samples."""
        return metrics.frechet_distance(features(samplers.draw(unet, diffusion, settings, seed, count, device)), real)

    # how far from real images
    fake, of_train, of_test = features(samples), features(train), features(test)
    real = {"train": of_train, "test": of_test, "all": torch.cat([of_train, of_test])}[p.reference]
    values = metrics.compare(fake, real, neighbours=p.neighbours, kid_subset_size=p.kid_subset_size, seed=p.seed)
    if p.seeds > 1:
        sets = [values["frechet_distance"]]
        sets += [distance(drawn, drawn.seed + i, len(samples)) for i in range(1, p.seeds)]
        values |= {"frechet_distance_mean": float(np.mean(sets)), "frechet_distance_std": float(np.std(sets, ddof=1))}
    values["frechet_distance_train"] = metrics.frechet_distance(fake, of_train)
    values["frechet_distance_test"] = metrics.frechet_distance(fake, of_test)
    values["frechet_distance_real_halves"] = metrics.real_floor(real, p.seed)
    values["frechet_distance_real_test"] = metrics.frechet_distance(of_test, of_train)

    # how far from the training images
    to_train, index = metrics.nearest(fake, of_train, device)
    values["memorisation_ratio"] = metrics.memorisation_ratio(to_train, metrics.nearest(of_test, of_train, device)[0])
    pictures.save(pictures.pairs(samples[:PAIRS], train[index[:PAIRS]], PAIR_COLUMNS), RESULTS / "neighbours.png")

    # how well the held-out images are denoised
    held_out = test[np.linspace(0, len(test) - 1, min(p.loss_images or len(test), len(test))).astype(int)]
    losses = metrics.held_out_loss(
        unet, diffusion, held_out, bins=p.loss_bins, batch_size=p.batch_size, seed=p.seed, device=device
    )
    values["held_out_loss"] = sum(losses) / len(losses)
    times = [round((i + 0.5) / len(losses) * config.timesteps) for i in range(len(losses))]
    rows = [{"timestep": t, "loss": loss} for t, loss in zip(times, losses, strict=True)]
    report.write_json(RESULTS / "loss_by_timestep.json", rows)

    # how likely they are: the whole bound, and its terms summed over equal ranges of t
    rows = []
    if p.bound_images:
        some = test[np.linspace(0, len(test) - 1, min(p.bound_images, len(test))).astype(int)]
        bound = variational_bound(
            unet, diffusion, some, variance=drawn.variance, batch_size=p.batch_size, seed=p.seed, device=device
        )
        values["bits_per_dim"] = bound.bits_per_dim
        rows = bound.rows(BOUND_RANGES)
    report.write_json(RESULTS / "bound_by_timestep.json", rows)

    # how the distance falls with the network evaluations; where no curve is asked for, the one point that is known
    points = [  # fixed_small, since fixed_large collapses where steps are skipped
        drawn.model_copy(update={"sampler": line.sampler, "steps": steps, "variance": "fixed_small"})
        for line in p.nfe_curve
        for steps in line.steps
    ]
    curve = [(point, distance(point, point.seed, p.nfe_samples)) for point in points]
    curve = curve or [(drawn, values["frechet_distance"])]
    rows = [{"sampler": s.sampler, "nfe": nfe(s), "frechet_distance": value} for s, value in curve]
    report.write_json(RESULTS / "fd_by_nfe.json", rows)

    facts = {"samples": len(samples), "seeds": p.seeds, "nfe": nfe(drawn), "reference_images": len(real)}
    report.write_json(RESULTS / "metrics.json", values | facts)
    digest = metrics.weights_digest(p.features, p.inception_weights)
    (RESULTS / "card.md").write_text(report.card(values | facts, p, drawn, info, digest), encoding="utf-8")


if __name__ == "__main__":
    run_stage(main, SECTIONS)
