"""sample: models/ddpm -> samples/images.npy and results/sample (a grid; a strip and a film of the denoising)."""

from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.runtime.stage import run_stage

if TYPE_CHECKING:
    from ddpm.config.schema import Params

SECTIONS = ("runtime", "sample", "tracking")
MODEL, SAMPLES, RESULTS = Path("models/ddpm"), Path("samples/images.npy"), Path("results/sample")


def main(params: "Params") -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from ddpm import files, model_folder, pictures, sampling
    from ddpm.runtime import processes
    from ddpm.runtime.run import open_run

    p, model = params.sample, model_folder.load_model(MODEL, params.sample.ema_width)
    classes = sampling.Classes(model.classes, model_folder.class_counts(MODEL))
    inputs = {"weights": model_folder.weights_sha256(MODEL, p.ema_width), "class_counts": classes.counts}
    run_id = model_folder.training_run(MODEL)
    with open_run("sample", params, inputs, memory_advice="lower sample.batch_size", run_id=run_id) as run:
        diffusion = sampling.place(model, params.runtime, run.device)
        sampling.check_settings(p, model.unet, diffusion, classes)
        images, strip, film = sampling.draw_filmed(model.unet, diffusion, p, classes, run.state)

        if processes.rank() == 0:
            files.save_array(SAMPLES, images)
            pictures.save_film(film, RESULTS / "film.png")
        run.tracker.log_picture(0, "grid", pictures.grid(images[: p.grid]), RESULTS)
        run.tracker.log_picture(0, "denoising", pictures.rows(strip), RESULTS)


if __name__ == "__main__":
    run_stage(main, SECTIONS)
