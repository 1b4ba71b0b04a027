"""Long trainings on the page of `make plots`, in a browser: thin curves, one card for all epochs, three revisions."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT
from tools.plots_page import MOST_POINTS, table, thin, thinned, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOSS = "results/train/plots/metrics/loss.tsv"
STEPS, EPOCHS = 800_000, 204  # the paper's
SECONDS = 3.0


def rows(values) -> list[dict[str, str]]:
    return [{"step": str(step), "loss": repr(float(value))} for step, value in enumerate(values)]


def test_a_short_curve_is_left_as_it_is():
    curve = rows(np.arange(MOST_POINTS))
    assert thinned(curve) is curve


@pytest.mark.parametrize("count", [MOST_POINTS + 1, 12_345, 100_000])
def test_a_long_curve_keeps_its_ends_order_and_every_spike(count):
    values = np.random.default_rng(0).normal(size=count)
    values[count // 3], values[count // 2] = 50, -50
    kept = thinned(rows(values))
    steps = [int(row["step"]) for row in kept]
    assert len(kept) <= MOST_POINTS and steps == sorted(set(steps))
    assert {count // 3, count // 2} <= set(steps)
    assert steps[0] < 2 * count / MOST_POINTS and steps[-1] >= count - 1 - 2 * count / MOST_POINTS


def test_only_the_curves_of_dvclive_are_thinned():
    curve = rows(np.arange(2 * MOST_POINTS))
    data = {LOSS: {"data": curve}, "results/evaluate/fd_by_nfe.json": {"data": curve}}
    assert thin({"main": {"sources": {"data": data}}}) == {LOSS: 2 * MOST_POINTS}
    assert len(data[LOSS]["data"]) <= MOST_POINTS and data["results/evaluate/fd_by_nfe.json"]["data"] is curve


def test_a_number_stands_with_its_error_in_one_cell():
    trees = {"a": {"recall": 0.85, "recall_se": 0.0123}, "b": {"recall": 0.9}, "c": {}}
    (row,) = table(trees, ["recall"])
    assert row == {"name": "recall", "values": {"a": "0.850 ± 0.012", "b": "0.9000"}}


@pytest.fixture
def long_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three commits with a curve of a point per step, and the samples of 204 epochs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / ".dvc/plots", ".dvc/plots")
    Path(".dvc/config").write_text("[core]\n    analytics = false\n")
    Path(".gitignore").write_text("/dvc_plots\n")
    loss = {LOSS: {"cache": False, "x": "step", "y": "loss", "title": "Training loss"}}
    pictures = {"results/train/pictures": {"cache": False}}
    stage = {"cmd": "true", "params": ["train"], "plots": [loss, pictures]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": stage}}))
    Path("results/train/pictures").mkdir(parents=True)
    Path(LOSS).parent.mkdir(parents=True)
    author = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for key, value in author.items():
        monkeypatch.setenv(key, value)
    subprocess.run(["git", "init", "-q"], check=True)
    for run in range(3):
        rng = np.random.default_rng(run)
        values = np.exp(-np.arange(STEPS) / 1e5) + rng.normal(0, 0.01, STEPS)
        Path(LOSS).write_text("step\tloss\n" + "".join(f"{step}\t{value:.6f}\n" for step, value in enumerate(values)))
        for epoch in range(EPOCHS):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(f"results/train/pictures/samples_epoch_{10 * epoch + 10:05}.png")
        Path("params.yaml").write_text(yaml.safe_dump({"train": {"seed": run, "steps": STEPS}}))
        subprocess.run(f"git add -A && git commit -qm {run} && git tag run{run}", shell=True, check=True)
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_three_long_trainings_open_within_three_seconds(long_trainings):
    from playwright.sync_api import sync_playwright

    index = write(Path("dvc_plots"), ["run0", "run1", "run2"])
    with sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        for width in (1366, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            start = time.monotonic()
            page.goto(index.as_uri())
            page.locator("svg.marks .mark-line path").first.wait_for()
            assert time.monotonic() - start < SECONDS
            assert page.locator("header p").inner_text() == "run0, run1 and run2"
            assert page.locator("h2").all_inner_texts()[:2] == ["Numbers", "Changed parameters"]
            assert page.locator("figure").count() == 2, "a card per epoch"
            card = page.locator("figure").filter(has=page.get_by_role("slider")).last
            assert card.locator("img").count() == 3 and "after epoch 2040" in card.inner_text()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.close()
        browser.close()
