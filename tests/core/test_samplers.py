import math
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from ddpm.core import samplers
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from tests.conftest import small_unet

CPU = torch.device("cpu")


def exact_gaussian(d: GaussianDiffusion, mean: float, std: float):
    """The best epsilon for data that is normal with this mean and standard deviation, in closed form."""

    def model(x, t):
        a = float(d.alphas_cumprod[int(t[0])])
        return math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (a * std**2 + 1 - a)

    return model


def drawn(name, steps, d, model, count=20_000, **options):
    g = torch.Generator().manual_seed(0)
    path = samplers.timesteps(d.timesteps, steps, "trailing")
    noise = lambda: torch.randn(count, 1, 1, 1, generator=g)  # noqa: E731
    options = {"variance": "fixed_small", "eta": 0.0} | options
    *_, last = samplers.SAMPLERS[name](model, d, noise(), path, noise, **options)
    return last.x


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("ddpm", 1000, {}),
        ("ddpm", 1000, {"variance": "fixed_large"}),
        ("ddim", 200, {}),
        ("dpm_solver", 100, {}),
        ("ddim", 1000, {"eta": 1.0}),
    ],
)
def test_gaussian_data_is_drawn_with_its_mean_and_spread(name, steps, options):
    d = GaussianDiffusion(DiffusionConfig(1000, "linear", "epsilon"))
    x = drawn(name, steps, d, exact_gaussian(d, mean=0.1, std=0.2), **options).double()
    assert x.mean().item() == pytest.approx(0.1, abs=0.01)
    assert x.std().item() == pytest.approx(0.2, rel=0.04)


MEAN, COVARIANCE = torch.tensor([0.1, -0.2]).double(), torch.tensor([[0.04, 0.03], [0.03, 0.06]]).double()


def exact_correlated(d: GaussianDiffusion):
    """The best epsilon for two pixels that are normal with this mean and covariance, in closed form."""

    def model(x, t):
        a = float(d.alphas_cumprod[int(t[0])])
        inverse = torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(2))
        return (math.sqrt(1 - a) * (x.flatten(1).double() - math.sqrt(a) * MEAN) @ inverse).view_as(x).float()

    return model


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_more_steps_approach_the_covariance_of_gaussian_data(name):
    d = GaussianDiffusion(DiffusionConfig(1000, "cosine", "epsilon"))
    g = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, 2, generator=g)
    start = (start - start.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov(start.T))
    ).T  # of unit covariance
    noise = lambda: torch.randn(20_000, 1, 1, 2, generator=g)  # noqa: E731
    errors = []
    for steps in (10, 50, 250):
        path = samplers.timesteps(1000, steps, "trailing")
        *_, last = samplers.SAMPLERS[name](exact_correlated(d), d, start.view(-1, 1, 1, 2), path, noise)
        x = last.x.flatten(1).double()
        assert x.mean(0).tolist() == pytest.approx(MEAN.tolist(), abs=0.01)
        errors.append(float((torch.cov(x.T) - COVARIANCE).norm() / COVARIANCE.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < {"ddpm": 0.06, "ddim": 0.03, "dpm_solver": 0.01}[name], errors


def one_step_of_diffusers(scheduler, output, t, x, draw, eta):
    """diffusers' step with our noise instead of its own."""
    if isinstance(scheduler, DDIMScheduler):
        noise = draw if eta > 0 else None
        return scheduler.step(output, t, x, use_clipped_model_output=True, variance_noise=noise, eta=eta).prev_sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: draw)
        return scheduler.step(output, t, x).prev_sample


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("ddpm", 20, {"variance": "fixed_small"}),
        ("ddpm", 20, {"variance": "fixed_large"}),
        ("ddpm", 10, {"variance": "fixed_small"}),
        ("ddim", 10, {"eta": 0.0}),
        ("ddim", 10, {"eta": 0.5}),
    ],
)
def test_every_step_equals_diffusers(name, steps, options, schedule, prediction):
    d = GaussianDiffusion(DiffusionConfig(20, schedule, prediction))
    model = small_unet(block_out_channels=(16,), attention=(False,))
    g = torch.Generator().manual_seed(0)
    start, *noises = torch.randn(steps + 1, 2, 1, 8, 8, generator=g)
    common = {
        "num_train_timesteps": 20,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        "prediction_type": {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction],
        "timestep_spacing": "leading",
    }
    if name == "ddpm":
        scheduler = DDPMScheduler(**common, beta_end=0.02, variance_type=options["variance"])
    else:
        scheduler = DDIMScheduler(**common, beta_end=0.02, set_alpha_to_one=True)
    # diffusers keeps its tables in float32, where 1 - alpha_bar loses four digits at small t: replace them by ours
    scheduler.betas, scheduler.alphas_cumprod = torch.from_numpy(d.betas), torch.from_numpy(d.alphas_cumprod)
    scheduler.alphas, scheduler.one = 1 - scheduler.betas, torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.one if name == "ddim" else None
    scheduler.set_timesteps(steps)
    path = samplers.timesteps(20, steps, "leading")
    assert path == scheduler.timesteps.tolist()
    options = {"variance": "fixed_small", "eta": 0.0} | options
    queue = iter(noises)
    ours = samplers.SAMPLERS[name](model, d, start, path, lambda: next(queue), **options)
    x = start
    for i, (t, step) in enumerate(zip(path, ours, strict=True)):
        with torch.no_grad():
            output = model(x, torch.full((len(x),), t))
        draw = noises[i] if i + 1 < len(path) else torch.zeros_like(x)
        expected = one_step_of_diffusers(scheduler, output, t, x, draw, options["eta"])
        torch.testing.assert_close(step.x, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))
        x = step.x


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linear"])
def test_spacings_equal_diffusers(spacing):
    scheduler = DDIMScheduler(timestep_spacing={"linear": "linspace"}.get(spacing, spacing))
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()  # trailing: for 62 numbers of steps, a timestep -1 is at the end
        assert samplers.timesteps(1000, steps, spacing) == theirs[:steps], steps


