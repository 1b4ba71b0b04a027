"""sample: models/ddpm -> samples/images.npy and results/sample (a grid; a strip and a film of the denoising)."""

import io
from pathlib import Path
from typing import Any

from ddpm.runtime.stage import run_stage
from ddpm.runtime.workspace import root

SECTIONS = ("runtime", "sample", "tracking")
MODEL, SAMPLES, RESULTS = Path("models/ddpm"), Path("samples/images.npy"), Path("results/sample")


def main(params: Any) -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from functools import partial

    import numpy as np

    from ddpm import pictures
    from ddpm.core import samplers
    from ddpm.core.diffusion import GaussianDiffusion
    from ddpm.files import write_file
    from ddpm.film import Moments
    from ddpm.model_folder import class_counts, load_model, training_run, weights_sha256
    from ddpm.runtime import processes
    from ddpm.runtime.device import choose_device, explain_out_of_memory, memory_format
    from ddpm.runtime.resume import ResumeState, fingerprint, state_folder
    from ddpm.runtime.tracking import Tracker

    p = params.sample
    unet, config = load_model(MODEL)
    counts = class_counts(MODEL)
    run = fingerprint(p.model_dump(), params.runtime.model_dump(), weights_sha256(MODEL), counts)
    device = choose_device(params.runtime)
    unet.to(device).to(memory_format=memory_format(params.runtime, device))
    diffusion = GaussianDiffusion(config, device)
    samplers.check_variance(p, diffusion)
    steps = len(samplers.timesteps(config.timesteps, p.steps, p.spacing))
    draw = partial(samplers.draw, unet, diffusion, p, p.seed, device=device, class_counts=counts)
    print(f"{p.count} images by {p.sampler}, {steps} network evaluations each", flush=True)
    with (
        explain_out_of_memory("lower sample.batch_size"),
        ResumeState(state_folder(root() / ".state", "sample", run)) as state,
        Tracker(None, params.tracking, {"sample": p.model_dump()}, training_run(MODEL), "sample") as tracker,
    ):
        values = unet.config.in_channels * unet.config.sample_size**2
        moments = Moments(steps, p.count, p.batch_size, values, state)
        images = draw(p.count, on_step=moments.watch, keep=state.keep)
        strip, film = moments.pictures(lambda count, on_step: draw(count, on_step=on_step))
        if processes.rank() == 0:
            buffer = io.BytesIO()
            np.save(buffer, images)
            write_file(SAMPLES, buffer.getbuffer())
            pictures.save_film(film, RESULTS / "film.png")
        tracker.log_picture(0, "grid", pictures.grid(images[: p.grid]), RESULTS)
        tiles = pictures.tile(strip.reshape(-1, *images.shape[1:]), columns=strip.shape[1])
        tracker.log_picture(0, "denoising", tiles, RESULTS)
        state.remove()


if __name__ == "__main__":
    run_stage(main, SECTIONS)
