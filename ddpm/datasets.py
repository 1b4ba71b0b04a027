"""The data sets, and how each becomes the prepared data: uint8 pixels and labels, split into train and test.

The same images, parameters and library versions give the same bytes, on any number of cores.
"""

import errno
import hashlib
import io
import json
import shutil
import socket
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, redirect_stderr
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddpm.config import Dataset
from ddpm.decode import EXTENSIONS, Pixels, decode_file, digest_file, image_files, in_parallel, to_pixels
from ddpm.errors import UserError, legible

TORCHVISION_CLASSES = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
IMAGES_A_CHUNK = 64
BYTES_A_CHUNK = 2**22  # bounds the memory where the images are large
NAMED_FAULTS = 20


class Split(NamedTuple):
    """One side of a data set, before any image is converted."""

    images: Pixels | list[str]  # uint8 (N, h, w, c) of the set's own size, or N paths relative to Source.folder
    labels: npt.NDArray[np.int64]  # (N,)


class Source(NamedTuple):
    """A data set: two splits, and the names of the classes."""

    train: Split
    test: Split
    classes: list[str]  # label k is classes[k]; empty where there are none, and all labels are 0
    folder: Path = Path()


def prepare(dataset: Dataset, out: Path, downloads: Path) -> dict[str, Any]:
    """Make `out` anew: {train,test}/{images,labels}.npy and dataset.json, whose content is returned.

    images: uint8 (N, image_size, image_size, channels); labels: int64 (N,). They are written beside `out` and
    moved there at the end, so that a failure leaves an older `out` as it was. `downloads` keeps what torchvision
    fetches.

    Raises:
        UserError: the source is missing, unfit or broken, one line a fault.
        OSError: the disk is full or read-only.
    """
    if dataset.name == "digits":
        source = _digits(dataset.test_fraction)
    elif dataset.name == "folder":
        source = _folder(Path(dataset.path), dataset.test_fraction)
    else:
        source = _torchvision(dataset.name, downloads)

    shape = (dataset.image_size, dataset.image_size, dataset.channels)
    content = hashlib.sha256()
    counts: dict[str, int] = {}
    broken: list[str] = []
    with _replacing(out) as new:
        for name, split in (("train", source.train), ("test", source.test)):
            chosen = subset_indices(len(split.labels), dataset.subset)
            labels = split.labels[chosen]
            images = [split.images[i] for i in chosen] if isinstance(split.images, list) else split.images[chosen]
            (new / name).mkdir()
            with closing(_converted(images, source.folder, dataset, name)) as chunks:
                faults = _write_images(new / name / "images.npy", chunks, shape, content)
            broken += [f"{legible(images[i])}: {reason}" for i, reason in faults.items()]
            labels = np.delete(labels, list(faults)).astype("<i8")
            buffer = io.BytesIO()  # np.save to a file reports a full disk without its error number
            np.save(buffer, labels)
            (new / name / "labels.npy").write_bytes(buffer.getvalue())
            content.update(labels.tobytes())
            counts[name] = len(labels)
        if broken:
            _tell_broken(broken, counts, dataset)
        summary = {
            "name": dataset.name,
            "shape": list(shape),
            "counts": counts,
            "classes": source.classes,
            "broken": len(broken),
            "sha256": content.hexdigest(),
        }
        (new / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def subset_indices(count: int, subset: int | float | None) -> npt.NDArray[np.int64]:
    """Which of `count` images to keep, ascending: all, `subset` of them, or that fraction, at least one.

    A smaller subset is part of every larger one.
    """
    if subset is None:
        return np.arange(count)
    size = max(1, round(count * subset)) if isinstance(subset, float) else min(count, subset)
    return np.sort(np.random.default_rng(0).permutation(count)[:size])


# The sources


def _digits(test_fraction: float) -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1); 0..16 as they come
    labels = data.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    held_out = min(max(1, round(len(labels) * test_fraction)), len(labels) - 1)
    test[np.random.default_rng(0).permutation(len(labels))[:held_out]] = True
    return Source(
        Split(pixels[~test], labels[~test]),
        Split(pixels[test], labels[test]),
        [str(name) for name in data.target_names],
    )


