"""Every setting has bounds, and every choice and preset of conf/ keeps within them."""

import math

import pytest
import torch

from ddpm.config.load import check
from ddpm.config.schema import Params
from ddpm.core.unet import UNet
from ddpm.training.setup import unet_config
from tests.conftest import ROOT, composed
from tests.support.trees import changed, only_fault

GROUPS = ("dataset", "model", "diffusion", "optimizer", "lr_schedule", "train", "sample", "evaluate", "experiment")
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]


def test_the_composed_default_is_valid(tree):
    params = check(tree)
    assert isinstance(params, Params)
    assert params.optimizer.model_dump(by_alias=True) == tree["optimizer"]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_gives_valid_parameters(group, choice):
    overrides = [f"+{group}={choice}" if group == "experiment" else f"{group}={choice}"]
    if (group, choice) == ("model", "paper"):
        overrides.append("dataset=cifar10")
    check(composed(*overrides))


@pytest.mark.parametrize("preset", [choice for group, choice in CHOICES if group == "experiment"])
def test_the_network_of_every_preset_takes_its_images(preset):
    params = check(composed(f"+experiment={preset}"))
    size, channels = params.dataset.image_size, params.dataset.channels
    with torch.device("meta"):
        network = UNet(unet_config(params.model, size, channels, params.diffusion.learn_variance, 2, True))
        zeros = torch.zeros(2, dtype=torch.int64)
        labels = zeros if params.model.class_conditional else None
        out = network(torch.zeros(2, channels, size, size), zeros, labels)
    assert out.shape == (2, channels * (1 + params.diffusion.learn_variance), size, size)


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("optimizer.lr", "abc", "should be a valid number"),
        ("optimizer.lr", True, "should be a valid number"),
        ("optimizer.lr", None, "should be a valid number"),
        ("train.batch_size", 1.5, "should be a valid integer"),
        ("train.batch_size", 2.0, "should be a valid integer"),
        ("train.batch_size", "3", "should be a valid integer"),
        ("train.batch_size", True, "should be a valid integer"),
        ("train.flip", "yes", "should be a valid boolean"),
        ("train.flip", 1, "should be a valid boolean"),
        ("train.transforms", None, "should be a valid list"),
        ("model.channel_multipliers", 3, "should be a valid list"),
        ("model.channel_multipliers", {"a": 1}, "should be a valid list"),
        ("dataset.path", 3, "should be a valid string"),
        ("dataset.channels", True, "should be 1 or 3"),
        ("dataset.channels", 1.0, "should be 1 or 3"),
        ("dataset.max_megapixels", "179", "should be a valid number"),
        ("dataset.subset", True, "should be null, a count from 1 up, or a fraction between 0 and 1"),
        ("dataset.subset", "all", "should be null, a count from 1 up, or a fraction between 0 and 1"),
        ("train", None, "should be a section, with its settings indented below it"),
        ("lr_schedule", 3, "should be a section, with its settings indented below it"),
        ("optimizer.eps", "x", "should be a number from 0 up and below 1000"),
        ("optimizer.betas", 0.9, "should be two numbers with 0 <= beta1 < beta2 < 1"),
        ("optimizer.betas", [True, False], "should be two numbers with 0 <= beta1 < beta2 < 1"),
    ],
)
def test_a_wrong_type_is_reported_in_one_line(path, value, allowed):
    assert only_fault(**{path.replace(".", "__"): value}) == f"params.yaml: {path} = {value!r}: {allowed}"


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("optimizer.lr", -0.001, "should be greater than 0"),
        ("optimizer.lr", 0.0, "should be greater than 0"),
        ("optimizer.lr", math.nan, "should be a finite number"),
        ("optimizer.lr", math.inf, "should be a finite number"),
        ("optimizer.eps", math.nan, "must be a finite number"),
        ("optimizer.weight_decay", -0.1, "should be a number from 0 up and below 1000"),
        ("optimizer.betas", [0.9, 0.5], "should be two numbers with 0 <= beta1 < beta2 < 1"),
        ("optimizer.betas", [0.9, 0.9], "should be two numbers with 0 <= beta1 < beta2 < 1"),
        ("optimizer.betas", [0.9], "should be two numbers with 0 <= beta1 < beta2 < 1"),
        ("lr_schedule.eta_min", math.nan, "must be a finite number"),
        ("train.batch_size", 0, "should be greater than or equal to 1"),
        ("train.grad_clip", 0.0, "should be greater than 0"),
        ("train.grad_clip", -1.0, "should be greater than 0"),
        ("train.seed", -1, "should be greater than or equal to 0"),
        ("train.seed", 2**63, f"should be less than {2**63}"),
        ("model.base_channels", 10**30, f"should be less than {2**31}"),
        ("model.dropout", math.inf, "should be a finite number"),
        ("dataset.image_size", 2048, "should be less than or equal to 1024"),
        ("dataset.max_megapixels", 0, "should be greater than 0"),
        ("dataset.max_megapixels", 1e6, "should be less than or equal to 100000"),
        ("dataset.subset", 0, "should be null, a count from 1 up, or a fraction between 0 and 1"),
        ("dataset.subset", 1.5, "should be null, a count from 1 up, or a fraction between 0 and 1"),
        ("dataset.subset", math.nan, "should be null, a count from 1 up, or a fraction between 0 and 1"),
        ("dataset.test_fraction", 1.0, "should be less than 1"),
        ("diffusion.timesteps", 1, "should be greater than or equal to 2"),
        ("sample.eta", 1.5, "should be less than or equal to 1"),
        ("sample.count", 1, "should be greater than or equal to 2"),
    ],
)
def test_a_number_out_of_bounds_is_reported_in_one_line(path, value, allowed):
    assert only_fault(**{path.replace(".", "__"): value}) == f"params.yaml: {path} = {value!r}: {allowed}"


