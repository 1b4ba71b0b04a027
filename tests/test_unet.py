import pytest
import torch
from diffusers import UNet2DModel

from ddpm.config import check
from ddpm.unet import UNet, UNetConfig, initialise, timestep_embedding, unet_config
from tests.conftest import composed, small_unet


def test_the_papers_network_has_the_papers_number_of_parameters():
    params = check(composed("model=paper", "dataset=cifar10"))
    with torch.device("meta"):
        unet = UNet(unet_config(params.model, image_size=32, channels=3))
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307


def twin(config: UNetConfig) -> UNet2DModel:
    """diffusers' network at the same settings."""
    flags = config.attention
    return UNet2DModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if flag else "DownBlock2D" for flag in flags),
        up_block_types=tuple("AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(flags)),
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        attention_head_dim=config.attention_head_dim,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()


@pytest.mark.parametrize(
    ("channels", "changes"),
    [
        (1, {}),
        (3, {"block_out_channels": (16, 32, 32), "layers_per_block": 2, "attention": (False, True, False)}),
        (3, {"attention": (True, True), "attention_head_dim": 8}),
        (1, {"block_out_channels": (32,), "attention": (True,)}),
    ],
)
def test_outputs_and_gradients_equal_diffusers(channels, changes):
    ours = small_unet(size=16, channels=channels, **changes)
    theirs = twin(ours.config)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 17, 999])
    a, b = ours(x, t), theirs(x, t).sample
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    a.square().mean().backward()
    b.square().mean().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-8, msg=name
        )


def test_the_time_embedding_is_the_papers():
    embedding = timestep_embedding(torch.tensor([0, 3]), 8)
    assert embedding[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # sines before cosines
    frequencies = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4])  # both ends included
    torch.testing.assert_close(embedding[1, :4], torch.sin(3 * frequencies))


def test_a_new_network_predicts_zero_and_every_parameter_learns():
    unet = UNet(small_unet(dropout=0.1).config)
    initialise(unet, torch.Generator().manual_seed(0))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not unet(x, torch.arange(4)).any()
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    for _ in range(4):  # the zeros at the ends of the blocks open up one after the other
        optimizer.zero_grad()
        (unet(x, torch.arange(4)) - x).square().mean().backward()
        optimizer.step()
    still = [name for name, p in unet.named_parameters() if torch.equal(before[name], p)]
    # a key's bias shifts all scores of a query alike, which softmax ignores
    assert all(name.endswith("to_k.bias") for name in still)


def test_the_initial_weights_follow_from_the_seed_alone():
    torch.manual_seed(1)
    first = small_unet().state_dict()
    torch.manual_seed(2)
    second = small_unet().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
