import math

import numpy as np
import pytest
import torch

from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion, make_betas


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


def test_predicting_zero_loses_the_power_of_the_target():
    d = diffusion(prediction="epsilon")
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.zeros(64, 1, 8, 8), torch.randn(64, 1, 8, 8, generator=g)
    losses = d.losses(lambda x, t: torch.zeros_like(x), x0, torch.arange(64), noise).simple
    assert losses.shape == (64,)
    torch.testing.assert_close(losses, noise.square().mean(dim=(1, 2, 3)))
    assert losses.mean().item() == pytest.approx(1.0, abs=0.05)  # normal noise; uniform on [0, 1] would give 1/3


def test_the_sigmoid_schedule_runs_between_its_betas():
    sigmoid = diffusion("sigmoid")
    assert sigmoid.betas[0] == pytest.approx(1e-4 + (0.02 - 1e-4) / (1 + math.exp(6)))
    assert sigmoid.betas[499:501].mean() == pytest.approx((0.02 + 1e-4) / 2)


def test_the_posterior_is_that_of_bayes():
    """q(x_{t-1} | x_t, x_0) from its two factors, for one dimension."""
    d = diffusion()
    x0, x_t = 0.3, -0.8
    for t in (1, 10, 500, 999):
        alpha, before = 1 - d.betas[t], d.alphas_cumprod[t - 1]
        precision = alpha / d.betas[t] + 1 / (1 - before)
        mean = (math.sqrt(alpha) * x_t / d.betas[t] + math.sqrt(before) * x0 / (1 - before)) / precision
        tensor = torch.full((1, 1, 1, 1), 1.0)
        assert d.posterior_mean(x0 * tensor, x_t * tensor, torch.tensor([t])).item() == pytest.approx(mean, rel=1e-5)
        assert d.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-9)
        log_small = d.log_variance(torch.tensor([t]), "fixed_small", None)
        assert log_small.item() == pytest.approx(-math.log(precision), rel=1e-5)
    assert d.posterior_variance[0] == d.posterior_variance[1] == pytest.approx(5.453e-5, rel=1e-3)


def test_a_learned_variance_lies_between_its_two_bounds():
    d = GaussianDiffusion(DiffusionConfig(1000, "cosine", "epsilon", learn_variance=True))
    t = torch.tensor([500])
    small, large = (d.log_variance(t, kind, None) for kind in ("fixed_small", "fixed_large"))
    for share, expected in ((-1.0, small), (1.0, large), (0.0, (small + large) / 2)):
        torch.testing.assert_close(d.log_variance(t, "learned", torch.full((1, 1, 1, 1), share)), expected)


def test_the_hybrid_loss_moves_the_mean_by_the_simple_loss_alone():
    config = DiffusionConfig(100, "cosine", "epsilon", learn_variance=True)
    g = torch.Generator().manual_seed(0)
    x0, noise, raw = (torch.rand(4, 1, 4, 4, generator=g) * 2 - 1 for _ in range(3))
    t = torch.tensor([0, 1, 50, 99])
    output = torch.cat([raw, raw.flip(0)], dim=1).requires_grad_()
    GaussianDiffusion(config).losses(lambda x, t: output, x0, t, noise).objective.sum().backward()
    prediction = raw.clone().requires_grad_()
    GaussianDiffusion(DiffusionConfig(100, "cosine", "epsilon")).losses(
        lambda x, t: prediction, x0, t, noise
    ).objective.sum().backward()
    torch.testing.assert_close(output.grad[:, :1], prediction.grad)
    assert output.grad[1:, 1:].abs().sum() > 0  # the variance learns from the bound


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_min_snr_weighs_the_error_of_x0_whatever_is_predicted(prediction):
    """The same error in x_0 costs the same in each parametrisation: min(SNR, 5) times its square."""
    d = diffusion("cosine", prediction)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(6, 1, 4, 4, generator=g) * 2 - 1, torch.randn(6, 1, 4, 4, generator=g)
    t = torch.tensor([50, 200, 400, 600, 800, 900])
    x_t = d.q_sample(x0, t, noise)
    wrong = x0 + 0.1
    signal, sigma = (table[t.numpy()] for table in (d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod))
    epsilon = (x_t - torch.tensor(signal).view(-1, 1, 1, 1) * wrong) / torch.tensor(sigma).view(-1, 1, 1, 1)
    outputs = {
        "x0": wrong,
        "epsilon": epsilon.float(),
        "v": (torch.tensor(signal).view(-1, 1, 1, 1) * epsilon - torch.tensor(sigma).view(-1, 1, 1, 1) * wrong).float(),
    }
    losses = d.losses(lambda x, t: outputs[prediction], x0, t, noise, "min_snr").objective
    snr = signal**2 / sigma**2
    np.testing.assert_allclose(losses.numpy(), 0.01 * np.minimum(snr, 5), rtol=2e-3)


def losses_of(config, weighting="simple"):
    g = torch.Generator().manual_seed(0)
    x0, noise, raw = (torch.rand(4, 1, 4, 4, generator=g) * 2 - 1 for _ in range(3))
    output = torch.cat([raw, raw.flip(0)], dim=1) if config.learn_variance else raw
    return GaussianDiffusion(config).losses(lambda x, t: output, x0, torch.tensor([0, 1, 50, 99]), noise, weighting)


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_the_simple_loss_does_not_depend_on_the_objective(weighting):
    plain = losses_of(DiffusionConfig(100, "cosine", "epsilon"))
    hybrid = losses_of(DiffusionConfig(100, "cosine", "epsilon", learn_variance=True), weighting)
    assert torch.equal(plain.objective, plain.simple)
    assert plain.bound is None
    assert torch.equal(hybrid.simple, plain.simple)
    weighted = losses_of(DiffusionConfig(100, "cosine", "epsilon"), weighting).objective
    torch.testing.assert_close(hybrid.objective, weighted + hybrid.bound)


@pytest.mark.parametrize("t", [-1, -100, 100, 101, 2**40])
def test_a_timestep_outside_of_the_tables_is_refused_everywhere(t):
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "v", learn_variance=True))
    x, wrong = torch.zeros(2, 1, 4, 4), torch.tensor([5, t])
    share = torch.zeros_like(x)
    for look_up in (
        lambda: d.q_sample(x, wrong, x),
        lambda: d.target(x, wrong, x),
        lambda: d.predict_x0(x, wrong, x),
        lambda: d.posterior_mean(x, x, wrong),
        *(lambda kind=kind: d.log_variance(wrong, kind, share) for kind in ("fixed_small", "fixed_large", "learned")),
        lambda: d.losses(lambda x, t: torch.cat([x, x], 1), x, wrong, x, "min_snr"),
    ):
        with pytest.raises((RuntimeError, IndexError), match=r"out of bounds|out of range"):
            look_up()


@pytest.mark.parametrize(
    "config",
    [
        DiffusionConfig(100_000, "linear", "epsilon"),
        DiffusionConfig(1000, "sigmoid", "epsilon", 0.5, 0.9),
        DiffusionConfig(1000, "linear", "epsilon", 1e-300, 0.02),
    ],
)
def test_a_schedule_that_floats_cannot_represent_is_refused(config):
    with pytest.raises(ValueError, match=r"timesteps = .*beta_start = .*alpha_bar runs from"):
        GaussianDiffusion(config)
