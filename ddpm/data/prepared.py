"""data/prepared as the stages read it. Arrays are memory-mapped, so a data set may be larger than memory."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddpm.errors import UserError
from ddpm.files import load_array
from ddpm.files import stale as stale_file

Positive = Annotated[int, Field(ge=1)]
stale = partial(stale_file, stage="prepare_data")


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


class Images(NamedTuple):
    """A split, memory-mapped."""

    images: np.ndarray  # uint8 (N, H, W, C)
    labels: np.ndarray  # int64 (N,); all 0 where there are no classes


class Prepared:
    """The prepared data: what dataset.json says, and both splits.

    Opening reads dataset.json and the arrays' shapes and labels; `verify` reads all pixels.

    Attributes:
        folder: where the data is.
        info: dataset.json, as `Info`.
        train, test: the splits.

    Raises:
        UserError: a file is missing or damaged, or not the one that dataset.json describes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info: dict[str, Any] = _load_info(self.folder / "dataset.json")
        self._stamps = self._files()
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
            raise stale(path, f"holds not {count} labels of {classes} classes")
        return Images(images, labels)

    def verify(self) -> None:
        """Read all of it.

        Raises:
            UserError: it does not match dataset.json.
        """
        if self._sha256() != self.info["sha256"]:
            raise stale(self.folder, "does not match its dataset.json")

    def changed(self) -> bool:
        """Whether the files hold something else by now. They are read again only if one was written or replaced."""
        try:
            return self._files() != self._stamps and Prepared(self.folder)._sha256() != self.info["sha256"]
        except (UserError, OSError):
            return True

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()

    def _files(self) -> list[tuple[Path, int, int]]:
        """Every file of the folder, its inode and when it was written."""
        return [(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(self.folder.rglob("*"))]


def _load_info(path: Path) -> dict[str, Any]:
    try:
        return Info.model_validate_json(path.read_bytes()).model_dump()
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"{part}: " for part in fault["loc"])
        raise stale(path, f"{where}{fault['msg'].removeprefix('Value error, ')}") from None
    except OSError as error:
        raise stale(path, str(error.strerror)) from None
