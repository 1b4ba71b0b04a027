"""Convert images, as stored or transformed, to the model's range and back. No other module does."""

import numpy as np
import torch
from torch import Tensor


def to_model_range(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) in [0, 255], or float32 in [0, 1], to float32 in [-1, 1]."""
    if images.is_floating_point():
        return 2 * images - 1
    return images.to(torch.float32) / 127.5 - 1


def to_pixels(x: Tensor) -> np.ndarray:
    """float (B, C, H, W) in [-1, 1] to uint8 (B, H, W, C): clamped, and rounded to the nearest level."""
    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()