@pytest.mark.parametrize("spacing", get_args(samplers.Spacing))
def test_every_spacing_visits_distinct_timesteps_of_the_model(spacing):
    """At every number of steps: index -1 would put the noisiest timestep at the clean end of the path."""
    for steps in range(1, 1001):
        path = samplers.timesteps(1000, steps, spacing)
        assert path == sorted(set(path), reverse=True)
        assert 0 <= path[-1] <= path[0] < 1000
        assert len(path) == steps or spacing == "quadratic"


def test_quadratic_spacing_is_that_of_ddim():
    path = samplers.timesteps(1000, 10, "quadratic")
    assert path == [int(x) for x in np.linspace(0, np.sqrt(800), 10)[::-1] ** 2]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linear", "quadratic"])
@pytest.mark.parametrize("total", [2, 3, 4, 5, 7, 10, 33, 100, 256, 999, 1000, 1001])
def test_every_number_of_steps_gives_as_many_falling_timesteps(total, spacing):
    for steps in range(1, total + 1):
        path = np.array(samplers.timesteps(total, steps, spacing))
        assert len(path) == steps, steps
        assert 0 <= path[-1] <= path[0] < total, steps
        assert (np.diff(path) < 0).all(), steps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linear", "quadratic"])
def test_a_long_process_has_right_timesteps_as_well(spacing):
    for steps in [*range(1, 60), *np.random.default_rng(0).integers(60, 100_001, 40), 99_999, 100_000]:
        path = np.array(samplers.timesteps(100_000, int(steps), spacing))
        assert len(path) == steps
        assert 0 <= path[-1] <= path[0] < 100_000
        assert (np.diff(path) < 0).all()


