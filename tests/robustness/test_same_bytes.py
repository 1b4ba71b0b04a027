"""The short forms of `make verify` and `make verify-cpu`: a tiny run of all four stages."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.robustness import cpus
from tests.robustness.verify import LIBRARIES, PROVENANCE

pytestmark = pytest.mark.process


def test_threads_and_loader_workers_change_no_byte_of_any_stage(tmp_path: Path) -> None:
    processes = []
    for threads, workers in (("1", 0), ("4", 3)):
        folder = tmp_path / threads
        folder.mkdir()
        small = "'train.preview_every_epochs=0', 'evaluate.bound_images=0', 'evaluate.nfe_curve=[]'"
        call = f"probe('train.workers={workers}', {small}, digits=False)"
        processes.append((folder, cpus.start(folder, ROOT, call, **dict.fromkeys(LIBRARIES, threads))))
    found = []
    for folder, process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found.append(json.loads((folder / "found").read_text()))
        del found[-1][PROVENANCE]  # it holds the parameters
    assert found[0] == found[1]
    parts = {Path(name).parts[0] for name in found[0]}
    assert parts == {"data", "models", "samples", "results", "gradients at 32 pixels"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-x86_64 (Debian's qemu-user)")
def test_another_cpu_gives_the_same_bytes() -> None:
    here, there = cpus.run(None, ROOT), cpus.run("Haswell", ROOT)
    files = {name for name in here if not name.startswith("all digits")}
    assert {name for name in files if here[name] != there.get(name)} == set()
    assert len(files) > 20
