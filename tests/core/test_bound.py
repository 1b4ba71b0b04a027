import math

import numpy as np
import pytest
import torch

from ddpm.core.bound import variational_bound
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion, discretised_log_likelihood
from tests.conftest import small_unet

CPU = torch.device("cpu")


def gaussian_images(count, mean, std):
    """Images whose pixels are independent normal levels, and the entropy of a level in bits."""
    rng = np.random.default_rng(0)
    levels = np.clip(np.rint(rng.normal(mean, std, (count, 8, 8, 1))), 0, 255).astype(np.uint8)
    edges = (np.arange(257) - 0.5 - mean) / (std * math.sqrt(2))
    cdf = np.array([0.5 * (1 + math.erf(z)) for z in edges])
    cdf[0], cdf[-1] = 0, 1
    p = np.diff(cdf)
    return levels, float(-(p[p > 0] * np.log2(p[p > 0])).sum())


def exact_network(d: GaussianDiffusion, std: float):
    """For normal data around 0: the best prediction and the true variance of x_{t-1} given x_t, in closed form."""

    def model(x, t):
        step = int(t[0])
        a, beta = float(d.alphas_cumprod[step]), float(d.betas[step])
        signal, sigma = math.sqrt(a), math.sqrt(1 - a)
        epsilon = sigma * x / (a * std**2 + 1 - a)
        x0 = (x - sigma * epsilon) / signal
        output = epsilon if d.config.prediction == "epsilon" else signal * epsilon - sigma * x0
        if not d.config.learn_variance:
            return output
        before = float(d.alphas_cumprod[step - 1]) if step else 1.0
        small = float(d.posterior_variance[step])
        unknown = std**2 * (1 - a) / (a * std**2 + 1 - a)  # the variance of x_0 given x_t
        true = small + before * (beta / (1 - a)) ** 2 * unknown if step else unknown
        share = 2 * math.log(true / small) / math.log(beta / small) - 1
        return torch.cat([output, torch.full_like(x, share)], dim=1)

    return model


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_bound_of_the_exact_network_is_the_entropy_of_the_data(prediction):
    images, entropy = gaussian_images(60, mean=127.5, std=30.0)
    d = GaussianDiffusion(DiffusionConfig(1000, "linear", prediction, learn_variance=True))
    options = {"batch_size": 60, "seed": 0, "device": CPU}
    bound = variational_bound(exact_network(d, 30 / 127.5), d, images, variance="learned", **options)
    assert bound.bits_per_dim == pytest.approx(entropy, rel=0.01)
    # what was spent grows from the prior's part to the whole but L_0, and the image gets clearer meanwhile
    rate, distortion = bound.rate_distortion()
    assert rate[-1] == pytest.approx(bound.prior)
    assert rate[0] == pytest.approx(bound.bits_per_dim - bound.terms[0])
    assert distortion[-1] == pytest.approx(30, rel=0.05)
    assert distortion[0] < 2


def test_the_rows_of_the_plot_sum_to_the_bound():
    images, _ = gaussian_images(3, 127.5, 40.0)
    d = GaussianDiffusion(DiffusionConfig(20, "cosine", "v"))
    bound = variational_bound(small_unet(), d, images, variance="fixed_large", batch_size=3, seed=0, device=CPU)
    rows = bound.rows(5)
    assert [row["timestep"] for row in rows] == [0, 4, 8, 12, 16]
    assert sum(row["bits_per_dim"] for row in rows) + bound.prior == pytest.approx(bound.bits_per_dim)
    assert [row["rate"] for row in rows] == sorted((row["rate"] for row in rows), reverse=True)


def test_a_fixed_variance_makes_the_bound_looser():
    images, entropy = gaussian_images(60, mean=127.5, std=30.0)
    d = GaussianDiffusion(DiffusionConfig(1000, "linear", "epsilon"))
    small, large = (
        variational_bound(
            exact_network(d, 30 / 127.5), d, images, variance=variance, batch_size=60, seed=0, device=CPU
        ).bits_per_dim
        for variance in ("fixed_small", "fixed_large")
    )
    assert 1.01 * entropy < large < 1.05 * entropy < small


def test_a_network_that_knows_nothing_has_a_worse_bound():
    images, entropy = gaussian_images(8, mean=127.5, std=40.0)
    d = GaussianDiffusion(DiffusionConfig(50, "linear", "epsilon", 1e-3, 0.3))
    blind = variational_bound(
        lambda x, t: torch.zeros_like(x), d, images, variance="fixed_small", batch_size=8, seed=0, device=CPU
    )
    assert blind.bits_per_dim > 1.5 * entropy
    assert (blind.terms > -1e-6).all()


def test_the_bound_does_not_depend_on_other_draws_and_repeats():
    images, _ = gaussian_images(5, 127.5, 40.0)
    d = GaussianDiffusion(DiffusionConfig(20, "cosine", "v"))
    torch.manual_seed(3)
    options = {"variance": "fixed_large", "batch_size": 5, "device": CPU}
    a = variational_bound(small_unet(), d, images, seed=0, **options)
    torch.rand(5)
    b = variational_bound(small_unet(), d, images, seed=0, **options)
    c = variational_bound(small_unet(), d, images, seed=1, **options)
    assert a.bits_per_dim == b.bits_per_dim != c.bits_per_dim


def test_the_bound_follows_from_each_image_alone():
    images, _ = gaussian_images(7, 127.5, 40.0)
    d = GaussianDiffusion(DiffusionConfig(20, "cosine", "v"))

    def terms(rows, batch_size):
        options = {"variance": "fixed_large", "batch_size": batch_size, "seed": 0, "device": CPU}
        bound = variational_bound(small_unet(), d, images[rows], None, np.array(rows), **options)
        return np.array([*bound.terms, *bound.x0_mse, bound.prior]) * len(rows)

    whole = terms([*range(7)], 7)
    for batch_size in (1, 2, 6, 100):
        np.testing.assert_allclose(terms([*range(7)], batch_size), whole, rtol=1e-4)
    np.testing.assert_allclose(terms([6, 1, 0, 3, 2, 5, 4], 3), whole, rtol=1e-4)
    np.testing.assert_allclose(terms([0, 2, 5], 2) + terms([1, 3, 4, 6], 3), whole, rtol=1e-4)


def test_the_likelihoods_of_all_levels_sum_to_one():
    levels = torch.arange(256).float().view(256, 1, 1, 1) / 127.5 - 1
    for mean in (-1.0, 0.1, 0.97):
        for log_scale in (-5.0, -2.0, 0.0):
            log_p = discretised_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_scale))
            # levels that are hopeless count 1e-12 each
            assert log_p.exp().sum().item() == pytest.approx(1, abs=2e-4)


def test_the_prior_term_is_the_divergence_of_two_normals():
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon", 0.1, 0.4))
    a = d.alphas_cumprod[-1]
    expected = 0.5 * ((1 - a) + a * 0.25 - 1 - math.log(1 - a)) / math.log(2)
    assert d.prior_term(torch.full((2, 1, 4, 4), 0.5)).tolist() == pytest.approx([expected] * 2, rel=1e-4)
