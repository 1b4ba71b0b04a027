import argparse
import json
import os
import signal
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import colour, distances, gpu, growth, long_run, memory, million, ours, quality, report, speedrun, whole
from benchmarks.__main__ import SECTIONS
from ddpm.data.prepared import Prepared
from ddpm.evaluation import blocks, pairs
from ddpm.evaluation import distances as measures
from tests.conftest import ROOT


def test_the_page_is_rendered_from_the_committed_numbers():
    page, charts = report.render(SECTIONS)
    assert (report.RESULTS / "README.md").read_text(encoding="utf-8") == page
    assert charts.keys() == {path.name for path in report.RESULTS.glob("*.png")}


def test_a_ratio_is_taken_in_each_round():
    turns = {
        "ours": [{"seconds": seconds} for seconds in (1.0, 2.0, 4.0)],
        "theirs": [{"seconds": seconds} for seconds in (3.0, 4.0, 20.0)],
    }
    assert str(report.faster(turns, "ours", "theirs")) == "3 (2 to 5)"


def test_a_training_fills_the_seconds_though_its_pace_was_another():
    made = []

    def train(steps):
        made.append(steps)
        return 2.0 + 0.5 * steps

    assert quality.fill(train, 60, None) == (106, 55.0)
    assert quality.fill(train, 60, 1.0) == (112, 58.0)
    assert made == [quality.PROBE, 106, 60, 112]


@pytest.fixture
def raced(monkeypatch):
    """A race whose trainings are made up: a contender's distance is its choice's, divided by the seconds."""

    def trained(entry, choice, seed, data, plan):
        steps, seconds = plan(lambda steps: 0.1 * steps)
        distance = entry.choices[choice]["distance"] * (1 + seed / 10) / seconds
        row = {"name": entry.name, "choice": choice, "seed": seed, "steps": steps, "seconds": seconds}
        return row | {"distance": distance, "count": data.count}

    monkeypatch.setattr(quality, "trained", trained)
    entries = [
        quality.Entry(quality.OURS, "", {"default": {"distance": 10.0}}),
        quality.Entry("peer", "", {"slow": {"distance": 50.0}, "fast": {"distance": 20.0}}),
    ]
    race = quality.Race(quality.Data(Path(), 400, np.zeros((1, 1))))
    race.run(entries, seeds=[1, 2], goals=[10, 20], choosing=5)
    return race, entries


def test_a_race_alternates_with_the_settings_chosen_on_another_seed(raced):
    race, _ = raced
    order = [(row["name"], row["choice"], row["seed"], row["goal"], row["count"]) for row in race.rows]
    assert order[:4] == [
        ("peer", "slow", 0, 5, 100),
        ("peer", "fast", 0, 5, 100),
        ("ours", "default", 1, 10, 400),
        ("peer", "fast", 1, 10, 400),
    ]
    assert [row[2:4] for row in order[4:]] == [(1, 20)] * 2 + [(2, 10)] * 2 + [(2, 20)] * 2


def test_a_race_continues_where_it_was_cut(raced):
    race, entries = raced
    rows, race.rows = race.rows, race.rows[:5]
    race.run(entries, seeds=[1, 2], goals=[10, 20], choosing=5)
    assert race.rows == rows


def test_the_page_of_a_race_has_means_with_errors_and_the_choices(raced):
    page = quality.page({"count": 400, "reference": 1797, "rows": raced[0].rows})
    assert "| ours | 1.150 ± 0.050 (100 steps, 10 s) | 0.575 ± 0.025 (200 steps, 20 s) |" in page
    assert "| ours by the better peer's | 0.50 | 0.50 |" in page
    assert "| peer | slow | 5 s | 10 |" in page


