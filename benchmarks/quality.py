"""How good the samples are after so many seconds of training, on the digits."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks import ours
from benchmarks.report import curves, table
from benchmarks.workers import Contender, Send, alternate

TITLE = "Quality by training time"
OURS = "ours"
CLOSE, TRIES = 0.1, 3  # a training may miss the seconds asked for by this share, and is made at most so many times
Trained = TypeVar("Trained")
CONTENDERS = {
    OURS: "benchmarks.ours:quality",
    "denoising-diffusion-pytorch": "benchmarks.peers:ddpm_pytorch_quality",
    "diffusers, recipe of its example": "benchmarks.peers:diffusers_quality",
}


def fill(send: Send, train: Callable[[int], Trained], draw: Callable[[Trained], np.ndarray], out: str) -> None:
    """Turns of a training of as many steps as fit into the seconds asked for.

    A learning rate that falls to zero at the end has to know the number of its steps: it follows from the pace of the
    training before. Where that was not the pace of this one, it is made again.
    """

    def timed(steps: int) -> tuple[Trained, float]:
        start = time.perf_counter()
        return train(steps), time.perf_counter() - start

    few, steps = 5, 55
    train(few)  # to warm up
    least, seconds = timed(few)[1], timed(steps)[1]
    wanted = send("ready")
    while True:
        for _ in range(TRIES):
            pace = max(seconds - least, 1e-3) / (steps - few)
            steps = few + max(1, int((wanted - least) / pace))
            trained, seconds = timed(steps)
            if abs(seconds - wanted) < CLOSE * wanted:
                break
        np.save(out, draw(trained))
        wanted = send({"seconds": seconds, "steps": steps})


def measure(quick: bool, compiled: bool) -> dict[str, Any]:
    """Steps, seconds and distance of each contender at each moment."""
    moments = [1, 2] if quick else [30, 60, 120]
    count = 200 if quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        train, real = ours.digits(Path(folder))
        np.save(f"{folder}/train.npy", train)
        settings = {"images": f"{folder}/train.npy", "count": count, "out": f"{folder}/samples.npy"}
        contenders = [Contender(name, function, settings) for name, function in CONTENDERS.items()]

        def keep(answer: Any) -> None:
            answer["distance"] = ours.distance(np.load(f"{folder}/samples.npy"), real)

        turns = alternate(contenders, moments, keep)
    facts = {"moments": moments, "count": count, "reference": len(real), "settings": ours.SOONEST}
    return facts | {"turns": turns}


def page(result: dict[str, Any]) -> str:
    """The table."""
    turns, moments = result["turns"], result["moments"]
    mine = turns[OURS]
    peers = [answers for name, answers in turns.items() if answers is not mine]
    best = [min(answers[i]["distance"] for answers in peers) for i in range(len(moments))]
    rows = [
        (name, *(f"{a['distance']:.3f} ({a['steps']:,} steps, {a['seconds']:.0f} s)" for a in answers))
        for name, answers in turns.items()
    ]
    rows.append(("ours by the better peer's", *(f"{a['distance'] / b:.2f}" for a, b in zip(mine, best, strict=True))))
    return (
        f"Fréchet distance in pixel space of {result['count']:,} samples from all {result['reference']:,} digits, "
        f"after training on the same images in memory; sampling is not counted. Ours: the default with "
        f"`{' '.join(result['settings'])}`, a tenth of the steps to warm up: chosen among a dozen by this very "
        f"distance. Of denoising-diffusion-pytorch three networks were tried, and diffusers is as its recipe has it; "
        f"both sample by DDIM in 50 steps. Ours and diffusers' learning rates fall to zero, so that each time is a "
        f"training of its own. One seed: there is no spread.\n\n"
        + table(("contender", *(f"after {moment} s" for moment in moments)), rows)
    )


def chart(result: dict[str, Any]) -> dict[str, Any]:
    """Distance by seconds."""
    rows = [
        {"name": name, "x": answer["seconds"], "y": answer["distance"]}
        for name, answers in result["turns"].items()
        for answer in answers
    ]
    return curves("seconds of training", "Fréchet distance", rows)
