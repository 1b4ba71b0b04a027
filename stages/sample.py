"""sample: models/ddpm -> samples/images.npy and results/sample (a grid; a strip and a film of the denoising)."""

from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.runtime.stage import run_stage
from ddpm.runtime.workspace import root

if TYPE_CHECKING:
    from ddpm.config.schema import Params

SECTIONS = ("runtime", "sample", "tracking")
MODEL, SAMPLES, RESULTS = Path("models/ddpm"), Path("samples/images.npy"), Path("results/sample")


def main(params: "Params") -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from ddpm import files, pictures, sampling
    from ddpm.core.diffusion import GaussianDiffusion
    from ddpm.model_folder import class_counts, load_model, training_run, weights_sha256
    from ddpm.runtime import device, processes, resume, tracking

    p = params.sample
    unet, config = load_model(MODEL)
    counts = class_counts(MODEL)
    run = resume.fingerprint(p.model_dump(), params.runtime.model_dump(), weights_sha256(MODEL), counts)
    diffusion = GaussianDiffusion(config, device.choose_device(params.runtime))
    sampling.check_settings(p, unet, diffusion, counts)
    with (
        device.explain_out_of_memory("lower sample.batch_size"),
        resume.ResumeState(resume.state_folder(root() / ".state", "sample", run)) as state,
        tracking.Tracker(None, params.tracking, {"sample": p.model_dump()}, training_run(MODEL), "sample") as tracker,
    ):
        unet.to(diffusion.device).to(memory_format=device.memory_format(params.runtime, diffusion.device))
        images, strip, film = sampling.draw_filmed(unet, diffusion, p, counts, state)
        if processes.rank() == 0:
            files.save_array(SAMPLES, images)
            pictures.save_film(film, RESULTS / "film.png")
        tracker.log_picture(0, "grid", pictures.grid(images[: p.grid]), RESULTS)
        tracker.log_picture(0, "denoising", pictures.rows(strip), RESULTS)
        state.remove()


if __name__ == "__main__":
    run_stage(main, SECTIONS)
