"""One run of a stage: its device, its resume state and its records, opened in the one right order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm.config.schema import Runtime, Tracking
from ddpm.errors import UserError
from ddpm.runtime import processes
from ddpm.runtime.device import choose_device, explain_out_of_memory
from ddpm.runtime.resume import ResumeState, fingerprint, state_folder
from ddpm.runtime.tracking import Tracker
from ddpm.runtime.workspace import root


@dataclass(frozen=True)
class Run:
    """What a stage computes on, resumes from and records to. `name` follows from the facts of `open_run`."""

    name: str
    device: torch.device
    state: ResumeState
    tracker: Tracker

    def check_unchanged(self, changed: bool, path: str | Path) -> None:
        """Delete the state and stop where any process has found its input `path` changed.

        Raises:
            UserError: it was changed, and the outputs would belong to no input.
        """
        if processes.any_process(changed):
            self.state.remove()
            raise UserError(f"{path}: was changed while the stage ran; nothing of it is kept; run it again")


@contextmanager
def open_run(
    stage: str,
    runtime: Runtime,
    tracking: Tracking,
    facts: tuple[object, ...],
    config: dict[str, Any],
    *,
    memory_advice: str,
    run_id: str | None = None,
    curves: str | Path | None = None,
) -> Iterator[Run]:
    """Open a run: first the device, which may be refused; then the state, which waits for another process; then the
    records, which empty the folder of an earlier run.

    The state is deleted when the block ends without an exception: write all outputs in it.

    Args:
        stage: its name, as in dvc.yaml.
        facts: what the result follows from (JSON-like: parameters, hashes of inputs); they name the run.
        config: the parameters that Weights & Biases shows.
        memory_advice: the settings to change where memory runs out, after "out of memory: ".
        run_id: W&B's id; of the training for a stage that comes after it. None: the run's own name.
        curves: DVCLive's folder; None to record no curves.

    Raises:
        UserError: `cuda` was asked for and is not there, another process works on this run, or memory ran out.
    """
    name = fingerprint(*facts)
    device = choose_device(runtime)
    folder = None if curves is None else str(curves)
    with (
        explain_out_of_memory(memory_advice),
        ResumeState(state_folder(root() / ".state", stage, name)) as state,
        Tracker(folder, tracking, config, run_id or name, stage) as tracker,
    ):
        yield Run(name, device, state, tracker)
        state.remove()
