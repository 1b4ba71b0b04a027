from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.core.unet import Dropout, UNet, UNetConfig, Upsample, initialise, timestep_embedding
from tests.conftest import small_unet


def twin(config: UNetConfig) -> UNet2DModel:
    """diffusers' network at the same settings."""
    values = asdict(config)
    for ours in ("attention", "up_attention", "has_no_label"):
        del values[ours]
    return UNet2DModel(
        **values,
        down_block_types=tuple("AttnDownBlock2D" if flag else "DownBlock2D" for flag in config.attention),
        up_block_types=tuple("AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(config.up_flags)),
    ).eval()


PAPER = {  # the shape of the paper's network, at a sixteenth of its width
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "attention": (False, True, False, False),
    "norm_num_groups": 4,
}
DIFFUSERS = {  # the defaults of an empty config.json, but for the width
    "attention": (False, True),
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
CONFIGURATIONS = {
    "one channel": {"in_channels": 1, "out_channels": 1},
    "the paper's": PAPER,
    "the paper's size": PAPER | {"size": 32},
    "diffusers' defaults": DIFFUSERS,
    "three levels": {"block_out_channels": (16, 32, 32), "attention": (False, True, False)},
    "one level, one more channel out": {"block_out_channels": (32,), "attention": (True,), "out_channels": 4},
    "heads of 8": {"attention": (True, True), "attention_head_dim": 8},
    "classes": {"num_class_embeds": 10},
    "padding on all sides": {"downsample_padding": 1},
    "cosines first": {"flip_sin_to_cos": True},
    "frequencies above 1/10000": {"freq_shift": 0},
    "no attention in the middle": {"add_attention": False},
    "attention down only": {"attention": (True, True), "up_attention": (False, False)},
    "attention up only": {"attention": (False, False), "up_attention": (True, False)},
    "inputs in [0, 1]": {"center_input_sample": True},
    "odd width, three blocks a level": {
        "block_out_channels": (15, 10),
        "layers_per_block": 3,
        "norm_num_groups": 5,
        "norm_eps": 1e-3,
    },
}


def relative(ours: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference, divided by the largest value."""
    return float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), floor)


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_outputs_and_gradients_equal_diffusers(changes, record_property):
    ours = small_unet(**({"size": 16, "channels": 3} | changes))
    theirs = twin(ours.config)
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    ours.load_state_dict(theirs.state_dict())
    size = ours.config.sample_size
    x = torch.randn(3, ours.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 17, 999])
    labels = torch.tensor([0, 9, 9]) if ours.config.num_class_embeds else None
    a, b = ours(x, t, labels), theirs(x, t, labels).sample
    record_property("output", relative(a.detach(), b.detach()))
    assert relative(a.detach(), b.detach()) < 1e-5
    a.square().mean().backward()
    b.square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    # a key's bias shifts all scores of a query alike, which softmax ignores: its gradient is rounding
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    differences = {
        name: relative(p.grad, expected[name], floor=largest * name.endswith("to_k.bias"))
        for name, p in ours.named_parameters()
    }
    worst = max(differences, key=differences.__getitem__)
    record_property("gradient", differences[worst])
    assert differences[worst] < 1e-5, worst


def test_only_class_conditional_networks_take_labels():
    x, t, labels = torch.zeros(2, 1, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 4])
    conditional = small_unet(num_class_embeds=5)
    first, second = conditional(x, t, labels)
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match=r"takes labels below 5, one per image \(num_class_embeds = 5\)"):
        conditional(x, t)
    with pytest.raises(ValueError, match=r"takes no labels \(num_class_embeds = None\)"):
        small_unet()(x, t, labels)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"attention": (True,)}, "2 block_out_channels, 1 blocks down and 1 up"),
        ({"up_attention": (True,)}, "2 block_out_channels, 2 blocks down and 1 up"),
        ({"sample_size": 9}, "sample_size = 9: must be a multiple of 2"),
        ({"norm_num_groups": 5}, "norm_num_groups = 5: must divide every one of"),
        ({"attention_head_dim": 24}, "attention_head_dim = 24: must divide the channels wherever"),
        ({"attention_head_dim": 0}, "attention_head_dim = 0"),
        ({"downsample_padding": 2}, "downsample_padding = 2: only 0 and 1"),
        ({"freq_shift": 8}, "freq_shift = 8: must not be half"),
        ({"num_class_embeds": 0}, "num_class_embeds = 0"),
        ({"has_no_label": True}, "has_no_label = True: num_class_embeds = None: must be at least 2"),
        ({"has_no_label": True, "num_class_embeds": 1}, "num_class_embeds = 1: must be at least 2"),
        ({"layers_per_block": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout from 0 up and below 1"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        UNetConfig(**(asdict(small_unet().config) | changes))


@st.composite
def configurations(draw):
    levels = draw(st.integers(1, 3))
    flags = st.lists(st.booleans(), min_size=levels, max_size=levels).map(tuple)
    return UNetConfig(
        sample_size=2**levels * draw(st.integers(1, 2)),  # attention over one position has nothing to learn
        in_channels=(channels := draw(st.integers(1, 4))),
        out_channels=channels,
        block_out_channels=tuple(8 * draw(st.integers(1, 2)) for _ in range(levels)),
        layers_per_block=draw(st.integers(1, 2)),
        attention=draw(flags),
        up_attention=draw(flags),
        dropout=draw(st.sampled_from([0.0, 0.2])),
        norm_num_groups=draw(st.sampled_from([1, 4])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        attention_head_dim=draw(st.sampled_from([None, 4, 8])),
        add_attention=draw(st.booleans()),
        downsample_padding=draw(st.sampled_from([0, 1])),
        flip_sin_to_cos=draw(st.booleans()),
        freq_shift=draw(st.sampled_from([0, 1])),
        num_class_embeds=draw(st.sampled_from([None, 3])),
        center_input_sample=draw(st.booleans()),
    )


@pytest.mark.heavy
@settings(derandomize=True, deadline=None, max_examples=10)
@given(configurations())
def test_every_network_starts_at_zero_and_learns_everywhere(config):
    unet, generator = UNet(config), torch.Generator().manual_seed(0)
    initialise(unet, generator)
    size = (8, config.in_channels, config.sample_size, config.sample_size)
    x, noise = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    t = torch.arange(8) * 120
    labels = None if config.num_class_embeds is None else t % config.num_class_embeds
    output = unet(x, t, labels)
    assert output.shape == size
    assert not output.any()
    # the mean of n squared normals is 1 with a deviation of sqrt(2 / n)
    assert abs((output - noise).square().mean().item() - 1) < 5 * (2 / noise.numel()) ** 0.5
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    reached = set()
    for _ in range(4):  # the zero layers at the ends of the blocks become non-zero one after the other
        optimizer.zero_grad()
        (unet(x, t, labels) - noise).square().mean().backward()
        optimizer.step()
        reached |= {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    missed = dict(unet.named_parameters()).keys() - reached
    # a key's bias shifts all scores of a query alike, which softmax ignores
    assert all(name.endswith("to_k.bias") for name in missed), missed


def test_the_time_embedding_is_the_papers():
    embedding = timestep_embedding(torch.tensor([0, 3]), 8)
    assert embedding[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # sines before cosines
    frequencies = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4])  # both ends included
    torch.testing.assert_close(embedding[1, :4], torch.sin(3 * frequencies))
    flipped = timestep_embedding(torch.tensor([0, 3]), 8, flip_sin_to_cos=True)
    assert torch.equal(flipped, embedding.roll(4, dims=1))


@pytest.mark.parametrize("size", [4, 16, 18])
def test_doubling_and_convolving_at_once_is_one_after_the_other(size):
    torch.manual_seed(0)
    upsample = Upsample(6).double()
    x = torch.randn(2, 6, size, size, dtype=torch.float64, requires_grad=True)
    given = [x, *upsample.parameters()]
    expected = upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    target = torch.randn_like(expected)
    actual = upsample(x)
    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(
        torch.autograd.grad((actual * target).sum(), given),
        torch.autograd.grad((expected * target).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999999])
def test_dropout_is_uniform_over_places_and_keeps_the_mean(share):
    torch.manual_seed(0)
    dropout, x = Dropout(share), torch.ones(5, 2001, 101, requires_grad=True)
    y = dropout(x)
    # the share that 16 bits can represent, over all elements and by place among the four of a draw
    p = min(share, 1 - 2**-16)
    spread = 5 * (p * (1 - p) / (x.numel() / 4)) ** 0.5 + 2**-17
    for part in (y, *(y.flatten()[place::4] for place in range(4))):
        assert abs(float((part == 0).double().mean()) - p) < spread
    kept = y[y != 0]
    assert kept.numel() and (kept == kept[0]).all() and float(kept[0].detach()) == pytest.approx(1 / (1 - p), rel=1e-4)
    # (neighbours among the four are dropped independently, too)
    a, b = ((y.flatten()[place : x.numel() - 1 : 4] == 0).double() for place in (0, 1))
    assert abs(float((a * b).mean()) - p * p) < spread
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_dropout_follows_the_seed_and_acts_in_training_alone():
    dropout, x = Dropout(0.5), torch.randn(3, 7)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(dropout(x))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


def test_the_initial_weights_follow_from_the_seed_alone():
    torch.manual_seed(1)
    first = small_unet(num_class_embeds=3).state_dict()
    torch.manual_seed(2)
    second = small_unet(num_class_embeds=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
