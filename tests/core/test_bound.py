import math

import numpy as np
import pytest
import torch

from ddpm.core.bound import Bound, bound_sums
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion, discretised_log_likelihood
from tests.conftest import small_unet


def test_the_bound_of_a_batch_is_the_mean_over_its_images():
    d = GaussianDiffusion(DiffusionConfig(20, "cosine", "v"))
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (3, 1, 8, 8), generator=g) / 127.5 - 1
    noises, calls = torch.randn(20, 3, 1, 8, 8, generator=g), []

    def sums(rows):
        queue = iter(noises)
        return bound_sums(small_unet(), d, x0[rows], lambda: next(queue)[rows], "fixed_large", lambda: calls.append(1))

    whole, parts = sums(slice(0, 3)), sums(slice(0, 1)) + sums(slice(1, 3))
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    assert len(calls) == 3 * 20
    bound = Bound.of(whole, 3)
    assert bound.bits_per_dim == pytest.approx(whole[0].sum() / 3 + d.prior_term(x0).mean().item(), rel=1e-6)


def test_the_likelihoods_of_all_levels_sum_to_one():
    levels = torch.arange(256).float().view(256, 1, 1, 1) / 127.5 - 1
    for mean in (-1.0, 0.1, 0.97):
        for log_scale in (-5.0, -2.0, 0.0):
            log_p = discretised_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_scale))
            # levels that are almost impossible count 1e-12 each
            assert log_p.exp().sum().item() == pytest.approx(1, abs=2e-4)


def test_the_prior_term_is_the_divergence_of_two_normals():
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon", 0.1, 0.4))
    a = d.alphas_cumprod[-1]
    expected = 0.5 * ((1 - a) + a * 0.25 - 1 - math.log(1 - a)) / math.log(2)
    assert d.prior_term(torch.full((2, 1, 4, 4), 0.5)).tolist() == pytest.approx([expected] * 2, rel=1e-4)
