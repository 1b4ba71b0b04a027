"""Searches with the real dvc: one clone that is stopped, and three clones as three machines."""

import os
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

from tests.pipeline.servers import postgresql
from tests.support.clones import Clone, git_clone, make_clone
from tests.support.search import SEARCH
from tools.common.runs import origin
from tools.common.searches import Search
from tools.common.study import Study, open_storage

RUN = [
    "+experiment=smoke", "runtime.threads=1", "diffusion.timesteps=20", "train.steps=40", "train.warmup_steps=0",
    "train.log_every_steps=4", "train.preview_every_epochs=0", "train.save_every_seconds=0.5", "sample.count=16",
    "sample.batch_size=16", "sample.steps=2", "evaluate.bound_images=0", "evaluate.loss_images=8",
]  # fmt: skip
SMALL = SEARCH | {"overrides": RUN, "space": {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}}


def ask(clone: Clone, **changes: object) -> None:
    (clone.folder / "conf/search/default.yaml").write_text(yaml.safe_dump(SMALL | changes))


def watched(clone: Clone, log: Path) -> None:
    """Make the clone log each run of an experiment that begins."""
    programs = log.parent / "bin"
    programs.mkdir(exist_ok=True)
    real = shutil.which("dvc", path=clone.env["PATH"])
    (programs / "dvc").write_text(f'#!/bin/sh\n[ "$1 $2" = "exp run" ] && echo "$5" >> "{log}"\nexec "{real}" "$@"\n')
    (programs / "dvc").chmod(0o755)
    clone.env["PATH"] = f"{programs}:{clone.env['PATH']}"


def start(clone: Clone) -> subprocess.Popen:
    out = (clone.folder.parent / f"{clone.folder.name}.log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "tools.search"], cwd=clone.folder, env=clone.env, stdout=out, stderr=out
    )


def experiments(folder: Path) -> list[str]:
    command = ["git", "-C", str(folder), "for-each-ref", "--format=%(refname)", "refs/exps"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(ref.rsplit("/", 1)[1] for ref in done.stdout.split() if not ref.startswith("refs/exps/exec"))


def names(trials: int) -> list[str]:
    return sorted(f"s-{trial}-s{seed}" for trial in range(trials) for seed in (0, 1))


def until_training(clone: Clone, worker: subprocess.Popen) -> None:
    """Wait until a training of this worker has saved a state, from which its next start resumes."""
    while not any((clone.folder / ".state").glob("train-*/*")):
        assert worker.poll() is None, (clone.folder.parent / f"{clone.folder.name}.log").read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_search_resumes_and_its_runs_are_experiments(tmp_path):
    clone, log = make_clone(tmp_path / "clone"), tmp_path / "runs"
    watched(clone, log)
    ask(clone, trials=1)
    search = start(clone)
    until_training(clone, search)
    search.send_signal(signal.SIGTERM)
    assert search.wait() == 128 + signal.SIGTERM
    assert start(clone).wait() == 0
    assert "trial 0: resumed" in (tmp_path / "clone.log").read_text()
    assert Counter(log.read_text().split()) == {"s-0-s0": 2, "s-0-s1": 1}
    assert clone.run("git", "status", "--porcelain").stdout == " M conf/search/default.yaml\n"
    assert re.search(r"s-0-s\d \+1 .* 2 +\d+\.\d+ ± ", clone.run("python", "-m", "tools.exps").stdout)


@pytest.mark.slow
def test_hopeless_and_diverged_trials_end_early_with_a_reason(tmp_path, monkeypatch):
    clone = make_clone(tmp_path / "clone")
    rates = [1e-3, 2e-3, 1e-6, 1e30]
    changes = {"space": {"optimizer.lr": {"choices": rates}}, "trials": 4, "prune_after": 2, "prune_from": 0.0}
    changes["overrides"] = [*RUN, "optimizer=sgd", "train.grad_clip=null", "train.held_out_every_epochs=1"]
    ask(clone, **changes)
    monkeypatch.chdir(clone.folder)
    study = Study(Search.model_validate(SMALL | changes), open_storage(".search/journal.log"), "other", origin())
    distributions = {"optimizer.lr": optuna.distributions.CategoricalDistribution(list(map(str, rates)))}
    for rate in ("0.001", "0.002"):  # two good trials
        study.study.add_trial(
            optuna.trial.create_trial(
                value=0.0,
                params={"optimizer.lr": rate},
                distributions=distributions,
                intermediate_values={4: 0.7, 40: 0.7},
            )
        )
    assert start(clone).wait() == 0
    printed = (tmp_path / "clone.log").read_text()
    assert ": stopped early: held-out loss " in printed and ": failed: training diverged: " in printed
    assert experiments(clone.folder) == [] and not list((clone.folder / ".dvc/tmp/exps/standalone").glob("tmp*"))


@pytest.mark.remote
def test_three_machines_share_a_search_through_their_remotes(tmp_path):
    """Three clones, one bare git remote, one DVC remote, PostgreSQL; a worker is killed in a training and restarted."""
    trials, log = 4, tmp_path / "runs"
    origin = make_clone(tmp_path / "origin")
    origin.dvc("remote", "add", "--default", "storage", str(tmp_path / "storage"))
    ask(origin, remote="origin", trials=trials)
    origin.run("git", "commit", "-qam", "A search")
    origin.run("git", "clone", "-q", "--bare", ".", "../hosted.git")
    clones = [git_clone(tmp_path / "hosted.git", tmp_path / name) for name in ("one", "two", "three")]
    with postgresql() as url:
        for clone in clones:
            watched(clone, log)
            clone.env["OPTUNA_STORAGE"] = url
            clone.env["DVC_SITE_CACHE_DIR"] = str(tmp_path / f"site-{clone.folder.name}")
        workers = [start(clone) for clone in clones]
        until_training(clones[0], workers[0])
        os.kill(workers[0].pid, signal.SIGKILL)
        workers[0].wait()
        time.sleep(1)
        workers[0] = start(clones[0])
        printed = {clone.folder.name: tmp_path / f"{clone.folder.name}.log" for clone in clones}
        assert [worker.wait() for worker in workers] == [0, 0, 0], [path.read_text() for path in printed.values()]
        for clone in clones:  # nothing is left to run: each gets what the others pushed after it had ended
            clone.run("python", "-m", "tools.search")
    assert ": resumed" in printed["one"].read_text()
    # nothing is lost
    for folder in (tmp_path / "hosted.git", *(clone.folder for clone in clones)):
        assert experiments(folder) == names(trials)
    # nothing is run twice: each run began once, except the one that was killed
    begun = Counter(log.read_text().split())
    assert sorted(begun) == names(trials) and sorted(begun.values()) == [1] * (2 * trials - 1) + [2]
    # the outputs of any run are in the DVC remote, and its numbers in every clone
    reader = git_clone(tmp_path / "hosted.git", tmp_path / "reader")
    reader.dvc("exp", "pull", "origin", "s-0-s1")
    reader.dvc("exp", "apply", "s-0-s1")
    assert (reader.folder / "samples/images.npy").exists() and (reader.folder / "models/ddpm/model_index.json").exists()
    assert clones[2].run("python", "-m", "tools.exps").stdout.count(" +1 ") == trials
