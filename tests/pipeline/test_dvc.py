"""A user's commands with the real dvc, in a scratch clone."""

import json
import re

import pytest
import yaml
from dvc.repo import Repo

from tests.conftest import ROOT
from tests.support.clones import SMOKE, wait_for_queue

GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def changed(clone) -> dict[str, set[str]]:
    """The stages with a changed dependency or parameter of their own (not only of a predecessor), and what changed."""
    found = {}
    with Repo(str(clone.folder)) as repo:
        for name, entries in repo.status().items():
            changes = [entry["changed deps"] for entry in entries if "changed deps" in entry]
            found[name.rpartition(":")[2]] = {
                part
                for change in changes
                for path, what in change.items()
                for part in (what if isinstance(what, dict) else [path])  # the sections of params.yaml
            }
    return found


def test_a_run_writes_every_promised_file(smoke):
    for path in (
        "data/prepared/train/images.npy",
        "data/prepared/dataset.json",
        "models/ddpm/model_index.json",
        "models/ddpm/unet/diffusion_pytorch_model.safetensors",
        "results/train/metrics.json",
        "results/train/pictures/inputs.png",
        "results/train/pictures/samples_epoch_00001.png",
        "samples/images.npy",
        "results/sample/grid.png",
        "results/sample/denoising.png",
        "results/sample/film.png",
        "results/evaluate/metrics.json",
        "results/evaluate/loss_by_timestep.json",
        "results/evaluate/bound_by_timestep.json",
        "results/evaluate/fd_by_nfe.json",
        "results/evaluate/card.md",
        "results/evaluate/neighbours.png",
    ):
        assert (smoke.folder / path).is_file(), path
    assert not list((smoke.folder / ".state").glob("*")), "the resume state outlived the run"


def test_a_second_repro_does_nothing(smoke):
    assert "up to date" in smoke.dvc("repro")
    assert smoke.run("dvc", "status", "-q", check=False).returncode == 0
    assert smoke.run("git", "status", "--porcelain").stdout == ""


