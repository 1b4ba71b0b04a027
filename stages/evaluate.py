"""evaluate: samples, data/prepared and models/ddpm -> results/evaluate.

Writes metrics.json, card.md (what the numbers were measured with), neighbours.png (samples beside their nearest
training images), loss_by_timestep.json, bound_by_timestep.json and fd_by_nfe.json.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.errors import UserError
from ddpm.runtime.stage import run_stage
from ddpm.runtime.workspace import root

if TYPE_CHECKING:
    from ddpm.config.schema import Params

SECTIONS = ("runtime", "sample", "evaluate", "tracking")
DATA, MODEL, SAMPLES = Path("data/prepared"), Path("models/ddpm"), Path("samples/images.npy")
RESULTS = Path("results/evaluate")


def main(params: "Params") -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from ddpm.core.diffusion import GaussianDiffusion
    from ddpm.data.batches import load_array, load_images, load_info, load_labels, watch
    from ddpm.evaluation.card import rounded
    from ddpm.evaluation.evaluate import Split, Subject, evaluate
    from ddpm.model_folder import class_counts, load_model, training_run, weights_sha256
    from ddpm.runtime import device, processes, resume, tracking

    samples, info = load_array(SAMPLES, "sample", "uint8", 4), load_info(DATA)
    changed = watch(DATA)
    train, test = (Split(load_images(DATA, split), load_labels(DATA, split)) for split in ("train", "test"))
    unet, config = load_model(MODEL)
    settings = {name: section.model_dump() for name, section in vars(params).items()}
    counts, content = class_counts(MODEL), hashlib.sha256(samples.data).hexdigest()
    run = resume.fingerprint(settings, weights_sha256(MODEL), counts, info["sha256"], content)
    diffusion = GaussianDiffusion(config, device.choose_device(params.runtime))
    with (
        device.explain_out_of_memory("lower evaluate.batch_size or sample.batch_size"),
        resume.ResumeState(resume.state_folder(root() / ".state", "evaluate", run)) as state,
        tracking.Tracker(None, params.tracking, settings, training_run(MODEL), "evaluate") as tracker,
    ):
        unet.to(diffusion.device).to(memory_format=device.memory_format(params.runtime, diffusion.device))
        done = evaluate(
            Subject(params.evaluate, params.sample, unet, diffusion, samples, train, test, info, counts, state)
        )
        if processes.any_process(changed()):
            state.remove()
            raise UserError(f"{DATA}: was changed while the stage ran; nothing of it is kept; run it again")
        if processes.rank() == 0:
            done.write(RESULTS)
        tracker.log_picture(0, "neighbours", done.neighbours, RESULTS)
        tracker.log(0, rounded(done.values))
        state.remove()


if __name__ == "__main__":
    run_stage(main, SECTIONS)
