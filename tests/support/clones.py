"""Scratch clones of the working tree, in which the real dvc runs."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dvc.repo import Repo

from tests.conftest import ROOT

VENV = Path(sys.executable).parents[1]
INSTALLED = f"VENV='{VENV}' -o '{VENV}/.run' -o '{VENV}/.dev'"  # make treats this environment as up to date
# one thread, as other tests run at the same time; fewer timesteps, each of which the bound evaluates
SMOKE = ("-S", "+experiment=smoke", "-S", "train.steps=48", "-S", "runtime.threads=1", "-S", "diffusion.timesteps=100")


class Clone:
    """A clone of the working tree, in its own folder, with a clean environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("DVC", "WANDB", "COV"))}
        # like a user's: bytecode is written, which must not count as a change of ddpm/
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
    """Someone else's clone from git: without the outputs that DVC holds, and with an empty cache of its own."""
    subprocess.run(["git", "clone", "-q", source, folder], check=True)
    return Clone(folder)


def wait_for_queue(clone: Clone) -> None:
    """Wait until no experiment is queued or running; asked in this process: `dvc queue status` is slow."""
    with Repo(str(clone.folder)) as repo:
        queue, deadline = repo.experiments.celery_queue, time.monotonic() + 600
        while any(queue.iter_queued()) or any(queue.iter_active()):
            assert time.monotonic() < deadline, clone.dvc("queue", "status")
            time.sleep(0.2)
