"""Pictures for people: grids and strips, small images enlarged so that their pixels can be seen."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm.files import write_file

GAP = 2  # pixels of white between images
TILE = 64  # pixels: least size of a shown image
FILM_VALUES = 12_288  # in one moment of a film, about the bytes it adds to the file: 4 colour images of 32x32 ...
FILM_IMAGES, FILM_COLUMNS = 48, 12  # ... and at most this many images
FILM_PACE, FILM_START, FILM_END = 80, 600, 2500  # milliseconds that a moment, the first and the last are seen


def _enlarged(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C), each pixel made a square block where the images are small."""
    zoom = max(1, math.ceil(TILE / max(images.shape[1:3])))
    return images.repeat(zoom, axis=1).repeat(zoom, axis=2)


def tile(images: np.ndarray, columns: int, gap: int = GAP) -> Image.Image:
    """Images in rows, `gap` pixels apart: uint8 (N, H, W, C) to one picture, enlarged where they are small.

    Raises:
        ValueError: there is no image.
    """
    if not len(images):
        raise ValueError("no image to show")
    images = _enlarged(images)
    count, height, width, channels = images.shape
    down, right, rows = height + gap, width + gap, math.ceil(count / columns)
    canvas = np.full((rows * down + gap, columns * right + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * down + gap, i % columns * right + gap
        canvas[y : y + height, x : x + width] = image
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def grid(images: np.ndarray) -> Image.Image:
    """Images in a block about as wide as it is high: uint8 (N, H, W, C)."""
    return tile(images, columns=math.ceil(math.sqrt(len(images))))


def rows(images: np.ndarray) -> Image.Image:
    """Rows of images: uint8 (rows, columns, H, W, C)."""
    return tile(images.reshape(-1, *images.shape[2:]), columns=images.shape[1])


def pairs(left: np.ndarray, right: np.ndarray, columns: int) -> Image.Image:
    """Two sets of images side by side, uint8 (N, H, W, C) each: the gap in a pair is narrow, between pairs wide."""
    left, right = _enlarged(left), _enlarged(right)
    seam = np.full((*left.shape[:2], GAP, left.shape[3]), 255, dtype=np.uint8)
    return tile(np.concatenate([left, seam, right], axis=2), columns, gap=8 * GAP)


def film_images(values: int) -> int:
    """How many images of `values` numbers each a film shows."""
    return max(1, min(FILM_IMAGES, FILM_VALUES // values))


def save_film(moments: Sequence[np.ndarray], path: str | Path) -> None:
    """Write an animated PNG, the same bytes for the same moments; a missing folder is created.

    Args:
        moments: at least two, uint8 (N, H, W, C) each. A viewer that shows only one picture of the file shows the last.
    """
    frames = [tile(images, min(FILM_COLUMNS, len(images))) for images in moments]
    buffer = BytesIO()
    frames[-1].save(
        buffer,
        format="PNG",
        optimize=True,
        save_all=True,
        default_image=True,  # the first image is not played
        append_images=frames,
        duration=[FILM_START, *[FILM_PACE] * (len(frames) - 2), FILM_END],
        loop=0,
    )
    write_file(path, buffer.getbuffer())


def save(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG, the same bytes for the same picture; a missing folder is created."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_file(path, buffer.getbuffer())
