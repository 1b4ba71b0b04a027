import numpy as np
import pytest
import torch

from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.core.unet import UNet, initialise
from ddpm.data.prepared import Images
from ddpm.training.held_out import DRAWS, NAMES, RANGES, HeldOutLoss
from tests.conftest import small_unet

DIFFUSION = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v"))


def split(count: int) -> Images:
    draws = np.random.default_rng(0)
    return Images(draws.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8), np.arange(count) // (count // 2 + 1))


def network(**changes: int) -> UNet:
    model = UNet(small_unet(**changes).config)
    initialise(model, torch.Generator().manual_seed(0))
    return model.eval()


@pytest.mark.heavy
def test_the_loss_is_the_same_each_time_and_for_every_batch_size():
    model = network()
    measure = HeldOutLoss(split(50), DIFFUSION, 0, 64)
    first = measure(model)
    assert measure(model) == first
    torch.manual_seed(5)
    for batch_size in (100, DRAWS):
        assert HeldOutLoss(split(50), DIFFUSION, 0, batch_size)(model) == pytest.approx(first, rel=1e-5)
    assert HeldOutLoss(split(50), DIFFUSION, 1, 64)(model) != first


@pytest.mark.parametrize("count", [1, 3, 50, 2000])
def test_timesteps_cover_every_range_and_images_alternate(monkeypatch, count):
    measure = HeldOutLoss(split(count), DIFFUSION, 0, 64)
    seen = []

    def losses(model: UNet, part: slice) -> torch.Tensor:
        seen.append((measure._t[part], measure._rows[part]))
        return torch.zeros(len(seen[-1][0]))

    monkeypatch.setattr(measure, "_losses", losses)
    measure(network())
    t, rows = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    assert len(t) == DRAWS
    assert (np.histogram(t, bins=RANGES, range=(0, 1000))[0] == DRAWS / RANGES).all()
    times = np.bincount(rows, minlength=count)
    if count <= DRAWS:
        assert times.max() - times.min() <= 1
    if count > 3:  # the order of the images is not that of the timesteps
        assert abs(np.corrcoef(t, rows)[0, 1]) < 0.2


def test_the_ranges_of_a_blank_network_are_known_and_averaged():
    losses = HeldOutLoss(split(50), DIFFUSION, 0, 64)(network())
    assert tuple(losses) == NAMES
    assert losses["held_out_loss"] == pytest.approx(np.mean([losses[name] for name in NAMES[1:]]))
    # it predicts zero; the mean square of v is that of the noise at t = 0, and that of the image at the last timestep
    assert losses[NAMES[1]] == pytest.approx(1, abs=0.1)
    image = (split(50).images / 127.5 - 1).astype(np.float32)
    assert losses[NAMES[-1]] == pytest.approx((image**2).mean(), rel=0.2)


def test_a_conditional_network_is_given_the_classes():
    model, draws = network(num_class_embeds=2), torch.Generator().manual_seed(0)
    measure = HeldOutLoss(split(50), DIFFUSION, 0, 64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1, generator=draws)
        before = measure(model)
        model.class_embedding.weight[1] += 1
    assert measure(model) != before
