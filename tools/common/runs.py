"""The runs of a search: `dvc exp run` in its own folder, the curve of a run while it trains, exchange through git."""

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ddpm.errors import UserError
from ddpm.runtime.signals import PR_SET_PDEATHSIG
from ddpm.runtime.workspace import PATIENCE

CURVE = Path("results/train/plots/metrics/held_out_loss.tsv")
METRICS_FILE, PARAMS_FILE = "results/evaluate/metrics.json", "params.yaml"
POLL = 1.0  # seconds between two looks at a run
RUN_LOGS = Path(".dvc/tmp/search")
TRAINING = b"Running stage 'train'"  # in the log of a run, once DVC has removed the outputs that the stage writes
OnPoint = Callable[[int, float], bool]  # a step and its loss; whether to stop the run


class RunError(Exception):
    """A run has ended without a result; the message is the reason in one line."""


def git(*arguments: str, check: bool = True) -> str:
    """The output of git; empty if git fails and `check` is off.

    Raises:
        UserError: git fails.
    """
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise UserError(f"git {arguments[0]}: {' '.join(done.stderr.split())[:300]}")
    return done.stdout.strip() if not done.returncode else ""


def dvc(*arguments: str) -> str:
    """Run dvc quietly; return the reason if it fails, else an empty string."""
    done = subprocess.run(["dvc", *arguments], capture_output=True, text=True, check=False)
    return reason_in(done.stdout + done.stderr) if done.returncode else ""


def origin() -> str:
    """What all runs of a search share: the commit, and a hash of uncommitted changes in code and configuration.

    Raises:
        UserError: this is not a git repository with a commit.
    """
    head = git("rev-parse", "HEAD")
    changes = git("diff", "HEAD", "--", "ddpm", "stages", "conf", "dvc.yaml", "requirements.txt", ":!conf/search")
    return head + (f" and {git_hash(changes)}" if changes else "")


