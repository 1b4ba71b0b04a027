"""Kill the pipeline at random moments, resume it, and compare the end with the bytes of an undisturbed run.

    python -m tests.robustness.kills --seed 1 --kills 100

Each round starts from nothing in a scratch clone, is killed a few times and run again until it is done. What is
killed is drawn from the seed: the stage, dvc or its whole process group; by SIGKILL, SIGTERM or SIGINT; under
`dvc repro`, `dvc exp run`, `dvc exp run --temp` or a queue worker; at once run again, or after the dust has settled.
Needs /proc, so Linux only.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.robustness.scratch import clone, environment, run

STAGES = ("prepare_data", "train", "sample", "evaluate")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
TARGETS = ("stage", "dvc", "group")
COMMANDS = {
    "repro": ["dvc", "repro"],
    "exp run": ["dvc", "exp", "run"],
    "exp run --temp": ["dvc", "exp", "run", "--temp"],
    "queue": ["dvc", "exp", "run", "--queue"],
}
# the smoke preset, small where it is slow and with many states to be killed between
OVERRIDES = (
    "+experiment=smoke",
    "train.steps=60",
    "train.save_every_seconds=0.3",
    "train.preview_every_epochs=1",
    "diffusion.timesteps=100",
    "sample.steps=5",
)
Aim = tuple[str, str, str | None]  # target, signal, and the stage to wait for
CHECKED = ("dvc.lock", "params.yaml", "results")
GRACE = 15.0  # seconds in which a process that has lost its parent, or was signalled, has to end
PATIENCE = 300.0  # seconds for any one command


class BrokenPromise(Exception):  # noqa: N818
    """A promise that was not kept."""


@dataclass
class Tally:
    """The counts for the table at the end."""

    kills: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # command, target, signal
    during: Counter[str] = field(default_factory=Counter)  # the stage that was running
    rounds: Counter[str] = field(default_factory=Counter)
    resumed: int = 0  # trainings that resumed from a state
    detached: int = 0  # times that dvc left the branch of the checkout
    longest: float = 0.0  # seconds that a victim outlived its kill

    def table(self) -> str:
        lines = [f"{'':16}" + "".join(f"{target + ' ' + name[3:]:>12}" for target in TARGETS for name in SIGNALS)]
        for command in COMMANDS:
            row = [self.kills[command, target, name] for target in TARGETS for name in SIGNALS]
            lines.append(f"{command:16}" + "".join(f"{count:>12}" for count in row))
        during = ", ".join(f"{name} {self.during[name]}" for name in (*STAGES, "between"))
        return "\n".join(
            [
                *lines,
                f"{sum(self.kills.values())} kills ({during}) in {sum(self.rounds.values())} rounds; "
                f"{self.resumed} trainings resumed from a state; nothing outlived its kill by more than "
                f"{self.longest:.1f} s; HEAD was left detached {self.detached} times",
            ]
        )


class Ground:
    """The scratch clone, every process that was started in it, and the result that all rounds have to end in."""

    def __init__(self, folder: Path, draw: random.Random, overrides: tuple[str, ...], duration: float) -> None:
        """`folder`: a clone whose last commit holds the result of `dvc exp run`, which took `duration` seconds."""
        self.folder, self.draw, self.duration, self.tally = folder, draw, duration, Tally()
        self.mark = uuid.uuid4().hex
        self.env = environment(folder, KILLS_MARK=self.mark)
        self.log = Path(f"{folder}.log")
        self.overrides = [part for setting in overrides for part in ("-S", setting)]
        self.git("config", "advice.detachedHead", "false")
        self.git("tag", "reference")
        self.git("checkout", "-q", "HEAD~", "--", "dvc.lock", "results")
        self.git("commit", "-qm", "start")
        self.git("tag", "start")

    def git(self, *arguments: str) -> str:
        return run(self.folder, self.env, "git", *arguments).strip()

    def dvc(self, *arguments: str) -> str:
        return run(self.folder, self.env, "dvc", *arguments)

    # The processes

    def processes(self) -> list[psutil.Process]:
        """Every process that was started in the clone and still runs, whatever its name and parent."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("KILLS_MARK") == self.mark and lives(process):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def stage(self) -> tuple[psutil.Process, str] | None:
        """The running stage and its name; the youngest, where another is still ending."""
        stages = [(process, name) for process in self.processes() if (name := stage_name(process))]
        return max(stages, key=lambda pair: pair[0].create_time(), default=None)

    # One round

    def reset(self) -> None:
        """Reset the clone: no outputs, no cache, but keep what earlier kills left in .dvc/tmp, .git and .state."""
        self.git("symbolic-ref", "HEAD", "refs/heads/main")
        self.git("reset", "-q", "--hard", "start")
        self.git("clean", "-fdqx", *(part for kept in ("/.dvc", "/.state", "/wandb") for part in ("-e", kept)))
        shutil.rmtree(self.folder / ".dvc/cache", ignore_errors=True)

    def round(self, names: list[str], aims: list[Aim | None]) -> None:
        """Do one run, killed under each of the commands but the last, which completes it; then check it."""
        self.reset()
        self.env["WANDB_MODE"] = self.draw.choice(["disabled", "disabled", "offline"])
        self.log.write_bytes(b"")
        before = self.experiments()
        for name, aim in zip(names[:-1], aims, strict=True):
            if self.attempt(name, before, kill=True, aim=aim):
                break  # the command ended before the moment of the kill
        else:
            name = names[-1]
            if not self.attempt(name, before, kill=False):
                raise BrokenPromise("a run that was not killed has failed")
        self.check(name, before)
        self.tally.rounds[name] += 1

    def attempt(self, name: str, before: set[str], kill: bool, aim: Aim | None = None) -> bool:
        """Start the command, perhaps kill it, wait for its end; return whether the run is complete."""
        command = [*COMMANDS[name], *(self.overrides if name != "repro" else [])]
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            started = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
            if name == "queue":
                if started.wait(PATIENCE):
                    raise BrokenPromise("the experiment could not be queued")
                # (not into a pipe: the worker keeps its other end open until all is done)
                worker = ["dvc", "queue", "start", "-j", "1"]
                subprocess.run(worker, cwd=self.folder, env=self.env, stdout=log, stderr=log, check=True)
                self.await_worker()
            if kill:
                self.kill(name, started, aim)
            if name == "queue":
                return self.queue_done(before)
            try:
                return started.wait(PATIENCE) == 0
            except subprocess.TimeoutExpired:
                raise BrokenPromise(f"{' '.join(command)} did not end") from None

    def append(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(text)

    def kill(self, name: str, started: subprocess.Popen[bytes], aim: Aim | None) -> None:
        """Draw target and signal, wait for the moment, kill, and check that every victim ends."""
        if aim is None:
            target, how = self.draw.choice(TARGETS), self.draw.choice(SIGNALS)
            aim = target, how, self.draw.choice(STAGES) if target == "stage" else None
        target, how, wanted = aim
        begin, share = time.monotonic(), self.draw.random()
        deadline = begin + (PATIENCE if wanted else share * self.duration)

        def running() -> bool:
            return self.queue_runs() if name == "queue" else started.poll() is None

        while time.monotonic() < deadline and running():
            time.sleep(0.02)
            if wanted and (now := self.stage()) and STAGES.index(now[1]) >= STAGES.index(wanted):
                time.sleep(share * self.duration / len(STAGES))
                break
        if not running():
            return  # the command ended before the moment of the kill
        present = self.stage()
        if target == "stage":
            if present is None:
                return
            victims, group = [present[0]], None
        else:
            leader = self.queue_dvc() if name == "queue" else psutil.Process(started.pid)
            if leader is None:
                return
            victims = [leader, *([present[0]] if present and how != "SIGINT" else [])]
            group = os.getpgid(leader.pid) if target == "group" else None
            if group:
                victims = [process for process in self.processes() if os.getpgid(process.pid) == group]
        during = present[1] if present else "between"
        try:
            number = signal.Signals[how]
            if group:
                os.killpg(group, number)
            else:
                victims[0].send_signal(number)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return
        self.tally.kills[name, target, how] += 1
        self.tally.during[during] += 1
        count = sum(self.tally.kills.values())
        self.append(f"\n--- {how} to the {target} of {name} during {during}\n")
        print(f"{count:4} {name:15} {how:8} {target:6} during {during}", flush=True)
        if target != "stage" and (name == "queue" if how == "SIGTERM" else how == "SIGINT" and target == "dvc"):
            return  # by design, dvc lets the stage end, and the worker its task
        started_at = time.monotonic()
        if self.draw.random() < 0.5 and name != "queue":
            return  # run again at once; lingering processes are found at the end of the round
        # (not psutil's own waiting, which would take the exit code of dvc away from its Popen)
        while (alive := [p for p in victims if lives(p)]) and time.monotonic() < started_at + GRACE:
            time.sleep(0.02)
        self.tally.longest = max(self.tally.longest, time.monotonic() - started_at)
        if alive:
            raise BrokenPromise(f"outlived {how} by {GRACE:.0f} s: {[described(process) for process in alive]}")

    # The queue

    def queue_dvc(self) -> psutil.Process | None:
        """The process that runs the experiment, or its worker: either is dvc."""
        found = [p for p in self.processes() if {"exec-run", "queue-worker"} & set(command_line(p))]
        return self.draw.choice(sorted(found, key=lambda p: p.pid)) if found else None

    def queue_runs(self) -> bool:
        return any("exec-run" in command_line(p) for p in self.processes())

    def await_worker(self) -> None:
        """Wait until the worker, which starts in the background, has begun the experiment."""
        deadline = time.monotonic() + PATIENCE
        while not self.queue_runs():
            if time.monotonic() > deadline:
                raise BrokenPromise(f"no worker began:\n{self.dvc('queue', 'status')}")
            time.sleep(0.05)

    def queue_done(self, before: set[str]) -> bool:
        """Wait until no process is at work; return whether an experiment was made."""
        deadline, quiet = time.monotonic() + PATIENCE, 0
        while time.monotonic() < deadline:
            if self.experiments() - before:
                return True
            quiet = 0 if self.queue_runs() else quiet + 1
            if quiet > 10:  # longer than a worker takes to collect the outputs
                return False
            time.sleep(0.5)
        raise BrokenPromise(f"the queue did not end:\n{self.dvc('queue', 'status')}")

    def experiments(self) -> set[str]:
        """The commits of the experiments that are complete."""
        refs = self.git("for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").splitlines()
        hidden = ("refs/exps/exec/", "refs/exps/stash", "refs/exps/celery/", "refs/exps/temp")
        return {line.split()[1] for line in refs if not line.startswith(hidden)}

    # The promise

    def check(self, name: str, before: set[str]) -> None:
        """Check that the bytes are the reference's, no process is left, and the next command works.

        Raises:
            BrokenPromise: one of these does not hold.
        """
        log = self.log.read_text(errors="replace")
        self.tally.resumed += log.count("resuming at step")
        for sign in ("Traceback", "unexpected error"):
            if sign in log:
                raise BrokenPromise(f"{sign} in the output")
        if name in ("repro", "exp run"):
            if subprocess.run(["git", "symbolic-ref", "-q", "HEAD"], cwd=self.folder, capture_output=True).returncode:
                self.tally.detached += 1
                self.git("switch", "-q", "main")  # keeps the changes: it is the same commit
            self.same("reference")
            if unknown := self.git("ls-files", "--others", "--exclude-standard"):
                raise BrokenPromise(f"left behind: {unknown}")
            if run(self.folder, self.env, "dvc", "status", "-q", check=False):
                raise BrokenPromise("dvc status is not clean")
        else:
            new = self.experiments() - before
            if not new:
                raise BrokenPromise("no experiment was made")
            for commit in new:
                self.same("reference", commit)
        if left := self.leftovers():
            raise BrokenPromise(f"still running: {[described(process) for process in left]}")
        if states := list((self.folder / ".state").glob("*")):
            raise BrokenPromise(f"states outlived the run: {states}")

    def same(self, *commits: str) -> None:
        if difference := self.git("diff", "--stat", *commits, "--", *CHECKED):
            raise BrokenPromise(f"other bytes than those of an untouched run:\n{difference}")

    def leftovers(self) -> list[psutil.Process]:
        """The processes left some seconds after the end, except the worker of a queue, which waits for more."""
        deadline = time.monotonic() + GRACE
        while left := [p for p in self.processes() if not {"queue-worker", "start"} & set(command_line(p))]:
            if time.monotonic() > deadline:
                return left
            time.sleep(0.2)
        return []

    def close(self) -> None:
        """End the processes that this script has started, by their mark."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):  # ended by itself, or with its parent
                process.kill()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def stage_name(process: psutil.Process) -> str | None:
    """The stage that a process is; None for anything else, the helpers of a stage among them."""
    words = command_line(process)
    if "-m" not in words or not words[-1].startswith("stages."):
        return None
    try:
        if any(word.startswith("stages.") for word in command_line(psutil.Process(process.ppid()))):
            return None
    except psutil.Error:
        return None
    return words[-1].removeprefix("stages.")


def described(process: psutil.Process) -> str:
    return f"{process.pid} {' '.join(command_line(process))}"


def run_kills(ground: Ground, kills: int, commands: list[str]) -> None:
    """Do rounds with the commands in turn until so many kills are done."""
    turn = 0
    while (done := sum(ground.tally.kills.values())) < kills:
        times = min(ground.draw.randint(1, 4), kills - done)
        ground.round([commands[turn % len(commands)]] * (times + 1), [None] * times)
        turn += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of targets and moments; the machine's timing still varies")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("error: needs Linux's /proc")
    folder = Path(tempfile.mkdtemp(prefix="kills-")) / "clone"
    print(f"in {folder}: first an undisturbed run", flush=True)
    clone(folder)
    start, env = time.monotonic(), environment(folder)
    run(folder, env, "dvc", "exp", "run", *(part for setting in OVERRIDES for part in ("-S", setting)))
    duration = time.monotonic() - start
    print(f"it took {duration:.0f} s", flush=True)
    run(folder, env, "git", "commit", "-qam", "reference")
    ground = Ground(folder, random.Random(arguments.seed), OVERRIDES, duration)
    try:
        run_kills(ground, arguments.kills, arguments.commands)
    except BrokenPromise as fault:
        print(ground.tally.table())
        sys.exit(f"error: {fault}\nthe log is {ground.log}")
    finally:
        ground.close()
    print(ground.tally.table())
    print("every round ended in the bytes of the untouched run")
    shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
