"""All that is to be shown on a GPU, in steps of at most nine minutes, and one page of it: benchmarks/results/gpu/.

Each step leaves its numbers when it ends, also when it is cut short, so that the page holds what there was time for.
Without a GPU the same steps run on the CPU, with --quick in a few minutes, and the page says so.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks import ours, sampling, train_step
from benchmarks.machine import machine
from ddpm.runtime.stage import OPENMP_SPINS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/gpu"
WORK = ROOT / ".gpu"  # what a step leaves for the next, and git does not see
LIMIT = 540  # seconds per step
SHORT = ["+experiment=smoke", "train.steps=60", "train.log_every_steps=1", "train.save_every_seconds=1e-9"]
TRAINED = r"([\d,]+) images in (\d+) s"  # what a training prints at its end
WEIGHTS, LOSSES = "models/ddpm/unet/diffusion_pytorch_model.safetensors", "results/train/plots/metrics/loss.tsv"


def stage(folder: Path, name: str, *overrides: str) -> "subprocess.Popen[str]":
    """Start a stage in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(OmegaConf.to_yaml(ours.composed(*overrides)), encoding="utf-8")
    command = [sys.executable, "-m", f"stages.{name}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: "subprocess.Popen[str]", seconds: float = LIMIT) -> str:
    """What a stage prints to its end; it is asked to stop, and saves its state, where it takes longer.

    Raises:
        RuntimeError: it failed.
        TimeoutError: it was stopped.
    """
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, _ = process.communicate()
        raise TimeoutError(f"stopped after {seconds:.0f} s; the same step resumes it") from None
    if process.returncode:
        raise RuntimeError(out[-2000:])
    return out


def tests(arguments: argparse.Namespace) -> dict[str, Any]:
    """The half of the suite that needs CUDA."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    return {"exit": done.returncode, "last": "; ".join(done.stdout.strip().splitlines()[-3:])}


def training_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """The training step beside diffusers, and its share of the measured rate of matrix products."""
    return train_step.measure(arguments.quick, arguments.compile)


def samples(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sampling beside diffusers."""
    return sampling.measure(arguments.quick, arguments.compile)


def _losses(folder: Path) -> np.ndarray:
    return np.loadtxt(folder / LOSSES, skiprows=1)[:, 1]


def resume(arguments: argparse.Namespace) -> dict[str, Any]:
    """A training that is killed and resumed, beside one that is not."""
    folder, weights = WORK / "resume", []
    shutil.rmtree(folder, ignore_errors=True)
    finish(stage(folder, "prepare_data", *SHORT))
    for kill in (False, True):
        shutil.rmtree(folder / "results", ignore_errors=True)
        process = stage(folder, "train", *SHORT)
        if kill:
            while not (folder / LOSSES).exists() or len((folder / LOSSES).read_text().splitlines()) < 20:
                if process.poll() is not None:
                    raise RuntimeError("it ended before it was killed")
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            process = stage(folder, "train", *SHORT)
        out = finish(process)
        weights.append(hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())
    return {"same": weights[0] == weights[1], "resumed": re.findall(r"resuming at step \d+", out)}


def processes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two processes on one card, by gloo, beside one."""
    folder, curves = WORK / "processes", []
    shutil.rmtree(folder, ignore_errors=True)
    finish(stage(folder, "prepare_data", *SHORT))
    for more in ([], ["runtime.launcher=torchrun", "runtime.processes=2"]):
        finish(stage(folder, "train", *SHORT, *more))
        curves.append(_losses(folder))
    return {"difference": float(np.abs(curves[1] / curves[0] - 1).max())}


def speedrun(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train `+experiment=speedrun_gpu` on a folder of images for the minutes given; call it again to resume it."""
    folder, plan = WORK / "speedrun", WORK / "speedrun/plan.json"
    began = time.monotonic()
    common = ["+experiment=speedrun_gpu", f"dataset.path={arguments.images.resolve()}"]
    if arguments.quick:
        common += ["model.base_channels=32", "train.batch_size=8", "sample.count=16", "evaluate.loss_images=16"]
        common += ["train.workers=0", "dataset.subset=64", "sample.steps=5", "evaluate.reference=all"]
    if not plan.exists():
        finish(stage(folder, "prepare_data", *common))
        probe = 20 if arguments.quick else 400
        short = [f"train.steps={probe}", "train.warmup_steps=10", "train.preview_every_epochs=0"]
        match = re.search(TRAINED, finish(stage(folder, "train", *common, *short)))
        assert match, "the training did not print its time"
        rate = int(match[1].replace(",", "")) / max(1, int(match[2]))
        steps = max(probe, int(arguments.minutes * 60 * rate / ours.params(*common).train.batch_size))
        plan.write_text(json.dumps({"images_per_second": rate, "steps": steps, "minutes": arguments.minutes}))
    planned = json.loads(plan.read_text())
    common += [f"train.steps={planned['steps']}", f"train.warmup_steps={planned['steps'] // 20}"]
    out = finish(stage(folder, "train", *common), LIMIT - (time.monotonic() - began))
    (folder / "common.json").write_text(json.dumps(common))
    return planned | {"printed": out.strip().splitlines()[-1]}


def judge(arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples of the speedrun, their distance to the training images, and a grid."""
    folder = WORK / "speedrun"
    common = json.loads((folder / "common.json").read_text())
    for name in ("sample", "evaluate"):
        finish(stage(folder, name, *common))
    shutil.copy(folder / "results/sample/grid.png", RESULTS / "grid.png")
    metrics = json.loads((folder / "results/evaluate/metrics.json").read_text())
    extractor = ours.params(*common).evaluate.features
    return {"extractor": extractor, "metrics": metrics}


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tests": tests,
    "resume": resume,
    "processes": processes,
    "training_step": training_step,
    "samples": samples,
    "speedrun": speedrun,
    "judge": judge,
}


def page() -> str:
    """Everything that was measured, in markdown."""
    parts = ["# On a GPU\n\nMade by `make gpu`; change nothing here.\n"]
    for name, function in STEPS.items():
        if not (path := RESULTS / f"{name}.json").exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        facts = ", ".join(f"{what}: {value}" for what, value in result["machine"].items() if value)
        smoke = "\n**A smoke run (`--quick`): its numbers measure nothing.**\n" if result["quick"] else ""
        body = f"Not finished: {result['fault']}" if "fault" in result else _body(name, result)
        parts.append(f"\n## {function.__doc__}\n\n{facts}; {result['seconds']:.0f} s.\n{smoke}\n{body}\n")
    return "".join(parts)


def _body(name: str, result: dict[str, Any]) -> str:
    if name == "training_step":
        return train_step.page(result)
    if name == "samples":
        return sampling.page(result)
    if name == "judge":
        rows = "".join(f"| {key} | {value} |\n" for key, value in result["metrics"].items())
        return f"Features: {result['extractor']}.\n\n| number | value |\n| --- | ---: |\n{rows}\n![Samples](grid.png)"
    return "\n".join(f"- {key}: {value}" for key, value in result.items() if key not in ("machine", "quick", "seconds"))


def main() -> None:
    """Run the steps that are asked for, one after the other, and write the page after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(STEPS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="only see that everything works")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, ours and diffusers'")
    parser.add_argument("--images", type=Path, default=Path("data/raw"), help="the folder of images of the speedrun")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training of the speedrun")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": OPENMP_SPINS}
    RESULTS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, _stop)
    for name in arguments.steps or STEPS:
        print(f"{name}: {STEPS[name].__doc__}", flush=True)
        start, result = time.monotonic(), {"machine": machine(), "quick": arguments.quick}
        signal.alarm(LIMIT + 30)  # for what has no limit of its own
        try:
            result |= STEPS[name](arguments)
        except (RuntimeError, TimeoutError, OSError, AssertionError, subprocess.TimeoutExpired) as fault:
            result["fault"] = str(fault)
        signal.alarm(0)
        result["seconds"] = time.monotonic() - start
        print(f"{name}: {result.get('fault', 'done')}, {result['seconds']:.0f} s", flush=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "README.md").write_text(page(), encoding="utf-8")


def _stop(*_: object) -> None:
    raise TimeoutError(f"cut after {LIMIT} s")


if __name__ == "__main__":
    main()