@pytest.mark.parametrize("path", [[], [-1], [9, 4, -1], [10, 4, 0], [4, 4], [0, 5]])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_path_outside_of_the_tables_is_refused(name, path):
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon"))
    with pytest.raises(ValueError, match="must fall from at most 9"):
        list(samplers.SAMPLERS[name](lambda x, t: x, d, torch.zeros(1, 1, 2, 2), path, lambda: torch.zeros(1)))


@pytest.mark.parametrize("steps", range(1, 40))
def test_ancestral_ddim_is_finite_where_almost_no_signal_is_left(steps):
    d = GaussianDiffusion(DiffusionConfig(8000, "linear", "epsilon"))
    x = drawn("ddim", steps, d, exact_gaussian(d, mean=0.1, std=0.2), count=50, eta=1.0)
    assert x.isfinite().all()


@pytest.mark.parametrize("steps", [0, 11])
def test_more_steps_than_timesteps_are_refused(steps):
    with pytest.raises(ValueError, match="must be from 1 to 10"):
        samplers.timesteps(10, steps, "leading")


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_no_noise_is_added_at_the_last_step(name):
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon"))
    calls = []

    def noise():
        calls.append(1)
        return torch.zeros(2, 1, 8, 8)

    *_, last = samplers.SAMPLERS[name](
        small_unet(), d, torch.zeros(2, 1, 8, 8), samplers.timesteps(10, 10, "leading"), noise, eta=1.0
    )
    assert len(calls) == (0 if name == "dpm_solver" else 9)
    assert torch.equal(last.x, last.x0) or torch.allclose(last.x, last.x0, atol=1e-6)


def test_an_image_depends_on_its_own_number_alone():
    unet = small_unet()
    together = samplers.ImageNoise(3, range(10), unet.config, CPU)
    apart = samplers.ImageNoise(3, range(6, 9), unet.config, CPU)
    for _ in range(3):  # start noise and path noise
        assert torch.equal(together()[6:9], apart())
    assert not torch.equal(apart(), samplers.ImageNoise(4, range(6, 9), unet.config, CPU)())


def test_the_noise_of_the_samples_is_normal():
    draws = samplers.ImageNoise(0, range(500), small_unet().config, CPU)().double()
    moments = [float(draws.pow(k).mean()) for k in (1, 2, 4)]
    assert moments == pytest.approx([0, 1, 3], abs=0.1)  # the fourth is 1.8 for uniform noise of the same variance


PETS = {"num_class_embeds": 3, "has_no_label": True}


