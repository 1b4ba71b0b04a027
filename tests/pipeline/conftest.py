"""A scratch clone in which the real dvc runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


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

    def run(self, *command: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )
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
def smoke(tmp_path_factory) -> Clone:
    """A clone in which the smoke preset has been run by `dvc exp run` and committed: about half a minute."""
    clone = make_clone(tmp_path_factory.mktemp("smoke") / "clone")
    clone.dvc("exp", "run", "-S", "+experiment=smoke")
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "smoke")
    return clone
