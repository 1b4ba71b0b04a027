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
    from ddpm import files, model_folder, sampling
    from ddpm.data.prepared import Prepared
    from ddpm.evaluation.evaluate import Subject, evaluate
    from ddpm.runtime.run import open_run

    samples, data = files.load_array(SAMPLES, "sample", "uint8", 4), Prepared(DATA)
    data.verify()
    p, drawn, run_id = params.evaluate, params.sample, model_folder.training_run(MODEL)
    model = model_folder.load_model(MODEL, drawn.ema_width)
    variants = {width: model_folder.load_model(MODEL, width, "evaluate.ema_widths") for width in p.ema_widths}
    classes = sampling.Classes(model.classes, model_folder.class_counts(MODEL))
    weights = [model_folder.weights_sha256(MODEL, width) for width in (drawn.ema_width, *variants)]
    inputs = {"weights": weights, "data": data.info["sha256"], "samples": files.sha256(samples)}
    inputs["class_counts"] = classes.counts
    with open_run("evaluate", params, inputs, memory_advice=ADVICE, run_id=run_id) as run:
        diffusion = sampling.place(model, params.runtime, run.device, *variants.values())
        done = evaluate(Subject(p, drawn, model.unet, variants, diffusion, samples, data, classes, run.state))
        run.check_unchanged(data.changed(), DATA)
        done.write(RESULTS, run.tracker)


if __name__ == "__main__":
    run_stage(main, SECTIONS)
