"""The U-Net of DDPM (Ho et al. 2020, appendix B): residual blocks, attention at chosen levels, time embedding.

Module names and shapes are those of diffusers' `UNet2DModel`, so that weights pass both ways without conversion.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net; the default values are the paper's. Names follow diffusers, attention apart.

    Attributes:
        sample_size: height and width of the images, in pixels.
        attention: one flag per level, from the full resolution down: self-attention after each residual block.
        up_attention: the same for the way up, also from the full resolution down; None: same as `attention`.
        attention_head_dim: channels per head; None for a single head.
        add_attention: attention in the middle.
        downsample_padding: 0 pads the stride-2 convolutions on the right and bottom only, 1 on all sides.
        flip_sin_to_cos: cosines before sines in the time embedding.
        freq_shift: 1 makes the lowest frequency of the time embedding exactly 1/10000; with 0 it is higher.
        num_class_embeds: number of labels of a class-conditional network; None for an unconditional one.
        has_no_label: the last of these labels is no class, but stands for no label.
        center_input_sample: inputs are in [0, 1], and the network maps them to [-1, 1].

    Raises:
        ValueError: values that do not fit together.
    """

    sample_size: int
    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention: tuple[bool, ...]
    up_attention: tuple[bool, ...] | None = None
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-6  # torch's default is 1e-5
    attention_head_dim: int | None = None
    add_attention: bool = True
    downsample_padding: int = 0
    flip_sin_to_cos: bool = False
    freq_shift: int = 1
    num_class_embeds: int | None = None
    has_no_label: bool = False
    center_input_sample: bool = False

    def __post_init__(self) -> None:
        widths, groups, head = self.block_out_channels, self.norm_num_groups, self.attention_head_dim
        counts = [self.sample_size, self.in_channels, self.out_channels, self.layers_per_block, groups, *widths]
        if not widths or min(counts) < 1 or not 0 <= self.dropout < 1:
            raise ValueError("sizes, channels and counts must be at least 1, and dropout from 0 up and below 1")
        if not len(widths) == len(self.attention) == len(self.up_flags):
            raise ValueError(
                f"{len(widths)} block_out_channels, {len(self.attention)} blocks down and {len(self.up_flags)} up: "
                f"must be as many of each"
            )
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps = {self.norm_eps}: must be above 0")
        if self.sample_size % 2 ** (len(widths) - 1):
            raise ValueError(f"sample_size = {self.sample_size}: must be a multiple of {2 ** (len(widths) - 1)}")
        if any(width % groups for width in widths):
            raise ValueError(f"norm_num_groups = {groups}: must divide every one of block_out_channels = {widths}")
        attends = [down or up for down, up in zip(self.attention, self.up_flags, strict=True)]
        attends[-1] |= self.add_attention
        if head is not None and (head < 1 or any(w % head for w, a in zip(widths, attends, strict=True) if a)):
            raise ValueError(f"attention_head_dim = {head}: must divide the channels wherever there is attention")
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding = {self.downsample_padding}: only 0 and 1 are known")
        if widths[0] // 2 == self.freq_shift:  # the divisor of the frequencies would be zero
            raise ValueError(f"freq_shift = {self.freq_shift}: must not be half of block_out_channels[0]")
        if self.num_class_embeds is not None and self.num_class_embeds < 1:
            raise ValueError(f"num_class_embeds = {self.num_class_embeds}: must be at least 1, or null")
        if self.has_no_label and self.classes < 1:
            raise ValueError(f"has_no_label = True: num_class_embeds = {self.num_class_embeds}: must be at least 2")

    @property
    def up_flags(self) -> tuple[bool, ...]:
        """One flag per level for the way up, from the full resolution down."""
        return self.attention if self.up_attention is None else self.up_attention

    @property
    def classes(self) -> int:
        """The number of classes of the images; 0 for an unconditional network."""
        return (self.num_class_embeds or 0) - self.has_no_label

    @property
    def no_label(self) -> int | None:
        """The label that stands for no label, which guidance needs; None where the network has none."""
        return self.classes if self.has_no_label else None


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool = False, freq_shift: int = 1) -> Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017, section 3.5): t (B,) to float32 (B, dim).

    As in the paper's code by default: sines before cosines, and frequencies from 1 to 1/10000 inclusive,
    since the divisor is half - 1. The last column of an odd dim is zero.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(10000) / (half - freq_shift) * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * freqs[None]
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """Two layers over the sinusoidal embedding."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Dropout(nn.Dropout):
    """torch's dropout, but on a CPU with 16 random bits per element, four elements per draw: Bernoulli draws would take
    a twentieth of a bf16 training step of the paper's network. `p` is rounded to 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        drop = min(round(self.p * 2**16), 2**16 - 1)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= drop - 2**15
        return x * (keep.to(x.dtype) / (1 - drop / 2**16))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice; the time embedding is added between the two.

    `recompute`: see `UNet.set_recompute`.
    """

    recompute: bool = False

    def __init__(self, c_in: int, c_out: int, time_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, c_out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, silu_temb: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, silu_temb, use_reentrant=False)  # with the same dropout
        return self._forward(x, silu_temb)

    def _forward(self, x: Tensor, silu_temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(silu_temb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over all positions (Vaswani et al. 2017, eq. 1), with a residual connection."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // (config.attention_head_dim or channels)
        self.group_norm = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.group_norm(x).view(b, c, h * w).transpose(1, 2)
        q, k, v = (
            project(tokens).view(b, h * w, self.heads, c // self.heads).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.to_out[0](out).transpose(1, 2).reshape(b, c, h, w)


class Downsample(nn.Module):
    """Stride-2 convolution, padded on all sides, or (padding 0, the paper's) on the right and bottom only."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution.

    On a CPU both are one transposed convolution: each output pixel depends on 2x2 inputs, weighted by sums of the 3x3
    kernel, with less than half of the products. For few pixels the sums cost more than they save.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] >= 16:
            sums = F.avg_pool2d(self.conv.weight, 2, stride=1, padding=1, divisor_override=1)  # (out, in, 4, 4)
            return F.conv_transpose2d(x, sums.flip(2, 3).transpose(0, 1), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """A level going down: residual blocks, each followed by attention where the level has it, then half the size."""

    def __init__(self, c_in: int, c_out: int, attention: bool, last: bool, time: int, config: UNetConfig) -> None:
        super().__init__()
        n = config.layers_per_block
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, time, config) for i in range(n))
        self.attentions = nn.ModuleList(Attention(c_out, config) for _ in range(n if attention else 0))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out, config.downsample_padding)])

    def forward(self, x: Tensor, silu_temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, silu_temb)
            if self.attentions:
                x = self.attentions[i](x)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, attention (unless the network has none here), residual block at the smallest size."""

    def __init__(self, channels: int, time: int, config: UNetConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, config)] if config.add_attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, time, config) for _ in range(2))

    def forward(self, x: Tensor, silu_temb: Tensor) -> Tensor:
        x = self.resnets[0](x, silu_temb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, silu_temb)


class UpBlock(nn.Module):
    """A level going up: one residual block more than going down, since it also takes the skip of the level's input."""

    def __init__(
        self, c_in: int, c_out: int, skips: list[int], attention: bool, last: bool, time: int, config: UNetConfig
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock((c_in if i == 0 else c_out) + skip, c_out, time, config) for i, skip in enumerate(skips)
        )
        self.attentions = nn.ModuleList(Attention(c_out, config) for _ in range(len(skips) if attention else 0))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x: Tensor, skips: list[Tensor], silu_temb: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), silu_temb)
            if self.attentions:
                x = self.attentions[i](x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(nn.Module):
    """Predicts epsilon, x0 or v from a noisy image, its timestep, and its class if the network is conditional."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, levels = config.block_out_channels, len(config.block_out_channels)
        time = widths[0] * 4
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time)
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        c = widths[0]
        for level, width in enumerate(widths):
            last = level == levels - 1
            self.down_blocks.append(DownBlock(c, width, config.attention[level], last, time, config))
            skips += [width] * (config.layers_per_block + (not last))
            c = width
        self.mid_block = MidBlock(c, time, config)
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(c, width, taken, config.up_flags[level], level == 0, time, config))
            c = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction, float (B, out_channels, H, W).

        Args:
            x: float (B, C, H, W) in about [-1, 1].
            t: integer (B,) in [0, T).
            labels: int64 (B,) in [0, num_class_embeds); for class-conditional networks, and only for them.

        Raises:
            ValueError: labels are missing, or the network takes none.
        """
        c = self.config
        if (labels is None) != (c.num_class_embeds is None):
            takes = "no labels" if labels is not None else f"labels below {c.num_class_embeds}, one per image"
            raise ValueError(f"this U-Net takes {takes} (num_class_embeds = {c.num_class_embeds})")
        temb = self.time_embedding(timestep_embedding(t, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift))
        if labels is not None:
            temb = temb + self.class_embedding(labels)
        temb = F.silu(temb)  # once here; diffusers does it in each residual block
        x = self.conv_in(2 * x - 1 if c.center_input_sample else x)
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, temb)
            skips += new
        x = self.mid_block(x, temb)
        for block in self.up_blocks:
            x = block(x, skips, temb)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def set_recompute(self, recompute: bool) -> None:
        """Set whether residual blocks keep only their input for the backward pass, and recompute activations there.

        This takes less memory, gives the same bits, and costs a second forward pass (Chen et al. 2016).
        """
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                module.recompute = recompute


@torch.no_grad()
def initialise(unet: UNet, generator: torch.Generator) -> None:
    """The paper's initial weights: uniform with variance 1 / fan_avg, zero biases, and zero for the last
    convolution of each residual block, each attention output and the output, so that a new network is near
    the identity and predicts zero. Class embeddings are standard normal."""
    zero = {unet.conv_out}
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            zero.add(module.conv2)
        elif isinstance(module, Attention):
            zero.add(module.to_out[0])  # type: ignore[arg-type]
    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module in zero:
                module.weight.zero_()
            else:
                nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
