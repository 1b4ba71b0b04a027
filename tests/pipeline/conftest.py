"""A scratch clone in which the real dvc runs."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

# one thread, as other tests run at the same time; fewer timesteps, each of which the bound evaluates
SMOKE = ("-S", "+experiment=smoke", "-S", "runtime.threads=1", "-S", "diffusion.timesteps=100")


class Clone:
    """A clone of the working tree, in a folder of its own, with a clean environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("DVC", "WANDB", "COV"))}
        # as a user has it: bytecode is written, which must not count as a change of ddpm/
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.env |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_SITE_CACHE_DIR": str(folder.parent / "site"),
            "WANDB_MODE": "disabled",
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@example.org",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@example.org",
        }

    def run(self, *command: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        # not pipes: the worker that `dvc queue start` leaves behind would keep them open until its last trial is done
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = subprocess.run(
                command, cwd=self.folder, env=self.env, stdout=out, stderr=err, text=True, timeout=timeout, check=False
            )
            done.stdout, done.stderr = (file.seek(0) or file.read() for file in (out, err))
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def dvc(self, *arguments: str, check: bool = True) -> str:
        done = self.run("dvc", *arguments, check=check)
        return done.stdout + done.stderr


def make_clone(folder: Path) -> Clone:
    """The files that git knows or would add, as they are in the working tree, committed in a new repository."""
    clone = Clone(folder)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    clone.run("git", "init", "-q", "-b", "main")
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "all")
    return clone


def git_clone(source: Path, folder: Path) -> Clone:
    """What someone else gets from git: no output that DVC holds, and a cache of their own, empty."""
    subprocess.run(["git", "clone", "-q", source, folder], check=True)
    return Clone(folder)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A clone in which the smoke preset was run and committed, to be copied and not changed: half a minute.

    All workers of pytest-xdist share it: the first makes it, under a lock.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "smoke"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder / "clone", ignore_errors=True)
            clone = make_clone(folder / "clone")
            clone.dvc("exp", "run", *SMOKE)
            clone.run("git", "add", "-A")
            clone.run("git", "commit", "-qm", "smoke")
            (folder / "done").touch()
    return folder / "clone"


@pytest.fixture(scope="session")
def smoke(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The same for the tests of one worker, which leave it as they found it, but for experiments and tags."""
    return Clone(shutil.copytree(smoke_run, tmp_path_factory.mktemp("own") / "clone"))
