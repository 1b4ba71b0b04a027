"""The trials of a search in Optuna's storages: which worker has which, how many there are, which are hopeless."""

import threading
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from ddpm.errors import UserError
from tests.support.search import SEARCH
from tools.common.searches import Search
from tools.common.study import Pruner, Study, open_storage


def study(storage, worker: str = "a", origin: str = "o", **changes: object) -> Study:
    return Study(Search.model_validate(SEARCH | changes), storage, worker, origin)


@pytest.fixture(params=["journal", "sqlite"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "new/journal") if request.param == "journal" else f"sqlite:///{tmp_path}/trials.db"


@pytest.mark.heavy
def test_a_restarted_worker_resumes_its_trial_with_its_values(address):
    trial = study(open_storage(address)).next()
    again = study(open_storage(address))
    (mine,) = again.unfinished()
    assert mine.number == trial.number and again.suggest(mine) == trial.params
    assert study(open_storage(address), "b").unfinished() == []


def test_a_trial_killed_before_it_had_values_gets_them_later(address):
    one = study(open_storage(address))
    one._create()
    (mine,) = study(open_storage(address)).unfinished()
    assert set(one.suggest(mine)) == {"optimizer.lr"}


def test_a_lost_workers_trials_can_be_adopted(address):
    study(open_storage(address), "lost").next()
    other = study(open_storage(address), "b")
    assert other.adopt("lost") == 1 and len(other.unfinished()) == 1
    assert other.adopt("lost") == 0


def test_parallel_workers_use_the_budget_once_without_repeats(tmp_path):
    address, taken = str(tmp_path / "journal"), []
    space = {"optimizer.lr": {"choices": [i / 1000 for i in range(1, 30)]}}

    def work(name: str) -> None:
        mine = study(open_storage(address), name, trials=12, space=space)
        while trial := mine.next():
            taken.append(trial.params["optimizer.lr"])
            mine.finish(trial, [1.0, 2.0])

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(Counter(taken).values()) == 1
    done = study(open_storage(address), "x", trials=12, space=space)
    assert len(done.trials()) <= 12
    while trial := done.next():  # two workers with the same settings may both have withdrawn
        done.finish(trial, [1.0, 2.0])
    assert len(done.trials()) == 12 and all(t.state == TrialState.COMPLETE for t in done.trials())


def test_every_choice_is_tried_even_if_one_is_by_far_the_best():
    space = {"optimizer.lr": {"choices": [i / 1000 for i in range(1, 25)]}}
    mine = study(optuna.storages.InMemoryStorage(), trials=20, space=space)
    while trial := mine.next():
        value = abs(float(trial.params["optimizer.lr"]) - 0.01)
        mine.finish(trial, [value, value])
    assert len(mine.trials()) == 20


def test_the_value_of_a_trial_is_the_mean_over_its_seeds():
    made = study(optuna.storages.InMemoryStorage())
    made.finish(made.next(), [1.0, 2.0])
    assert made.trials()[0].value == 1.5


@pytest.mark.parametrize("change", [{"seeds": [0, 2]}, {"metric": "recall"}, {"overrides": ["train.steps=5"]}])
def test_trials_of_another_search_are_not_mixed_in(change):
    storage = optuna.storages.InMemoryStorage()
    study(storage)
    study(storage, trials=99, prune_after=2)
    with pytest.raises(UserError, match="study = s: was begun with another metric, seeds, overrides or space"):
        study(storage, **change)
    with pytest.raises(UserError, match="study = s: was begun with another commit or other code"):
        study(storage, origin="p")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nosql://host/x", "storage = nosql://host/x: cannot be opened"),
        ("postgresql://me:secret@127.0.0.1:1/x", r"storage = postgresql://me:\*\*\*@127.0.0.1:1/x: cannot be opened"),
        ("mysql://host/x", "storage = mysql://host/x: cannot be opened: install its driver, the package MySQLdb"),
        ("/proc/none/journal", "storage = /proc/none/journal: cannot be opened"),
    ],
)
def test_an_unreachable_storage_is_refused_without_its_password(address, words):
    with pytest.raises(UserError, match=words) as fault:
        open_storage(address)
    assert "secret" not in str(fault.value) and "\n" not in str(fault.value)


def hopeless(losses, mine, name: str = "diffusion.prediction", value: str = "first") -> bool:
    made = optuna.create_study(pruner=Pruner(after=3, share=0.5))
    choices = {name: optuna.distributions.CategoricalDistribution(["first", "second"])}
    for points in losses:
        made.add_trial(
            create_trial(value=0.0, params={name: "first"}, distributions=choices, intermediate_values=points)
        )
    frozen = create_trial(
        state=TrialState.RUNNING, params={name: value}, distributions=choices, intermediate_values=mine
    )
    return Pruner(after=3, share=0.5).prune(made, frozen)


CURVES = [{10: 1.0, 20: 0.5, 40: 0.1 * i} for i in range(1, 5)]


def test_a_loss_above_three_quarters_of_the_others_is_hopeless():
    assert hopeless(CURVES, {40: 0.5})
    assert not hopeless(CURVES, {40: 0.2})


def test_no_trial_is_hopeless_early_or_among_few():
    assert not hopeless(CURVES, {10: 9.0}), "hopeless before half of the training"
    assert not hopeless(CURVES[:2], {40: 9.0}), "hopeless beside two others only"


def test_a_loss_between_two_points_uses_the_earlier_point():
    assert hopeless(CURVES, {30: 0.6})
    assert not hopeless(CURVES, {30: 0.5})


@pytest.mark.parametrize("name", ["diffusion.prediction", "train.weighting", "train.noise_coupling"])
def test_losses_on_another_scale_are_not_compared(name):
    assert hopeless(CURVES, {40: 9.0}, name, "first")
    assert not hopeless(CURVES, {40: 9.0}, name, "second")
