import math

import pytest
import torch

from ddpm.config.load import check
from ddpm.core.diffusion import DiffusionConfig
from ddpm.core.unet import UNet
from ddpm.errors import UserError
from ddpm.training.setup import Design, make_lr_schedule, set_up, unet_config
from tests.conftest import composed, small_unet


def test_the_papers_network_has_the_papers_number_of_parameters():
    params = check(composed("model=paper", "dataset=cifar10"))
    with torch.device("meta"):
        unet = UNet(unet_config(params.model, 32, 3, learn_variance=False, classes=0, unlabelled=True))
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307


@pytest.mark.parametrize("choice", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_follows_the_schedule(choice):
    params = check(composed(f"lr_schedule={choice}"))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = make_lr_schedule(params.lr_schedule, optimizer, warmup=4, steps=20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    expected = {
        "cosine": [(1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)],
        "linear": [1 - i / 16 for i in range(16)],
        "constant": [1.0] * 16,
    }
    assert rates[4:] == pytest.approx(expected[choice])


def test_the_initial_weights_follow_from_the_seed_alone():
    params, design = check(composed()), Design(small_unet().config, DiffusionConfig(50, "cosine", "v"), ())
    models = [set_up(params, design, torch.device("cpu"), 40).model for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))


def test_a_conditional_network_needs_classes():
    model = check(composed("model.class_conditional=true")).model
    labels = [unet_config(model, 8, 1, False, 10, unlabelled) for unlabelled in (False, True)]
    assert [(c.num_class_embeds, c.classes, c.no_label) for c in labels] == [(10, 10, None), (11, 10, 10)]
    with pytest.raises(UserError, match=r"model.class_conditional = true: the prepared data has no classes"):
        unet_config(model, 8, 1, False, 0, True)