@pytest.mark.parametrize("subset", [None, 1, 1000, 0.1])
def test_a_subset_is_a_count_or_a_fraction(subset):
    value = check(changed(dataset__subset=subset)).dataset.subset
    assert value == subset
    assert type(value) is type(subset)


@pytest.mark.parametrize("start", [0.02, 0.5])
def test_betas_have_to_rise(start):
    line = only_fault(diffusion=composed("diffusion=linear")["diffusion"] | {"beta_start": start})
    assert line == f"params.yaml: diffusion.beta_end = 0.02: should be above diffusion.beta_start = {start}"


@pytest.mark.parametrize(("epochs", "steps"), [(3, 100), (None, None)])
def test_epochs_and_steps_both_or_neither_are_refused(epochs, steps):
    line = only_fault(train__epochs=epochs, train__steps=steps)
    assert line == (
        f"params.yaml: train.steps = {steps}: set exactly one of train.epochs (now {epochs}) and train.steps, "
        "the other to null"
    )


def test_epochs_alone_are_allowed():
    assert check(changed(train__epochs=3, train__steps=None)).train.epochs == 3


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("diffusion.schedule", "'linear', 'cosine' or 'sigmoid'"),
        ("diffusion.prediction", "'epsilon', 'x0' or 'v'"),
        ("sample.sampler", "'ddpm', 'ddim' or 'dpm_solver'"),
        ("runtime.device", "'auto', 'cpu' or 'cuda'"),
        ("tracking.wandb", "'auto', 'online', 'offline' or 'disabled'"),
        ("dataset.name", "'digits', 'cifar10', 'mnist', 'fashion_mnist' or 'folder'"),
    ],
)
def test_an_unknown_choice_is_answered_with_all_choices(path, allowed):
    assert only_fault(**{path.replace(".", "__"): "foo"}) == f"params.yaml: {path} = 'foo': should be {allowed}"


def test_a_class_may_be_named_by_a_word_or_a_number():
    params = check(changed(model__class_conditional=True, sample__classes=["cat", 3], sample__guidance=0.0))
    assert params.sample.classes == ["cat", 3]
