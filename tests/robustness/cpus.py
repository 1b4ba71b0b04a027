"""Compare the bytes of all four stages on this CPU with those on others, emulated by qemu-user.

    python -m tests.robustness.cpus                  # Haswell (Intel, 2013) and EPYC (AMD, 2017)
    python -m tests.robustness.cpus --cpus Haswell Skylake-Client EPYC-Rome

A tiny run, since emulation is slow: a few steps of training, every sampler, every metric. The files that the stages
write have to agree. The metrics are also compared with all their digits, to see which agree only by rounding.
Needs Debian's package qemu-user.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddpm.runtime.stage import OPENMP_SPINS
from tests.robustness.scratch import clone, environment

OVERRIDES = (
    "+experiment=smoke",
    "dataset.subset=200",
    "diffusion.timesteps=40",
    "model.class_conditional=true",
    "sample.guidance=2.0",
    "train.steps=6",
    "train.warmup_steps=2",
    "train.batch_size=16",
    "train.flip=true",
    "train.log_every_steps=2",
    "train.label_dropout=0.1",
    "sample.count=24",
    "sample.batch_size=16",
    "sample.steps=4",
    "sample.grid=16",
    "evaluate.loss_bins=2",
    "evaluate.loss_images=16",
    "evaluate.nfe_samples=8",
    "evaluate.nfe_curve=[{sampler: ddpm, steps: [4]}, {sampler: dpm_solver, steps: [4]}]",
    "tracking.wandb=disabled",
)


def gradients_at_32_pixels() -> str:
    """The hash of a training step's gradients; such images are doubled by a separate kernel, and dropout is on."""
    import torch

    from tests.conftest import small_unet

    unet = small_unet(32, block_out_channels=(16, 16, 32), attention=(False, False, True), dropout=0.1).train()
    torch.manual_seed(0)
    unet(torch.randn(4, 1, 32, 32), torch.arange(4) * 250).square().mean().backward()
    return hashlib.sha256(b"".join(parameter.grad.numpy().tobytes() for parameter in unet.parameters())).hexdigest()


def probe(*more: str, digits: bool = True) -> dict[str, str]:
    """Run the stages in the current folder, and return a hash, or a number, by its name.

    Args:
        more: further overrides of the parameters.
        digits: the metrics with all their digits, too.
    """
    from ddpm.runtime.stage import REPRODUCIBLE_ENVIRONMENT

    os.environ.update(REPRODUCIBLE_ENVIRONMENT)  # before torch is loaded
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from ddpm.config.load import load_params
    from ddpm.evaluation import card
    from stages import evaluate, prepare_data, sample, train

    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base=None):
        OmegaConf.save(compose("config", overrides=[*OVERRIDES, *more]), "params.yaml")
    for stage in (prepare_data, train, sample, evaluate):
        stage.main(load_params(stage.SECTIONS))
    here = Path()
    found = {
        path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(here.rglob("*"))
        if path.is_file() and not {".state", ".cache"} & {*path.parts} and path.name != "params.yaml"
    } | {"gradients at 32 pixels": gradients_at_32_pixels()}
    if not digits:
        return found
    card.DIGITS = 17
    evaluate.main(load_params(evaluate.SECTIONS))
    for name in ("metrics", "loss_by_timestep", "bound_by_timestep", "fd_by_nfe"):
        content = json.loads((here / f"results/evaluate/{name}.json").read_text())
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            found[f"all digits of {name} {key}"] = repr(value)
    return found


def start(folder: Path, code: Path, call: str, *around: str, **variables: str) -> subprocess.Popen[str]:
    """A process in the folder that calls `probe` with that folder's code, and writes the result into `found`."""
    # the interpreter itself, with the path of the packages of the virtual environment
    python = [os.path.realpath(sys.executable), "-c"]
    script = f"import json, sys; from tests.robustness.cpus import probe; json.dump({call}, open('found', 'w'))"
    paths = {"PYTHONPATH": os.pathsep.join([str(code), *filter(None, sys.path[1:])])}
    env = environment(folder) | {"GOMP_SPINCOUNT": OPENMP_SPINS} | paths | variables
    return subprocess.Popen([*around, *python, script], cwd=folder, env=env, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip


def run(cpu: str | None, code: Path) -> dict[str, str]:
    """The result of `probe` with the code of that folder, on this CPU or on an emulated one."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        process = start(Path(folder), code, "probe()", *(["qemu-x86_64", "-cpu", cpu] if cpu else []))
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"{errors}\nerror: the run on {cpu or 'this CPU'} ended with {process.returncode}")
        found = json.loads(Path(folder, "found").read_text())
        print(f"{cpu or 'this CPU'}: {len(found)} hashes and numbers in {time.monotonic() - begin:.0f} s", flush=True)
        return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpus", nargs="+", default=["Haswell", "EPYC"], help="names that qemu-x86_64 -cpu help lists")
    arguments = parser.parse_args()
    if not shutil.which("qemu-x86_64"):
        sys.exit("error: qemu-x86_64 is missing: apt-get install qemu-user")
    code = Path(tempfile.mkdtemp(prefix="cpus-")) / "clone"  # the working tree may be edited during the runs
    clone(code)
    here, other = run(None, code), 0
    for cpu in arguments.cpus:
        there = run(cpu, code)
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                digits = name.startswith("all digits")
                other += not digits
                print(f"  {cpu}: {name} differs: {here.get(name)}, {there.get(name)}{' (before rounding)' * digits}")
    files = sum(not name.startswith("all digits") for name in here)
    print(f"{files} files compared on {len(arguments.cpus)} other CPUs: {other} differences")
    shutil.rmtree(code.parent)
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
