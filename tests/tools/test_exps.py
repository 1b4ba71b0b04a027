"""The table of `make exps`: groups, the best, and what cannot be distinguished from it."""

import sys

import pytest
from PIL import Image
from scipy import stats

from tests.tools.conftest import A, B
from tests.tools.repository import Repository
from tools import exps
from tools.common.experiments import Group, Run
from tools.common.ranking import beside_the_best, ranked


def groups(*several: tuple[float, ...], **params: object) -> list[Group]:
    made = []
    for i, values in enumerate(several):
        runs = [
            Run(
                f"{i}{s}",
                f"{i}{s}",
                "success",
                params | {"train.seed": s, "lr": i},
                {"frechet_distance": value},
                {},
                f"{i}{s}",
            )
            for s, value in enumerate(values)
        ]
        made.append(Group(tuple(runs)))
    return made


def words(*several: tuple[float, ...]) -> list[str | None]:
    found = beside_the_best(groups(*several), "frechet_distance").words
    return [found.get(i) for i in range(len(several))]


def test_the_best_is_a_mean_over_seeds_and_not_a_lucky_run():
    assert words(A, B, (0.03,)) == ["best", "worse", "one run: not known"]
    assert words(B, A, (0.0505, 0.0495)) == ["worse", "cannot be distinguished", "best"]


def test_with_one_run_each_nothing_is_concluded():
    assert words((0.1,), (0.2,)) == [None, None]


def test_the_higher_recall_is_the_better():
    made = [
        Group(tuple(Run(f"{v}", f"{v}", "success", {"train.seed": v, "lr": i}, {"recall": v}) for v in values))
        for i, values in enumerate([(0.1, 0.11), (0.9, 0.91)])
    ]
    assert ranked(made, "recall") == made[::-1]
    assert beside_the_best(made, "recall").words == {0: "worse", 1: "best"}


def test_p_is_welchs_and_corrected_for_all_comparisons():
    found = beside_the_best(groups(A, (0.05, 0.056, 0.054), B), "frechet_distance")
    assert found.p[1] == pytest.approx(stats.ttest_ind(A, (0.05, 0.056, 0.054), equal_var=False).pvalue)
    assert found.corrected[2] == pytest.approx(2 * found.p[2])
    assert found.corrected[1] == pytest.approx(found.p[1])


def test_equal_groups_are_seldom_called_worse():
    import numpy as np

    rng, wrong = np.random.default_rng(0), 0
    for _ in range(100):
        wrong += "worse" in words(*(tuple(rng.normal(1, 0.1, 5)) for _ in range(4)))
    assert wrong <= 10


def printed(repository, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.chdir(repository.folder)
    monkeypatch.setattr(sys, "argv", ["exps", *arguments])
    exps.main()
    return capsys.readouterr().out


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(name))


@pytest.mark.process
def test_seeds_are_one_row_with_mean_standard_error_and_n(repository, monkeypatch, capsys):
    text = printed(repository, monkeypatch, capsys)
    assert "0.05050 ± 0.00065" in row(text, "main +3") and row(text, "main +3").split("0.0505")[0].split()[-1] == "4"
    assert row(text, "main +3").rstrip().endswith("best")
    assert row(text, "b").rstrip().endswith("worse")
    assert row(text, "lucky").rstrip().endswith("one run: not known")
    assert "2 draws" in row(text, "ddpm")
    assert "code.py" in row(text, "code")
    assert "p, by" not in text
    assert "± is, of several runs, the standard error of their mean\n" in text


@pytest.mark.process
def test_one_run_has_the_error_of_its_evaluation_and_a_note(tmp_path, monkeypatch, capsys):
    made = Repository(tmp_path / "repository")
    for seed in (1, 2):
        made.experiment(f"s{seed}", {"frechet_distance": 0.05 + seed / 100}, train__seed=seed)
    numbers = {"frechet_distance": 0.0712, "frechet_distance_se": 0.0034, "recall": 0.8, "recall_se": 0.012}
    made.experiment("one", numbers, optimizer__lr=0.02)
    text = printed(made, monkeypatch, capsys)
    assert "0.0712 ± 0.0034" in row(text, "one") and "0.800 ± 0.012" in row(text, "one")
    assert "0.0600 ± 0.0058" in row(text, "main +2")
    note = "± is, of several runs, the standard error of their mean; of one run, its own: over its samples and held-out"
    assert note in text
    text = printed(made, monkeypatch, capsys, "--runs")
    assert "0.0712 ± 0.0034" in row(text, "one") and "± is, of one run, its own: over its samples" in text


@pytest.mark.process
def test_the_p_value_is_shown_on_request_and_each_run_too(repository, monkeypatch, capsys):
    text = printed(repository, monkeypatch, capsys, "--p")
    p = stats.ttest_ind(A, B, equal_var=False).pvalue
    assert f"{p:.4f}" in row(text, "b")
    text = printed(repository, monkeypatch, capsys, "--runs")
    assert all(row(text, name) for name in ("main", "a1", "b3", "ddpm2")) and "±" not in text


@pytest.mark.process
def test_by_sorts_by_a_parameter_and_draws_the_metric(repository, monkeypatch, capsys, tmp_path):
    out = tmp_path / "new/by.png"
    text = printed(repository, monkeypatch, capsys, "--by", "optimizer.lr", "--out", str(out))
    lines = [
        next(i for i, line in enumerate(text.splitlines()) if f" {lr} " in line) for lr in ("0.002", "0.005", "0.02")
    ]
    assert lines == sorted(lines)
    with Image.open(out) as picture:
        assert picture.width > 400
    printed(repository, monkeypatch, capsys, "--by", "diffusion.prediction", "--out", str(out))


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--by", "optimizer.lrr"], "BY = optimizer.lrr: no parameter (did you mean optimizer.lr?)"),
        (["--by", "train.steps"], "BY = train.steps: is 1000 in all finished experiments"),
        (
            ["--metric", "memorisation_ratio"],
            "METRIC = memorisation_ratio: should be one of frechet_distance, precision",
        ),
    ],
)
def test_a_parameter_without_a_comparison_is_refused_in_one_line(repository, monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        printed(repository, monkeypatch, capsys, *arguments)
    assert words in str(stop.value) and "\n" not in str(stop.value)
