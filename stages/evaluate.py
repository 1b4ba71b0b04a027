"""evaluate: samples, data/prepared, models/ddpm -> results/evaluate (metrics.json, plots, card.md, neighbours.png)."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.runtime.stage import run_stage

if TYPE_CHECKING:
    from ddpm.config.schema import Params

SECTIONS = ("runtime", "sample", "evaluate", "tracking")
DATA, MODEL, SAMPLES = Path("data/prepared"), Path("models/ddpm"), Path("samples/images.npy")
RESULTS = Path("results/evaluate")


def main(params: "Params") -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from ddpm import files, model_folder
    from ddpm.core.diffusion import GaussianDiffusion
    from ddpm.data.prepared import Prepared
    from ddpm.evaluation.evaluate import Subject, evaluate
    from ddpm.runtime import device
    from ddpm.runtime.run import open_run
    from ddpm.sampling import Classes

    samples, data = files.load_array(SAMPLES, "sample", "uint8", 4), Prepared(DATA)
    data.verify()
    model = model_folder.load_model(MODEL)
    classes = Classes(model.classes, model_folder.class_counts(MODEL))
    config = {name: section.model_dump() for name, section in vars(params).items()}
    content = hashlib.sha256(samples.data).hexdigest()
    facts = (config, model_folder.weights_sha256(MODEL), classes.counts, data.info["sha256"], content)
    advice = "lower evaluate.batch_size or sample.batch_size"
    options = {"memory_advice": advice, "run_id": model_folder.training_run(MODEL)}
    with open_run("evaluate", params.runtime, params.tracking, facts, config, **options) as run:
        diffusion = GaussianDiffusion(model.diffusion, run.device)
        model.unet.to(run.device).to(memory_format=device.memory_format(params.runtime, run.device))
        subject = Subject(params.evaluate, params.sample, model.unet, diffusion, samples, data, classes, run.state)
        done = evaluate(subject)
        run.check_unchanged(data.changed(), DATA)
        done.write(RESULTS, run.tracker)


if __name__ == "__main__":
    run_stage(main, SECTIONS)
