"""The page of `make plots`, in a real browser: everything is drawn, and nothing is requested from the network."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import vl_convert
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

LAPTOP, PHONE = {"width": 1366, "height": 900}, {"width": 390, "height": 844}
CHARTS = {  # title: the titles of its axes
    "Training loss": ("training step", "mean squared error"),
    "Learning rate": ("training step", "learning rate"),
    "Gradient norm, before clipping": ("training step", "L2 norm"),
    "Held-out loss of the averaged weights": ("training step", "mean squared error"),
    "Held-out loss by noise level": ("training step", "mean squared error"),
    "Held-out loss by timestep": ("timestep t (0 is clean)", "mean squared error"),
    "Variational bound by timestep": ("timestep t (0 is clean)", "bits/dim (log scale)"),
    "Rate and distortion": ("rate (bits/dim)", "distortion (RMSE, 0 to 255)"),
    "Fréchet distance by network evaluations": ("network evaluations (log scale)", "Fréchet distance (log scale)"),
}
PICTURES = [
    "Denoising",
    "Samples of the trained model",
    "Denoising, step by step",
    "Nearest neighbours",
    "Training images",
    "Start noise of the samples",
    "Samples by epoch",
]
ELSEWHERE = re.compile("^https?:")
MARKS = ".mark-line path, .mark-symbol path"  # the marks of a curve


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # root, as in a container, has no sandbox
    with sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


def make_plots(clone, revisions: str = "") -> Path:
    environment = Path(sys.prefix)
    # -o: the environment is the tests' own, and must not be installed again
    clone.run("make", "plots", f"VENV={environment}", "-o", f"{environment}/.run", f"REV={revisions}")
    return clone.folder / "dvc_plots/index.html"


@pytest.fixture(scope="module")
def page_of_one(smoke) -> Path:
    return shutil.copytree(make_plots(smoke).parent, smoke.folder.parent / "one") / "index.html"


@pytest.fixture(scope="module")
def page_of_two(smoke) -> Path:
    """The committed results (without the training pictures, which no clone has) beside those of the smoke preset."""
    smoke.run("git", "tag", "-f", "default", "main~1")
    return make_plots(smoke, "default main")


def opened(browser: Browser, path: Path, size: dict) -> tuple[Page, list[str]]:
    """The page once all is drawn, and the list of messages, errors and outside requests, which should be empty."""
    page, trouble = browser.new_page(viewport=size), []
    page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or trouble.append(request.url))
    page.goto(path.as_uri())
    page.locator("svg.marks").nth(len(CHARTS) - 1).wait_for()
    return page, trouble


def figure(page: Page, title: str):
    return page.locator("figure").filter(has=page.get_by_role("heading", name=title, exact=True))


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_every_chart_and_picture_is_drawn_without_a_network(browser, page_of_one, size):
    page, trouble = opened(browser, page_of_one, size)
    for title, axes in CHARTS.items():
        chart = figure(page, title).locator("svg.marks")
        assert any(chart.locator(MARKS).evaluate_all("all => all.map(path => path.getBoundingClientRect().width)")), (
            title
        )
        box = chart.bounding_box()
        assert box["width"] > 200 and box["height"] > 150, title
        for axis in axes:
            assert chart.get_by_text(axis, exact=True).count() == 1, (title, axis)
    for title in PICTURES:
        widths = figure(page, title).locator("img").evaluate_all("all => all.map(img => img.naturalWidth)")
        assert len(widths) == 1 and widths[0] > 0, title
    assert page.locator("figure").count() == len(CHARTS) + len(PICTURES)
    assert page.locator("h2").all_inner_texts() == ["Numbers", "Samples", "Training", "Evaluation"]
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "the page is wider than the screen"
    assert trouble == []
    page.close()


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_two_revisions_are_overlaid_and_side_by_side(browser, page_of_two, size):
    page, trouble = opened(browser, page_of_two, size)
    assert "default and main" in page.locator("header p").inner_text()
    for title in CHARTS:
        chart = figure(page, title).locator("svg.marks")
        legend = chart.locator(".role-legend-label text").all_text_contents()
        assert {"default", "main"} <= set(legend), title
    strokes = (
        figure(page, "Training loss")
        .locator(".mark-line path")
        .evaluate_all("all => all.map(path => path.getAttribute('stroke'))")
    )
    assert len(set(strokes)) == 2
    for title in PICTURES[:4]:
        pictures = figure(page, title).locator("img")
        assert pictures.count() == 2, title
        assert all(pictures.evaluate_all("all => all.map(img => img.naturalWidth > 0)")), title
        left, right = (pictures.nth(i).bounding_box() for i in range(2))
        assert left["y"] == right["y"] or size == PHONE, title
    assert "default has none" in figure(page, "Samples by epoch").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert trouble == []
    page.close()


def test_two_revisions_open_with_their_numbers_and_what_differs(browser, page_of_two):
    page, _ = opened(browser, page_of_two, LAPTOP)
    assert page.locator("h2").all_inner_texts()[:3] == ["Numbers", "Changed parameters", "Samples"]
    numbers, _, params = (page.locator("table").nth(i) for i in range(3))
    assert numbers.locator("thead").inner_text().split() == ["default", "main"]
    (distance,) = (row for row in numbers.locator("tr").all_inner_texts() if row.startswith("Fréchet distance"))
    assert re.fullmatch(r"Fréchet distance(\s+\d+\.\d+ ± \d+\.\d+){2}", distance)
    rows = {row.split()[0]: row.split()[1:] for row in params.locator("tbody tr").all_inner_texts()}
    assert rows["train.steps"] == ["1200", "48"]
    assert "optimizer.lr" not in rows, "optimizer.lr is the same in both"
    page.close()


def test_the_slider_shows_the_samples_of_each_epoch(browser, page_of_one):
    page, trouble = opened(browser, page_of_one, LAPTOP)
    card = figure(page, "Samples by epoch")
    assert "after epoch 2" in card.inner_text()
    last = card.locator("img").get_attribute("src")
    card.get_by_role("slider").press("ArrowLeft")
    assert "after epoch 1" in card.inner_text()
    assert card.locator("img").count() == 1 and card.locator("img").get_attribute("src") != last
    card.get_by_role("slider").press("ArrowRight")
    assert card.locator("img").get_attribute("src") == last
    assert trouble == []
    page.close()


@pytest.fixture(scope="module")
def page_of_dvc(smoke, tmp_path_factory) -> Path:
    """The page of `dvc plots show`, which loads the scripts of the charts."""
    folder = tmp_path_factory.mktemp("dvc")
    smoke.dvc("plots", "show", "--out", str(folder))
    return folder / "index.html"


def test_dvc_alone_writes_the_page_with_scripts_to_download(browser, page_of_dvc):
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed")
    page = browser.new_page()
    page.route(
        ELSEWHERE,
        lambda route: route.fulfill(
            content_type="text/javascript", body=bundle if "/vega-embed@" in route.request.url else ""
        ),
    )
    page.goto(page_of_dvc.as_uri())
    page.locator("svg.marks").nth(len(CHARTS) - 1).wait_for()
    page.close()


def test_without_scripts_the_page_shows_pictures_and_a_hint(browser, page_of_dvc):
    page = browser.new_page()
    page.route(ELSEWHERE, lambda route: route.abort())
    page.goto(page_of_dvc.as_uri())
    assert "make plots" in figure(page, "Training loss").inner_text()
    widths = page.locator("img").evaluate_all("all => all.map(img => img.naturalWidth)")
    assert len(widths) == len(PICTURES) and all(widths)
    page.close()


def test_unknown_plots_are_shown_under_their_own_names(browser, smoke, tmp_path):
    shutil.copy(smoke.folder / "results/sample/grid.png", smoke.folder / "mine.png")
    try:
        smoke.dvc("plots", "show", "--out", str(tmp_path), "mine.png")
    finally:
        (smoke.folder / "mine.png").unlink()
    page = browser.new_page()
    page.route(ELSEWHERE, lambda route: route.abort())
    page.goto((tmp_path / "index.html").as_uri())
    assert page.locator("h2").all_inner_texts() == ["More"]
    assert figure(page, "mine.png").locator("img").evaluate("img => img.naturalWidth") > 0
    page.close()
