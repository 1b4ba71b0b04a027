import math

import numpy as np
import pytest
import torch

from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.evaluation import held_out
from ddpm.evaluation.held_out import HeldOut, held_out_loss, image_losses, variational_bound
from ddpm.runtime.resume import Store
from tests.conftest import small_unet
from tests.support.training import SHALLOW


def test_the_held_out_loss_of_a_known_network_is_its_closed_form():
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon"))
    images = np.full((200, 8, 8, 1), 127, dtype=np.uint8)
    half = lambda x, t: x * 0  # noqa: E731  predicts zero: the loss is the noise's power
    losses, bound = held_out_loss(half, d, HeldOut(images), bins=4, batch_size=64, seed=0)
    assert losses == pytest.approx([1.0] * 4, abs=0.04)
    assert bound is None


def test_the_held_out_loss_runs_from_clean_to_noisy_timesteps():
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon"))
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    images = np.zeros((10, 8, 8, 1), dtype=np.uint8)
    losses, _ = held_out_loss(model, d, HeldOut(images), bins=5, batch_size=10, seed=0)
    assert [(int(t.min()) // 20, int(t.max()) // 20) for t in seen] == [(i, i) for i in range(5)]
    assert all(math.isfinite(loss) for loss in losses)
    again = held_out_loss(small_unet(), d, HeldOut(images), bins=5, batch_size=10, seed=0)
    assert again == held_out_loss(small_unet(), d, HeldOut(images), bins=5, batch_size=10, seed=0)


@pytest.mark.parametrize("learned", [False, True])
def test_the_mean_loss_is_the_mean_over_the_image_losses(learned):
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon", learn_variance=learned))
    unet, held = small_unet(out_channels=1 + learned), HeldOut(photographs(7))
    options = {"bins": 3, "batch_size": 4, "seed": 0}
    losses = image_losses(unet, d, held, **options)
    assert losses.shape == (1 + learned, 7, 3)
    simple, bound = held_out_loss(unet, d, held, **options)
    np.testing.assert_array_equal(losses[0].mean(axis=0), simple)
    assert (bound is not None) == learned
    one = image_losses(unet, d, HeldOut(held.images[5:6], None, np.array([5])), **options)
    np.testing.assert_allclose(one[:, 0], losses[:, 5], rtol=1e-5)


def photographs(count, size=8, channels=1):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.mark.heavy
@pytest.mark.parametrize("learned", [False, True])
def test_the_held_out_loss_depends_on_each_image_alone(learned):
    d = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon", learn_variance=learned))
    images, unet = photographs(23), small_unet(**SHALLOW | {"out_channels": 1 + learned})

    def loss(rows, batch_size):
        options = {"bins": 3, "batch_size": batch_size, "seed": 0}
        simple, bound = held_out_loss(unet, d, HeldOut(images[rows], None, np.array(rows)), **options)
        return np.array([simple, bound or simple]) * len(rows)

    every = list(range(23))
    whole = loss(every, 23)
    for batch_size in (1, 2, 5, 22, 100):
        np.testing.assert_allclose(loss(every, batch_size), whole, rtol=1e-5)
    np.testing.assert_allclose(loss(every[::-1], 4), whole, rtol=1e-5)  # in another order
    np.testing.assert_allclose(loss(every[::2], 4) + loss(every[1::2], 7), whole, rtol=1e-5)  # others left out
    assert np.abs(loss(every[::2], 4) - loss(every[1::2], 4)).min() > 0


def test_the_held_out_loss_shared_by_processes_is_that_of_one():
    d, images = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon")), photographs(11)

    class Shared(Store):
        """Each process computes its parts, the last process first."""

        def batches(self, name, count, size, compute, bar):
            slices = [slice(start, min(start + size, count)) for start in range(0, count, size)]
            arrays = [compute(rows) for rows in slices[::-1]]
            return zip(slices, arrays[::-1], strict=True)

    options = {"bins": 3, "batch_size": 2, "seed": 0}
    alone, together = (
        held_out_loss(small_unet(), d, HeldOut(images), **options, **more) for more in ({}, {"store": Shared()})
    )
    assert alone == together


def test_a_learned_variance_leaves_the_held_out_loss_unchanged():
    """A network with the same prediction has the same loss, whether or not it also has a variance."""
    images, unet = photographs(9), small_unet()
    plain = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon"))
    hybrid = GaussianDiffusion(DiffusionConfig(100, "linear", "epsilon", learn_variance=True))
    options = {"bins": 3, "batch_size": 4, "seed": 0}
    expected, none = held_out_loss(unet, plain, HeldOut(images), **options)
    both = lambda x, t: torch.cat([unet(x, t), torch.zeros_like(x)], dim=1)  # noqa: E731
    simple, bound = held_out_loss(both, hybrid, HeldOut(images), **options)
    assert simple == expected
    assert none is None
    assert len(bound) == 3
    assert min(bound) > 0


def test_a_timestep_that_rounding_lifts_to_the_end_stays_inside(monkeypatch):
    class Highest:
        def random(self):
            return 1 - 2**-53

        def standard_normal(self, shape, dtype):
            return np.zeros(shape, dtype)

    monkeypatch.setattr(held_out, "generator", lambda *seed: Highest())
    seen = []
    model = lambda x, t: (seen.append(int(t.max())), x)[1]  # noqa: E731
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon"))
    held_out_loss(model, d, HeldOut(photographs(2)), bins=5, batch_size=2, seed=0)
    assert max(seen) == 9


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

    a, beta, small = d.alphas_cumprod, d.betas, d.posterior_variance
    unknown = std**2 * (1 - a) / (a * std**2 + 1 - a)  # the variance of x_0 given x_t
    true = small + np.append(1.0, a[:-1]) * (beta / (1 - a)) ** 2 * unknown
    true[0] = unknown[0]
    shares = 2 * np.log(true / small) / np.log(beta / small) - 1

    def model(x, t):
        at = lambda table: torch.from_numpy(table)[t].float().view(-1, 1, 1, 1)  # noqa: E731
        signal, sigma = at(np.sqrt(a)), at(np.sqrt(1 - a))
        epsilon = x * at(np.sqrt(1 - a) / (a * std**2 + 1 - a))
        x0 = (x - sigma * epsilon) / signal
        output = epsilon if d.config.prediction == "epsilon" else signal * epsilon - sigma * x0
        if not d.config.learn_variance:
            return output
        return torch.cat([output, at(shares).expand_as(x)], dim=1)

    return model


@pytest.mark.heavy
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_exact_networks_bound_is_the_entropy_of_the_data(prediction):
    images, entropy = gaussian_images(60, mean=127.5, std=30.0)
    d = GaussianDiffusion(DiffusionConfig(1000, "linear", prediction, learn_variance=True))
    options = {"batch_size": 60 * 40, "seed": 0}  # 40 timesteps at once
    bound = variational_bound(exact_network(d, 30 / 127.5), d, HeldOut(images), variance="learned", **options)
    assert bound.bits_per_dim == pytest.approx(entropy, rel=0.01)
    # the rate grows from the prior's part to the whole bound but L_0, while the distortion falls
    rate, distortion = bound.rate_distortion()
    assert rate[-1] == pytest.approx(bound.prior)
    assert rate[0] == pytest.approx(bound.bits_per_dim - bound.terms[0])
    assert distortion[-1] == pytest.approx(30, rel=0.05)
    assert distortion[0] < 2


def test_the_rows_of_the_plot_sum_to_the_bound():
    images, _ = gaussian_images(3, 127.5, 40.0)
    d = GaussianDiffusion(DiffusionConfig(20, "cosine", "v"))
    bound = variational_bound(small_unet(), d, HeldOut(images), variance="fixed_large", batch_size=3, seed=0)
    rows = bound.rows(5)
    assert [row["timestep"] for row in rows] == [0, 4, 8, 12, 16]
    assert sum(row["bits_per_dim"] for row in rows) + bound.prior == pytest.approx(bound.bits_per_dim)
    assert [row["rate"] for row in rows] == sorted((row["rate"] for row in rows), reverse=True)


@pytest.mark.heavy
def test_a_fixed_variance_makes_the_bound_looser():
    images, entropy = gaussian_images(60, mean=127.5, std=30.0)
    d = GaussianDiffusion(DiffusionConfig(1000, "linear", "epsilon"))
    small, large = (
        variational_bound(
            exact_network(d, 30 / 127.5), d, HeldOut(images), variance=variance, batch_size=60 * 40, seed=0
        ).bits_per_dim
        for variance in ("fixed_small", "fixed_large")
    )
    assert 1.01 * entropy < large < 1.05 * entropy < small


def test_timesteps_at_once_are_given_the_labels_of_their_images():
    images, _ = gaussian_images(6, 127.5, 40.0)
    d, unet = GaussianDiffusion(DiffusionConfig(20, "cosine", "v")), small_unet(num_class_embeds=3)
    held, other = HeldOut(images, np.array([0, 1, 2, 2, 1, 0])), HeldOut(images, np.array([0, 1, 2, 2, 1, 1]))
    options = {"variance": "fixed_large", "seed": 0}
    one = variational_bound(unet, d, held, batch_size=6, **options)
    several = variational_bound(unet, d, held, batch_size=64, **options)  # of 10 timesteps
    np.testing.assert_allclose(several.terms, one.terms, rtol=1e-4, atol=1e-6)
    assert variational_bound(unet, d, other, batch_size=64, **options).bits_per_dim != several.bits_per_dim


@pytest.mark.heavy
def test_the_bound_has_the_error_of_its_images_in_any_batches():
    images, _ = gaussian_images(9, 127.5, 40.0)
    d = GaussianDiffusion(DiffusionConfig(20, "cosine", "v"))

    def bound(rows, batch_size=9):
        options = {"variance": "fixed_large", "batch_size": batch_size, "seed": 0}
        return variational_bound(small_unet(**SHALLOW), d, HeldOut(images[rows], None, np.array(rows)), **options)

    alone = [bound([i]) for i in range(9)]
    assert all(math.isnan(one.error) for one in alone)
    expected = np.std([one.bits_per_dim for one in alone], ddof=1) / 3
    assert bound([*range(9)]).error == pytest.approx(expected, rel=1e-4)
    assert bound([*range(9)], 4).error == pytest.approx(expected, rel=1e-4)


def test_a_network_that_knows_nothing_has_a_worse_bound():
    images, entropy = gaussian_images(8, mean=127.5, std=40.0)
    d = GaussianDiffusion(DiffusionConfig(50, "linear", "epsilon", 1e-3, 0.3))
    blind = variational_bound(
        lambda x, t: torch.zeros_like(x), d, HeldOut(images), variance="fixed_small", batch_size=8, seed=0
    )
    assert blind.bits_per_dim > 1.5 * entropy
    assert (blind.terms > -1e-6).all()


@pytest.mark.heavy
def test_the_bound_does_not_depend_on_other_draws_and_repeats():
    images, _ = gaussian_images(5, 127.5, 40.0)
    d = GaussianDiffusion(DiffusionConfig(20, "cosine", "v"))
    torch.manual_seed(3)
    options = {"variance": "fixed_large", "batch_size": 5}
    a = variational_bound(small_unet(), d, HeldOut(images), seed=0, **options)
    torch.rand(5)
    b = variational_bound(small_unet(), d, HeldOut(images), seed=0, **options)
    c = variational_bound(small_unet(), d, HeldOut(images), seed=1, **options)
    assert a.bits_per_dim == b.bits_per_dim != c.bits_per_dim


@pytest.mark.heavy
def test_the_bound_depends_on_each_image_alone():
    images, _ = gaussian_images(7, 127.5, 40.0)
    d = GaussianDiffusion(DiffusionConfig(6, "cosine", "v"))

    def terms(rows, batch_size):
        options = {"variance": "fixed_large", "batch_size": batch_size, "seed": 0}
        bound = variational_bound(small_unet(**SHALLOW), d, HeldOut(images[rows], None, np.array(rows)), **options)
        return np.array([*bound.terms, *bound.x0_mse, bound.prior]) * len(rows)

    whole = terms([*range(7)], 7)
    for batch_size in (1, 2, 6, 100):
        np.testing.assert_allclose(terms([*range(7)], batch_size), whole, rtol=1e-4)
    np.testing.assert_allclose(terms([6, 1, 0, 3, 2, 5, 4], 3), whole, rtol=1e-4)
    np.testing.assert_allclose(terms([0, 2, 5], 2) + terms([1, 3, 4, 6], 3), whole, rtol=1e-4)
