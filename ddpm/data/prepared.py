"""data/prepared as the stages read it. Arrays are memory-mapped, so a data set may be larger than memory."""

import hashlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddpm.errors import UserError
from ddpm.files import load_array
from ddpm.files import stale as stale_file
from ddpm.runtime import processes
from ddpm.runtime.workspace import root

FILES = ("dataset.json", *(f"{split}/{kind}.npy" for split in ("train", "test") for kind in ("images", "labels")))
SETTLED = 2 * 10**9  # ns: on a file system that counts in seconds, a second write within one does not show
MOST_RECORDS = 100  # in .cache/verified/
BLOCK = 2**20  # bytes
Positive = Annotated[int, Field(ge=1)]
stale = partial(stale_file, stage="prepare_data")


class Info(BaseModel):
    """The content of dataset.json. `shape`: of an image, [H, W, C]; `sha256`: of all pixels and labels."""

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


class Images(NamedTuple):
    """A split, memory-mapped."""

    images: np.ndarray  # uint8 (N, H, W, C)
    labels: np.ndarray  # int64 (N,); all 0 where there are no classes


class Prepared:
    """The prepared data: what dataset.json says, and both splits.

    Opening reads dataset.json and the arrays' shapes and labels. `verify` reads all pixels, once: it keeps a record in
    `.cache/verified/` of the main checkout, valid while each file has the same size, inode and time of its last write.
    DVC trusts the same three. That folder may be deleted at any time.

    Attributes:
        folder: where the data is.
        info: dataset.json, as `Info`.
        train, test: the splits.

    Raises:
        UserError: a file is missing or damaged, or does not match dataset.json.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info: dict[str, Any] = _load_info(self.folder / "dataset.json")
        self._opened_at = time.time_ns()
        self._stamps = _stamps(self.folder)
        self.train, self.test = self._open("train"), self._open("test")

    def _open(self, split: str) -> Images:
        count, classes, shape = self.info["counts"].get(split), len(self.info["classes"]), self.info["shape"]
        path = self.folder / split / "images.npy"
        images = load_array(path, "prepare_data", "uint8", 4)
        if images.shape != (expected := (count, *shape)):
            raise stale(path, f"holds {images.shape}, not {expected}")
        path = self.folder / split / "labels.npy"
        labels = load_array(path, "prepare_data", "int64", 1)
        if len(labels) != count or (classes and not 0 <= labels.min() <= labels.max() < classes):
            raise stale(path, f"does not hold {count} labels of {classes} class{'es' * (classes != 1)}")
        return Images(images, labels)

    def verify(self) -> None:
        """Compare all data with dataset.json, unless a record says that this was done. Every process has to call this.

        Raises:
            UserError: the data does not match dataset.json.
        """
        if self._differs():
            raise stale(self.folder, "does not match its dataset.json")

    def changed(self) -> bool:
        """Whether the content of the files has changed since they were opened.

        They are read again only if one of them was written or replaced. Every process has to call this, and all get the
        same answer.
        """
        try:
            now = self if _stamps(self.folder) == self._stamps else Prepared(self.folder)
            other = now.info["sha256"] != self.info["sha256"]
        except (UserError, OSError):
            now, other = self, True
        return processes.any_process(other) or (processes.any_process(now is not self) and now._differs())

    def _differs(self) -> bool:
        """Whether the arrays differ from what dataset.json describes.

        Of the processes that see the same files, one reads them: on several machines there may be several copies.
        """
        facts = json.dumps([self._stamps, self.info["sha256"]]).encode()
        mark = hashlib.sha256(facts).hexdigest()
        record = root() / ".cache/verified" / f"{mark[:16]}.json"
        number = 0 if _read(record) == facts else 1 + int(mark[:15], 16)
        readers = processes.gathered(torch.tensor([number])).tolist()
        reads = number > 0 and readers.index(number) == processes.rank()
        differs = reads and self._sha256() != self.info["sha256"]
        if reads and not differs:
            self._keep(record, facts)  # before the others continue, which may look for it
        return processes.any_process(differs)

    def _keep(self, record: Path, facts: bytes) -> None:
        """Record that the files were read, unless one is so new that another write might not change its time."""
        if self._opened_at - max(written for _, _, written in self._stamps) < SETTLED:
            return
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_bytes(facts)  # half a record is not equal to `facts`
            for old in sorted(record.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST_RECORDS]:
                old.unlink(missing_ok=True)
        except OSError as error:
            print(f"{record}: not kept, so the next start reads all data again: {error.strerror}", file=sys.stderr)

    def _sha256(self) -> str:
        digest, buffer = hashlib.sha256(), bytearray(BLOCK)
        for name, array in zip(FILES[1:], (*self.train, *self.test), strict=True):
            assert isinstance(array, np.memmap)
            with (self.folder / name).open("rb", buffering=0) as file:  # mapped pages would count as this process's
                file.seek(array.offset)
                while size := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:size])
        return digest.hexdigest()


def _stamps(folder: Path) -> list[list[int]]:
    """The size in bytes, the inode and the time of the last write in ns of each file.

    Raises:
        UserError: a file is missing.
    """
    found = []
    for name in FILES:
        try:
            stat = (folder / name).stat()
        except OSError as error:
            raise stale(folder / name, str(error.strerror)) from None
        found.append([stat.st_size, stat.st_ino, stat.st_mtime_ns])
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _load_info(path: Path) -> dict[str, Any]:
    try:
        return Info.model_validate_json(path.read_bytes()).model_dump()
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"{part}: " for part in fault["loc"])
        raise stale(path, f"{where}{fault['msg'].removeprefix('Value error, ')}") from None
    except OSError as error:
        raise stale(path, str(error.strerror)) from None
