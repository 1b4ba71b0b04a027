"""The walk of docs/own-images.md, on a user's own folder: every command of the page is run by the real dvc."""

import hashlib
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.support.clones import INSTALLED, Clone, git_clone, make_clone, wait_for_queue

PAGE = (ROOT / "docs/own-images.md").read_text(encoding="utf-8")
BLOCKS = [block.splitlines() for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
# one thread, as other tests run at the same time; fewer steps and timesteps
FASTER = (
    "-S runtime.threads=1 -S diffusion.timesteps=50 -S train.steps=6 -S train.warmup_steps=2 -S dataset.image_size=16"
)


def photographs(folder: Path, count: int = 60) -> None:
    """JPEGs of a small camera's size, smooth like photographs."""
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"IMG_{i:04}.JPG", "JPEG")


def content(folder: Path) -> dict[str, str]:
    """The hash of every file that git does not hold: images, prepared data, model and samples."""
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for name in ("data", "models", "samples")
        for path in (folder / name).rglob("*")
        if path.is_file()
    }


class Person:
    """A user who types the commands of the page, in a clone with an origin and a DVC remote."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.clone = make_clone(base / "repository")
        self.clone.run("git", "clone", "-q", "--bare", ".", "../hosted.git")
        self.clone.run("git", "remote", "add", "origin", "../hosted.git")
        self.clone.run("git", "push", "-qu", "origin", "main")
        self.clone.dvc("remote", "add", "--default", "storage", str(base / "storage"))
        self.clone.run("git", "commit", "-qam", "A remote")

    def type(self, line: str, clone: Clone | None = None, check: bool = True) -> str:
        line = line.replace("/path/to/pictures", "../pictures").replace("/path/to/repository", "../hosted.git")
        line = re.sub(r"(dvc exp run [^&]*)", rf"\1 {FASTER} ", line)
        done = (clone or self.clone).run("sh", "-ec", line, check=check)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def person(tmp_path_factory) -> Person:
    """The first block of the page has been typed, and its queue is done."""
    base = tmp_path_factory.mktemp("own")
    photographs(base / "pictures")
    person = Person(base)
    copy, track, run, sweep, share = BLOCKS[0]
    person.type(copy)
    person.type(track)
    assert "Running stage 'evaluate'" in person.type(run)
    person.type(sweep)
    wait_for_queue(person.clone)
    person.type(share)
    return person


def is_clean(clone: Clone) -> bool:
    return clone.run("dvc", "status", "-q", check=False).returncode == 0


def test_both_trials_of_the_sweep_saw_the_images(person):
    status = person.type("dvc queue status")
    assert (status.count("Success"), status.count("Failed")) == (2, 0), status
    table = person.type("python -m tools.exps")
    assert table.count("success") == 2, table


def test_git_holds_none_of_the_images(person):
    assert is_clean(person.clone)
    assert person.type("git status --porcelain") == ""
    tracked = person.type("git ls-files data").split()
    assert sorted(tracked) == ["data/.gitignore", "data/raw.dvc"]


def test_a_temporary_workspace_sees_the_images(person):
    out = person.type(
        "dvc exp run --temp -S dataset=folder -S +experiment=smoke -S dataset.test_fraction=0.2 prepare_data"
    )
    assert "Ran experiment" in out


def test_the_page_of_plots_shows_the_runs(person):
    person.type(f"make plots {INSTALLED}")
    page = (person.clone.folder / "dvc_plots/index.html").read_text()
    assert "Training loss" in page and "grid.png" in page


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_clone_elsewhere_is_clean_and_has_the_same_bytes(person, tmp_path, recompute):
    get, pull, repeat, again = BLOCKS[1]
    hosted = Clone(tmp_path)
    hosted.run("sh", "-ec", get.replace("/path/to/repository", str(person.base / "hosted.git")))
    clone = Clone(tmp_path / "elsewhere")
    person.type(pull, clone)
    assert is_clean(clone)
    before = content(clone.folder)
    assert before == content(person.clone.folder)
    assert len([name for name in before if name.startswith("data/raw/")]) == 60
    assert "Running stage" not in person.type(repeat, clone)
    if recompute:
        person.type(again, clone)
        assert content(clone.folder) == before


def test_a_linked_folder_is_used_run_after_run_and_never_stashed(person, tmp_path):
    clone = git_clone(person.base / "hosted.git", tmp_path / "linked")
    clone.run("git", "rm", "-q", "data/raw.dvc")
    clone.run("git", "commit", "-qm", "Linked instead")
    (clone.folder / "data/raw").symlink_to(person.base / "pictures")
    for fraction in ("0.2", "0.3"):
        command = f"dvc exp run -S dataset=folder -S +experiment=smoke -S dataset.test_fraction={fraction} prepare_data"
        assert "Ran experiment" in person.type(command, clone)
        assert (clone.folder / "data/raw").is_symlink()
        assert clone.run("git", "stash", "list").stdout == ""


def test_an_imported_folder_is_pulled_where_its_source_is_not(person, tmp_path):
    clone = git_clone(person.base / "hosted.git", tmp_path / "first")
    pictures = tmp_path / "pictures"
    photographs(pictures, 4)
    clone.run("git", "rm", "-q", "data/raw.dvc")
    clone.run("dvc", "import-url", str(pictures), "data/raw")
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "Imported")
    clone.dvc("push", "data/raw.dvc")
    other = git_clone(clone.folder, tmp_path / "second")
    subprocess.run(["mv", str(pictures), str(tmp_path / "gone")], check=True)
    other.dvc("pull", "data/raw")
    assert len(list((other.folder / "data/raw").iterdir())) == 4
    Image.new("RGB", (32, 32)).save(tmp_path / "gone/new.png")
    subprocess.run(["mv", str(tmp_path / "gone"), str(pictures)], check=True)
    clone.dvc("update", "data/raw.dvc")
    assert len(list((clone.folder / "data/raw").iterdir())) == 5


def test_a_folder_elsewhere_is_watched_and_seen_in_workspaces(person, tmp_path):
    clone = git_clone(person.base / "hosted.git", tmp_path / "watching")
    pictures = tmp_path / "Müller's (1) = #~"
    photographs(pictures, 12)
    quoted = str(pictures).replace("'", "'\\''")
    command = f"-S dataset=folder -S +experiment=smoke -S 'dataset.path=\"{quoted}\"' prepare_data"
    assert "Ran experiment" in person.type(f"dvc exp run --temp {command}", clone)
    assert "Ran experiment" in person.type(f"dvc exp run {command}", clone)
    assert "prepare_data" not in clone.dvc("status", "prepare_data")
    (pictures / "IMG_0000.JPG").unlink()
    assert "prepare_data" in clone.dvc("status", "prepare_data")


def test_tools_folder_reports_a_folder_and_prints_its_command(person, tmp_path):
    pictures = tmp_path / "Müller (1)"
    photographs(pictures, 3)
    (line,) = BLOCKS[2]
    out = person.type(line.replace("/home/me/Müller (1)", str(pictures)))
    (command,) = (printed for printed in out.splitlines() if printed.startswith("dvc exp run"))
    assert command == f"dvc exp run -S dataset=folder -S +experiment=short -S 'dataset.path=\"{pictures}\"'"
    clone = git_clone(person.base / "hosted.git", tmp_path / "typed")
    assert "Ran experiment" in person.type(f"{command} prepare_data", clone)
