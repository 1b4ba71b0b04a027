import copy
import io

import pytest
import torch

from ddpm.config.targets import OPTIMIZER, build
from ddpm.core.unet import UNet, initialise
from ddpm.training.muon import ENDS, NEWTON_SCHULZ, Muon, orthogonalised
from tests.conftest import small_unet

NODE = {"_target_": "ddpm.training.muon.Muon", "lr": 0.01}


def network(seed: int = 0) -> UNet:
    model = UNet(small_unet(num_class_embeds=3).config)
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def step(model: UNet, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 1, 8, 8, generator=draws)
    loss = (
        model(x, torch.arange(4), labels=torch.tensor([0, 1, 2, 0])) - torch.randn(4, 1, 8, 8, generator=draws)
    ) ** 2
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()


SHAPES = [(16, 72), (72, 16), (1, 5), (16, 16), (16, 40), (9, 9)]  # some share the size of X X^T


def matrices(seed: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws) for shape in SHAPES]


def test_singular_values_come_near_one():
    for matrix in orthogonalised(matrices(0)):
        values = torch.linalg.svdvals(matrix)
        if len(set(matrix.shape)) == 2:  # a square matrix may be nearly singular, and stays so
            assert values.min() > 0.6
        assert values.max() < 1.3


def test_singular_vectors_are_kept():
    for matrix, found in zip(matrices(1), orthogonalised(matrices(1)), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.mT @ found @ v.mT
        torch.testing.assert_close(inner, torch.diag(inner.diag()), atol=1e-4, rtol=0)


def test_the_iteration_is_that_of_its_authors():
    """Their form multiplies the whole matrix in each step."""
    a, b, c = NEWTON_SCHULZ
    for matrix, found in zip(matrices(2), orthogonalised(matrices(2)), strict=True):
        x = matrix.double() / matrix.double().norm()
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        torch.testing.assert_close(found.double(), x, atol=1e-4, rtol=0)


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalised([torch.zeros(3, 4)])[0].any()


def test_matrices_get_updates_of_one_size_and_the_rest_adams():
    model = network()
    twin = copy.deepcopy(model)
    optimizer = build(NODE, OPTIMIZER, model.named_parameters())
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, fused=True)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    step(model, optimizer, 0)
    step(twin, adam, 0)
    theirs = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        change = (weight - before[name]).detach()
        if weight.ndim < 2 or name in ENDS:
            assert torch.equal(weight, theirs[name]), name
        elif change.any():
            assert 0.5 < change.square().mean().sqrt() / (0.2 * 0.01) < 1.2, name


def test_a_channels_last_network_takes_the_same_steps():
    model, last = network(), network().to(memory_format=torch.channels_last)
    ours, theirs = Muon(model.named_parameters(), lr=0.01), Muon(last.named_parameters(), lr=0.01)
    for seed in range(3):
        step(model, ours, seed)
        step(last, theirs, seed)
    for a, b in zip(model.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


def test_a_saved_optimizer_resumes_in_the_same_bytes():
    whole, cut = network(), network()
    ours, first = (Muon(model.named_parameters()) for model in (whole, cut))
    for seed in range(4):
        step(whole, ours, seed)
    for seed in range(2):
        step(cut, first, seed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Muon(cut.named_parameters())
    second.load_state_dict(torch.load(file))
    for seed in range(2, 4):
        step(cut, second, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_weight_decay_shrinks_every_weight():
    model = network()
    optimizer = Muon(model.named_parameters(), lr=0.1, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer.step()
    for weight, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(weight, old * 0.95)


@pytest.mark.process
def test_the_loss_falls_below_that_of_adam_at_the_same_rate():
    losses = {}
    for name, target in (("muon", NODE), ("adam", {"_target_": "torch.optim.Adam", "lr": 0.01})):
        model = network()
        optimizer = build(target, OPTIMIZER, model.named_parameters())
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(9))
        for _ in range(40):
            optimizer.zero_grad()
            loss = (model(x, torch.arange(4), labels=torch.zeros(4, dtype=torch.int64)) - x).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["muon"] < losses["adam"]
