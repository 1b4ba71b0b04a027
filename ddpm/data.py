"""Prepared images as batches. Arrays are memory-mapped, so a data set may be larger than memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm.errors import UserError
from ddpm.seeding import derive, generator
from ddpm.targets import TRANSFORM, build


def load_array(path: str | Path, stage: str, dtype: str, dimensions: int) -> np.ndarray:
    """Open an array that `stage` wrote, memory-mapped: nothing is read yet.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}; run the stage {stage} again") from None
    if array.dtype != dtype or array.ndim != dimensions:
        raise UserError(f"{path}: holds {array.dtype} {array.shape}, not {dtype}; run the stage {stage} again")
    return array


def load_images(folder: str | Path, split: str) -> np.ndarray:
    """The prepared images of a split, memory-mapped: uint8 (N, H, W, C)."""
    return load_array(Path(folder, split, "images.npy"), "prepare_data", "uint8", 4)


def load_info(folder: str | Path) -> dict[str, Any]:
    """data/prepared/dataset.json: name, shape, counts, classes and the hash of the content."""
    path = Path(folder, "dataset.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; run the stage prepare_data again") from None


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) as stored, possibly memory-mapped, to a uint8 tensor (B, C, H, W)."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())  # torch wants memory that may be written


class _Batches(Dataset[Tensor]):
    """Maps (epoch, index in the epoch, rows) to a batch of transformed images."""

    def __init__(self, images: np.ndarray, transforms: list[dict[str, Any]], seed: int) -> None:
        self.images = images
        self.seed = seed
        try:
            self.transforms = [build(node, TRANSFORM) for node in transforms]
        except ValueError as error:
            raise UserError(f"train.transforms: {error}") from None

    def __getitem__(self, batch: tuple[int, int, np.ndarray]) -> Tensor:
        epoch, index, rows = batch
        order = np.argsort(rows)  # read in the order of the file
        images = as_tensor(self.images[rows[order]])[torch.from_numpy(np.argsort(order))]
        if not self.transforms:
            return images
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "augment", epoch, index))
            return torch.stack([self._transformed(image) for image in images])

    def _transformed(self, image: Tensor) -> Tensor:
        shape = image.shape
        for transform in self.transforms:
            image = transform(image)
        if not isinstance(image, Tensor) or image.shape != shape:
            got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise UserError(f"train.transforms: give {got}, but the model needs images of shape {tuple(shape)}")
        return image


class _Order:
    """The batches of all epochs from one step on: the order of an epoch follows from (seed, epoch)."""

    def __init__(self, count: int, batch_size: int, seed: int, first_step: int, last_step: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        per_epoch = self.count // self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = generator(self.seed, "shuffle", epoch).permutation(self.count)
            start = step % per_epoch * self.batch_size
            yield epoch, step % per_epoch, order[start : start + self.batch_size]

    def __len__(self) -> int:
        return len(self.steps)


def batches(
    images: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    steps: range,
    transforms: list[dict[str, Any]],
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Tensor]:
    """The training batches of the steps asked for: the same for a step whatever came before it.

    An epoch is a permutation of the images, less the rest that fills no batch. Random transforms draw anew
    for every image, from (seed, epoch, batch), so the number of workers changes nothing.

    Returns:
        An iterator of uint8 (B, C, H, W), or of float32 in [-1, 1] where the transforms end in floats.
    """
    loader = DataLoader(
        _Batches(images, transforms, seed),
        batch_size=None,
        sampler=_Order(len(images), batch_size, seed, steps.start, steps.stop),
        generator=torch.Generator(),  # else the loader would draw from the global one
        num_workers=workers,
        pin_memory=pin_memory,
        # "spawn" would import torch anew in each worker; forking is safe before the first CUDA call of a child
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)
