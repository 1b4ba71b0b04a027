"""The runs of a search: why a run failed, how far it is, and what an exchange needs."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from ddpm.errors import UserError
from tests.conftest import ROOT, composed
from tools.common.runs import CURVE, Experiments, points, reason_in


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: 1/9\rtrain: 2/9\nerror: it diverged\nERROR: failed to reproduce 'train'\n", "it diverged"),
        ("ERROR: failed to reproduce 'train': exited with -9\nmore\n", "failed to reproduce 'train': exited with -9"),
        ("one\n\ntwo\n", "two"),
        ("", "the command printed nothing"),
    ],
)
def test_the_reason_is_the_stages_own_error_if_there_is_one(text, reason):
    assert reason_in(text) == reason


def test_a_curve_is_read_while_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert points("s-0-s0") == []
    info = Path(".dvc/tmp/exps/run/abc/abc.run")
    info.parent.mkdir(parents=True)
    info.write_text('{"name": ')  # DVC is writing it
    assert points("s-0-s0") == []
    info.write_text(json.dumps({"name": "s-0-s0", "root_dir": str(tmp_path / "run")}))
    assert points("s-0-s0") == []
    (tmp_path / "run" / CURVE).parent.mkdir(parents=True)
    (tmp_path / "run" / CURVE).write_text("step\theld_out_loss\n10\t0.5\n20\tnan\n30\t0.25\n40\t0.")
    assert points("s-0-s0") == [(10, 0.5), (30, 0.25)]
    assert points("s-0-s1") == []


def test_a_search_reads_the_curve_that_the_stage_train_writes(tmp_path, monkeypatch):
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]["plots"]
    assert str(CURVE) in [name for plot in plots if isinstance(plot, dict) for name in plot]
    monkeypatch.chdir(tmp_path)
    Path(".dvc/tmp/exps/run/a").mkdir(parents=True)
    Path(".dvc/tmp/exps/run/a/a.run").write_text(json.dumps({"name": "s-0-s0", "root_dir": str(ROOT)}))
    found = points("s-0-s0")  # the committed one
    steps, losses = zip(*found, strict=True)
    assert len(found) == len((ROOT / CURVE).read_text().splitlines()) - 1 > 5
    assert list(steps) == sorted(set(steps)) and steps[-1] == composed()["train"]["steps"]
    assert losses[-1] == json.loads((ROOT / "results/train/metrics.json").read_text())["held_out_loss"] < losses[0]


@pytest.mark.process
def test_an_exchange_without_its_remotes_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="git rev-parse: "):
        Experiments(None)
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], [*author, "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", *arguments], check=True)
    Experiments(None)
    with pytest.raises(UserError, match="remote = origin: is not a remote of this clone: git remote add origin <"):
        Experiments("origin")
    subprocess.run(["git", "remote", "add", "origin", "/nowhere"], check=True)
    with pytest.raises(UserError, match="the outputs need a DVC remote, too: dvc remote add"):
        Experiments("origin")
