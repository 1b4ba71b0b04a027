import numpy as np
import pytest
import torch

from ddpm.core.ema import EMA, WIDEST, exponent
from ddpm.core.unet import UNet
from tests.conftest import small_unet

WIDTHS = [0.001, 0.012, 0.05, 0.1, 0.2, WIDEST]


def weights_of_steps(width: float, steps: int) -> np.ndarray:
    """The weight of each step in the average: the network's weights are 1 after one step, and 0 after the others."""
    gamma, weights = exponent(width), np.empty(steps)
    kept = 1.0
    for step in reversed(range(steps)):
        beta = (step / (step + 1)) ** (gamma + 1)
        weights[step] = kept * (1 - beta)
        kept *= beta
    return weights


def test_the_exponents_are_those_that_karras_et_al_print():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_average_is_as_wide_as_asked_whatever_the_length(width):
    for steps in (20_000, 80_000):
        weights = weights_of_steps(width, steps)
        places = (np.arange(steps) + 1) / steps
        mean = (weights * places).sum()
        assert weights.sum() == pytest.approx(1)
        assert np.sqrt((weights * (places - mean) ** 2).sum()) == pytest.approx(width, rel=0.01)


@pytest.mark.parametrize("width", [-0.1, 0, 0.2801, 1, float("nan")])
def test_a_width_that_no_power_gives_is_refused(width):
    with pytest.raises(ValueError, match=r"must be above 0 and at most 0\.28"):
        exponent(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_average_forgets_the_initial_weights(width):
    model = UNet(small_unet().config)
    ema, steps = EMA(model, width), 12
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step**2)
        ema.update(step)
    expected = (weights_of_steps(width, steps) * np.arange(steps) ** 2).sum()
    for average in ema.model.parameters():
        torch.testing.assert_close(average, torch.full_like(average, expected))
    assert not ema.model.training


def test_a_width_of_zero_is_the_network_itself():
    model = UNet(small_unet().config)
    ema = EMA(model, 0)
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(step + 0.1)
        ema.update(step)
        assert all(torch.equal(a, b) for a, b in zip(ema.model.parameters(), model.parameters(), strict=True))
