"""One run of a stage: its device, its resume state and its records, opened in the one right order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm.config.load import plain
from ddpm.config.schema import Params
from ddpm.errors import UserError
from ddpm.runtime import processes
from ddpm.runtime.device import choose_device, explain_out_of_memory
from ddpm.runtime.resume import ResumeState, fingerprint, state_folder
from ddpm.runtime.tracking import Tracker
from ddpm.runtime.workspace import root


@dataclass(frozen=True)
class Run:
    """What a stage computes on, resumes from and records to.

    Attributes:
        provenance: what an output is made from: the run's name, the stage's parameters as plain values, its inputs.
    """

    provenance: dict[str, Any]
    device: torch.device
    state: ResumeState
    tracker: Tracker

    def check_unchanged(self, changed: bool, path: str | Path) -> None:
        """Delete the state and raise if any process has found the input `path` changed.

        Raises:
            UserError: the input was changed, so the outputs would belong to no version of it.
        """
        if processes.any_process(changed):
            self.state.remove()
            raise UserError(
                f"{path}: was changed while the stage ran, so its results are discarded; run the stage again"
            )


@contextmanager
def open_run(
    stage: str,
    params: Params,
    inputs: dict[str, Any],
    *,
    memory_advice: str,
    run_id: str | None = None,
    curves: str | Path | None = None,
) -> Iterator[Run]:
    """Open a run: first the device, which may be refused; then the state, which waits for another process; then the
    records, which empty the folder of an earlier run.

    When the block ends without an exception, the curves' last values are written and the state is deleted: write all
    outputs in the block.

    Args:
        stage: its name, as in dvc.yaml.
        params: the stage's sections; the result follows from them and from `inputs`, so both name the run.
        inputs: hashes and other plain values that stand for the files that the stage reads.
        memory_advice: the settings to change where memory runs out, as the end of the line "out of memory: ".
        run_id: W&B's id of the run; a stage after the training passes the training's. None: this run's own name.
        curves: DVCLive's folder; None to record no curves.

    Raises:
        UserError: there is no CUDA device and the parameters ask for one, another process works on this run, or memory
            ran out.
    """
    config = plain(params)
    name = fingerprint(config, inputs)
    device = choose_device(params.runtime)
    folder = None if curves is None else str(curves)
    with (
        explain_out_of_memory(memory_advice),
        ResumeState(state_folder(root() / ".state", stage, name)) as state,
        Tracker(folder, params.tracking, config, run_id or name, stage) as tracker,
    ):
        yield Run({"run": name, "params": config} | inputs, device, state, tracker)
        tracker.finish()
        state.remove()
