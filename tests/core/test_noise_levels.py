import itertools

import numpy as np
import pytest
import torch

from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.core.noise_levels import Timesteps, timestep_shares
from ddpm.core.schedules import crosses_zero

SCHEDULES = ["linear", "cosine", "sigmoid"]


def alphas(schedule: str, timesteps: int = 1000) -> np.ndarray:
    return GaussianDiffusion(DiffusionConfig(timesteps, schedule, "v")).alphas_cumprod


@pytest.mark.parametrize("timesteps", [2, 3, 10, 1000, 4000])
def test_uniform_shares_are_equal(timesteps):
    shares = timestep_shares(alphas("cosine", timesteps), "uniform", 1.0)
    assert (shares == 1 / timesteps).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("levels", "width", "spread"), [("normal", 2.0, 2.0), ("laplace", 1.0, 2**0.5)])
def test_the_log_snr_has_the_distribution_that_is_asked_for(schedule, levels, width, spread):
    alpha_bar = alphas(schedule)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    shares = timestep_shares(alpha_bar, levels, width)
    assert shares.sum() == pytest.approx(1)
    assert (shares > 0).all()
    mean = (shares * log_snr).sum()
    assert mean == pytest.approx(0, abs=0.05)
    assert np.sqrt((shares * (log_snr - mean) ** 2).sum()) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(("levels", "width"), itertools.product(("normal", "laplace"), (0.1, 2, 100)))
@pytest.mark.parametrize("timesteps", [3, 10, 1000])
def test_every_width_and_length_gives_shares(levels, width, timesteps):
    shares = timestep_shares(alphas("cosine", timesteps), levels, width)
    assert shares.sum() == pytest.approx(1)
    assert (shares >= 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 3, 10, 50, 1000])
def test_parameters_are_refused_exactly_if_the_shares_are(schedule, timesteps):
    fine = crosses_zero(timesteps, schedule, 1e-4, 0.02)
    try:
        timestep_shares(alphas(schedule, timesteps), "normal", 2.0)
    except ValueError as error:
        assert not fine
        assert "must cross 0" in str(error)
    else:
        assert fine


def test_quantiles_give_each_timestep_its_share():
    shares = np.array([0.5, 0.25, 0.0, 0.25])
    timesteps = Timesteps(shares)
    u = torch.arange(4000) / 4000
    t = timesteps.at(u)
    assert t.dtype == torch.int64
    assert (torch.bincount(t, minlength=4) / len(u)).tolist() == shares.tolist()
    assert timesteps.at(torch.tensor([0.0, 1.0])).tolist() == [0, 3]
