"""sample: models/ddpm -> samples/images.npy and results/sample (a grid, and a strip of the denoising)."""

import io
from pathlib import Path
from typing import Any

from ddpm.runtime import run_stage

SECTIONS = ("runtime", "sample")
MODEL, SAMPLES, RESULTS = Path("models/ddpm"), Path("samples/images.npy"), Path("results/sample")
STRIP_ROWS, STRIP_COLUMNS = 6, 11  # images and moments of denoising.png


def main(params: Any) -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    import numpy as np
    from torch import Tensor

    from ddpm import pictures, samplers
    from ddpm.device import choose_device
    from ddpm.diffusion import GaussianDiffusion
    from ddpm.images import to_pixels
    from ddpm.pipeline_io import load_model

    p = params.sample
    unet, config = load_model(MODEL)
    device = choose_device(params.runtime)
    unet, diffusion = unet.to(device), GaussianDiffusion(config, device)
    path = samplers.timesteps(config.timesteps, p.steps, p.spacing)
    shown = {0} | {round(i) + 1 for i in np.linspace(0, len(path) - 1, STRIP_COLUMNS - 1)}
    strip: list[np.ndarray] = []

    def keep(start: int, evaluations: int, x: Tensor) -> None:
        if start == 0 and evaluations in shown:
            strip.append(to_pixels(x[:STRIP_ROWS]))

    print(f"{p.count} images by {p.sampler}, {len(path)} network evaluations each", flush=True)
    images = samplers.draw(unet, diffusion, p, p.seed, p.count, device, on_step=keep)
    SAMPLES.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()  # np.save to a file reports a full disk without its error number
    np.save(buffer, images)
    SAMPLES.write_bytes(buffer.getbuffer())
    pictures.save(pictures.grid(images[: p.grid]), RESULTS / "grid.png")
    moments = np.stack(strip, axis=1).reshape(-1, *images.shape[1:])  # a row an image, a column a moment
    pictures.save(pictures.tile(moments, columns=len(strip)), RESULTS / "denoising.png")


if __name__ == "__main__":
    run_stage(main, SECTIONS)
