"""The short form of tests.robustness.kills: one run, killed under each command, instead of a hundred kills."""

import random
import sys
from pathlib import Path

import pytest

from tests.robustness.kills import Ground
from tests.support.clones import SMOKE, Clone, git_clone


@pytest.mark.slow  # a minute; tests/stages/test_pipeline.py kills the stages themselves
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_run_killed_under_every_command_ends_in_the_same_bytes(smoke: Clone, tmp_path: Path) -> None:
    git_clone(smoke.folder, tmp_path / "clone")
    ground = Ground(tmp_path / "clone", random.Random(1), SMOKE[1::2], duration=15)
    try:
        ground.round(
            ["queue", "exp run", "exp run --temp", "repro", "repro"],
            [
                ("stage", "SIGKILL", "train"),
                ("group", "SIGINT", "train"),
                ("dvc", "SIGKILL", "sample"),
                ("stage", "SIGTERM", "evaluate"),
            ],
        )
    finally:
        ground.close()
        print(ground.tally.table(), ground.log.read_text(errors="replace"))  # shown if the test fails
    assert ground.tally.kills.total() == 4
