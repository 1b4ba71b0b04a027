"""The documents point at things that exist: pages, headings, files, tests, knobs and numbers. Their commands are run by
tests/pipeline/test_readme.py."""

import ast
import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ddpm.evaluation.card import measured
from tests.conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT) and file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_file_and_test_that_is_named_exists(page):
    named = re.findall(r"`((?:benchmarks|conf|ddpm|stages|tests|tools)/[\w/.-]+\.\w+)(?:::(\w+))?`", prose(page))
    for path, test in named:
        assert (ROOT / path).is_file(), path
        if test:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in functions, f"{path}::{test}"


def knobs(section: str) -> set[str]:
    """The knobs of a section, whatever the choice of its group."""
    trees = [OmegaConf.load(ROOT / "params.yaml")[section] or {}]
    trees += [OmegaConf.load(file) for file in (ROOT / "conf" / section).glob("*.yaml")]
    return {str(key) for tree in trees for key in tree}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_knob_that_is_named_is_in_the_configuration(page):
    sections = "|".join(map(str, OmegaConf.load(ROOT / "params.yaml")))
    for section, knob in re.findall(rf"`(?:-S )?({sections})\.(?!json|py)(\w+)", prose(page)):
        assert knob in knobs(section), f"{section}.{knob}"


def test_every_knob_of_the_table_of_groups_is_one_of_its_group():
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", page[page.index("| group |") :], re.MULTILINE)
    assert len(rows) == 8
    for group, cell in rows:
        assert set(re.findall(r"`(\w+)`", cell)) <= knobs(group), group


def test_every_page_is_on_the_list_of_the_readme():
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in README] == []


def test_the_numbers_of_the_readme_are_the_committed_ones():
    values = json.loads((ROOT / "results/evaluate/metrics.json").read_text(encoding="utf-8"))
    names = [name for name in values if f"{name}_se" in values and name != "frechet_distance_real_test"]
    texts = [measured(values, name) for name in names]
    results = README[README.index("## Results of the default") : README.index("## Presets")]
    assert [text for text in texts if text not in results] == []
    shown = README[README.index("## Quick start") : README.index("## Your first experiment")]
    names = ("bits_per_dim", "frechet_distance", "precision", "recall", "reference_images", "samples")
    assert [name for name in names if f" {values[name]}" not in shown] == []


def test_the_classic_bugs_are_each_caught_by_a_test():
    rows = re.findall(r"^\| (?!bug |---)(.*) \|$", (ROOT / "docs/bugs.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 19
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::test_\w+`$", row)] == []