def _torchvision(name: str, downloads: Path) -> Source:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    cls = getattr(datasets, TORCHVISION_CLASSES[name])
    unpacked: list[tuple[Path, str | None]]
    if name == "cifar10":
        folder, origins = downloads, [cls.url.rpartition("/")[0]]
        archives = [(cls.filename, cls.tgz_md5)]
        parts = [*cls.train_list, *cls.test_list, [cls.meta["filename"], cls.meta["md5"]]]
        unpacked = [(folder / cls.base_folder / file, md5) for file, md5 in parts]
    else:
        folder, origins = downloads / cls.__name__ / "raw", cls.mirrors
        archives = cls.resources
        unpacked = [((folder / file).with_suffix(""), None) for file, _ in archives]
    # torchvision takes unpacked files that it has no checksum for, such as the half that a killed run left, and
    # does not unpack again where only some are bad. Without them it goes back to the archives, which it checks.
    if not all(md5 and check_integrity(path, md5) for path, md5 in unpacked):
        for path, _ in unpacked:
            path.unlink(missing_ok=True)
        lacking = [(file, md5) for file, md5 in archives if not check_integrity(folder / file, md5)]
        if lacking:
            print(f"{name}: downloading {', '.join(file for file, _ in lacking)} into {folder}", flush=True)

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte; a network that drops packets would wait for ever
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            train, test = (cls(downloads, train=train, download=True) for train in (True, False))
    except (RuntimeError, OSError, EOFError, TarError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        lacking = [(file, md5) for file, md5 in archives if not check_integrity(folder / file, md5)] or archives
        files = ", ".join(f"{file} (md5 {md5})" for file, md5 in lacking)
        raise UserError(
            f"dataset.name = {name}: cannot download {files}: {' '.join(str(error).split())}; "
            f"fetch it by other means from {' or '.join(origins)}, put it into {folder} and run this again"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)

    def split(part: Any) -> Split:
        pixels = np.asarray(part.data)  # CIFAR-10: (N, 32, 32, 3); MNIST: (N, 28, 28)
        return Split(pixels if pixels.ndim == 4 else pixels[..., None], np.asarray(part.targets, dtype=np.int64))

    return Source(split(train), split(test), list(train.classes))


def _folder(folder: Path, test_fraction: float) -> Source:
    """A person's own images; their sub-folders, if any, are the classes."""
    here = f"dataset.path = {legible(folder)}"
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise UserError(f"{here}: {what}; make it and put images there, or set dataset.path to the folder with yours")
    files, ignored = image_files(folder)
    if ignored:
        print(f"{folder}: {ignored} other files ignored")
    if not files:
        raise UserError(f"{here}: holds no {', '.join(EXTENSIONS)} files; put images there")

    sides: dict[str, list[str]]
    if all((folder / side).is_dir() for side in ("train", "test")):
        sides = {side: [file for file in files if file.startswith(f"{side}/")] for side in ("train", "test")}
        outside = len(files) - sum(map(len, sides.values()))
        if outside:
            print(f"{folder}: {outside} images outside train/ and test/ left out")
        for side, members in sides.items():
            if not members:
                raise UserError(f"{here}: {side}/ holds no images; put some there, or remove it to have one held out")
        depth = 1
    else:
        sides = _split_by_content(folder, files, test_fraction)
        depth = 0

    def class_of(file: str) -> str | None:
        parts = file.split("/")
        return parts[depth] if len(parts) > depth + 1 else None

    kept = [file for members in sides.values() for file in members]
    loose = [file for file in kept if class_of(file) is None]
    names = sorted({name for file in kept if (name := class_of(file)) is not None})
    if loose and names:
        inside = next(file for file in kept if class_of(file))
        raise UserError(
            f"{here}: holds images in class sub-folders ({legible(inside)}) and beside them ({legible(loose[0])}); "
            f"move all into sub-folders, or none"
        )
    label = {name: k for k, name in enumerate(names)} | {None: 0}

    def split(members: list[str]) -> Split:
        members = sorted(members, key=lambda file: (label[class_of(file)], file))
        return Split(members, np.array([label[class_of(file)] for file in members], dtype=np.int64))

    return Source(split(sides["train"]), split(sides["test"]), names, folder)


def _split_by_content(folder: Path, files: list[str], test_fraction: float) -> dict[str, list[str]]:
    """Hold out the files whose hash, read as a number in [0, 1), is below `test_fraction`.

    So a file stays on its side when it is renamed or others come or go, and copies of it are on the same side.
    """
    paths = [str(folder / file) for file in files]
    with closing(in_parallel(digest_file, paths, IMAGES_A_CHUNK, "split")) as chunks:
        number = [int.from_bytes(digest[:8], "big") / 2**64 for chunk in chunks for digest in chunk]
    if len(set(number)) < 2:
        raise UserError(
            f"dataset.path = {folder}: needs two different images at least, one of them to hold out; has "
            f"{len(files)} file{'s of one content' if len(files) > 1 else ''}"
        )
    # The bounds keep either side from being empty: the lowest is always held out, the highest never.
    threshold = min(max(test_fraction, np.nextafter(min(number), 1)), max(number))
    return {
        "train": [file for file, x in zip(files, number, strict=True) if x >= threshold],
        "test": [file for file, x in zip(files, number, strict=True) if x < threshold],
    }


# From a source to files


def _converted(
    images: Pixels | list[str], folder: Path, dataset: Dataset, label: str
) -> Generator[list[Pixels | str], None, None]:
    """Chunks of images as uint8 (size, size, channels); in the place of a broken one, what is wrong with it."""
    size, channels = dataset.image_size, dataset.channels
    chunk = max(1, min(IMAGES_A_CHUNK, BYTES_A_CHUNK // (size * size * channels)))
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


def _write_images(
    path: Path, chunks: Iterable[list[Pixels | str]], row_shape: tuple[int, ...], content: Any
) -> dict[int, str]:
    """Write the images that are whole to a .npy file and into the hash `content`; return the faults by index."""
    faults: dict[int, str] = {}
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
                    count += 1
                index += 1
        write_header()
    return faults


def _tell_broken(broken: list[str], counts: dict[str, int], dataset: Dataset) -> None:
    lines = broken[:NAMED_FAULTS]
    if len(broken) > NAMED_FAULTS:
        lines.append(f"and {len(broken) - NAMED_FAULTS} more")
    total = f"{len(broken)} of {len(broken) + sum(counts.values())} images in {dataset.path} are broken"
    if dataset.on_broken == "stop":
        raise UserError("\n".join([*lines, f"{total}: mend or remove them, or leave them out: dataset.on_broken=skip"]))
    for name, count in counts.items():
        if count == 0:
            raise UserError("\n".join([*lines, f"{total}, and none is left to {name} on"]))
    print("\n".join([*lines, f"{total} and left out"]))


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` at the end, or is removed when something goes wrong before."""
    tmp = out.with_name(f"{out.name}.tmp")
    if tmp.exists():  # of a run that was killed
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
            error.filename = str(tmp)  # a failed write does not know its file
        raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
