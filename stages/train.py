"""train: data/prepared -> models/ddpm (averaged weights) and results/train (curves, pictures)."""

from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.runtime.stage import run_stage

if TYPE_CHECKING:
    from ddpm.config.schema import Params

SECTIONS = ("runtime", "model", "diffusion", "optimizer", "lr_schedule", "train", "tracking")
DATA, MODEL, RESULTS = Path("data/prepared"), Path("models/ddpm"), Path("results/train")


def main(params: "Params") -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from ddpm import files, model_folder
    from ddpm.data import fit, prepared
    from ddpm.runtime import processes
    from ddpm.runtime.run import open_run
    from ddpm.training import loop, setup

    p, data = params.train, prepared.Prepared(DATA)
    fit.check_settings(data.info)
    data.verify()
    inputs = {"data": data.info, "init_from": p.init_from and model_folder.weights_sha256(p.init_from)}
    with open_run("train", params, inputs, memory_advice=loop.memory_advice(p), curves=RESULTS) as run:
        design = setup.design(params, data.info)
        ready = setup.set_up(params, design, run.device, len(data.train.images))
        averages = (training := loop.Training(ready, p, data.train, data.test, run.tracker, run.state)).run()
        run.check_unchanged(data.changed(), DATA)

        if processes.rank() == 0:  # the pictures were kept with the state: DVC empties results/ when a run is resumed
            files.copy_files(training.pictures, RESULTS / "pictures")
            first = averages.pop(p.ema_widths[0])
            model_folder.save_model(MODEL, first, design.diffusion, run.provenance, design.classes, averages)


if __name__ == "__main__":
    run_stage(main, SECTIONS)
