"""Prepared images as batches. Arrays are memory-mapped, so a data set may be larger than memory."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm import distributed
from ddpm.errors import UserError
from ddpm.seeding import derive, generator
from ddpm.targets import TRANSFORM, build

Positive = Annotated[int, Field(ge=1)]


def load_array(path: str | Path, stage: str, dtype: str, dimensions: int) -> np.ndarray:
    """Open an array that `stage` wrote, memory-mapped: nothing is read yet.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises a dozen kinds, from TokenError to OverflowError
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}; run the stage {stage} again") from None
    if array.dtype != dtype or array.ndim != dimensions:
        raise UserError(f"{path}: holds {array.dtype} {array.shape}, not {dtype}; run the stage {stage} again")
    return array


class Info(BaseModel):
    """data/prepared/dataset.json. `shape` is that of an image, `sha256` of all pixels and labels."""

    model_config = ConfigDict(strict=True)
    name: str
    shape: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    counts: dict[str, Positive]
    classes: list[str]
    class_counts: list[Positive]  # training images of each class; empty where there are no classes
    broken: int
    sha256: str

    @model_validator(mode="after")
    def _one_count_per_class(self) -> Self:
        if len(self.class_counts) != len(self.classes):
            raise ValueError(f"class_counts has {len(self.class_counts)} numbers for {len(self.classes)} classes")
        return self


def load_info(folder: str | Path) -> dict[str, Any]:
    """data/prepared/dataset.json, as `Info`.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    path = Path(folder, "dataset.json")
    try:
        return Info.model_validate_json(path.read_bytes()).model_dump()
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"{part}: " for part in fault["loc"])
        raise UserError(
            f"{path}: {where}{fault['msg'].removeprefix('Value error, ')}; run the stage prepare_data again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run the stage prepare_data again") from None


def load_images(folder: str | Path, split: str) -> np.ndarray:
    """The prepared images of a split, memory-mapped: uint8 (N, H, W, C).

    Raises:
        UserError: the file is missing or damaged, or not the one that dataset.json tells of.
    """
    path, info = Path(folder, split, "images.npy"), load_info(folder)
    images = load_array(path, "prepare_data", "uint8", 4)
    if images.shape != (expected := (info["counts"].get(split), *info["shape"])):
        raise UserError(f"{path}: holds {images.shape}, not {expected}; run the stage prepare_data again")
    return images


def load_labels(folder: str | Path, split: str) -> np.ndarray:
    """The class of each prepared image of a split, memory-mapped: int64 (N,).

    Raises:
        UserError: the file is missing or damaged, or not the one that dataset.json tells of.
    """
    path, info = Path(folder, split, "labels.npy"), load_info(folder)
    labels = load_array(path, "prepare_data", "int64", 1)
    count, classes = info["counts"].get(split), len(info["classes"])
    if len(labels) != count or (classes and not 0 <= labels.min() <= labels.max() < classes):
        raise UserError(f"{path}: holds not {count} labels of {classes} classes; run the stage prepare_data again")
    return labels


def watch(folder: str | Path) -> Callable[[], bool]:
    """Read all prepared data once; what is returned tells whether it was changed since.

    Raises:
        UserError: the data is not what dataset.json tells of.
    """

    def content() -> str:
        digest = hashlib.sha256()
        for split in load_info(folder)["counts"]:
            digest.update(np.ascontiguousarray(load_images(folder, split)).data)
            digest.update(np.ascontiguousarray(load_labels(folder, split)).data)
        return digest.hexdigest()

    def stamps() -> list[tuple[Path, int, int]]:
        return [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(Path(folder).rglob("*"))]

    told, before = load_info(folder)["sha256"], stamps()
    if content() != told:
        raise UserError(f"{folder}: is not what its dataset.json tells of; run the stage prepare_data again")

    def changed() -> bool:
        try:
            return stamps() != before and content() != told
        except (UserError, OSError):
            return True

    return changed


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) as stored, possibly memory-mapped, to a uint8 tensor (B, C, H, W)."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())  # torch wants memory that may be written


def told_labels(
    model: Callable[..., Tensor], labels: np.ndarray | None, rows: slice, device: torch.device
) -> Callable[..., Tensor]:
    """A network as a function of x_t and t alone: where there are labels, int64 (N,), it is told those of the rows."""
    return model if labels is None else partial(model, labels=torch.from_numpy(np.array(labels[rows])).to(device))


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Maps (epoch, rows) to a batch of transformed images and its labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transforms: list[dict[str, Any]], seed: int) -> None:
        self.images = images
        self.labels = labels
        self.seed = seed
        try:
            self.transforms = [build(node, TRANSFORM) for node in transforms]
        except ValueError as error:
            raise UserError(f"train.transforms: {error}") from None

    def __getitem__(self, batch: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor]:
        epoch, rows = batch
        order = np.argsort(rows)  # read in the order of the file
        images = as_tensor(self.images[rows[order]])[torch.from_numpy(np.argsort(order))]
        labels = torch.from_numpy(self.labels[rows])
        if not self.transforms:
            return images, labels
        with torch.random.fork_rng(devices=[]):
            transformed = [self._transformed(image, epoch, int(row)) for image, row in zip(images, rows, strict=True)]
        return torch.stack(transformed), labels

    def _transformed(self, image: Tensor, epoch: int, row: int) -> Tensor:
        shape = image.shape
        torch.manual_seed(derive(self.seed, "augment", epoch, row))
        for transform in self.transforms:
            image = transform(image)
        if not isinstance(image, Tensor) or image.shape != shape:
            got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise UserError(f"train.transforms: give {got}, but the model needs images of shape {tuple(shape)}")
        return image


class _Order:
    """This process's share of all batches from one step on: the order of an epoch follows from (seed, epoch)."""

    def __init__(self, count: int, batch_size: int, seed: int, first_step: int, last_step: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        per_epoch = self.count // self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = generator(self.seed, "shuffle", epoch).permutation(self.count)
            start = step % per_epoch * self.batch_size
            yield epoch, order[start : start + self.batch_size][distributed.share(self.batch_size)]

    def __len__(self) -> int:
        return len(self.steps)


def batches(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    steps: range,
    transforms: list[dict[str, Any]],
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of the steps asked for: the same for a step whatever came before it.

    An epoch is a permutation of the images, less the rest that fills no batch. Random transforms draw anew for every
    image, from (seed, epoch, image), so the numbers of workers and of processes change nothing. Where there are
    several processes, each gets its share of every batch.

    Returns:
        An iterator of images, uint8 (B, C, H, W), or float32 in [-1, 1] where the transforms end in floats, and
        their labels, int64 (B,).
    """
    loader = DataLoader(
        _Batches(images, labels, transforms, seed),
        batch_size=None,
        sampler=_Order(len(images), batch_size, seed, steps.start, steps.stop),
        generator=torch.Generator(),  # else the loader would draw from the global one
        num_workers=workers,
        pin_memory=pin_memory,
        # "spawn" would import torch anew in each worker; forking is safe before the first CUDA call of a child
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)
