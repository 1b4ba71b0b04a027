"""evaluate: samples, data/prepared, models/ddpm -> results/evaluate (metrics.json, plots, card.md, neighbours.png)."""

from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.runtime.stage import run_stage

if TYPE_CHECKING:
    from ddpm.config.schema import Params

SECTIONS = ("runtime", "sample", "evaluate", "tracking")
DATA, MODEL, SAMPLES = Path("data/prepared"), Path("models/ddpm"), Path("samples/images.npy")
RESULTS, ADVICE = Path("results/evaluate"), "lower evaluate.batch_size or sample.batch_size"


def main(params: "Params") -> None:
    # torch is imported here, after the environment that makes it reproducible is set
    from ddpm import files, model_folder
    from ddpm.data.prepared import Prepared
    from ddpm.evaluation.evaluate import Subject, evaluate
    from ddpm.runtime.run import open_run
    from ddpm.sampling import Classes, place

    samples, data = files.load_array(SAMPLES, "sample", "uint8", 4), Prepared(DATA)
    data.verify()
    width, run_id = params.sample.ema_width, model_folder.training_run(MODEL)
    model = model_folder.load_model(MODEL, width)
    classes = Classes(model.classes, model_folder.class_counts(MODEL))
    inputs = {"weights": model_folder.weights_sha256(MODEL, width), "class_counts": classes.counts}
    inputs |= {"data": data.info["sha256"], "samples": files.sha256(samples)}
    with open_run("evaluate", params, inputs, memory_advice=ADVICE, run_id=run_id) as run:
        diffusion = place(model, params.runtime, run.device)
        subject = Subject(params.evaluate, params.sample, model.unet, diffusion, samples, data, classes, run.state)
        done = evaluate(subject)
        run.check_unchanged(data.changed(), DATA)
        done.write(RESULTS, run.tracker)


if __name__ == "__main__":
    run_stage(main, SECTIONS)
