"""The tools that `make` runs besides the stages: the lists in dvc.yaml, params.yaml, the tables and the pages."""

import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ddpm.runtime.imports import stage_files
from tests.conftest import ROOT
from tools import curves, deps, folder, params, plots_page, sizes

GRAPH = """\
# a comment
stages:
  prepare:
    cmd: exec python -m stages.prepare  # of its own
    outs:
      - stages/other.py

  one:
    cmd: exec python -m stages.one
    deps:
      - data/prepared
      # the library
      - ddpm/gone.py
      - stages/one.py  # the script
      - ${dataset.path}
    params:
      - ddpm/kept.py
"""
MODULES = {
    "stages/one.py": "from ddpm import a\ndef f():\n    from ddpm.room import c as d\n",
    "stages/prepare.py": "import ddpm.a\n",
    "ddpm/__init__.py": "",
    "ddpm/a.py": "import ddpm.b, numpy\n",
    "ddpm/b.py": "from ddpm.a import x\nfrom ddpm.e import y\n",
    "ddpm/e.py": "",
    "ddpm/room/__init__.py": "",
    "ddpm/room/c.py": "",
    "ddpm/unused.py": "",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "dvc.yaml").write_text(GRAPH.replace("    outs:", "    deps:\n      - ddpm/a.py\n    outs:"))
    return tmp_path


def test_a_closure_follows_imports_in_functions_and_circles(project):
    files = [*(f"ddpm/{name}.py" for name in ("a", "b", "e", "room/c")), "stages/one.py"]
    assert stage_files("one", project) == files


def test_stale_deps_are_refused_by_check_and_rewritten_without(project, monkeypatch):
    monkeypatch.chdir(project)
    before = Path("dvc.yaml").read_text()
    monkeypatch.setattr(sys, "argv", ["deps", "--check"])
    with pytest.raises(SystemExit, match="run make deps"):
        deps.main()
    assert Path("dvc.yaml").read_text() == before
    monkeypatch.setattr(sys, "argv", ["deps"])
    deps.main()
    listed = "".join(f"      - ddpm/{name}.py\n" for name in ("a", "b", "e", "room/c"))
    assert Path("dvc.yaml").read_text() == before.replace("      - ddpm/gone.py\n", listed).replace(
        "      - ddpm/a.py\n    outs:",
        "".join(f"      - ddpm/{name}.py\n" for name in ("a", "b", "e")) + "      - stages/prepare.py\n    outs:",
    )
    monkeypatch.setattr(sys, "argv", ["deps", "--check"])
    deps.main()


def test_a_stage_without_deps_is_refused(project):
    with pytest.raises(SystemExit, match=r"stages\.prepare has no list `deps:`"):
        deps.refreshed(GRAPH, project)


def test_deps_of_the_committed_graph_are_fresh_byte_for_byte():
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert deps.refreshed(text, ROOT) == text


def test_stale_params_are_refused_by_check_else_rewritten(tmp_path, monkeypatch):
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "params.yaml").write_text("stale")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["params", "--check"])
    with pytest.raises(SystemExit, match="run make params"):
        params.main()
    assert Path("params.yaml").read_text() == "stale"
    monkeypatch.setattr(sys, "argv", ["params"])
    params.main()
    assert Path("params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_the_plots_page_loads_nothing_from_an_address():
    template = (ROOT / plots_page.PAGE).read_text(encoding="utf-8")
    page = plots_page.page(template, {"numbers": "</script>"})
    assert "{scripts}" in template and "{scripts}" not in page and "{facts}" not in page
    assert json.loads(re.search('id="facts">(.*?)</script>', page)[1]) == {"numbers": "</script>"}
    assert "vegaEmbed" in page and "<script src" not in page


def test_files_above_one_megabyte_are_refused(tmp_path, monkeypatch, capsys):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(1_000_000))
    large.write_bytes(bytes(1_000_001))
    monkeypatch.setattr(sys, "argv", ["sizes", str(small), str(tmp_path / "deleted")])
    with pytest.raises(SystemExit) as done:
        sizes.main()
    assert not done.value.code
    monkeypatch.setattr(sys, "argv", ["sizes", str(small), str(large)])
    with pytest.raises(SystemExit) as done:
        sizes.main()
    assert done.value.code
    assert capsys.readouterr().err.startswith(f"error: {large}: ")


@pytest.mark.process
def test_no_committed_file_is_above_one_megabyte():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    done = subprocess.run([sys.executable, "-m", "tools.sizes", *names.split("\0")[:-1]], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.process
def test_curves_of_an_unknown_revision_end_with_dvcs_error(tmp_path):
    command = [sys.executable, "-m", "tools.curves", str(tmp_path / "x.png"), "no-such-revision"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode and "no-such-revision" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x.png").exists()


def test_the_curves_are_those_of_a_file_that_a_stage_writes():
    assert f"- {curves.LOSS}:" in (ROOT / "dvc.yaml").read_text(encoding="utf-8")


def test_make_holds_no_python_and_runs_each_tool_as_a_module():
    files = ("Makefile", ".pre-commit-config.yaml", "docs/own-images.md")
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    assert "python -c" not in text and "python tools/" not in text
    for tool in (ROOT / "tools").glob("*.py"):
        assert f"python -m tools.{tool.stem}" in text, tool.name


def test_the_jobs_of_ci_are_targets_that_together_run_the_suite():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    targets = {job["target"] for job in jobs["tests"]["strategy"]["matrix"]["include"]} - {"coverage"}
    recipes = [re.search(rf"^{target}:.*\n\tpytest .*-m \"(.*)\"$", makefile, re.MULTILINE) for target in targets]
    chosen = [recipe[1] for recipe in recipes if recipe]
    assert len(chosen) == len(targets)
    names = ("heavy", "process", "pipeline", "slow")
    for values in itertools.product((False, True), repeat=len(names)):
        marks = dict(zip(names, values, strict=True), remote=False)
        assert sum(bool(eval(choice, marks)) for choice in chosen) == 1, marks


@pytest.mark.parametrize(
    "path",
    [
        "/a/ü (1)",
        "/a=b",
        "/o'neil",
        "/a#b",
        "/~x",
        "/a,b",
        "/a b",
        "/${x}",
        "/a{b}",
        "/a[1]",
        "/C:\\pics",
        "/日本",
        '/q"',
        "/\\",
        "/a/b-c_d.e",
    ],
)
def test_the_override_for_a_folder_gives_its_path(path):
    (typed,) = shlex.split(folder.override(path))
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        composed = OmegaConf.to_container(compose("config", overrides=["dataset=folder", typed]), resolve=True)
    assert composed["dataset"]["path"] == path


@pytest.mark.process
def test_a_folder_that_is_refused_is_reported_in_one_line(tmp_path):
    command = [sys.executable, "-m", "tools.folder", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: dataset.path = ") and done.stderr.count("\n") == 1
