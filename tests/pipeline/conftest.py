"""Fixtures: a clone in which the smoke preset has run."""

import fcntl
import shutil
from pathlib import Path

import pytest

from tests.support.clones import SMOKE, Clone, make_clone


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A clone in which the smoke preset was run and committed, to be copied and not changed: half a minute.

    All workers of pytest-xdist share the clone: the first worker makes it, under a lock.
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
    """A copy for the tests of one worker, which leave it unchanged but for experiments and tags."""
    return Clone(shutil.copytree(smoke_run, tmp_path_factory.mktemp("own") / "clone"))
