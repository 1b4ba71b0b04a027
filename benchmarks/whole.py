"""The pipeline as a user runs it, in a scratch clone: its cost beyond the training itself."""

import re
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Spread, table
from tests.robustness.scratch import clone, environment, run

TITLE = "The whole pipeline"
FACTS = {  # lines that the stage train prints
    "share": r"([\d.]+) ?% in forward, backward and step",
    "first_step": r"first step after ([\d.]+) s",
}
BARE = "stages: {hello: {cmd: echo hello > out, outs: [out]}}\n"


def facts(output: str) -> dict[str, float]:
    """The facts in the output of a training.

    Raises:
        RuntimeError: a fact is missing.
    """
    found = {name: re.search(pattern, output) for name, pattern in FACTS.items()}
    if missing := [FACTS[name] for name, match in found.items() if not match]:
        raise RuntimeError(f"the stage train did not print {missing}:\n{output[-2000:]}")
    return {name: float(match[1]) for name, match in found.items() if match}


def measure(quick: bool, compiled: bool) -> dict[str, Any]:
    """The facts of a real `dvc repro`, and the seconds of one with nothing to do, beside those of bare dvc."""
    with tempfile.TemporaryDirectory() as top:
        pipeline, bare = Path(top, "pipeline"), Path(top, "bare")
        env = environment(pipeline)
        clone(pipeline)
        repro = ["dvc", "exp", "run", "-S", "+experiment=smoke"] if quick else ["dvc", "repro"]
        found: dict[str, Any] = dict(facts(run(pipeline, env, *repro)))
        bare.mkdir()
        for command in ("git init -q", "dvc init -q"):
            run(bare, env, *command.split())
        (bare / "dvc.yaml").write_text(BARE)
        run(bare, env, "dvc", "repro")
        times: dict[str, list[float]] = {"pipeline": [], "bare": []}
        for _ in range(2 if quick else 5):
            for folder in (pipeline, bare):
                start = time.perf_counter()
                run(folder, env, "dvc", "repro")
                times[folder.name].append(time.perf_counter() - start)
    return found | {"nothing": times}


def page(result: dict[str, Any]) -> str:
    """The table."""
    beyond = [a - b for a, b in zip(result["nothing"]["pipeline"], result["nothing"]["bare"], strict=True)]
    rows = [
        ("share of the training's wall clock in forward, backward and step", f"{result['share']:.1f} %"),
        ("from process start to the first step", f"{result['first_step']:.1f} s"),
        ("`dvc repro` with nothing to do, s", Spread.of(result["nothing"]["pipeline"])),
        ("… the same with one trivial stage, s", Spread.of(result["nothing"]["bare"])),
        ("… the difference, s", Spread.of(beyond)),
    ]
    return "A real `dvc repro` of the default in a fresh clone.\n\n" + table(("", ""), rows)
