"""sample: models/ddpm -> samples/images.npy and results/sample (a grid, and a strip of the denoising)."""

from pathlib import Path
from typing import Any

from ddpm.runtime import run_stage

SECTIONS = ("runtime", "sample")
MODEL, SAMPLES, RESULTS = Path("models/ddpm"), Path("samples/images.npy"), Path("results/sample")
STRIP_ROWS, STRIP_COLUMNS = 6, 11  # images and moments of denoising.png


def main(params: Any) -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    import numpy as np

    from ddpm import pictures, samplers
    from ddpm.device import choose_device
    from ddpm.diffusion import GaussianDiffusion
    from ddpm.images import to_pixels
    from ddpm.pipeline_io import load_model
    from ddpm.progress import Progress

    p = params.sample
    unet, config = load_model(MODEL)
    device = choose_device(params.runtime)
    unet, diffusion = unet.to(device), GaussianDiffusion(config, device)
    path = samplers.timesteps(config.timesteps, p.steps, p.spacing)
    shown = {round(i) for i in np.linspace(0, len(path) - 1, STRIP_COLUMNS - 1)}
    size, channels = unet.config.sample_size, unet.config.in_channels
    images = np.empty((p.count, size, size, channels), dtype=np.uint8)
    print(f"{p.count} images by {p.sampler}, {len(path)} network evaluations each", flush=True)
    strip: list[np.ndarray] = []
    with Progress(p.count * len(path), "sample", "eval") as bar:
        for start in range(0, p.count, p.batch_size):
            indices = range(start, min(start + p.batch_size, p.count))
            noise = samplers.ImageNoise(p.seed, indices, unet.config, device)
            x = noise()
            if start == 0:
                strip.append(to_pixels(x[:STRIP_ROWS]))
            steps = samplers.SAMPLERS[p.sampler](unet, diffusion, x, path, noise, variance=p.variance, eta=p.eta)
            for i, step in enumerate(steps):
                if start == 0 and i in shown:
                    strip.append(to_pixels(step.x[:STRIP_ROWS]))
                bar.update(len(indices))
            images[indices.start : indices.stop] = to_pixels(step.x)
    SAMPLES.parent.mkdir(exist_ok=True)
    np.save(SAMPLES, images)
    pictures.save(pictures.grid(images[: p.grid]), RESULTS / "grid.png")
    moments = np.stack(strip, axis=1).reshape(-1, size, size, channels)  # a row an image, a column a moment
    pictures.save(pictures.tile(moments, columns=len(strip)), RESULTS / "denoising.png")


if __name__ == "__main__":
    run_stage(main, SECTIONS)
