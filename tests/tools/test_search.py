"""A search: refusals, the sharing of work, and kills. A run takes a fraction of a second here."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
import yaml

from tests.conftest import ROOT
from tests.support.search import SEARCH
from tools.common.searches import Search
from tools.common.study import Study, open_storage


class Clone:
    """A repository in which a search can run, with the stand-in for dvc."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder.parent / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "dvc").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/tools/fake_dvc.py" "$@"\n')
        (programs / "dvc").chmod(0o755)
        author = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.runs = folder.parent / "runs"
        self.runs.touch()
        self.env = {**os.environ, **author, "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.env |= {"PYTHONPATH": str(ROOT), "RUNS": str(self.runs), "PACE": "0.1"}

    def make(self) -> "Clone":
        shutil.copytree(ROOT / "conf", self.folder / "conf")
        (self.folder / ".gitignore").write_text("/.search/\n/.dvc/\n")
        self.git("init", "-q", "-b", "main")
        self.ask()
        self.git("add", "-A")
        self.git("commit", "-qm", "all")
        return self

    def git(self, *arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=self.folder, env=self.env, capture_output=True, text=True, check=True
        ).stdout

    def ask(self, **changes: object) -> None:
        (self.folder / "conf/search/default.yaml").write_text(yaml.safe_dump(SEARCH | changes))

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "tools.search", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def search(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def experiments(self) -> list[str]:
        return sorted(
            ref.rsplit("/", 1)[1] for ref in self.git("for-each-ref", "--format=%(refname)", "refs/exps").split()
        )

    def log(self, word: str) -> Counter:
        return Counter(line.split()[1] for line in self.runs.read_text().splitlines() if line.startswith(word))


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "a").make()


def names(trials: int, seeds: int = 2) -> list[str]:
    return sorted(f"s-{trial}-s{seed}" for trial in range(trials) for seed in range(seeds))


@pytest.mark.process
def test_a_search_runs_its_budget_with_every_seed_and_stops(clone):
    code, out, err = clone.search()
    assert code == 0, err
    assert clone.experiments() == names(2) and clone.log("begin") == Counter(names(2))
    assert out.count(" ± ") == 4 and "make exps" in out
    assert clone.search()[0] == 0
    assert clone.log("begin") == Counter(names(2)), "a finished search has run again"
    clone.ask(trials=3)
    assert clone.search()[0] == 0
    assert clone.log("begin") == Counter(names(3)), "a larger budget did not continue the search"


@pytest.mark.process
def test_the_slurm_tasks_of_the_docs_share_a_search(clone, tmp_path):
    """The script as documented, except for the storage, with Slurm's variables: two tasks at once."""
    (text,) = re.findall(r"```\n(#!/bin/bash\n#SBATCH --array.*?)```", (ROOT / "docs/search.md").read_text(), re.DOTALL)
    home, script = tmp_path / "my home", tmp_path / "array.sh"
    script.write_text(text.replace("postgresql://me@host/searches", f"'{tmp_path}/journal'"))
    assert f"'{tmp_path}/journal'" in script.read_text()
    clone.ask(remote="origin")
    clone.git("commit", "-qam", "A search")
    clone.git("clone", "-q", "--bare", ".", str(home / "ddpm.git"))
    programs = home / "ddpm/.venv/bin"
    programs.mkdir(parents=True)
    (tmp_path / "bin/dvc").rename(programs / "dvc")
    for name, command in (("python", f'"{sys.executable}" "$@"'), ("srun", '"$@"')):
        (programs / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "scratch/search-1.new").mkdir(parents=True)  # left by a task that was killed while it cloned
    own = {"HOME": str(home), "SCRATCH": str(tmp_path / "scratch")}

    def task(number: int) -> subprocess.Popen:
        return subprocess.Popen(["bash", script], env=clone.env | own | {"SLURM_ARRAY_TASK_ID": str(number)})

    tasks = [task(0), task(1)]
    assert [each.wait() for each in tasks] == [0, 0]
    assert clone.log("begin") == Counter(names(2))
    command = ["git", "-C", str(home / "ddpm.git"), "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps"]
    assert sorted(subprocess.check_output(command, text=True).split()) == names(2)


@pytest.mark.process
def test_a_failed_trial_keeps_its_reason_and_nothing_runs_twice(clone):
    clone.ask(space={"optimizer.lr": {"choices": [0.01, 0.001]}}, trials=5)
    code, out, err = clone.search()
    assert code == 0, err
    assert "failed: training diverged: the loss is nan (.dvc/tmp/search/s-" in out
    assert "the space has no other settings" in out
    assert len(clone.experiments()) == 2 and sum(clone.log("begin").values()) == 3


@pytest.mark.process
def test_a_worker_stops_after_three_failures_in_a_row(clone):
    clone.ask(space={"optimizer.lr": {"low": 0.01, "high": 0.02}}, trials=10)
    code, _, err = clone.search()
    assert code == 1 and err == "error: 3 trials in a row have failed here; this worker stops\n"
    assert sum(clone.log("begin").values()) == 3


@pytest.mark.process
def test_a_hopeless_trial_is_stopped_early_by_its_held_out_loss(clone):
    rates = [0.001, 0.0011, 0.0085]
    clone.ask(space={"optimizer.lr": {"choices": rates}}, trials=3, prune_after=2, prune_from=0.5)
    journal = open_storage(str(clone.folder / ".search/journal.log"))
    clone.env["PACE"] = "6"  # a point every 1.2 s
    # two finished trials, which this search has run before
    search = Search.model_validate(SEARCH | {"space": {"optimizer.lr": {"choices": rates}}})
    known = Study(search, journal, "other", clone.git("rev-parse", "HEAD").strip())
    rate = optuna.distributions.CategoricalDistribution(list(map(str, rates)))
    for text in ("0.001", "0.0011"):
        points = dict.fromkeys(range(10, 60, 10), 0.0001)
        made = {"params": {"optimizer.lr": text}, "distributions": {"optimizer.lr": rate}}
        known.study.add_trial(optuna.trial.create_trial(value=0.0, intermediate_values=points, **made))
    code, out, err = clone.search()
    assert code == 0, err
    # not before half of the training; the curve of the commit, which the folder holds at first, does not count
    assert ": stopped early: held-out loss 0.0075 at step 30\n" in out
    (name,) = clone.log("begin")
    assert name.endswith("-s0") and not clone.experiments()
    assert not list((clone.folder / ".dvc/tmp/exps/standalone").glob("*")), "the run's folder is left behind"


@pytest.mark.process
def test_runs_of_another_search_are_not_used_as_results(clone):
    clone.ask(trials=1)
    assert clone.search()[0] == 0
    clone.ask(seeds=[0, 1, 2])
    code, _, err = clone.search()
    assert code == 1 and "was begun with another metric, seeds, overrides or space" in err
    clone.ask(trials=1)
    (clone.folder / "conf/model/small.yaml").write_text((ROOT / "conf/model/small.yaml").read_text() + "# changed\n")
    code, _, err = clone.search()
    assert code == 1 and "was begun with another commit or other code" in err
    shutil.rmtree(clone.folder / ".search")
    code, _, err = clone.search()
    assert code == 1 and "experiment s-0-s0: is another run of that name" in err


@pytest.mark.process
def test_an_unreachable_remote_is_refused_before_anything_runs(clone):
    clone.git("remote", "add", "origin", "/nowhere/at/all")
    clone.ask(remote="origin")
    code, _, err = clone.search()
    assert code == 1 and err.startswith("error: git ls-remote: ") and err.count("\n") == 1
    assert not clone.log("begin")


@pytest.mark.process
def test_a_clone_has_at_most_one_worker(clone):
    clone.env["PACE"] = "5"
    first = clone.start()
    while not clone.log("begin"):
        time.sleep(0.1)
    code, _, err = clone.search()
    first.terminate()
    assert code == 1 and "a search runs in this clone already" in err
    assert first.wait() == 128 + signal.SIGTERM


@pytest.mark.process
@pytest.mark.parametrize(
    "signum", [signal.SIGKILL, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_stopped_search_resumes_and_runs_nothing_twice(clone, signum):
    clone.env["PACE"] = "0.6"
    search = clone.start()
    while sum(clone.log("begin").values()) < 4:  # in the second trial's second seed
        time.sleep(0.05)
    search.send_signal(signum)
    search.communicate()
    time.sleep(0.5)
    begun, ended = clone.log("begin"), clone.log("end")
    code, out, err = clone.search()
    assert code == 0, err
    assert "trial 1: resumed" in out
    assert clone.experiments() == names(2)
    assert clone.log("end") == Counter(names(2))
    again = {name for name, count in clone.log("begin").items() if count > 1}
    assert again == set(begun) - set(ended), "a finished run has run again"


@pytest.mark.process
@pytest.mark.slow
def test_three_workers_share_a_search_despite_random_kills(clone, tmp_path):
    """Each budget place is used once, and each run ends once, however often a worker is killed."""
    hosted = tmp_path / "hosted.git"
    trials, rng = 8, random.Random(0)
    clone.ask(trials=trials, storage=str(tmp_path / "journal"), remote="origin")
    clone.git("commit", "-qam", "many")
    subprocess.run(["git", "clone", "-q", "--bare", clone.folder, hosted], check=True)
    clones = []
    for name in ("b", "c", "d"):
        subprocess.run(["git", "clone", "-q", hosted, tmp_path / name], check=True)
        clones.append(Clone(tmp_path / name))
    workers = [one.start() for one in clones]
    for _ in range(8):
        time.sleep(rng.uniform(1.0, 3.0))
        i = rng.randrange(3)
        workers[i].kill()
        workers[i].communicate()
        workers[i] = clones[i].start()
    ends = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], ends
    for one in clones:
        one.search()  # the last worker may have pushed after the others had fetched
        assert one.experiments() == names(trials)
    assert clone.log("end") == Counter(names(trials))
