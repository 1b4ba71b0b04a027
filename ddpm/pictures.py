"""Pictures for people: grids and strips, small images enlarged so that their pixels can be seen."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

GAP = 2  # pixels of white between images
TILE = 40  # pixels that a shown image has at least


def tile(images: np.ndarray, columns: int) -> Image.Image:
    """Images in rows: uint8 (N, H, W, C) to one picture, each pixel enlarged to a square block where they are small.

    Raises:
        ValueError: there is no image.
    """
    count, height, width, channels = images.shape
    if not count:
        raise ValueError("no image to show")
    zoom = max(1, math.ceil(TILE / max(height, width)))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width, rows = height * zoom + GAP, width * zoom + GAP, math.ceil(count / columns)
    canvas = np.full((rows * height + GAP, columns * width + GAP, channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height + GAP, i % columns * width + GAP
        canvas[top : top + height - GAP, left : left + width - GAP] = image
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def grid(images: np.ndarray) -> Image.Image:
    """Images in a block about as wide as it is high: uint8 (N, H, W, C)."""
    return tile(images, columns=math.ceil(math.sqrt(len(images))))


def save(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG, the same bytes for the same picture; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", optimize=True)
