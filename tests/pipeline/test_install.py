"""An editable install makes `ddpm` importable from anywhere, and a stage run as a script does what `-m` does."""

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT, composed
from tests.support.clones import Clone, make_clone

FEW = ("+experiment=smoke", "runtime.threads=1", "train.steps=2", "train.warmup_steps=0", "tracking.wandb=disabled")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone, installed with the Makefile's own options into an environment that has all requirements."""
    folder = tmp_path_factory.mktemp("installed")
    clone = make_clone(folder / "clone")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    (Path(sysconfig.get_path("purelib", vars=paths)) / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    options = ["--no-deps", "--no-build-isolation", "--editable"]
    assert f"{' '.join(options)} ." in (ROOT / "Makefile").read_text()
    clone.run("uv", "pip", "install", "--offline", "--python", f"{environment}/bin/python", *options, ".")
    clone.env["PATH"] = f"{environment}/bin:{clone.env['PATH']}"
    (clone.folder / "params.yaml").write_text(OmegaConf.to_yaml(composed(*FEW)))
    return clone


def outputs(clone: Clone) -> dict[str, str]:
    files = [path for name in ("data/prepared", "models/ddpm") for path in (clone.folder / name).rglob("*.*")]
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def test_the_library_is_imported_from_anywhere(installed: Clone, tmp_path: Path) -> None:
    elsewhere = Clone(tmp_path)
    elsewhere.env = installed.env
    found = elsewhere.run("python", "-c", "import ddpm.core.unet; print(ddpm.core.unet.__file__)").stdout
    assert Path(found.strip()) == installed.folder / "ddpm/core/unet.py"


def test_only_the_library_is_installed(installed: Clone, tmp_path: Path) -> None:
    elsewhere = Clone(tmp_path)
    elsewhere.env = installed.env
    code = "import importlib.util as u; print([n for n in ('stages', 'tools', 'conf') if u.find_spec(n)])"
    assert elsewhere.run("python", "-c", code).stdout == "[]\n"


def test_a_stage_run_as_a_script_gives_the_bytes_of_the_module(installed: Clone) -> None:
    for stage in ("prepare_data", "train"):
        installed.run("python", "-m", f"stages.{stage}")
    by_module = outputs(installed)
    for stage in ("prepare_data", "train"):
        installed.run("python", f"stages/{stage}.py")
    assert len(by_module) > 8 and outputs(installed) == by_module
    untracked = installed.run("git", "ls-files", "--others", "--exclude-standard").stdout
    assert untracked == "", "an installation leaves files that git does not ignore"


def test_a_script_refuses_the_library_of_another_checkout(installed: Clone, tmp_path: Path) -> None:
    other = make_clone(tmp_path / "other")
    other.env = installed.env
    done = other.run("python", "stages/train.py", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    fault = f"imports ddpm from {installed.folder}, another checkout; run python -m stages.train"
    assert done.stderr == f"error: {other.folder}/stages/train.py: {fault}\n"


RECORD = '#!/bin/sh\necho "$(basename "$0") $*" >> "{log}"\n{then}\n'


@pytest.mark.parametrize(
    ("uv", "pip", "runs"),
    [
        ("exit 0", "exit 0", ["uv pip install"]),
        ("exit 1", "exit 0", ["uv pip install", "python -m pip install"]),
        (None, 'case "$*" in *" uv") exit 1;; esac', ["python -m pip install", "python -m pip install"]),
    ],
    ids=["uv", "uv fails", "uv cannot be had"],
)
def test_uv_installs_and_pip_where_uv_cannot(tmp_path: Path, uv: str | None, pip: str, runs: list[str]) -> None:
    """The Makefile's own recipe, with programs that record how they were called."""
    log, programs = tmp_path / "log", tmp_path / "environment/bin"
    programs.mkdir(parents=True)
    for name, then in (("uv", uv), ("python", pip)):
        if then is not None:
            (programs / name).write_text(RECORD.format(log=log, then=then))
            (programs / name).chmod(0o755)
    target = "probe: ; $(call install,--requirement some.txt)"
    command = ["make", "-s", f"--eval={target}", "probe", f"VENV={programs.parent}"]
    subprocess.run(command, cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, check=True)
    calls = log.read_text().splitlines()
    assert [" ".join(call.split()[: len(run.split())]) for call, run in zip(calls, runs, strict=True)] == runs
    assert calls[-1].endswith("--requirement some.txt")
