import json

import pytest

from benchmarks import distances, growth, report, whole
from benchmarks.__main__ import MEASUREMENTS
from tests.conftest import ROOT


def test_the_page_is_rendered_from_the_committed_numbers():
    page, plots = report.render(MEASUREMENTS)
    assert (report.RESULTS / "README.md").read_text(encoding="utf-8") == page
    assert plots.keys() == {path.name for path in report.RESULTS.glob("*.png")}


def test_a_ratio_is_taken_in_each_round():
    turns = {
        "ours": [{"seconds": seconds} for seconds in (1.0, 2.0, 4.0)],
        "theirs": [{"seconds": seconds} for seconds in (3.0, 4.0, 20.0)],
    }
    assert str(report.faster(turns, "ours", "theirs")) == "3 (2 to 5)"


def test_the_facts_of_a_training_are_found_in_what_it_prints():
    printed = "device: CPU\nfirst step after 4.7 s\ntrain: 100 img\n96.3 % in forward, backward and step\n"
    assert whole.facts(printed) == {"share": 96.3, "first_step": 4.7}
    with pytest.raises(RuntimeError, match="did not print"):
        whole.facts("first step after 4.7 s")


def test_the_exponent_of_a_power_law_is_found():
    assert growth.exponent([{"n": n, "seconds": 3 * n**1.5} for n in (1, 4, 16)], "seconds") == pytest.approx(1.5)


def test_the_distance_table_is_rendered_from_committed_numbers():
    rows = json.loads(distances.FILE.read_text(encoding="utf-8"))["rows"]
    assert distances.page(rows).rstrip() in (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_cells_that_do_not_fit_the_minutes_are_marked():
    rows = distances.measure(minutes=0)
    assert len(rows) == 72
    assert distances.page(rows).count("not run") == 72


@pytest.mark.parametrize("part", distances.PARTS)
def test_a_cell_measures_the_functions_of_the_stage(part, tmp_path):
    for name, count in (("samples", 50), ("real", 80)):
        distances.features(tmp_path / f"{name}.npy", count, 8, 0)
    sent = []
    distances.cell(sent.append, part, str(tmp_path / "samples.npy"), str(tmp_path / "real.npy"))
    assert sent[0] == "ready"
    assert sent[1]["seconds"] > 0
    assert sent[1]["mib"] > 1
