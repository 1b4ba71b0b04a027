"""The files of conf/search/: which settings they may hold."""

from pathlib import Path

import pytest
import yaml

from ddpm.errors import UserError
from tests.conftest import ROOT
from tests.support.search import SEARCH
from tools.common.searches import composed, read_search, typed


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/, as links, except the folder of searches."""
    monkeypatch.chdir(tmp_path)
    Path("conf/search").mkdir(parents=True)
    for path in (ROOT / "conf").iterdir():
        if path.name != "search":
            Path("conf", path.name).symlink_to(path)
    return tmp_path / "conf/search"


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "conf/search").glob("*.yaml")])
def test_every_search_of_the_repository_could_run(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    assert read_search(name).space


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [0]}, "seeds = [0]: list should have at least 2 items"),
        ({"seeds": [1, 1]}, "seeds = [1, 1]: names a seed twice"),
        ({"metric": "loss"}, "metric = 'loss': should be one of frechet_distance"),
        ({"trials": 0}, "trials = 0: should be greater than or equal to 1"),
        ({"budget": 3}, "budget = 3: extra inputs are not permitted"),
        ({"study": "a b"}, "study = 'a b'"),
        ({"space": {}}, "space = {}"),
        ({"space": {"optimizer.lr": {"low": 1, "high": 0.5}}}, "should be {low, high} with low below high"),
        ({"space": {"optimizer.lr": {"low": 0, "high": 0.5, "log": True}}}, "low should be above 0"),
        ({"space": {"optimizer.lr": {"choices": []}}}, "with one choice or more"),
        ({"space": {"optimizer.lr": {"choices": [1], "log": True}}}, "with one choice or more"),
        ({"space": {"optimizer.rate": {"choices": [1]}}}, "space.optimizer.rate = 1: "),
        ({"space": {"train.grad_clip": {"low": -1.0, "high": 1.5}}}, "space.train.grad_clip = -1.0: its runs would be"),
        ({"space": {"train.seed": {"choices": [0, 1]}}}, "space.train.seed: is set by `seeds`"),
        ({"space": {"sample.count": {"choices": [10, 20]}}}, "trials could not be compared"),
        ({"overrides": ["+experiment=none"]}, "space.optimizer.lr = "),
        (
            {"metric": "held_out_loss", "space": {"diffusion.prediction": {"choices": ["v", "epsilon"]}}},
            "its scale depends on diffusion",
        ),
    ],
)
def test_a_wrong_search_is_refused_with_the_setting(conf, changes, words):
    (conf / "x.yaml").write_text(yaml.safe_dump(SEARCH | changes))
    with pytest.raises(UserError) as fault:
        read_search("x")
    assert words in str(fault.value)
    assert all(line.startswith("conf/search/x.yaml: ") for line in str(fault.value).splitlines())


def test_a_missing_search_is_refused_with_the_existing_ones(conf):
    (conf / "digits.yaml").write_text(yaml.safe_dump(SEARCH))
    with pytest.raises(
        UserError, match=r"SEARCH = digit: there is no conf/search/digit.yaml \(did you mean digits\?\)"
    ):
        read_search("digit")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1e-05"),
        (True, "true"),
        (None, "null"),
        ([1, 2], "[1,2]"),
        ("adam", "adam"),
        ([False, True], "[false,true]"),
    ],
)
def test_a_value_is_typed_as_hydra_reads_it(value, text):
    assert typed(value) == text


def test_the_overrides_of_a_run_give_the_values_and_the_seed(conf):
    space = {"optimizer": {"choices": ["adam", "sgd"]}, "model.channel_multipliers": {"choices": [[1, 2], [1, 3]]}}
    (conf / "x.yaml").write_text(yaml.safe_dump(SEARCH | {"space": space, "overrides": ["train.steps=700"]}))
    search = read_search("x")
    tree = composed(search.run_overrides({"optimizer": "sgd", "model.channel_multipliers": "[1,3]"}, 5))
    assert tree["optimizer"]["_target_"] == "torch.optim.SGD" and tree["model"]["channel_multipliers"] == [1, 3]
    assert (tree["train"]["seed"], tree["sample"]["seed"], tree["train"]["steps"]) == (5, 5, 700)
