import pytest
import torch

from ddpm.errors import UserError
from ddpm.training.curves import DIVERGED_LOSS, Window


def filled(*losses):
    window = Window(("loss", "grad_norm"), 4, torch.device("cpu"))
    for loss in losses:
        window.add(torch.tensor([loss, 2.0]))
    return window


def test_a_point_is_the_mean_since_the_last_one():
    window = filled(1.0, 2.0, 6.0)
    assert window.take(2) == {"loss": 3.0, "grad_norm": 2.0}
    window.add(torch.tensor([5.0, 7.0]))
    assert window.take(3) == {"loss": 5.0, "grad_norm": 7.0}


def test_a_refilled_window_gives_the_same_point():
    window, resumed = filled(1.0, 2.0), filled()
    resumed.refill(window.check(1))
    for each in (window, resumed):
        each.add(torch.tensor([6.0, 2.0]))
    assert resumed.take(2) == window.take(2)


def test_a_value_that_is_not_finite_is_named_with_its_step():
    with pytest.raises(UserError, match=r"the loss is inf and the gradient's norm 2 at step 11; lower optimizer.lr"):
        filled(1.0, float("inf"), float("nan")).check(12)


def test_a_mean_loss_that_will_not_recover_ends_the_training():
    filled(DIVERGED_LOSS).take(0)
    with pytest.raises(UserError, match=r"the mean loss of steps 8 to 9 is 11\.0, and .*; lower optimizer.lr"):
        filled(DIVERGED_LOSS, DIVERGED_LOSS + 2).take(9)
