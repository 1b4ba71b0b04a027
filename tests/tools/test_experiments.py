"""Which runs form a group, and which numbers may be compared."""

from typing import ClassVar

import pytest

from tests.conftest import composed
from tools.common.experiments import DISTANCE, Group, Run, _run, compared, grouped, not_comparable, read, shown

PARAMS = {"train.seed": 0, "sample.seed": 0, "evaluate.seed": 0, "optimizer.lr": 0.1, "sample.steps": 50}


def run(name: str = "x", fid: float = 1.0, model: str = "m", **changes: object) -> Run:
    params = PARAMS | {key.replace("__", "."): value for key, value in changes.items()}
    return Run(name, name, "success", params, {"frechet_distance": fid, "held_out_loss": 0.2}, {"a.py": "1"}, model)


@pytest.mark.process
def test_main_and_its_further_seeds_are_one_group(repository, monkeypatch):
    monkeypatch.chdir(repository.folder)
    groups = {tuple(sorted(run.name for run in group.runs)) for group in grouped(read())}
    assert groups == {
        ("a1", "a2", "a3", "main"), ("b0", "b1", "b2", "b3"), ("lucky",), ("ddpm1", "ddpm2"), ("eps",), ("code",)
    }  # fmt: skip


def test_the_numbers_of_a_run_are_those_of_its_evaluation():
    class State:
        rev, error = "abc", None

        class data:  # noqa: N801
            params: ClassVar = {"params.yaml": {"data": {"train": {"seed": 3}}}}
            metrics: ClassVar = {
                "results/evaluate/metrics.json": {"data": {"held_out_loss": 0.2}},
                "results/train/metrics.json": {"data": {"held_out_loss": 0.9, "step": 10}},
            }
            deps: ClassVar = {}

    assert _run(State, None, "x").metrics == {"held_out_loss": 0.2}


@pytest.mark.parametrize("name", ["optimizer__lr", "evaluate__seed", "sample__steps"])
def test_runs_that_differ_in_anything_but_seeds_are_two_groups(name):
    assert len(grouped([run(), run(train__seed=1, sample__seed=1), run(**{name: 7})])) == 2


def test_runs_of_other_code_or_data_are_two_groups():
    other = Run("y", "y", "success", dict(PARAMS), {}, {"a.py": "2"})
    assert len(grouped([run(), other])) == 2


def test_a_run_that_is_not_done_is_in_no_group():
    assert grouped([Run("x", "x", "failed", dict(PARAMS)), Run("y", "y", "queued", dict(PARAMS))]) == []


def test_samples_of_one_training_are_averaged_first():
    runs = (run(fid=1), run(fid=2, sample__seed=1), run(fid=4, train__seed=1))
    assert sorted(Group(runs).values("frechet_distance")) == [1.5, 4.0]


def test_the_same_seeds_twice_are_one_draw():
    assert Group((run(fid=1), run(fid=3))).values("frechet_distance") == [2.0]


def test_draws_of_one_training_vary_only_numbers_of_the_samples():
    group = Group((run(fid=1), run(fid=2, sample__seed=1)))
    assert group.values("frechet_distance") == [1.0, 2.0]
    assert group.values("held_out_loss") == [0.2]


def test_draws_of_one_training_do_not_compare_training_settings():
    a = Group((run(fid=1), run(fid=2, sample__seed=1)))
    sampler = Group((run(fid=3, sample__steps=9), run(fid=4, sample__seed=1, sample__steps=9)))
    training = Group((run(fid=3, model="n", optimizer__lr=1), run(fid=4, model="n", sample__seed=1, optimizer__lr=1)))
    assert compared(a, sampler, "frechet_distance") == ([1, 2], [3, 4])
    assert compared(a, training, "frechet_distance") == ([1.5], [3.5])


def test_numbers_on_two_scales_are_not_comparable():
    a, b = Group((run(diffusion__prediction="v"),)), Group((run(diffusion__prediction="x0"),))
    assert not_comparable(a, b, "held_out_loss") == "diffusion.prediction differs"
    assert not_comparable(a, b, "frechet_distance") is None
    fewer = Group((run(sample__count=10),))
    assert not_comparable(a, fewer, "frechet_distance") == "sample.count differs"


def test_a_parameter_is_shown_in_few_characters():
    assert shown("optimizer._target_", "torch.optim.RMSprop") == "RMSprop"
    assert [shown("x", value) for value in (1e-5, None, [3, 8], True)] == ["1e-05", "-", "[3, 8]", "true"]


def test_the_settings_of_a_distance_exist():
    tree = composed("evaluate=dinov2")
    names = [f"{section}.{name}" for section in ("dataset", "sample", "evaluate") for name in tree[section]]
    assert [prefix for prefix in DISTANCE if not any(name.startswith(prefix) for name in names)] == []