@pytest.mark.parametrize("out_channels", [1, 2])  # without and with a learned variance
def test_guidance_extrapolates_from_no_label_beyond_the_label(out_channels):
    unet = small_unet(**PETS, out_channels=out_channels)
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    labels = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        given, blind = unet(x, t, labels), unet(x, t, torch.full((4,), 2))
        expected = {1.0: given, 0.0: blind, 3.0: 3 * given - 2 * blind}  # (1 + w) given - w blind, w = 2
        for scale, value in expected.items():
            output = samplers.guided(unet, labels, scale)(x, t)
            torch.testing.assert_close(output[:, :1], value[:, :1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(output[:, 1:], given[:, 1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(given, blind, atol=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_guidance_means_the_same_whatever_the_network_predicts(prediction):
    """The guided noise is the same combination of the two noises."""
    d = GaussianDiffusion(DiffusionConfig(100, "cosine", prediction))
    g = torch.Generator().manual_seed(0)
    x, given, blind = torch.randn(3, 2, 1, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([20, 70])
    signal, sigma = (torch.tensor(table[[20, 70]]).view(2, 1, 1, 1) for table in (
        d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod))  # fmt: skip
    noise = lambda output: (x - signal * d.predict_x0(x, t, output)) / sigma  # noqa: E731
    both = noise(blind + 2.5 * (given - blind))
    torch.testing.assert_close(both, noise(blind) + 2.5 * (noise(given) - noise(blind)), rtol=1e-4, atol=1e-4)


def test_x0_is_clipped_before_the_mean_is_built():
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "x0"))
    wild = lambda x, t: torch.full_like(x, 7.0)  # noqa: E731
    tame = lambda x, t: torch.ones_like(x)  # noqa: E731
    x = torch.zeros(1, 1, 8, 8)
    results = [[s.x for s in samplers.ddpm(m, d, x, [9, 4, 0], lambda: torch.zeros_like(x))] for m in (wild, tame)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_solver_is_of_second_order_and_ddim_of_first():
    """Distance to the exact solution of the probability-flow ODE for normal data, as the steps double."""
    d = GaussianDiffusion(DiffusionConfig(1000, "linear", "epsilon"))
    mean, std = 0.1, 0.2
    x = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = exact_gaussian(d, mean, std)

    def error(sampler, steps):
        # equal strides in log-SNR from t = 900 to t = 100, and one more step, which is ignored
        log_snr = np.log(d.alphas_cumprod / (1 - d.alphas_cumprod)) / 2
        wanted = np.linspace(log_snr[900], log_snr[100], steps + 1)
        path = [int(np.abs(log_snr - value).argmin()) for value in wanted]
        *_, before_last, _ = sampler(model, d, x, path, lambda: x)
        a, b = (float(d.alphas_cumprod[t]) for t in (path[0], path[-1]))
        spread = math.sqrt((b * std**2 + 1 - b) / (a * std**2 + 1 - a))
        exact = math.sqrt(b) * mean + spread * (x - math.sqrt(a) * mean)
        return (before_last.x - exact).abs().mean().item()

    def order(sampler):
        errors = [error(sampler, steps) for steps in (8, 16, 32)]
        return [math.log2(a / b) for a, b in pairwise(errors)]

    assert all(0.8 < value < 1.3 for value in order(samplers.ddim))
    assert all(value > 1.6 for value in order(samplers.dpm_solver))
    assert error(samplers.dpm_solver, 16) < error(samplers.ddim, 16) / 4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])  # diffusers' solver has no sigmoid
def test_every_step_of_the_solver_equals_diffusers(schedule):
    d = GaussianDiffusion(DiffusionConfig(1000, schedule, "x0"))
    unet = small_unet()
    model = lambda x, t: torch.tanh(unet(x, t))  # noqa: E731  inside [-1, 1]: diffusers' solver does not clip
    path = samplers.timesteps(1000, 20, "trailing")
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="sample",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == path
    scheduler.sigmas = torch.tensor([math.sqrt((1 - a) / a) for a in d.alphas_cumprod[path]] + [0.0])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    start = x
    with torch.no_grad():
        for t, step in zip(path, samplers.dpm_solver(model, d, start, path, lambda: start), strict=True):
            x = scheduler.step(model(x, torch.full((2,), t)), t, x).prev_sample
            torch.testing.assert_close(step.x, x, rtol=1e-5, atol=1e-5 * max(1.0, float(x.abs().max())))


@pytest.mark.parametrize("steps", [1000, 100])
def test_a_learned_variance_is_drawn_as_diffusers_draws_it(steps):
    d = GaussianDiffusion(DiffusionConfig(1000, "cosine", "epsilon", learn_variance=True))
    unet = small_unet(out_channels=2)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    scheduler.betas, scheduler.alphas_cumprod = torch.from_numpy(d.betas), torch.from_numpy(d.alphas_cumprod)
    scheduler.alphas, scheduler.one = 1 - scheduler.betas, torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x, draw = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    path = samplers.timesteps(1000, steps, "leading")
    for t in (path[0], path[len(path) // 2], path[-2]):
        following = path[path.index(t) + 1]
        step = next(samplers.ddpm(unet, d, x, [t, following], lambda: draw, variance="learned"))
        with torch.no_grad():
            expected = one_step_of_diffusers(scheduler, unet(x, torch.full((2,), t)), t, x, draw, 0.0)
        torch.testing.assert_close(step.x, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
