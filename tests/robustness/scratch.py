"""A clone in its own folder, for checks that run the whole pipeline and must not touch the working tree."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a user's shell, without variables that affect other runs; DVC's files go beside `folder`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DVC", "WANDB", "GIT_", "COV"))}
    who = {f"GIT_{role}_{what}": "test" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    paths = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_SITE_CACHE_DIR": f"{folder}.site",
    }
    return env | who | paths | {"WANDB_MODE": "disabled"} | more


def run(folder: Path, env: dict[str, str], *command: str, check: bool = True) -> str:
    """The output of a command that is run in the clone, stdout and stderr together.

    Raises:
        RuntimeError: the command failed and `check` is set.
    """
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def clone(folder: Path) -> None:
    """Clone HEAD as a new repository on the branch `main`; print a note if the working tree differs."""
    # (with its history: dvc brings no experiment back from a temporary workspace of a shallow clone)
    subprocess.run(["git", "clone", "-q", "--no-local", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "switch", "-q", "-C", "main"], cwd=folder, check=True)
    if subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode:
        print("note: changes that are not committed are left out")
