"""dvc.yaml agrees with the code: each stage's deps and params are those that it imports and uses."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ddpm.config import targets
from ddpm.config.schema import Params
from ddpm.runtime.imports import stage_files
from tests.conftest import ROOT
from tools.params import composed

GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = list(GRAPH)


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_deps_of_a_stage_are_its_import_closure(stage):
    declared = [dep for dep in GRAPH[stage]["deps"] if dep.startswith(("ddpm/", "stages/"))]
    assert declared == stage_files(stage), "run make deps"


@pytest.mark.parametrize("name", targets.OPTIMIZER.own + targets.LR_SCHEDULER.own)
def test_a_class_of_ours_that_parameters_name_is_a_dep_of_train(name):
    """It is loaded by its name; without this, a change of its code would run nothing again."""
    assert f"{name.rpartition('.')[0].replace('.', '/')}.py" in GRAPH["train"]["deps"]


def test_package_files_that_no_stage_declares_hold_no_code():
    for path in (ROOT / "ddpm").rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        assert [
            node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ] == []
    assert not (ROOT / "stages/__init__.py").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_can_see_only_the_sections_that_dvc_watches(stage):
    sections = importlib.import_module(f"stages.{stage}").SECTIONS
    assert list(sections) == GRAPH[stage]["params"]
    assert set(sections) <= set(Params.model_fields)


def test_every_section_is_watched_by_a_stage():
    assert {section for stage in STAGES for section in GRAPH[stage]["params"]} == set(Params.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_uses_every_section_that_dvc_watches(stage):
    # a run and the set-up of a training take all sections of their stage
    takers = ("stages/", "ddpm/runtime/run.py", "ddpm/training/")
    files = [path for path in stage_files(stage) if path.startswith(takers)]
    used = {
        node.attr
        for path in files
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params"
    }
    assert used == set(GRAPH[stage]["params"])


def test_the_committed_params_are_the_composed_default():
    assert composed(ROOT / "conf") == (ROOT / "params.yaml").read_text()


def test_the_committed_lock_agrees_with_the_tree():
    """Every file that git tracks and the lock names has the content that the lock says."""
    import hashlib

    from omegaconf import OmegaConf

    lock = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.lock"))["stages"]
    assert list(lock) == STAGES
    params = OmegaConf.to_container(OmegaConf.load(ROOT / "params.yaml"))
    for name, stage in lock.items():
        for section, value in stage["params"]["params.yaml"].items():
            assert value == params[section], (name, section)
        files = [entry for entry in stage["deps"] + stage["outs"] if Path(ROOT / entry["path"]).is_file()]
        for entry in files:
            if entry["path"].startswith(("samples/", "results/evaluate/card.md")):
                continue  # not in git: the file of the last run here
            assert hashlib.md5((ROOT / entry["path"]).read_bytes()).hexdigest() == entry["md5"], entry["path"]


def test_no_parameter_reaches_a_command_or_names_an_output():
    """dvc.yaml inserts parameters by templating: in a command, the shell would run them."""
    for name, stage in GRAPH.items():
        assert stage["cmd"] == f"exec python -m stages.{name}"
        assert "${" not in yaml.safe_dump({key: value for key, value in stage.items() if key != "deps"})
        assert [dep for dep in stage["deps"] if "$" in dep] == (["${dataset.path}"] if name == "prepare_data" else [])


@pytest.mark.parametrize("section", Params.model_fields)
def test_every_knob_has_a_comment_beside_it(section):
    """In conf/: each key of each group file carries its advice on the same line."""
    files = sorted((ROOT / "conf" / section).glob("*.yaml"))
    for path in files:
        for line in path.read_text().splitlines():
            key = line.split(":")[0]
            if line and not line.startswith(("#", " ", "-", "name", "_target_")) and ":" in line:
                assert " # " in line, f"{path.name}: {key}"


@pytest.mark.process
def test_stages_check_their_parameters_before_loading_torch():
    for stage in STAGES:
        code = f"import sys, stages.{stage}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0, stage
