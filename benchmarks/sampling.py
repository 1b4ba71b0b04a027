"""Samples of the same weights, by the same steps, from the same noise."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ours
from benchmarks.report import Spread, bars, faster, peak, table
from benchmarks.workers import Contender, alternate

TITLE = "Sampling with the paper's network"
STEPS = 10
TOLERANCE = 1e-3  # of values in [0, 1]
PEERS = {"diffusers, as it ships": False, "diffusers, best": True}


def measure(quick: bool, compiled: bool) -> dict[str, Any]:
    """The answers of all contenders, turn by turn, and the largest difference between their pixels.

    Raises:
        AssertionError: the samples differ.
    """
    import torch

    batch = 1 if quick else 64 if torch.cuda.is_available() else 8
    with tempfile.TemporaryDirectory() as folder:
        ours.save_random_model(Path(folder, "model"))

        def settings(name: str) -> dict[str, Any]:
            return {"folder": f"{folder}/model", "batch": batch, "steps": STEPS, "out": f"{folder}/{name}.npy"}

        contenders = [
            Contender(name, "benchmarks.ours:sampling", settings(name) | {"overrides": more}, ours.environment(exact))
            for name, exact, more in [("ours, reproducible", True, []), ("ours, fastest", False, ours.FASTEST)]
        ] + [
            Contender(name, "benchmarks.peers:diffusers_sampling", settings(name) | {"best": best})
            for name, best in PEERS.items()
        ]
        turns = alternate(contenders, [None] * (1 if quick else 4))
        first, *rest = (np.load(path) for path in Path(folder).glob("*.npy"))
    difference = max(float(np.abs(other - first).max()) for other in rest)
    assert difference < TOLERANCE, f"the samples differ by {difference:.2g}"
    assert np.ptp(first) > 0.5, "the samples are blank: that they are equal proves nothing"
    return {"batch": batch, "difference": difference, "turns": turns}


def page(result: dict[str, Any]) -> str:
    """The table."""
    turns, batch = result["turns"], result["batch"]
    rows = []
    for name, answers in turns.items():
        rate = Spread.of(batch / answer["seconds"] for answer in answers)
        rows.append((name, rate, *(faster(turns, name, peer) for peer in PEERS), peak(answers)))
    head = ("contender", "images per second", *(f"times as fast as {peer}" for peer in PEERS), "peak MiB")
    return (
        f"DDIM, {STEPS} steps, batch {batch}, fp32, the same weights and start noise. The samples of all "
        f"contenders, in [0, 1], differ by at most {result['difference']:.1g}.\n\n{table(head, rows)}"
    )


def chart(result: dict[str, Any]) -> dict[str, Any]:
    """Images per second."""
    return bars(result["turns"], result["batch"])