def test_metrics_plots_and_experiments_are_shown(smoke, tmp_path):
    metrics = json.loads(smoke.run("dvc", "metrics", "show", "--json").stdout)
    values = metrics[""]["data"]["results/evaluate/metrics.json"]["data"]
    assert values["frechet_distance"] > 0
    assert {"kid", "kid_se", "precision", "recall", "coverage", "held_out_loss", "frechet_distance_floor"} <= set(
        values
    )
    smoke.dvc("plots", "show", "--out", str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    for title in ("Training loss", "Learning rate", "Held-out loss by timestep", "grid.png", "samples_epoch_00001"):
        assert title in page, title
    assert "frechet_distance" in smoke.dvc("exp", "show", "--csv")


def test_no_output_names_the_machine_or_its_folders(smoke_run):
    import socket

    for path in [*smoke_run.glob("results/**/*"), *smoke_run.glob("models/**/*")]:
        if path.is_file():
            content = path.read_bytes()
            assert str(smoke_run).encode() not in content, path
            assert len(socket.gethostname()) < 6 or socket.gethostname().encode() not in content, path


def test_a_changed_module_reruns_only_the_stages_importing_it(smoke):
    modules = {name: {dep for dep in stage["deps"] if dep.endswith(".py")} for name, stage in GRAPH.items()}
    before = {smoke.folder / module: (smoke.folder / module).read_text() for module in set().union(*modules.values())}
    try:
        for path, text in before.items():
            path.write_text(text + "\n# changed\n")
        assert changed(smoke) == modules
    finally:
        for path, text in before.items():
            path.write_text(text)


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [] if isinstance(value, list) and value else "other"


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


PARAMS = sorted(leaves(yaml.safe_load((ROOT / "params.yaml").read_text())))


@pytest.mark.parametrize("end", [0, -1])
def test_a_changed_param_reruns_exactly_the_stages_that_use_it(smoke, end):
    """dvc.yaml names whole sections, so the first and the last leaf of each stand for all."""
    assert not any("." in name for stage in GRAPH.values() for name in stage["params"])
    path = smoke.folder / "params.yaml"
    before = path.read_text()
    try:
        tree = yaml.safe_load(before)
        for section in tree:
            *parents, last = [leaf for leaf in PARAMS if leaf[0] == section and leaf != ("dataset", "path")][end]
            place = tree
            for key in parents:
                place = place[key]
            place[last] = other(place[last])
        path.write_text(yaml.safe_dump(tree))
        assert changed(smoke) == {name: set(stage["params"]) for name, stage in GRAPH.items()}
    finally:
        path.write_text(before)


def test_irrelevant_files_change_nothing(smoke):
    for name in ("README.md", "conf/optimizer/adam.yaml", "data/raw/new.png", "ddpm/__pycache__/x.pyc", "new.txt"):
        path = smoke.folder / name
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((before or b"") + b"\n# more\n")
        try:
            assert changed(smoke) == {}, name
        finally:
            if before is None:
                path.unlink()
            else:
                path.write_bytes(before)


def test_a_command_in_a_templated_parameter_is_never_run(smoke):
    path = smoke.folder / "params.yaml"
    before = path.read_text()
    try:
        tree = yaml.safe_load(before)
        tree["dataset"]["path"] = "raw; touch pwned; $(touch pwned) `touch pwned` && touch pwned"
        path.write_text(yaml.safe_dump(tree))
        assert "No such file or directory" in smoke.dvc("repro", "prepare_data", check=False)
    finally:
        path.write_text(before)
    assert smoke.run("git", "status", "--porcelain").stdout == ""


def test_an_override_reruns_only_what_uses_it(smoke):
    out = smoke.dvc("exp", "run", "-n", "ddpm-sampler", *SMOKE, "-S", "sample=ddpm", "-S", "evaluate.bound_images=0")
    ran = re.findall(r"Running stage '(\w+)'", out)
    assert ran == ["sample", "evaluate"]
    assert yaml.safe_load((smoke.folder / "params.yaml").read_text())["sample"]["sampler"] == "ddpm"
    smoke.run("git", "restore", ".")
    smoke.dvc("exp", "rename", "ddpm-sampler", "ancestral")
    assert "ancestral" in smoke.run("python", "-m", "tools.exps").stdout
    smoke.dvc("exp", "apply", "ancestral")
    assert yaml.safe_load((smoke.folder / "params.yaml").read_text())["sample"]["sampler"] == "ddpm"
    smoke.run("git", "restore", ".")
    smoke.dvc("checkout", "-q")
    assert smoke.run("dvc", "status", "-q", check=False).returncode == 0
    smoke.dvc("exp", "remove", "ancestral")
    assert "ancestral" not in smoke.dvc("exp", "list", "--name-only")


def test_a_diverged_trial_is_failed_and_does_not_harm_the_next(smoke):
    smoke.dvc(
        "exp", "run", "--queue", *SMOKE, "-S", "optimizer=sgd", "-S", "train.grad_clip=null", "-S", "train.steps=12",
        "-S", "train.preview_every_epochs=0", "-S", "diffusion.timesteps=20", "-S", "sample.steps=2",
        "-S", "evaluate.loss_images=8", "-S", "optimizer.lr=1e30,1e-2",
    )  # fmt: skip
    smoke.dvc("queue", "start", "-j", "1")
    wait_for_queue(smoke)
    rows = json.loads(smoke.run("dvc", "exp", "show", "--json").stdout)
    states = {}
    for baseline in rows:
        for experiment in baseline["experiments"] or []:
            last = experiment["revs"][0]
            rate = ((last["data"] or {}).get("params") or {}).get("params.yaml", {}).get("data", {}).get("optimizer")
            status = (experiment["executor"] or {}).get("state") or ("failed" if last["error"] else "success")
            if rate and "nesterov" in rate:
                states[rate["lr"]] = status
    assert states == {1e30: "failed", 1e-2: "success"}
    log = smoke.dvc("queue", "status")
    failed = next(line.split()[1] for line in log.splitlines() if "Failed" in line)
    assert "training diverged" in smoke.dvc("queue", "logs", failed)
    table = smoke.run("python", "-m", "tools.exps").stdout
    row = next(line.split() for line in table.splitlines() if line.strip().startswith(failed))
    assert row[:2] == [failed, "failed"], table
    assert "1e+30" in row, table
    assert re.search(r"success +0\.01 (?: +\d+\.\d+(?: ± \d+\.\d+)?){6}", table), table
    assert f"dvc queue logs {failed}" in table
