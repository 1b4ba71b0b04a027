"""The step in fp16: the scale of the loss, the steps that overflow, and the way back after a stop."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from ddpm.config.load import check
from ddpm.core.diffusion import DiffusionConfig
from ddpm.errors import UserError
from ddpm.runtime.resume import ResumeState
from ddpm.runtime.signals import Interrupted
from ddpm.training import held_out
from ddpm.training.setup import Design, set_up
from ddpm.training.step import optimizer_step
from tests.conftest import composed, small_unet
from tests.support.training import same, train

TINY = {"block_out_channels": (8,), "attention": (False,), "dropout": 0.0}  # fp16 is slow on a CPU
FP16 = "train.precision=fp16"
run = partial(train, network=TINY)


@pytest.fixture(autouse=True)
def few_held_out_draws(monkeypatch):
    monkeypatch.setattr(held_out, "DRAWS", 8)


@pytest.fixture
def overflows(monkeypatch):
    """Scales that overflow at first, and again whenever they have grown, which they do after two good steps."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**28, growth_interval=2))


def ready(*overrides):
    params = check(composed(FP16, "train.batch_size=8", *overrides))
    design = Design(small_unet(**TINY).config, DiffusionConfig(50, "cosine", "v"), ())
    return set_up(params, design, torch.device("cpu"), 40), params.train


def one_step(setup, settings, step):
    images = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return optimizer_step(setup, settings, images, torch.zeros(8, dtype=torch.int64), step)


@pytest.mark.process
def test_fp16_follows_the_curve_of_fp32(tmp_path):
    """And the norm of its gradient is that of the gradient, not of the scaled one."""
    _, exact = run(tmp_path, "train.precision=fp32", name="fp32")
    _, half = run(tmp_path, FP16, "train.accumulation=2", name="fp16")
    for step, metrics in exact.logged.items():
        assert half.logged[step]["loss_scale"] == 2.0**16
        assert half.logged[step] == pytest.approx(metrics | {"loss_scale": 2.0**16}, rel=0.02)
    assert "loss_scale" not in exact.logged[3]


@pytest.mark.process
@pytest.mark.usefixtures("overflows")
@pytest.mark.parametrize("optimizer", ["adam", "muon", "sgd"])
def test_a_resumed_fp16_run_ends_in_the_same_bytes(tmp_path, optimizer):
    changes = (FP16, f"optimizer={optimizer}", "train.log_every_steps=1", "train.steps=16")
    whole, curves = run(tmp_path, *changes)
    scales = [metrics["loss_scale"] for metrics in curves.logged.values()]
    later = {b / a for a, b in pairwise(scales[8:])}
    assert later == {0.5, 1.0, 2.0}  # steps are skipped to the end
    with pytest.raises(Interrupted):
        run(tmp_path, *changes, stop_at=11, name="cut")
    with ResumeState(tmp_path / "state-cut") as state:
        assert state.load()["scaler"]["scale"] == scales[10]
    resumed, replayed = run(tmp_path, *changes, name="cut")
    assert same(whole, resumed)
    assert replayed.logged == curves.logged


@pytest.mark.heavy
@pytest.mark.usefixtures("overflows")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd"])
def test_a_step_that_overflows_changes_no_weight_and_no_momentum(recwarn, optimizer):
    setup, settings = ready(f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    before = [weight.detach().clone() for weight in setup.model.parameters()]
    step = 0
    while (values := one_step(setup, settings, step))[-1] == 0:
        assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))
        assert values.isfinite().all() and setup.scaler.get_scale() == 2.0 ** (27 - step)
        setup.schedule.step()
        step += 1
    assert step > 2
    assert not all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))

    fresh, _ = ready(f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    for group, other in zip(fresh.optimizer.param_groups, setup.optimizer.param_groups, strict=True):
        group["lr"] = other["lr"]
    fresh.scaler.load_state_dict(setup.scaler.state_dict())
    one_step(fresh, settings, step)
    assert same(fresh.model, setup.model), "the first step that does not overflow is that of a fresh optimizer"
    assert not [text for warning in recwarn if "lr_scheduler" in (text := str(warning.message))]


@pytest.mark.heavy
def test_gradients_that_overflow_at_any_scale_end_the_training(tmp_path, monkeypatch):
    original = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: original(self, loss) * (
        float("inf") if loss.requires_grad else 1.0))  # fmt: skip
    fault = r"training diverged: the gradient overflows fp16 at step 19 .*scale of 0\.125; .*train.precision=fp32"
    with pytest.raises(UserError, match=fault):
        run(tmp_path, FP16, "train.steps=40", "train.log_every_steps=20")


@pytest.mark.process
@pytest.mark.parametrize(("first", "then"), [(FP16, "train.precision=fp32"), ("train.precision=fp32", FP16)])
def test_a_state_resumes_where_auto_takes_another_precision(tmp_path, first, then):
    """As on another GPU: the scale starts as in a new training, or is forgotten."""
    with pytest.raises(Interrupted):
        run(tmp_path, first, stop_at=6)
    _, curves = run(tmp_path, then)
    assert max(curves.logged) == 12
    assert ("loss_scale" in curves.logged[12]) is (then == FP16)
