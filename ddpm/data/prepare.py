"""Convert a data set to the prepared data: uint8 pixels and labels, split into train and test.

The same images, parameters and library versions give the same bytes, on any number of cores.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddpm.config.schema import Dataset
from ddpm.data.decode import Pixels, decode_file, to_pixels
from ddpm.data.sources import RawSplit, load_source
from ddpm.data.splits import check_subset, subset_indices
from ddpm.errors import UserError, legible, listed
from ddpm.files import save_array
from ddpm.runtime.pool import in_parallel

IMAGES_PER_CHUNK = 64
BYTES_PER_CHUNK = 2**22  # bounds the memory where the images are large
NAMED_FAULTS = 20  # broken files that the report names, at most


def prepare(
    dataset: Dataset, out: Path, downloads: Path, check: Callable[[dict[str, Any]], None] = lambda info: None
) -> dict[str, Any]:
    """Write `out`: {train,test}/{images,labels}.npy and dataset.json, whose content is returned.

    images: uint8 (N, image_size, image_size, channels); labels: int64 (N,). They are written beside `out` and
    moved there at the end, so that a failure leaves an older `out` as it was.

    Args:
        downloads: the folder that keeps what torchvision downloads.
        check: called with the content of dataset.json before the move; it may raise to refuse the data.

    Raises:
        UserError: the source is missing, unfit or broken, one line per fault.
        OSError: the disk is full or read-only.
    """
    source = load_source(dataset, downloads)
    check_subset(source.train.labels, dataset.subset)
    shape = (dataset.image_size, dataset.image_size, dataset.channels)
    content = hashlib.sha256()
    with _replacing(out) as new:
        train, test = (
            _write_split(new / name, split, source.folder, dataset, content)
            for name, split in (("train", source.train), ("test", source.test))
        )
        counts = {"train": len(train.labels), "test": len(test.labels)}
        broken = train.broken + test.broken
        if broken:
            _report_broken(broken, counts, dataset)
        class_counts = _report_classes(source.classes, train.labels, test.labels)
        _report_copies(train, test)
        summary = {
            "name": dataset.name,
            "shape": list(shape),
            "counts": counts,
            "classes": source.classes,
            "class_counts": class_counts,
            "broken": len(broken),
            "sha256": content.hexdigest(),
        }
        check(summary)
        (new / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _converted(
    images: Pixels | list[str], folder: Path, dataset: Dataset, label: str
) -> Generator[list[Pixels | str], None, None]:
    """Yield chunks of images, uint8 (size, size, channels) each, or in place of a broken one the reason."""
    size, channels = dataset.image_size, dataset.channels
    chunk = max(1, min(IMAGES_PER_CHUNK, BYTES_PER_CHUNK // (size * size * channels)))
    if isinstance(images, list):
        paths = [str(folder / file) for file in images]
        yield from in_parallel(
            partial(decode_file, size=size, channels=channels, max_megapixels=dataset.max_megapixels),
            paths,
            chunk,
            label,
        )
        return
    fits = images.shape[1:] == (size, size, channels)
    for start in range(0, len(images), chunk):
        rows = images[start : start + chunk]
        yield [row if fits else to_pixels(Image.fromarray(row.squeeze()), size, channels) for row in rows]


class Written(NamedTuple):
    """The outcome of a split."""

    labels: npt.NDArray[np.int64]  # (N,), of the images that are not broken
    files: list[str]  # the files of these images; empty for images that are not files
    marks: npt.NDArray[np.uint64]  # (N,), a hash of the pixels of each of these images
    broken: list[str]  # a line for each broken file


def _write_split(out: Path, split: RawSplit, folder: Path, dataset: Dataset, content: Any) -> Written:
    """Write the images and labels of a split to a new folder, and into the hash `content`."""
    size, channels = dataset.image_size, dataset.channels
    chosen = subset_indices(split.labels, dataset.subset)
    images = [split.images[i] for i in chosen] if isinstance(split.images, list) else split.images[chosen]
    out.mkdir()
    with closing(_converted(images, folder, dataset, out.name)) as chunks:
        faults, marks = _write_images(out / "images.npy", chunks, (size, size, channels), content)
    labels = np.delete(split.labels[chosen], list(faults)).astype("<i8")
    save_array(out / "labels.npy", labels)
    content.update(labels.tobytes())
    files = [file for i, file in enumerate(images) if i not in faults] if isinstance(images, list) else []
    return Written(labels, files, marks, [f"{legible(images[i])}: {reason}" for i, reason in faults.items()])


def _write_images(
    path: Path, chunks: Iterable[list[Pixels | str]], row_shape: tuple[int, ...], content: Any
) -> tuple[dict[int, str], npt.NDArray[np.uint64]]:
    """Write the images that are not broken to a .npy file and into the hash `content`.

    Returns:
        The reasons of the broken images by their index, and a hash of the pixels of each other image, uint64 (N,).
    """
    faults: dict[int, str] = {}
    marks = bytearray()
    count = index = 0

    def write_header() -> None:
        # numpy pads the header for a growing first axis, so it has one length for every count.
        file.seek(0)
        shape = (count, *row_shape)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

    with path.open("wb") as file:
        write_header()
        for chunk in chunks:
            for row in chunk:
                if isinstance(row, str):
                    faults[index] = row
                else:
                    pixels = row.tobytes()
                    file.write(pixels)
                    content.update(pixels)
                    marks += hashlib.blake2b(pixels, digest_size=8).digest()
                    count += 1
                index += 1
        write_header()
    return faults, np.frombuffer(marks, dtype=np.uint64)


def _report_broken(broken: list[str], counts: dict[str, int], dataset: Dataset) -> None:
    lines = broken[:NAMED_FAULTS]
    if len(broken) > NAMED_FAULTS:
        lines.append(f"and {len(broken) - NAMED_FAULTS} more")
    total = f"{len(broken)} of {len(broken) + sum(counts.values())} images in {dataset.path} are broken"
    if dataset.on_broken == "stop":
        raise UserError("\n".join([*lines, f"{total}: repair or remove them, or skip them: dataset.on_broken=skip"]))
    for name, count in counts.items():
        if count == 0:
            raise UserError("\n".join([*lines, f"{total}, and none is left to {name} on"]))
    print("\n".join([*lines, f"{total} and left out"]))


def _report_classes(names: list[str], train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> list[int]:
    """Count the training images of each class, and print which classes have no held-out image.

    Raises:
        UserError: a class has no training image, so that the model could not draw it.
    """
    counts, held_out = (np.bincount(labels, minlength=len(names)).tolist() for labels in (train, test))
    if not names:
        return []
    lost = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if lost:
        raise UserError(
            f"no training image is left of {listed(lost)}: repair or replace the broken ones, or move "
            f"{'these classes' if len(lost) > 1 else 'this class'} out of the data set"
        )
    untested = [name for name, count in zip(names, held_out, strict=True) if count == 0]
    if untested:
        print(f"{len(untested)} of {len(names)} classes have training images only, none held out: {listed(untested)}")
    return counts


def _report_copies(train: Written, test: Written) -> None:
    """Print how many held-out files have the pixels of a training file, which flatters every comparison."""
    if not test.files:
        return
    copies = np.flatnonzero(np.isin(test.marks, train.marks))
    if len(copies):
        twin = train.files[int(np.flatnonzero(train.marks == test.marks[copies[0]])[0])]
        print(
            f"{len(copies)} of {len(test.files)} held-out images have the same pixels as a training image, for example "
            f"{legible(test.files[copies[0]])} and {legible(twin)}"
        )


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Yield a new folder, which replaces `out` at the end of the block, or is removed if the block raises."""
    tmp = out.with_name(f"{out.name}.tmp")
    if tmp.exists():  # left by a run that was killed
        shutil.rmtree(tmp)
    new, old = tmp / "new", tmp / "old"
    try:
        new.mkdir(parents=True)
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    except BaseException as error:
        if old.exists() and not out.exists():
            old.rename(out)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(tmp)  # the error of a failed write names no file
        raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
