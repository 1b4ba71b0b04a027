"""Search the space of conf/search/<name>.yaml by Optuna; its trials are experiments: python -m tools.search [name]

Each trial runs with every seed of the search. The same command resumes a stopped search. Several workers, each in its
own clone, share a search through its storage. `--adopt <worker>` takes over the trials of a worker that will not come
back.
"""

import argparse
import fcntl
import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState
from rich import box
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from ddpm.errors import UserError
from ddpm.runtime import signals
from tools.common.experiments import METRICS, shown
from tools.common.runs import Experiments, RunError, origin, run
from tools.common.searches import Search, composed, read_search
from tools.common.statistics import number
from tools.common.study import REASON, VALUES, WORKER, Study, open_storage
from tools.common.tables import print_whole

FOLDER = Path(".search")
MOST_FAILURES = 3  # in a row: then the settings are not the cause


@contextmanager
def this_worker() -> Iterator[str]:
    """The name of this clone's worker, the same after a restart; a copy of the clone elsewhere has another.

    Raises:
        UserError: a search runs in this clone already.
    """
    FOLDER.mkdir(exist_ok=True)
    here = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:8]
    with (FOLDER / f"worker-{here}").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("a search runs in this clone already; a second worker needs its own clone") from None
        file.seek(0)
        name = file.read()
        if not name:
            name = f"{socket.gethostname()}-{os.urandom(4).hex()}"
            file.write(name)
            file.flush()
        yield name


class HopelessError(Exception):
    """A trial that was stopped early; the message says why."""


class Worker:
    """A worker on a study, in its own clone."""

    def __init__(self, search: Search, study: Study, experiments: Experiments) -> None:
        self.search, self.study, self.experiments = search, study, experiments
        self.failures = 0

    def work(self) -> None:
        """Finish the trials that were begun here, then take new ones until the budget is spent.

        Raises:
            UserError: three trials in a row have failed.
        """
        for trial in self.study.unfinished():
            print(f"trial {trial.number}: resumed")
            self.do(trial, resumed=True)
        while new := self.study.next():
            self.do(new, resumed=False)
            if self.failures >= MOST_FAILURES:
                raise UserError(f"{MOST_FAILURES} trials in a row have failed here; this worker stops")

    def do(self, trial: Trial, resumed: bool) -> None:
        """Run a trial with each seed, and record its outcome."""
        params = self.study.suggest(trial)
        print(
            f"trial {trial.number}: {', '.join(f'{name}={shown(name, v)}' for name, v in params.items())}", flush=True
        )
        values = []
        try:
            for place, seed in enumerate(self.search.seeds):
                values.append(self.value(trial, params, seed, first=place == 0, resumed=resumed))
        except RunError as fault:
            self.failures += 1
            self.study.fail(trial, str(fault))
            print(f"trial {trial.number}: failed: {fault}", flush=True)
        except HopelessError as reason:
            self.failures = 0
            self.study.prune(trial, str(reason))
            print(f"trial {trial.number}: stopped early: {reason}", flush=True)
        else:
            self.failures = 0
            self.study.finish(trial, values)
            print(f"trial {trial.number}: {self.search.metric} {number(values)}", flush=True)

    def value(self, trial: Trial, params: dict[str, Any], seed: int, *, first: bool, resumed: bool) -> float:
        """The metric of one run of a trial; the run happens only if its experiment exists nowhere yet.

        Raises:
            RunError: the run has failed, or its metric is not a number.
            HopelessError: it was stopped early; only the first seed's run is compared with other trials.
        """
        name, overrides = f"{self.search.study}-{trial.number}-s{seed}", self.search.run_overrides(params, seed)
        expected = composed(overrides)
        if resumed:
            self.experiments.fetch(name)
        metrics = self.experiments.metrics(name, expected)
        if metrics is None:
            reported = dict(self.study.points(trial))

            def hopeless(step: int, loss: float) -> bool:
                if not first or step in reported:
                    return False
                reported[step] = loss
                trial.report(loss, step)
                return trial.should_prune()

            if not run(name, overrides, hopeless):
                step = max(reported)
                raise HopelessError(f"held-out loss {reported[step]:.4g} at step {step}")
            metrics = self.experiments.metrics(name, expected) or {}
            self.experiments.push(name)
        value = metrics.get(self.search.metric)
        if not isinstance(value, int | float):
            raise RunError(f"{name} has no {self.search.metric}")
        return float(value)


def state_of(trial: FrozenTrial, worker: str) -> str:
    """The outcome of a trial, and the reason."""
    if trial.state == TrialState.RUNNING:
        where = trial.user_attrs.get(WORKER, "")
        return "unfinished" if where == worker else f"running in {where}"
    reason = trial.user_attrs.get(REASON, "")
    word = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}[trial.state]
    return f"{word}: {reason}" if reason else word


def table(study: Study, narrow: bool) -> Table:
    """All trials, best first."""
    search = study.search
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("trial", *(name.replace(".", ".\n", 1) for name in search.space)):
        made.add_column(heading, overflow="fold")
    made.add_column(METRICS[search.metric].heading, justify="right", no_wrap=True)
    made.add_column("", overflow="fold", max_width=40 if narrow else None)
    sign = METRICS[search.metric].sign
    for trial in sorted(
        study.trials(), key=lambda t: (t.state != TrialState.COMPLETE, sign * (t.value or 0), t.number)
    ):
        params = [shown(name, trial.params.get(name)) for name in search.space]
        cells = [str(trial.number), *params, number(trial.user_attrs.get(VALUES, [])), state_of(trial, study.worker)]
        made.add_row(*cells, style="red" if trial.state == TrialState.FAIL else None)
    return made


def search_with(asked: argparse.Namespace, worker: str) -> None:
    """Search until the budget is spent, then print the trials.

    Raises:
        UserError: the storage, the remote or a setting needs a fix by the user.
    """
    search = read_search(asked.search)
    experiments = Experiments(search.remote)
    address = search.storage or os.environ.get("OPTUNA_STORAGE") or str(FOLDER / "journal.log")
    study = Study(search, open_storage(address), worker, origin())
    print(f"study {search.study}, worker {worker}", flush=True)
    if asked.adopt:
        print(f"{study.adopt(asked.adopt)} trials of {asked.adopt} are now this worker's")
    experiments.exchange(search.study)
    Worker(search, study, experiments).work()
    reason = experiments.exchange(search.study)
    print_whole(lambda narrow: table(study, narrow))
    print("The runs are experiments: make exps lists them, and which settings cannot be distinguished from the best.")
    if reason:
        raise UserError(f"not all experiments are exchanged: {reason}; run the same command again")


def main() -> None:
    """Search, or print in one line why that is impossible."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", nargs="?", default="default")
    parser.add_argument("--adopt", metavar="WORKER", default="")
    asked = parser.parse_args()
    signals.raise_on_signals()
    try:
        with this_worker() as worker:
            search_with(asked, worker)
    except signals.Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except UserError as fault:
        sys.exit("\n".join(f"error: {line}" for line in str(fault).splitlines()))
    except SQLAlchemyError as error:
        sys.exit(f"error: storage: {' '.join(str(error).split())[:200]}; run the same command to resume")


if __name__ == "__main__":
    main()
