"""Prepared images as batches. Arrays are memory-mapped, so a data set may be larger than memory."""

import mmap
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm.config.checks import steps_per_epoch
from ddpm.core.seeding import derive, generator
from ddpm.data.prepared import Images
from ddpm.data.transforms import Transforms
from ddpm.errors import UserError
from ddpm.runtime import processes


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) as stored, possibly memory-mapped, to a uint8 tensor (B, C, H, W)."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())  # torch wants writable memory


def announce(images: np.ndarray, rows: np.ndarray) -> None:
    """Ask the system to read these rows of a memory-mapped array at once; does nothing for an array in memory.

    Otherwise the rows that are on the disk are waited for one after the other, and each is read with 128 KiB around it:
    for images of 64x64 that is eight times the bytes, and takes five to fifteen times as long.

    Args:
        images: (N, ...).
        rows: indices, int64 (B,).
    """
    if not (isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap)):
        return
    size, start = images[0].nbytes, images.offset % mmap.ALLOCATIONGRANULARITY
    for row in rows.tolist():
        begin = start + row * size
        page = begin - begin % mmap.PAGESIZE
        images.base.madvise(mmap.MADV_WILLNEED, page, begin + size - page)


class _Batches(Dataset[tuple[Tensor, Tensor] | UserError]):
    """Maps (passes, rows), int64 (b,) each, to a batch of transformed images and their labels.

    `rows` are the images, and `passes` the pass over all images that each belongs to. A UserError is returned, not
    raised: torch would wrap it in the traceback of the worker that raised it.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transforms: Transforms, seed: int) -> None:
        self.images = images
        self.labels = labels
        self.transforms = transforms
        self.seed = seed

    def __getitem__(self, batch: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor] | UserError:
        passes, rows = batch
        order = np.argsort(rows)  # read in the order of the file
        announce(self.images, rows)
        images = as_tensor(self.images[rows[order]])[torch.from_numpy(np.argsort(order))]
        labels = torch.from_numpy(self.labels[rows])
        if not self.transforms.nodes:
            return images, labels
        seeds = [derive(self.seed, "augment", int(p), int(row)) for p, row in zip(passes, rows, strict=True)]
        try:
            with torch.random.fork_rng(devices=[]):
                transformed = [self.transforms(image, seed) for image, seed in zip(images, seeds, strict=True)]
            return self.transforms.stack(transformed, images.shape[1:]), labels
        except UserError as fault:
            return fault


class _Order:
    """This process's share of the batch of each step, as (passes, rows); see `_Batches`.

    The order of a pass over all images depends on (seed, pass) alone. An epoch is one pass, or as many passes as one
    batch takes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, first_step: int, last_step: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        per_epoch = steps_per_epoch(self.count, self.batch_size)
        passes = -(-self.batch_size // self.count)  # per epoch
        epoch, order, numbers = -1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                numbers = np.arange(epoch * passes, (epoch + 1) * passes)
                order = np.concatenate(
                    [generator(self.seed, "shuffle", int(n)).permutation(self.count) for n in numbers]
                )
                numbers = numbers.repeat(self.count)
            start = step % per_epoch * self.batch_size
            mine = processes.share(self.batch_size)
            yield numbers[start : start + self.batch_size][mine], order[start : start + self.batch_size][mine]

    def __len__(self) -> int:
        return len(self.steps)


def batches(
    split: Images,
    *,
    batch_size: int,
    seed: int,
    steps: range,
    transforms: list[dict[str, Any]],
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The training batches of these steps: a step's batch does not depend on where the range starts.

    An epoch is a permutation of the images, without the remainder that fills no batch. A batch larger than the set is
    an epoch by itself: it takes as many permutations as it needs, and drops the rest of the last. Random transforms
    draw for every image, from (seed, permutation, image), so the numbers of workers and of processes change nothing.
    Where there are several processes, each gets its share of every batch.

    Args:
        batch_size: images per step, of all processes together.
        steps: counted from 0.
        transforms: as `_target_` mappings, applied in turn.
        workers: processes that load batches; 0: this process does.

    Returns:
        A generator of images (B, C, H, W), uint8, or float32 in [0, 1] where the transforms end in floats, and their
        labels, int64 (B,). Close it where it may not be run to its end: that ends the workers.

    Raises:
        UserError: a transform refuses its arguments or, raised by the generator, fails or gives other images.
    """
    loader = DataLoader(
        _Batches(*split, Transforms(transforms), seed),
        batch_size=None,
        sampler=_Order(len(split.images), batch_size, seed, steps.start, steps.stop),
        generator=torch.Generator(),  # else the loader would draw from the global one
        num_workers=workers,
        pin_memory=pin_memory,
        # "spawn" would import torch again in each worker; forking is safe before the first CUDA call of a child
        multiprocessing_context="fork" if workers else None,
    )
    # workers inherit this mask: a Ctrl-C reaches them, too, but the training needs them to finish its step
    blocked, others = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM)), active_children()
    items = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return _sound(items, [child for child in active_children() if child not in others])


def _sound(items: Any, workers: list[BaseProcess]) -> Generator[tuple[Tensor, Tensor], None, None]:
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item
    except (ConnectionError, EOFError) as error:  # a dying worker was sending a batch
        raise RuntimeError(f"DataLoader worker (pid(s) {_dead(workers)}) exited unexpectedly") from error
    finally:
        if workers:
            items._shutdown_workers()  # as the destructor would: a traceback that holds `items` delays that
        for worker in workers:
            worker.kill()  # one that hangs: it blocks the SIGTERM by which torch would end it


def _dead(workers: list[BaseProcess]) -> str:
    for worker in workers:
        worker.join(1)
    return ", ".join(str(worker.pid) for worker in workers if not worker.is_alive())


@contextmanager
def worker_faults(workers: int) -> Iterator[None]:
    """Report in one line that a loader's worker has died. torch raises that wherever the block is at that moment.

    Args:
        workers: the setting train.workers, for the message.

    Raises:
        UserError: a worker has died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"params.yaml: train.workers = {workers}: {reason}; lower it, or free memory, also in /dev/shm. "
            f"The last state is kept; run the same command to resume"
        ) from None
