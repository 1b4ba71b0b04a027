"""sample: models/ddpm -> samples/images.npy and results/sample (a grid; a strip and a film of the denoising)."""

import io
from pathlib import Path
from typing import Any

from ddpm.runtime import root, run_stage

SECTIONS = ("runtime", "sample", "tracking")
MODEL, SAMPLES, RESULTS = Path("models/ddpm"), Path("samples/images.npy"), Path("results/sample")
STRIP_ROWS, STRIP_COLUMNS = 6, 11  # images and moments of denoising.png
FILM_MOMENTS = 25  # of film.png


def main(params: Any) -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    import numpy as np
    from torch import Tensor

    from ddpm import distributed, pictures, samplers
    from ddpm.checkpoint import ResumeState, fingerprint, state_folder
    from ddpm.device import choose_device, memory_faults, memory_format
    from ddpm.diffusion import GaussianDiffusion
    from ddpm.files import write_file
    from ddpm.images import to_pixels
    from ddpm.pipeline_io import load_model, training_run, weights_sha256
    from ddpm.tracking import Tracker

    p = params.sample
    unet, config = load_model(MODEL)
    run = fingerprint(p.model_dump(), params.runtime.model_dump(), weights_sha256(MODEL))
    device = choose_device(params.runtime)
    unet.to(device).to(memory_format=memory_format(params.runtime, device))
    diffusion = GaussianDiffusion(config, device)
    path = samplers.timesteps(config.timesteps, p.steps, p.spacing)
    shown = {0} | {round(i) + 1 for i in np.linspace(0, len(path) - 1, STRIP_COLUMNS - 1)}
    filmed = {round(i) for i in np.linspace(0, len(path), FILM_MOMENTS)}
    watched = sorted(shown | filmed)  # in network evaluations so far
    seen: list[np.ndarray] = []

    print(f"{p.count} images by {p.sampler}, {len(path)} network evaluations each", flush=True)
    with (
        memory_faults("lower sample.batch_size"),
        ResumeState(state_folder(root() / ".state", "sample", run)) as state,
        Tracker(None, params.tracking, {"sample": p.model_dump()}, training_run(MODEL), "sample") as tracker,
    ):

        def watch(start: int, evaluations: int, x: Tensor) -> None:
            if start == 0 and evaluations in watched:
                seen.append(to_pixels(x[: max(STRIP_ROWS, pictures.film_images(x[0].numel()))]))
            if start == 0 and evaluations == len(path):  # before the first batch is kept, which may end the run
                state.kept("moments", lambda: np.stack(seen))

        images = samplers.draw(unet, diffusion, p, p.seed, p.count, device, on_step=watch, keep=state.keep)
        moments = dict(zip(watched, state.kept("moments", lambda: np.stack(seen)), strict=True))
        if distributed.rank() == 0:
            buffer = io.BytesIO()
            np.save(buffer, images)
            write_file(SAMPLES, buffer.getbuffer())
        tracker.log_picture(0, "grid", pictures.grid(images[: p.grid]), RESULTS)
        strip = np.stack([moments[i][:STRIP_ROWS] for i in sorted(shown)], axis=1)  # a row an image, a column a moment
        strip = strip.reshape(-1, *images.shape[1:])
        tracker.log_picture(0, "denoising", pictures.tile(strip, columns=len(shown)), RESULTS)
        film = [moments[i][: pictures.film_images(images[0].size)] for i in sorted(filmed)]
        if distributed.rank() == 0:
            pictures.save_film(film, RESULTS / "film.png")
        state.remove()


if __name__ == "__main__":
    run_stage(main, SECTIONS)
