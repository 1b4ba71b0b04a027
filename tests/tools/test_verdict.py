"""One paragraph on two revisions, which states no more than the numbers show."""

import sys

import pytest

from tools import verdict


def paragraph(repository, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.chdir(repository.folder)
    monkeypatch.setattr(sys, "argv", ["verdict", *arguments])
    verdict.main()
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    return text


pytestmark = pytest.mark.process


def test_a_clear_difference_is_stated_with_its_interval(repository, monkeypatch, capsys):
    text = paragraph(repository, monkeypatch, capsys, "main", "b2")
    assert text.startswith("From main to b2, this changed: optimizer.lr (0.002 → 0.02). b2 is worse than main: ")
    assert "0.05050 ± 0.00065 (n = 4) → 0.0910 ± 0.0011 (n = 4), a difference of +0.0405 (95 % interval +0.0" in text
    assert "Not known, with the seeds that would settle it: recall 0.8200 ± 0.0058" in text
    back = paragraph(repository, monkeypatch, capsys, "b2", "a1")
    assert "a1 is better than b2" in back and "a difference of -0.0405" in back


def test_one_run_is_not_enough_to_know(repository, monkeypatch, capsys):
    text = paragraph(repository, monkeypatch, capsys, "main", "lucky")
    assert "Whether lucky is better is not known" in text and "first 2 more seeds of lucky." in text


def test_two_seeds_of_one_group_are_not_compared(repository, monkeypatch, capsys):
    assert "seeds alone" in paragraph(repository, monkeypatch, capsys, "a1", "a3")


def test_losses_of_two_kinds_of_prediction_are_not_compared(repository, monkeypatch, capsys):
    text = paragraph(repository, monkeypatch, capsys, "b1", "eps")
    assert "Not to be compared: held-out loss (diffusion.prediction differs)." in text


def test_changed_code_is_named(repository, monkeypatch, capsys):
    assert "this changed: the content of code.py." in paragraph(repository, monkeypatch, capsys, "main", "code")


def test_an_experiment_of_an_earlier_commit_is_found(repository, monkeypatch, capsys):
    repository.git("checkout", "-q", "-b", "later")
    repository.commit("later", {"frechet_distance": 0.04}, **{"train.steps": 2000})
    try:
        text = paragraph(repository, monkeypatch, capsys, "b1", "later")
    finally:
        repository.git("checkout", "-q", "main")
    assert "train.steps (1000 → 2000)" in text and "(n = 4)" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["main"], "REV = 'main': takes two commits or experiments"),
        (["main", "nope"], "unknown Git revision 'nope'"),
        (["main", "b1", "--metric", "loss"], "METRIC = loss: should be one of"),
    ],
)
def test_a_wrong_question_is_refused_in_one_line(repository, monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        paragraph(repository, monkeypatch, capsys, *arguments)
    assert words in str(stop.value) and "\n" not in str(stop.value)
