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
    from ddpm.config.checks import check_data
    from ddpm.config.load import load_all
    from ddpm.data import prepared, transforms
    from ddpm.runtime import processes
    from ddpm.runtime.run import open_run
    from ddpm.training import loop, setup

    p, data = params.train, prepared.Prepared(DATA)
    size, _, channels = data.info["shape"]
    check_data(load_all(), data.info)  # all sections, to refuse now what a later stage would
    transforms.Transforms(p.transforms).probe((channels, size, size))
    data.verify()
    config = {name: section and section.model_dump(by_alias=True) for name, section in vars(params).items()}
    start = {} if p.init_from is None else {"init_from": model_folder.weights_sha256(p.init_from)}
    facts = (config, data.info["sha256"], start)
    options = {"memory_advice": loop.MEMORY_ADVICE, "curves": str(RESULTS)}
    with open_run("train", params.runtime, params.tracking, facts, config, **options) as run:
        design = setup.design(params, data.info)
        training = loop.Training(
            setup.set_up(params, design, run.device, len(data.train.images)), p, data.train, run.tracker, run.state
        )
        averaged = training.run()
        run.check_unchanged(data.changed(), DATA)

        run.tracker.finish()
        if processes.rank() == 0:
            # kept with the state until now: DVC empties results/ when a run is resumed
            for picture in training.pictures.iterdir():
                files.write_file(RESULTS / "pictures" / picture.name, picture.read_bytes())
            provenance = {"run": run.name, "data": data.info, "params": config} | start
            model_folder.save_model(MODEL, averaged, design.diffusion, provenance, design.classes)


if __name__ == "__main__":
    run_stage(main, SECTIONS)
