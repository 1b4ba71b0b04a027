"""No stage writes into DVC's cache, whatever links the workspace has into it."""

import hashlib
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.clones import Clone

STAGES = ("prepare_data", "train", "sample", "evaluate")
# With these, the stages compute outputs that all differ from those in the cache
CHANGES = {
    "dataset": {"test_fraction": 0.3},
    "train": {"steps": 4, "warmup_steps": 1, "seed": 1},
    "sample": {"seed": 1},
}


def cached(clone: Clone) -> dict[str, str]:
    """The content of every object of the cache, by its path."""
    folder = clone.folder / ".dvc/cache/files"
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("link", ["symlink", "hardlink"])
def test_no_stage_writes_through_a_link_into_the_cache(smoke_run: Path, tmp_path: Path, link: str) -> None:
    clone = Clone(tmp_path / "clone")
    shutil.copytree(smoke_run, clone.folder)
    clone.dvc("config", "cache.type", link)
    clone.dvc("checkout", "--relink")
    samples = clone.folder / "samples/images.npy"
    assert samples.is_symlink() if link == "symlink" else samples.stat().st_nlink == 2
    before = cached(clone)
    clone.run("git", "commit", "-qam", link)

    params = clone.folder / "params.yaml"
    tree = yaml.safe_load(params.read_text())
    for section, values in CHANGES.items():
        tree[section] |= values
    params.write_text(yaml.safe_dump(tree))
    for stage in STAGES:
        clone.run("python", "-m", f"stages.{stage}")
    assert cached(clone) == before, "a stage run by hand wrote into the cache"
    assert clone.dvc("status", "-q", check=False) == ""
    assert clone.run("dvc", "status", "-q", check=False).returncode == 1, "the outputs equal the lock"

    clone.run("git", "restore", ".")
    clone.dvc("checkout", "--force")
    assert clone.run("dvc", "status", "-q", check=False).returncode == 0
    clone.dvc("repro", "-f", "train")  # the earlier outputs are links here while dvc runs the stage
    after = cached(clone)
    assert {path: after[path] for path in before} == before, "a stage run by dvc wrote into the cache"
