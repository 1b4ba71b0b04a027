import json
import os
import signal
import sys

import pytest
import torch

from benchmarks import distances, gpu, growth, long_run, memory, million, report, whole
from benchmarks.__main__ import MEASUREMENTS
from ddpm.data.prepared import Prepared
from ddpm.evaluation import blocks, neighbours, pairs
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


@pytest.mark.parametrize(
    ("part", "limit", "whole"),
    [("fréchet", 60, True), ("nearest", 60, True), ("pairs", 60, True), ("nearest", 0, False), ("pairs", 0, False)],
)
def test_a_cell_measures_the_functions_of_the_stage(monkeypatch, part, limit, whole, tmp_path):
    """A loop that is stopped counts its other rows in proportion."""
    monkeypatch.setattr(blocks, "PAIRS", 800)  # ten rows in a block
    for module, name in ((pairs, "Progress"), (pairs, "_sample_balls"), (neighbours, "Progress")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test
    for name, count in (("samples", 50), ("real", 80)):
        distances.features(tmp_path / f"{name}.npy", count, 8, 0)
    sent = []
    distances.cell(sent.append, part, str(tmp_path / "samples.npy"), str(tmp_path / "real.npy"), limit)
    assert sent[0] == "ready"
    assert sent[1]["seconds"] > 0
    assert (sent[1]["ran"] == 1) == whole
    assert sent[1]["mib"] > 1
    rows = [dict(zip(("part", "samples", "real", "width"), c, strict=True)) | sent[1] for c in distances.CELLS]
    assert distances.page(rows).count("≈") == (0 if whole else 72)


def test_the_page_of_a_gpu_holds_what_was_finished_and_what_was_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    facts = {"machine": {"GPU": "a fast one"}, "quick": False, "seconds": 12.0}
    (tmp_path / "resume.json").write_text(json.dumps(facts | {"same": True}))
    (tmp_path / "speedrun.json").write_text(json.dumps(facts | {"fault": "stopped after 540 s"}))
    (tmp_path / "judge.json").write_text(json.dumps(facts | {"extractor": "pixels", "metrics": {"kid": 0.5}}))
    page = gpu.page()
    for line in ("GPU: a fast one; 12 s.", "- same: True", "Not finished: stopped after 540 s", "| kid | 0.5 |"):
        assert line in page
    assert "tests" not in page


def test_a_step_that_fails_leaves_its_fault_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "STEPS", {"one": broken, "two": lambda _: {"fine": 1}})
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick"])
    monkeypatch.setattr(gpu.os, "environ", os.environ | {})
    previous = signal.getsignal(signal.SIGALRM)
    gpu.main()
    signal.signal(signal.SIGALRM, previous)
    assert json.loads((tmp_path / "one.json").read_text())["fault"] == "no such kernel"
    assert "- fine: 1" in (tmp_path / "README.md").read_text()


def test_the_count_of_memory_is_that_of_the_tensors_that_live_at_once():
    with memory.Peak() as peak:
        one = torch.zeros(1000)
        two = one + 1  # 8000 bytes live
        view = two[10:]
        del one, two
        three = torch.ones(500)  # the view still holds 4000
        del view
    assert (peak.most, peak.now) == (8000, three.nbytes)


def test_a_step_under_fake_tensors_counts_weights_average_gradient_and_optimizer():
    least = 5 * 35_746_307 * 4 / memory.GIB  # Adam holds two
    assert least < memory.counted("paper", 32, 1, False) < 1.2 * least


def test_the_largest_batch_is_a_power_of_two_that_fits():
    assert memory.largest(8, one=2 + 8 * 0.1, many=2 + 128 * 0.1) == 32  # 48 would fit
    assert memory.largest(2, one=2 + 8 * 0.1, many=2 + 128 * 0.1) == 0


def test_the_made_set_is_one_that_the_stages_take(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(million, "HELD_OUT", 3)
    million.make(tmp_path, 5)
    (data := Prepared(tmp_path / "data/prepared")).verify()
    assert data.train.images.shape == (5, 64, 64, 3)


def test_the_size_of_files_is_that_below_a_folder(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_bytes(bytes(1_000_000))
    assert long_run.size(tmp_path) == 1
