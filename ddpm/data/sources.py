"""Load a data set as it is: digits, the sets that torchvision downloads, a folder of images."""

import errno
import io
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddpm.config.schema import Dataset
from ddpm.data.decode import Pixels
from ddpm.data.folders import Classes, read_folder
from ddpm.data.splits import hold_out
from ddpm.errors import UserError

TORCHVISION_CLASSES = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
NO_DATA_SECONDS = 30  # without a byte, until a download fails: a network that drops packets would let it hang


class RawSplit(NamedTuple):
    """One side of a data set, before any image is converted."""

    images: Pixels | list[str]  # uint8 (N, h, w, c) of the set's own size, or N paths relative to Source.folder
    labels: npt.NDArray[np.int64]  # (N,)


class Source(NamedTuple):
    """A data set: two splits, and the names of the classes."""

    train: RawSplit
    test: RawSplit
    classes: list[str]  # label k is classes[k]; empty where there are none, and all labels are 0
    folder: Path = Path()


def load_source(dataset: Dataset, downloads: Path) -> Source:
    """The data set that `dataset.name` names. The folder `downloads` keeps what torchvision downloads.

    Raises:
        UserError: the folder is missing or unfit, or a download failed.
        OSError: the disk is full or read-only.
    """
    if dataset.name == "digits":
        return _digits(dataset.test_fraction)
    if dataset.name == "folder":
        return _folder(Path(dataset.path), dataset.test_fraction)
    return _torchvision(dataset.name, downloads)


def _digits(test_fraction: float) -> Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1), from 0 ... 16
    labels = data.target.astype(np.int64)
    place = np.argsort(np.random.default_rng(0).permutation(len(labels)))  # of each image in a random order
    test = hold_out(place, labels, round(len(labels) * test_fraction))
    return Source(
        RawSplit(pixels[~test], labels[~test]),
        RawSplit(pixels[test], labels[test]),
        [str(name) for name in data.target_names],
    )


def _folder(folder: Path, test_fraction: float) -> Source:
    """The user's own images; their sub-folders, if any, are the classes."""
    sides = read_folder(folder, test_fraction)
    names = sorted({name for name in sides.train.values() if name is not None})
    label = {name: k for k, name in enumerate(names)} | {None: 0}

    def split(classes: Classes) -> RawSplit:
        files = sorted(classes, key=lambda file: (label[classes[file]], file))
        return RawSplit(files, np.array([label[classes[file]] for file in files], dtype=np.int64))

    return Source(split(sides.train), split(sides.test), names, folder)


def _torchvision(name: str, downloads: Path) -> Source:
    from torchvision import datasets

    cls = getattr(datasets, TORCHVISION_CLASSES[name])
    files = _files(cls, downloads)
    if not _verified_files(files) and (lacking := _lacking(files)):
        print(f"{name}: downloading {', '.join(file for file, _ in lacking)} into {files.folder}", flush=True)
    with _download_faults(name, files):
        train, test = (cls(downloads, train=train, download=True) for train in (True, False))
    return Source(_arrays(train), _arrays(test), list(train.classes))


class _Files(NamedTuple):
    """The files of one of torchvision's data sets."""

    folder: Path  # of the archives
    origins: list[str]  # addresses that the archives come from
    archives: list[tuple[str, str]]  # name, MD5
    unpacked: list[tuple[Path, str | None]]  # path, MD5 where torchvision knows it


def _files(cls: Any, downloads: Path) -> _Files:
    if cls.__name__ == "CIFAR10":
        parts = [*cls.train_list, *cls.test_list, [cls.meta["filename"], cls.meta["md5"]]]
        unpacked = [(downloads / cls.base_folder / file, md5) for file, md5 in parts]
        return _Files(downloads, [cls.url.rpartition("/")[0]], [(cls.filename, cls.tgz_md5)], unpacked)
    folder = downloads / cls.__name__ / "raw"
    return _Files(
        folder, cls.mirrors, cls.resources, [((folder / file).with_suffix(""), None) for file, _ in cls.resources]
    )


def _verified_files(files: _Files) -> bool:
    """Whether the checksums of all unpacked files fit; if not, all are removed.

    torchvision accepts unpacked files that it has no checksum for, such as half a file that a killed run left, and does
    not unpack again where only some are damaged. Where none are left, it unpacks the archives, which it checks.
    """
    from torchvision.datasets.utils import check_integrity

    if all(md5 and check_integrity(path, md5) for path, md5 in files.unpacked):
        return True
    for path, _ in files.unpacked:
        path.unlink(missing_ok=True)
    return False


def _lacking(files: _Files) -> list[tuple[str, str]]:
    """The archives that are missing or damaged."""
    from torchvision.datasets.utils import check_integrity

    return [(file, md5) for file, md5 in files.archives if not check_integrity(files.folder / file, md5)]


@contextmanager
def _download_faults(name: str, files: _Files) -> Iterator[None]:
    """Limit the wait for the network, and report a failed download in one line that says what to fetch by other means.

    Raises:
        UserError: a download failed.
        OSError: the disk is full or read-only.
    """
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NO_DATA_SECONDS)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    except (RuntimeError, OSError, EOFError, TarError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        wanted = ", ".join(f"{file} (md5 {md5})" for file, md5 in _lacking(files) or files.archives)
        raise UserError(
            f"dataset.name = {name}: cannot download {wanted}: {' '.join(str(error).split())}; "
            f"fetch it by other means from {' or '.join(files.origins)}, put it into {files.folder} and run this again"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


def _arrays(part: Any) -> RawSplit:
    """The images and labels of one of torchvision's data sets."""
    pixels = np.asarray(part.data)  # CIFAR-10: (N, 32, 32, 3); MNIST: (N, 28, 28)
    return RawSplit(pixels if pixels.ndim == 4 else pixels[..., None], np.asarray(part.targets, dtype=np.int64))
