"""train: data/prepared -> models/ddpm (averaged weights) and results/train (curves, pictures)."""

from pathlib import Path
from typing import Any

from ddpm.config.checks import check_data
from ddpm.errors import UserError
from ddpm.runtime.stage import run_stage
from ddpm.runtime.workspace import root

SECTIONS = ("runtime", "model", "diffusion", "optimizer", "lr_schedule", "train", "tracking")
DATA, MODEL, RESULTS = Path("data/prepared"), Path("models/ddpm"), Path("results/train")


def main(params: Any) -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from ddpm.config.load import load_all
    from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
    from ddpm.core.unet import UNet, unet_config
    from ddpm.data.batches import load_images, load_info, load_labels, watch
    from ddpm.data.transforms import Transforms
    from ddpm.files import write_file
    from ddpm.model_folder import save_model, weights_sha256
    from ddpm.runtime import processes
    from ddpm.runtime.device import choose_device
    from ddpm.runtime.resume import ResumeState, fingerprint, state_folder
    from ddpm.runtime.tracking import Tracker
    from ddpm.training.loop import Job, train

    init = params.train.init_from
    data = load_info(DATA)
    size, _, channels = data["shape"]
    check_data(load_all(), data)  # all sections, to refuse now what a later stage would
    Transforms(params.train.transforms).probe((channels, size, size))
    changed = watch(DATA)
    images, labels = load_images(DATA, "train"), load_labels(DATA, "train")
    config = {name: section and section.model_dump(by_alias=True) for name, section in vars(params).items()}
    start = {} if init is None else {"init_from": weights_sha256(init)}
    run = fingerprint(config, data["sha256"], start)
    device = choose_device(params.runtime)
    diffusion = DiffusionConfig(**params.diffusion.model_dump())
    unlabelled = params.train.label_dropout > 0
    model = UNet(unet_config(params.model, size, channels, diffusion.learn_variance, data["classes"], unlabelled))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(images):,} images", flush=True)
    with (
        ResumeState(state_folder(root() / ".state", "train", run)) as state,
        Tracker(str(RESULTS), params.tracking, config, run, "train") as tracker,
    ):
        pictures = state.folder / "pictures"  # kept with the state: DVC empties results/ when a run is taken up again
        job = Job(
            runtime=params.runtime,
            train=params.train,
            optimizer=params.optimizer,
            lr_schedule=params.lr_schedule,
            diffusion=GaussianDiffusion(diffusion, device),
            device=device,
            tracker=tracker,
            folder=pictures,
        )
        averaged = train(model, images, labels, job, state)
        if processes.any_process(changed()):
            state.remove()
            raise UserError(f"{DATA}: was changed while the training ran; nothing of it is kept; run it again")
        tracker.finish()
        if processes.rank() == 0:
            for picture in pictures.iterdir():
                write_file(RESULTS / "pictures" / picture.name, picture.read_bytes())
            save_model(MODEL, averaged, diffusion, provenance={"run": run, "data": data, "params": config} | start)
        state.remove()


if __name__ == "__main__":
    run_stage(main, SECTIONS)
