import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm.config.load import check
from ddpm.core.noise_levels import Timesteps
from ddpm.runtime import processes
from ddpm.training.draws import coupled, draw
from tests.conftest import composed


def settings(coupling: str, batch_size: int):
    return check(composed(f"train.noise_coupling={coupling}", f"train.batch_size={batch_size}")).train


def batch(size: int, seed: int = 0, shape: tuple[int, int, int] = (1, 4, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, *shape), generator=generator)
    return pixels / 127.5 - 1, torch.randn(size, *shape, generator=generator)


def distance(x0: torch.Tensor, noise: torch.Tensor) -> float:
    return float((x0 - noise).double().square().sum())


def test_independent_noise_stays_in_its_order():
    x0, noise = batch(8)
    assert torch.equal(coupled(settings("independent", 8), x0, noise), noise)


def test_assigned_noise_is_the_same_noise_at_the_least_distance():
    x0, noise = batch(6)
    assigned = coupled(settings("assigned", 6), x0, noise)
    assert sorted(assigned.flatten().tolist()) == sorted(noise.flatten().tolist())
    least = min(distance(x0, noise[list(order)]) for order in itertools.permutations(range(6)))
    assert distance(x0, assigned) == pytest.approx(least, rel=1e-3)  # noise is rounded to 1/256 for the distances
    assert distance(x0, assigned) < distance(x0, noise)


def test_the_marginal_distribution_of_the_noise_is_untouched():
    """Over many batches each pixel's noise is standard normal, as the sampler's start is."""
    parts = [coupled(settings("assigned", 32), *batch(32, seed)) for seed in range(40)]
    noise = torch.cat(parts)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.var()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("size", [1, 2])
def test_equal_images_are_assigned_noise_too(size):
    x0, noise = torch.zeros(size, 1, 4, 4), torch.ones(size, 1, 4, 4)
    assert torch.equal(coupled(settings("assigned", size), x0, noise), noise)


def test_the_order_of_summation_changes_no_assignment():
    """Ties and near ties: the distances are whole numbers, so no rounding decides."""
    x0, noise = batch(64, shape=(3, 16, 16))
    first = coupled(settings("assigned", 64), x0, noise)
    pixels = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = coupled(settings("assigned", 64), x0[:, :, pixels], noise[:, :, pixels])
    assert torch.equal(shuffled, first[:, :, pixels])
    levels = (x0 * 255).round().double().flatten(1)
    products = levels @ (noise * 256).round().double().flatten(1).T
    assert torch.equal(products, products.round())
    assert torch.equal(products, (levels.long() @ (noise * 256).round().long().flatten(1).T).double())


def test_several_processes_assign_as_one(monkeypatch):
    x0, noise = batch(8)
    whole = coupled(settings("assigned", 8), x0, noise)
    rows = [-(x0[part] * 255).round().double().flatten(1) @ (noise * 256).round().double().flatten(1).T
            for part in (slice(0, 4), slice(4, 8))]  # fmt: skip
    for rank in range(2):
        share = slice(4 * rank, 4 * rank + 4)
        monkeypatch.setattr(processes, "share", lambda count, share=share: share)
        monkeypatch.setattr(processes, "gathered", lambda mine, rank=rank: _checked(mine, rows, rank))
        assert torch.equal(coupled(settings("assigned", 8), x0[share], noise), whole[share])


def _checked(mine: torch.Tensor, rows: list[torch.Tensor], rank: int) -> torch.Tensor:
    assert torch.equal(mine, rows[rank])
    return torch.cat(rows)


@pytest.mark.heavy
@pytest.mark.parametrize("stratified", [True, False])
def test_a_stratified_batch_spreads_its_timesteps_evenly(stratified):
    setup = SimpleNamespace(
        device=torch.device("cpu"),
        timesteps=Timesteps(np.full(1000, 1 / 1000)),
        model=SimpleNamespace(config=SimpleNamespace(no_label=None)),
    )
    train = check(composed(f"train.stratified={stratified}", "train.batch_size=50")).train
    counts = [torch.histc(draw(setup, train, (1, 2, 2), step).t.float(), 50, 0, 1000) for step in range(200)]
    one_each = [bool((count == 1).all()) for count in counts]
    assert all(one_each) if stratified else not any(one_each)
    t = torch.stack([draw(setup, train, (1, 2, 2), step).t for step in range(200)])
    assert float(t.float().mean()) == pytest.approx(499.5, abs=10)  # 2.9 is the standard error of independent draws
