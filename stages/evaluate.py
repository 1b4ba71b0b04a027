"""evaluate: samples, data/prepared and models/ddpm -> results/evaluate.

Writes metrics.json, card.md (what the numbers were measured with), neighbours.png (samples beside their nearest
training images), loss_by_timestep.json, bound_by_timestep.json and fd_by_nfe.json.
"""

import hashlib
from pathlib import Path
from typing import Any

from ddpm.errors import UserError
from ddpm.runtime.stage import run_stage
from ddpm.runtime.workspace import root

SECTIONS = ("runtime", "sample", "evaluate", "tracking")
DATA, MODEL, SAMPLES = Path("data/prepared"), Path("models/ddpm"), Path("samples/images.npy")
RESULTS = Path("results/evaluate")


def main(params: Any) -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from ddpm.core.diffusion import GaussianDiffusion
    from ddpm.data.batches import load_images, load_info, load_labels, watch
    from ddpm.evaluation.card import rounded, write_json
    from ddpm.evaluation.evaluate import Evaluator, Split
    from ddpm.files import load_array, write_file
    from ddpm.model_folder import class_counts, load_model, training_run, weights_sha256
    from ddpm.runtime import processes
    from ddpm.runtime.device import choose_device, explain_out_of_memory, memory_format
    from ddpm.runtime.resume import ResumeState, fingerprint, state_folder
    from ddpm.runtime.tracking import Tracker

    samples, info = load_array(SAMPLES, "sample", "uint8", 4), load_info(DATA)
    changed = watch(DATA)
    train, test = (Split(load_images(DATA, split), load_labels(DATA, split)) for split in ("train", "test"))
    unet, diffusion = load_model(MODEL)
    config = {name: section.model_dump() for name, section in vars(params).items()}
    counts = class_counts(MODEL)
    run = fingerprint(config, weights_sha256(MODEL), counts, info["sha256"], hashlib.sha256(samples.data).hexdigest())
    device = choose_device(params.runtime)
    with (
        explain_out_of_memory("lower evaluate.batch_size or sample.batch_size"),
        ResumeState(state_folder(root() / ".state", "evaluate", run)) as state,
        Tracker(None, params.tracking, config, training_run(MODEL), "evaluate") as tracker,
    ):
        done = Evaluator(
            params.evaluate,
            params.sample,
            unet.to(device).to(memory_format=memory_format(params.runtime, device)),
            GaussianDiffusion(diffusion, device),
            samples,
            train,
            test,
            info,
            device,
            state.keep,
            counts,
        ).run()
        if processes.any_process(changed()):
            state.remove()
            raise UserError(f"{DATA}: was changed while the stage ran; nothing of it is kept; run it again")
        if processes.rank() == 0:
            for name, rows in done.plots.items():
                write_json(RESULTS / f"{name}.json", rows)
            write_json(RESULTS / "metrics.json", done.values)
            write_file(RESULTS / "card.md", done.card.encode())
        tracker.log_picture(0, "neighbours", done.neighbours, RESULTS)
        tracker.log(0, rounded(done.values))
        state.remove()


if __name__ == "__main__":
    run_stage(main, SECTIONS)