def test_the_comparison_in_colour_is_kept_as_it_goes_and_continues(tmp_path, monkeypatch):
    rng, made = np.random.default_rng(0), []
    for split, count in (("train", 30), ("test", 20)):
        for i in range(count):
            (folder := tmp_path / "images" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")

    def trained(entry, choice, seed, data, plan):
        if len(made) == 8:
            raise KeyboardInterrupt
        made.append((entry.name, seed))
        distance = data.distance(rng.integers(0, 256, (9, 32, 32, 3), np.uint8))
        return {"name": entry.name, "choice": choice, "seed": seed, "steps": 3, "seconds": 1.0, "distance": distance}

    monkeypatch.setattr(quality, "trained", trained)
    monkeypatch.setattr(colour, "features", lambda images: images[:, ::8, ::8].mean((3,)).reshape(len(images), -1))
    call = argparse.Namespace(quick=True, minutes=0.1, seeds=[1], only="", again=False)
    data, file = colour.photographs(tmp_path / "images", tmp_path / "work", quick=True), tmp_path / "colour.json"
    with pytest.raises(KeyboardInterrupt):
        colour.compare(data, file, call)
    made.clear()
    result = colour.compare(data, file, call)
    assert made == [("denoising-diffusion-pytorch", 1)]
    assert len(result["rows"]) == 9
    assert "after 0.1 min" in colour.page(result)
    made.clear()
    colour.compare(data, file, argparse.Namespace(**vars(call) | {"only": "ours", "again": True}))
    assert made == [("ours", 1)]


@pytest.mark.parametrize("first", [100, 400, 1600])
def test_the_seconds_to_a_distance_are_found_from_any_first_number_of_steps(first):
    made = []

    def train(steps):  # 0.04 after 800 steps, in 80 s
        made.append(steps)
        noises = (-0.1, 0, 0.1)
        return [{"steps": steps, "seconds": steps / 10, "distance": 32 / steps * (1 + noise)} for noise in noises]

    missed, met = speedrun.around(train, 0.0401, first)
    assert fmean(row["distance"] for row in missed) > 0.0401 > fmean(row["distance"] for row in met)
    assert made[0] == first
    assert len(made) <= 8
    seconds, error = speedrun.seconds_to(0.04, missed, met)
    assert seconds == pytest.approx(80, rel=1e-3)
    assert error == pytest.approx(80 * 0.1 / 3**0.5, rel=0.02)  # of the mean of the three distances


def test_a_distance_that_no_training_reaches_is_reported():
    with pytest.raises(ValueError, match="from 10 to 160 steps"):
        speedrun.around(lambda steps: [{"steps": steps, "distance": 1.0}], 0.5, 10)


def test_a_line_of_the_board_has_its_commit_machine_and_error():
    machine = {"CPU": "a fast one", "torch": "2.15.0"}
    row = {"what": "Muon", "commit": "abc1234", "machine": machine, "data": "digits", "target": 0.04}
    page = speedrun.page({"rows": [row | {"seconds": 81.234, "error": 4.56}]})
    assert "| Muon | digits, 0.04 | abc1234 | a fast one, torch 2.15.0 | 81.2 ± 4.6 |" in page


@pytest.mark.heavy
def test_ours_trains_and_draws_for_a_race(tmp_path):
    data, answers, requests = ours.prepared(tmp_path, "dataset=digits"), [], [2, None]

    def send(answer):
        answers.append(answer)
        if not requests:
            raise StopIteration
        return requests.pop(0)

    settings = {"count": 4, "seed": 1, "out": f"{tmp_path}/samples.npy", "overrides": []}
    settings["overrides"] = ["runtime.threads=1", "model.base_channels=8", "sample.steps=2"]
    with pytest.raises(StopIteration):
        ours.quality(send, f"{tmp_path}/prepared/train/images.npy", **settings)
    assert answers[0] == "ready"
    assert answers[1] > 0
    assert np.load(tmp_path / "samples.npy").shape == (4, 8, 8, 1)
    assert ours.distance(data.train.images, data.train.images) == pytest.approx(0, abs=1e-6)


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
    [
        ("fréchet", 60, True),
        ("nearest", 60, True),
        ("pairs", 60, True),
        ("fréchet", 0, False),
        ("nearest", 0, False),
        ("pairs", 0, False),
    ],
)
def test_a_cell_measures_the_functions_of_the_stage(monkeypatch, part, limit, whole, tmp_path):
    """A loop that is stopped counts its other rows or tiles in proportion."""
    monkeypatch.setattr(blocks, "TILE", 10)
    monkeypatch.setattr(blocks, "BLOCK", 80)
    for module, name in ((measures, "Progress"), (blocks, "Progress"), (pairs, "_sample_balls")):
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


def test_cells_of_the_same_code_are_kept_and_the_others_measured(monkeypatch, tmp_path):
    cells, asked = [("nearest", n, 10, 8) for n in (1, 2, 3)], []

    class Measured:
        def __init__(self, contender):
            asked.append(np.load(contender.settings["samples"]).shape)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self):
            return {"seconds": 1.0, "ran": 1.0, "mib": 1.0}

    monkeypatch.setattr(distances, "Worker", Measured)
    monkeypatch.setattr(distances, "CELLS", cells)
    monkeypatch.setattr(distances, "FILE", tmp_path / "distances.json")
    monkeypatch.setattr(distances, "page", lambda rows: f"{len(rows)} cells")
    commit = "abc1234"
    monkeypatch.setattr(distances, "code", lambda: commit)

    def call(*options):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["distances", *options])
        distances.main()
        rows = json.loads(distances.FILE.read_text())["rows"]
        assert sorted(map(distances.cell_of, rows)) == cells
        return [count for count, _ in asked]

    assert call() == [1, 2, 3]
    rows = json.loads(distances.FILE.read_text())["rows"]
    distances.FILE.write_text(json.dumps({"rows": rows[1:]}))  # as a call that was cut leaves it
    assert call() == [1]
    assert call("--again") == [1, 2, 3]
    commit = "def5678"
    assert call() == [1, 2, 3]
    commit = None  # changes that are in no commit
    assert call() == call() == [1, 2, 3]


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


@pytest.mark.heavy
def test_a_step_under_fake_tensors_counts_weights_average_gradient_and_optimizer(monkeypatch):
    monkeypatch.setitem(memory.NETWORKS, ("small", 8), ["model.base_channels=128"])
    network = ours._network(ours.params("model=small", "model.base_channels=128"), 8, 3)
    least = 5 * sum(parameter.nbytes for parameter in network.parameters()) / memory.GIB  # Adam holds two
    assert least < memory.counted("small", 8, 1, False) < 1.2 * least


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
