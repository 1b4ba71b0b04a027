"""Every command that the documents show is run, in a scratch clone: a new one has to be added to VERIFIED."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT
from tests.support.clones import INSTALLED, VENV, Clone, git_clone, wait_for_queue
from tests.support.clones import SMOKE as OVERRIDES

# the documents as one text
WALKED = ROOT / "docs/own-images.md"  # tests/pipeline/test_own_images.py runs that page from top to bottom
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").glob("*.md")} - {WALKED})]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


class Verified(NamedTuple):
    """How a command is verified: text appended so that it takes seconds, and functions to run before and after."""

    more: str = ""
    before: Callable[[Clone], Clone | None] = lambda clone: None  # may give another folder, for the rest of the block
    after: Callable[[Clone, str], None] = lambda clone, printed: None
    slow: bool = False


def blocks(language: str) -> list[list[str]]:
    """The commands of each code block in that language, without their comments."""
    found = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [
        [line for raw in block.replace("\\\n", "").splitlines() if (line := re.sub(r"(^|\s+)#.*", "", raw))]
        for block in found
    ]


def table(head: str) -> list[list[list[str]]]:
    """The table with that head: by row and column, the texts in backticks."""
    found = re.search(rf"^{re.escape(head)}\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert found, f"no page has a table headed {head}"
    rows = (row.strip("|").split("|") for row in found[1].splitlines()[1:])
    return [[re.findall(r"`([^`]*)`", cell) for cell in row] for row in rows]


def params(clone: Clone) -> dict:
    return yaml.safe_load((clone.folder / "params.yaml").read_text())


def without_samples(clone: Clone) -> None:
    (clone.folder / "samples/images.npy").unlink()


def with_samples(clone: Clone, printed: str) -> None:
    assert (clone.folder / "samples/images.npy").exists()


def images(clone: Clone, folder: str = "data/raw") -> None:
    (clone.folder / folder).mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(clone.folder / folder / f"{i}.png")


def pictures(clone: Clone) -> None:
    images(clone, "../pictures")


def made_from_images(clone: Clone, printed: str) -> None:
    assert json.loads((clone.folder / "data/prepared/dataset.json").read_text())["shape"] == [16, 16, 3]
    assert np.load(clone.folder / "samples/images.npy").shape == (8, 16, 16, 3)


def with_remote(clone: Clone) -> None:
    clone.dvc("remote", "add", "--force", "--default", "storage", str(clone.folder.parent / "storage"))
    clone.run("git", "commit", "-qam", "A remote")


def with_bucket(clone: Clone) -> None:
    clone.dvc("remote", "add", "storage", "s3://bucket/ddpm")


def elsewhere(clone: Clone) -> Clone:
    with_remote(clone)
    clone.dvc("push")
    return git_clone(clone.folder, clone.folder.parent / "elsewhere")


def is_clean(clone: Clone, printed: str) -> None:
    assert "up to date" in printed
    assert clone.run("dvc", "status", "-q", check=False).returncode == 0


def fetched(clone: Clone, printed: str) -> None:
    names = {path.name for path in (clone.folder / "base").iterdir()}
    assert names == {path.name for path in (clone.folder.parent / "author/models/ddpm").iterdir()}


def released(clone: Clone) -> Clone:
    with_remote(clone)
    clone.run("gto", "register", "ddpm", "--version", "v1.0.0")
    clone.dvc("push", "models/ddpm")
    reader = Clone(clone.folder.parent / "reader")
    reader.folder.mkdir()
    return reader


def at_hand(clone: Clone, printed: str) -> None:
    assert "ddpm@v1.0.0" in clone.run("git", "ls-remote", "--tags", "origin").stdout


def nowhere(clone: Clone) -> Clone:
    folder = clone.folder.parent / "empty"
    folder.mkdir()
    return Clone(folder)


def is_cloned(clone: Clone, printed: str) -> None:
    assert (clone.folder / "ddpm/dvc.lock").exists()


def back_home(clone: Clone) -> Clone:
    """The clone that has the outputs, so that nothing has to run."""
    return Clone(clone.folder.parent / "author")


def nothing_ran(clone: Clone, printed: str) -> None:
    assert "Running stage" not in printed


def slow_trial(clone: Clone) -> None:
    clone.dvc("exp", "run", "-n", "slow", *OVERRIDES, "-S", "dataset.test_fraction=0.3", "prepare_data")
    clone.run("git", "restore", ".")


def another_rate(clone: Clone) -> None:
    clone.dvc("exp", "run", "--temp", "-n", "rate", *OVERRIDES, "-S", "optimizer.lr=1e-3", "prepare_data")


def two_are_queued(clone: Clone, printed: str) -> None:
    assert "optimizer=adam" in printed and "optimizer=sgd" in printed
    assert clone.dvc("queue", "status").count("Queued") == 2
    clone.dvc("queue", "remove", "--all")


def is_restored(clone: Clone, printed: str) -> None:
    assert clone.run("git", "status", "--porcelain").stdout == ""


def key_is_not_in_git(clone: Clone, printed: str) -> None:
    assert "mine" in (clone.folder / ".dvc/config.local").read_text()
    assert "mine" not in clone.run("git", "diff", "HEAD").stdout
    assert clone.run("git", "status", "--porcelain", ".dvc").stdout == " M .dvc/config\n"  # the endpoint


def is_the_default(clone: Clone, printed: str) -> None:
    assert (clone.folder / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def is_unchanged(clone: Clone, printed: str) -> None:
    assert (clone.folder / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()


def shallow(clone: Clone) -> Clone:
    copy = Clone(clone.folder.parent / "shallow")
    clone.run("git", "clone", "-q", "--depth", "1", f"file://{clone.folder}", str(copy.folder))
    assert is_shallow(copy)
    return copy


def is_shallow(clone: Clone) -> bool:
    return clone.run("git", "rev-parse", "--is-shallow-repository").stdout == "true\n"


def is_whole(clone: Clone, printed: str) -> None:
    assert not is_shallow(clone)


def until_done(clone: Clone, printed: str) -> None:
    wait_for_queue(clone)


def four_states(clone: Clone, printed: str) -> None:
    assert printed.count("Success") + printed.count("Failed") == 4


def live_is_measured(clone: Clone, printed: str) -> None:
    numbers = json.loads((clone.folder / "results/evaluate/metrics.json").read_text())
    assert {"frechet_distance", "frechet_distance_ema_0", "frechet_distance_ema_0_se"} <= set(numbers)


def curve_is_drawn(clone: Clone, printed: str) -> None:
    points = json.loads((clone.folder / "results/evaluate/fd_by_nfe.json").read_text())
    assert [(p["sampler"], p["nfe"]) for p in points] == [
        *[("ddim", n) for n in (5, 10, 20, 50)],
        *[("dpm_solver", n) for n in (5, 10, 20)],
    ]


def three_trials(clone: Clone) -> None:
    (clone.folder / "docs/learning_rates.png").unlink()
    for name in ("lr-1e-5", "lr-2e-3", "lr-0.1"):
        clone.run("git", "tag", name)


def three_curves(clone: Clone, printed: str) -> None:
    with Image.open(clone.folder / "docs/learning_rates.png") as picture:
        assert picture.width > 400


def two_classes(clone: Clone, printed: str) -> None:
    classes = "| Classes | 3, 8; each as often as the others, whatever the data; guidance scale 2 |"
    assert classes in (clone.folder / "results/evaluate/card.md").read_text()


def contains(*parts: str) -> Callable[[Clone, str], None]:
    def check(clone: Clone, printed: str) -> None:
        assert [part for part in parts if part not in printed] == []

    return check


def has_param(section: str, key: str, value: object) -> Callable[[Clone, str], None]:
    def check(clone: Clone, printed: str) -> None:
        assert params(clone)[section][key] == value
        assert "Running stage 'train'" in printed

    return check


def dry_run(printed: str) -> Verified:
    """For a target that takes too long, or is the suite itself: check the command that it would run."""
    return Verified(f"{INSTALLED} -o '{VENV}/.bench' -o '{VENV}/.remote' -n", after=contains(printed))


LONG = {
    "bench": "python -m benchmarks",
    "coverage": "pytest -n 2 --dist worksteal --cov",
    "gpu": "python -m benchmarks.gpu",
    "kills": "python -m tests.robustness.kills",
    "lock": "uv pip compile",
    "speedrun": "python -m benchmarks.speedrun",
    "test-remote": "pytest -m remote",
    "test-slow": 'pytest -m "slow and not remote"',
    "verify": "python -m tests.robustness.verify",
    "verify-cpu": "python -m tests.robustness.cpus",
}
SMOKE = " ".join(OVERRIDES)
TRAIN = f"{SMOKE} -S train.steps=4 -S train.warmup_steps=0 train"  # that stage alone
TINY = (
    "-S model.base_channels=16 -S train.steps=2 -S train.warmup_steps=0 -S train.batch_size=4 "
    "-S sample.count=8 -S sample.steps=2 -S sample.batch_size=8 "
    "-S evaluate.loss_images=2 -S evaluate.loss_bins=1 -S evaluate.bound_images=0 "
    "-S dataset.test_fraction=0.5 -S dataset.image_size=16 -S runtime.threads=1"
)
PLACES = {  # placeholders that the reader replaces
    "<address of this repository>": "{parent}/author",
    "<name>": "HEAD",
    "/some/where": "..",
    "/path/to/pictures": "../pictures",
    "/mnt/storage/ddpm": "{parent}/storage",
    "<folder>": str(VENV),
    "https://…": "https://example.org",
    "access_key_id …": "access_key_id mine",
    "/path/or/url/of/the/repository": "{parent}/author",
}
CROP = {"_target_": "torchvision.transforms.v2.RandomCrop", "size": 8, "padding": 1}

VERIFIED = {
    "git clone <address of this repository> ddpm": Verified(before=nowhere, after=is_cloned),
    "cd ddpm": Verified(),
    "make repro": Verified(INSTALLED, before=back_home, after=contains("frechet_distance", "results/sample/grid.png")),
    # the suite cannot run itself; check the command that runs it
    "make check": Verified(f"{INSTALLED} -n", after=contains("ruff check .", "mypy", "not process")),
    "make test": Verified(f"{INSTALLED} -n", after=contains("ruff check .", "mypy", "pytest -n 2")),
    "dvc repro": Verified(after=contains("up to date")),
    "dvc exp run -S train.steps=3000": Verified(TRAIN, after=contains("Running stage 'train'", "Ran experiment")),
    "dvc exp run -n slow -S optimizer.lr=1e-5": Verified(TRAIN, after=has_param("optimizer", "lr", 1e-5)),
    'make plots REV="main slow"': Verified(INSTALLED, after=contains("dvc_plots/index.html")),
    "dvc exp run -S +experiment=cifar10 -S train.precision=bf16": Verified(
        f"-S dataset=folder -S model=small -S evaluate=pixels {TINY} train",
        before=images,
        after=has_param("train", "precision", "bf16"),
        slow=True,
    ),
    "dvc exp run -S +experiment=cifar10 -S runtime.launcher=torchrun -S runtime.processes=2": Verified(
        f"-S dataset=folder -S model=small -S evaluate=pixels {TINY} train",
        before=images,
        after=contains("one of 2 processes", "Ran experiment"),
        slow=True,
    ),
    "make exps": Verified(INSTALLED, after=contains("Fréchet")),
    "make exps BY=optimizer.lr": Verified(INSTALLED, before=another_rate, after=contains("dvc_plots/exps.png")),
    'make verdict REV="main <name>"': Verified(INSTALLED, after=contains("seeds alone")),
    "make images REV=main": Verified(INSTALLED, after=contains("64 images in images/main")),
    'make images REV=main ONLY="0 5 10-19" OUT=some': Verified(INSTALLED, after=contains("12 images in some")),
    "dvc exp run --queue -S 'optimizer.lr=1e-3,2e-3' -S 'train.seed=1,2,3'": Verified(
        f"{SMOKE} prepare_data", slow=True
    ),
    "dvc exp run --queue -S 'diffusion.prediction=v,epsilon' -S 'train.seed=0,1,2,3,4'": Verified(
        f"{SMOKE} prepare_data", slow=True
    ),
    "dvc queue start -j 1": Verified(after=until_done),
    "make exps BY=diffusion.prediction": Verified(INSTALLED, after=contains("+4", "dvc_plots/exps.png")),
    "make exps P=1": Verified(INSTALLED, after=contains("p, by")),
    "make exps RUNS=1": Verified(INSTALLED, after=contains("Fréchet")),
    "make search": dry_run("python -m tools.search default"),
    "make search SEARCH=<name>": dry_run("python -m tools.search"),
    "export OPTUNA_STORAGE=postgresql://me@host/searches": Verified(),
    "make states": Verified(INSTALLED, after=contains("No run is unfinished")),
    "make states CLEAN=1": Verified(INSTALLED, after=contains("No run is unfinished")),
    "dvc metrics show": Verified(after=contains("frechet_distance", "loss")),
    "dvc metrics diff": Verified(after=contains("results/train/metrics.json")),
    "make plots": Verified(INSTALLED, after=contains("dvc_plots/index.html")),
    'make plots REV="main <name>"': Verified(INSTALLED, after=contains("dvc_plots/index.html")),
    'make curves REV="lr-1e-5 lr-2e-3 lr-0.1" OUT=docs/learning_rates.png': Verified(
        INSTALLED, before=three_trials, after=three_curves
    ),
    "dvc checkout": Verified(before=without_samples, after=with_samples),
    "cp -r /path/to/pictures data/raw": Verified(before=pictures, slow=True),  # test_own_images.py runs it, too
    'dvc add data/raw && git add data/raw.dvc && git commit -m "My images"': Verified(),
    "dvc exp run -S dataset=folder -S +experiment=short": Verified(TINY, after=made_from_images),
    "dvc exp run -S '~optimizer' -S '+optimizer={_target_: torch.optim.RMSprop, lr: 1e-3, alpha: 0.9}'": Verified(
        TRAIN, after=has_param("optimizer", "_target_", "torch.optim.RMSprop"), slow=True
    ),
    "dvc exp run -S 'train.transforms=[{_target_: torchvision.transforms.v2.RandomCrop, size: 8, padding: 1}]'": (
        Verified(TRAIN, after=has_param("train", "transforms", [CROP]))
    ),
    "dvc exp run -S train.keep=best": Verified(TRAIN, after=has_param("train", "keep", "best"), slow=True),
    "dvc exp run -S sample.ema_width=0": Verified(
        f"{SMOKE} -S train.steps=4 -S train.warmup_steps=0 sample", after=has_param("sample", "ema_width", 0)
    ),
    "cp -r models/ddpm /some/where/base": Verified(slow=True),
    "dvc exp run -S train.init_from=/some/where/base": Verified(
        TRAIN, after=has_param("train", "init_from", "../base")
    ),
    "dvc exp run -S 'evaluate.ema_widths=[0]'": Verified(
        f"{SMOKE} -S train.steps=4 -S train.warmup_steps=0 -S evaluate.bound_images=0 -S evaluate.loss_images=8",
        after=live_is_measured,
        slow=True,
    ),
    "dvc exp run -S 'evaluate.nfe_curve=[{sampler: ddim, steps: [5, 10, 20, 50]}, {sampler: dpm_solver, steps: "
    "[5, 10, 20]}]'": Verified(
        f"{SMOKE} -S evaluate.nfe_samples=8 -S evaluate.bound_images=0 -S evaluate.loss_images=8",
        after=curve_is_drawn,
        slow=True,
    ),
    "dvc exp run --queue -S 'optimizer.lr=1e-5,2e-3,0.1,1.0'": Verified(TRAIN, slow=True),
    "dvc queue start -j 2": Verified(after=until_done),
    "dvc queue status": Verified(after=four_states),
    "dvc exp run -S model.class_conditional=true -S sample.guidance=2.0 -S 'sample.classes=[3, 8]'": Verified(
        f"{SMOKE} -S train.steps=4 -S train.warmup_steps=0 -S evaluate.bound_images=0", after=two_classes, slow=True
    ),
    "dvc repro -f && git diff --exit-code dvc.lock": Verified(after=contains("Running stage 'train'"), slow=True),
    "dvc remote add --default storage /mnt/storage/ddpm": Verified(),
    'git commit -m "Where the outputs are" .dvc/config': Verified(),
    "dvc push && git push": Verified(after=contains("pushed")),
    "dvc pull && dvc status": Verified(before=elsewhere, after=is_clean),
    "gto register ddpm --version v1.0.0": Verified(before=with_remote, after=contains("ddpm@v1.0.0")),
    "gto assign ddpm --version v1.0.0 --stage production": Verified(after=contains("ddpm#production#1")),
    "dvc push && git push --tags": Verified(after=at_hand),
    "dvc artifacts get /path/or/url/of/the/repository ddpm --rev v1.0.0 -o base": Verified(
        before=released, after=fetched
    ),
}
# Commands in sentences, in an order in which they work in one clone
SAID = {
    "dvc status": Verified(after=contains("up to date")),
    "dvc status -q": Verified(),
    "dvc exp run": Verified(SMOKE, after=nothing_ran),
    "dvc exp run --temp": Verified(SMOKE, after=nothing_ran),
    "dvc exp show": Verified(after=contains("frechet_distance")),
    "dvc exp apply slow": Verified(before=slow_trial, after=contains("slow")),
    "git restore .": Verified(after=is_restored),
    "dvc exp run --queue -S 'optimizer=adam,sgd'": Verified(SMOKE, after=two_are_queued),
    "dvc exp rename": Verified("slow slower && dvc exp rename slower slow"),
    "dvc exp apply": Verified("slow && git restore ."),
    "dvc exp remove slow": Verified(after=contains("slow")),
    "dvc repro -f train": Verified(after=contains("Running stage 'train'")),
    "dvc remote modify storage endpointurl https://…": Verified(before=with_bucket),
    "dvc remote modify --local storage access_key_id …": Verified(after=key_is_not_in_git),
    "make help": Verified(after=contains("repro", "Run the pipeline")),
    "make repro VENV=<folder>": Verified(f"-o '{VENV}/.run'", after=contains("frechet_distance")),
    **{f"make {target}": dry_run(printed) for target, printed in LONG.items()},
    "dvc commit -f": Verified(),
    "make params": Verified(INSTALLED, after=is_the_default),
    "make deps": Verified(INSTALLED, after=is_unchanged),
    "git fetch --unshallow": Verified(before=shallow, after=is_whole),
}
ELSEWHERE = {
    "python -m benchmarks.colour <folder>": "test_benchmarks.py",
    "python -m benchmarks.gpu <step>": "test_benchmarks.py",
    "python -m benchmarks.long_run --folder <folder>": "test_benchmarks.py",
    "python -m benchmarks.memory": "test_benchmarks.py",
    "python -m benchmarks.million --folder <folder>": "test_benchmarks.py",
    "python -m benchmarks.processes --folder <folder>": "test_benchmarks.py",
    "make states ADOPT=<name>": "../runtime/test_resume.py",
    "make verdict": "../tools/test_verdict.py",
    "dvc exp push": "pipeline/test_search.py",
    "dvc queue start -j 4": "../runtime/test_gpus.py",
    "make search ADOPT=<worker>": "../tools/test_study.py",
    'make plots REV="main <name> <other>"': "../tools/test_plots_page.py",
    "dvc exp pull origin <name>": "pipeline/test_search.py",
    'pip install "psycopg[binary]"': "pipeline/test_search.py",
    "dvc queue logs <name>": "pipeline/test_dvc.py",
    "wandb login": "test_tracking.py",
    "wandb sync": "test_tracking.py",
    "python stages/train.py": "pipeline/test_install.py",
    "python -m stages.train": "pipeline/test_install.py",
    "python -m stages.<stage>": "pipeline/test_install.py",
}
PROGRAMS = ("dvc", "git", "gto", "make", "pip", "python", "wandb")
SHOWN = [*blocks("sh"), [command for row in table("| command | does |") for command in row[0]]]


def test_every_command_of_the_documents_is_verified():
    commands = {command for block in SHOWN for command in block}
    sentences = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    said = {text for text in re.findall(r"`([^`\n]+)`", sentences) if text.split()[0] in PROGRAMS and " " in text}
    assert sorted(said - VERIFIED.keys()) == sorted([*SAID, *ELSEWHERE]), (
        "a command in a sentence has no test, or a tested one is gone"
    )
    assert sorted(commands - VERIFIED.keys()) == [], "on a page and in no test: add them to VERIFIED"
    assert sorted(VERIFIED.keys() - commands) == [], "in VERIFIED and no longer on a page"


@pytest.fixture
def author(smoke_run: Path, tmp_path: Path) -> Clone:
    """A clone with the outputs of the smoke preset, and a repository that it pushes to."""
    clone = Clone(tmp_path / "author")
    shutil.copytree(smoke_run, clone.folder, ignore=lambda folder, names: {"runs"} & set(names))  # no run cache
    clone.run("git", "clone", "-q", "--bare", ".", "../hosted.git")
    clone.run("git", "remote", "add", "origin", "../hosted.git")
    clone.run("git", "fetch", "-q", "origin")
    clone.run("git", "branch", "-q", "-u", "origin/main")
    return clone


def marks(block: list[str]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if any(command in VERIFIED and VERIFIED[command].slow for command in block) else []


def run_all(place: Clone, commands: dict[str, Verified]) -> None:
    parent = place.folder.parent
    for command, how in commands.items():
        place = how.before(place) or place
        for name, path in PLACES.items():
            command = command.replace(name, path.format(parent=parent))
        done = place.run("sh", "-ec", f"{command} {how.more}")
        how.after(place, done.stdout + done.stderr)


@pytest.mark.parametrize("block", [pytest.param(block, id=block[0], marks=marks(block)) for block in SHOWN])
def test_the_commands_of_the_documents_do_what_they_say(author: Clone, block: list[str]) -> None:
    run_all(author, {command: VERIFIED[command] for command in block})


def test_the_commands_in_the_sentences_do_what_they_say(author: Clone) -> None:
    run_all(author, SAID)


@pytest.mark.slow
def test_the_python_of_the_documents_gives_images(author: Clone) -> None:
    block, _ = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)  # the other: tests/test_hub.py
    author.env["OMP_NUM_THREADS"] = "1"  # a thousand steps, each too small to be shared out
    block = block.replace("batch_size=4", "batch_size=4, num_inference_steps=10")  # the smoke preset has a hundred
    done = author.run("python", "-c", f"{block}\nprint([image.size for image in images])")
    assert done.stdout == f"{[(8, 8)] * 4}\n"


@pytest.mark.parametrize(
    "head", ["| `-S +experiment=` | what | two CPU cores | one GPU |", "| preset | what it sets |"]
)
def test_the_tables_list_exactly_the_presets(head):
    listed = [name for row in table(head) for name in row[0]]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))


def test_the_table_lists_exactly_the_choices_of_every_group():
    rows = table("| group | choices | knobs that matter most |")
    listed = {name: sorted(choices) for group, choices, _ in rows for name in group}
    folders = [
        path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name not in ("experiment", "search")
    ]
    assert listed == {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
