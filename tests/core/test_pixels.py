import numpy as np
import torch

from ddpm.core.pixels import to_model_range, to_pixels


def test_every_level_comes_back_unchanged():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_model_range(levels)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_pixels(x), levels.permute(0, 2, 3, 1).numpy())


def test_pixels_are_clamped_and_rounded_to_the_nearest_level():
    x = torch.tensor([-3.0, 3.0, 0.9 / 127.5 - 1, 0.4 / 127.5 - 1]).view(1, 1, 2, 2)
    assert to_pixels(x).ravel().tolist() == [0, 255, 1, 0]
