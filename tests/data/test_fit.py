from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ddpm.data.fit import check_settings
from ddpm.errors import UserError
from tests.conftest import composed

INFO = {"shape": [8, 8, 1], "counts": {"train": 60, "test": 30}, "classes": ["a"], "class_counts": [60]}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("sample.seed=0", None),
        ("train.transforms=[{_target_: torchvision.transforms.v2.RandomCrop, size: 64}]", r"train.transforms.0 \(Ran"),
        ("sample.classes=[b]", r"sample.classes = \['b'\]: 'b' is not a class of the data"),
    ],
)
def test_settings_of_any_stage_must_fit_the_data(override, fault):
    Path("params.yaml").write_text(OmegaConf.to_yaml(composed("model.class_conditional=true", override)))
    if fault is None:
        return check_settings(INFO)
    with pytest.raises(UserError, match=f"^params.yaml: {fault}"):
        check_settings(INFO)
