import math

import numpy as np
import pytest
import torch

from ddpm.diffusion import DiffusionConfig, GaussianDiffusion, make_betas


def diffusion(schedule="linear", prediction="epsilon", timesteps=1000):
    return GaussianDiffusion(DiffusionConfig(timesteps, schedule, prediction))


def test_the_papers_schedule_ends_where_the_paper_says():
    linear = diffusion()
    assert len(linear.betas) == 1000  # t = 0 ... T-1, not T + 1 of them
    assert linear.betas[0] == 1e-4
    assert linear.betas[-1] == 0.02
    assert linear.alphas_cumprod[-1] == pytest.approx(4.036e-5, rel=1e-4)
    # beta-tilde of t = 1
    variance = linear.betas[1] * (1 - linear.alphas_cumprod[0]) / (1 - linear.alphas_cumprod[1])
    assert variance == pytest.approx(5.453e-5, rel=1e-3)


def test_the_cosine_schedule_follows_its_formula():
    cosine = diffusion("cosine")
    u = np.array([100, 500, 900])
    expected = np.cos(((u + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / np.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alphas_cumprod[u], expected, rtol=1e-9)
    assert cosine.betas.max() == 0.999


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_betas_are_float64_and_rise(schedule):
    betas = make_betas(DiffusionConfig(50, schedule, "v"))
    assert betas.dtype == np.float64
    assert (np.diff(betas) > 0).all()
    assert 0 < betas[0] < betas[-1] < 1


def test_q_sample_has_the_mean_and_variance_of_equation_4():
    d = diffusion()
    x0 = torch.full((20_000, 1, 1, 2), 0.7)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for t in (0, 250, 999):
        x_t = d.q_sample(x0, torch.full((len(x0),), t), noise).double()
        alpha_bar = d.alphas_cumprod[t]
        assert x_t.mean().item() == pytest.approx(0.7 * math.sqrt(alpha_bar), abs=0.02)
        assert x_t.var().item() == pytest.approx(1 - alpha_bar, rel=0.03)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_target_of_each_prediction_gives_back_the_image(prediction):
    d = diffusion("cosine", prediction)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(8, 3, 4, 4, generator=g) * 2 - 1, torch.randn(8, 3, 4, 4, generator=g)
    t = torch.tensor([0, 1, 10, 100, 300, 500, 700, 900])
    x_t = d.q_sample(x0, t, noise)
    torch.testing.assert_close(d.predict_x0(x_t, t, d.target(x0, t, noise)), x0, rtol=0, atol=2e-5)


def test_the_loss_of_a_network_that_predicts_zero_is_the_power_of_its_target():
    d = diffusion(prediction="epsilon")
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.zeros(64, 1, 8, 8), torch.randn(64, 1, 8, 8, generator=g)
    losses = d.losses(lambda x, t: torch.zeros_like(x), x0, torch.arange(64), noise)
    assert losses.shape == (64,)
    torch.testing.assert_close(losses, noise.square().mean(dim=(1, 2, 3)))
    assert losses.mean().item() == pytest.approx(1.0, abs=0.05)  # normal noise; uniform on [0, 1] would give 1/3