def git_hash(text: str) -> str:
    """The hash that git gives a text."""
    done = subprocess.run(["git", "hash-object", "--stdin"], input=text, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Experiments:
    """The experiments of the commit that this clone is on, here and in a git remote."""

    def __init__(self, remote: str | None) -> None:
        self._head, self._remote = git("rev-parse", "HEAD"), remote
        self._folder = f"refs/exps/{self._head[:2]}/{self._head[2:]}/"
        if remote is None:
            return
        if remote not in git("remote").split():
            raise UserError(f"remote = {remote}: is not a remote of this clone: git remote add {remote} <address>")
        if dvc("remote", "default"):
            raise UserError("remote: the outputs need a DVC remote, too: dvc remote add --default storage <address>")

    def metrics(self, name: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """The numbers of an experiment; None if the experiment is not here.

        Raises:
            UserError: an experiment of this name has other parameters than `params`.
        """
        if not git("rev-parse", "--verify", "--quiet", self._folder + name, check=False):
            return None
        text = git("show", f"{self._folder}{name}:{PARAMS_FILE}")
        if OmegaConf.to_container(OmegaConf.create(text)) != params:
            raise UserError(
                f"experiment {name}: is another run of that name: dvc exp remove {name}, or another `study`"
            )
        return json.loads(git("show", f"{self._folder}{name}:{METRICS_FILE}"))

    def fetch(self, name: str) -> None:
        """Fetch an experiment from the remote, without its outputs, if the remote has it.

        Raises:
            UserError: the remote cannot be reached, so that the run might happen twice.
        """
        if self._remote and name in self._there() and (reason := dvc("exp", "pull", "--no-cache", self._remote, name)):
            raise UserError(f"{name}: is in {self._remote} and cannot be fetched: {reason}")

    def push(self, name: str) -> None:
        """Push an experiment and its outputs to the remotes. A failure is a warning: `exchange` tries again."""
        if self._remote and (reason := dvc("exp", "push", self._remote, name)):
            print(f"warning: {name} is not pushed yet: {reason}", file=sys.stderr, flush=True)

    def exchange(self, study: str) -> str:
        """Push the search's experiments that the remote lacks, and fetch those that are not here; return why it failed.

        The outputs of fetched experiments stay in the DVC remote: `dvc exp pull` gets them.

        Raises:
            UserError: the remote cannot be reached.
        """
        if self._remote is None:
            return ""
        here = {
            ref.removeprefix(self._folder) for ref in git("for-each-ref", "--format=%(refname)", self._folder).split()
        }
        there = self._there()
        mine = [name for name in sorted(here - there) if name.startswith(f"{study}-")]
        theirs = [name for name in sorted(there - here) if name.startswith(f"{study}-")]
        reason = dvc("exp", "pull", "--no-cache", self._remote, *theirs) if theirs else ""
        return reason or (dvc("exp", "push", self._remote, *mine) if mine else "")

    def _there(self) -> set[str]:
        lines = git("ls-remote", str(self._remote), f"{self._folder}*").splitlines()
        return {line.split("\t")[1].removeprefix(self._folder) for line in lines}


def run(name: str, overrides: list[str], on_point: OnPoint) -> bool:
    """Run an experiment in its own folder; pass each point of its held-out loss to `on_point` while it trains.

    A run that was stopped before it was done resumes from its state in .state/.

    Returns:
        True: the run is done. False: `on_point` has stopped it.

    Raises:
        RunError: the run has failed.
        UserError: a signal has stopped the run.
    """
    _remove_folders(name)  # left by a run that was killed
    RUN_LOGS.mkdir(parents=True, exist_ok=True)
    log = RUN_LOGS / f"{name}.log"
    changes = [word for override in overrides for word in ("-S", override)]
    with log.open("wb") as out:
        # in its own process group, so that signals reach the stage, too; the run dies with this process
        process = subprocess.Popen(
            ["dvc", "exp", "run", "--temp", "--name", name, *changes],
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # the log is read while it is written
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            stopped = _watch(process, name, log, on_point)
        finally:
            _stop(process)
    if stopped or process.returncode:
        _remove_folders(name)
    if not stopped and process.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        if process.returncode < 0 or "stopped by SIG" in text:
            raise UserError(f"{name}: was stopped by a signal; run the same command to resume")
        raise RunError(f"{reason_in(text)} ({log})")
    return not stopped


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _watch(process: "subprocess.Popen[bytes]", name: str, log: Path, on_point: OnPoint) -> bool:
    """Wait for the end of a run; return whether `on_point` wants it stopped."""
    seen = -1
    while True:
        try:
            process.wait(POLL)
        except subprocess.TimeoutExpired:
            pass
        else:
            return False
        # until DVC has begun the stage, the file is the commit's
        for step, loss in points(name) if TRAINING in log.read_bytes() else []:
            if step > seen:
                seen = step
                if on_point(step, loss):
                    return True


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask a run to stop, if it has not ended, and wait until its stage has saved its state."""
    deadline = time.monotonic() + PATIENCE
    asked = False
    while True:
        process.poll()
        try:
            os.killpg(process.pid, 0 if asked else signal.SIGTERM)
        except (ProcessLookupError, PermissionError):
            return
        asked = True
        if time.monotonic() > deadline:
            return os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.1)


def folders_of(name: str) -> list[Path]:
    """The folder that DVC runs an experiment in; an empty list before and after the run."""
    found = []
    for file in Path(".dvc/tmp/exps/run").glob("*/*.run"):
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # DVC is writing the file
            continue
        folder = Path(str(info.get("root_dir")))
        if info.get("name") == name and folder.is_dir():
            found.append(folder)
    return found


def _remove_folders(name: str) -> None:
    """Delete the folder of a run that DVC had no time to delete."""
    for folder in folders_of(name):
        shutil.rmtree(folder, ignore_errors=True)


def points(name: str) -> list[tuple[int, float]]:
    """The curve of held-out losses of a run so far: steps and losses; empty where there is none."""
    try:
        text = "".join((folder / CURVE).read_text(encoding="utf-8") for folder in folders_of(name)[:1])
    except OSError:
        return []
    rows = (line.split("\t") for line in text.split("\n")[1:-1])  # the last line may not be whole
    return [(int(step), float(loss)) for step, loss in rows if math.isfinite(float(loss))]


def reason_in(text: str) -> str:
    """Why a command failed, in one line: the first error of a stage, or else the last line that was printed."""
    lines = [line.strip() for chunk in text.splitlines() for line in chunk.split("\r") if line.strip()]
    faults = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    faults += [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (faults or lines[-1:] or ["the command printed nothing"])[0]
