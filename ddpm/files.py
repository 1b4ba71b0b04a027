"""Output files, written whole or not at all; arrays, read back without a copy in memory."""

import hashlib
import io
from pathlib import Path

import numpy as np

from ddpm.errors import UserError


def write_file(path: str | Path, content: bytes | memoryview) -> None:
    """Write beside `path` and rename into place, so that a reader sees either the old file or the new one.

    A link at `path`, such as one of DVC's into its cache, is replaced: nothing is ever written through it. A missing
    folder is created.

    Raises:
        OSError: the disk is full or read-only; the error names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # the error of a failed write carries no file name
        raise


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a folder into another, each by `write_file`.

    Raises:
        OSError: as `write_file`.
    """
    for file in source.iterdir():
        write_file(target / file.name, file.read_bytes())


def save_array(path: str | Path, array: np.ndarray) -> None:
    """Write an array as .npy by `write_file`.

    Raises:
        OSError: as `write_file`.
    """
    buffer = io.BytesIO()  # np.save to a file reports a full disk without its error number
    np.save(buffer, array)
    write_file(path, buffer.getbuffer())


def load_array(path: str | Path, stage: str, dtype: str, dimensions: int) -> np.ndarray:
    """Open an array that `stage` wrote, memory-mapped: nothing is read yet.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises a dozen kinds, from TokenError to OverflowError
        raise stale(path, " ".join(str(error).split())[:300], stage) from None
    if array.dtype != dtype or array.ndim != dimensions:
        raise stale(path, f"holds {array.dtype} {array.shape}, not {dtype}", stage)
    return array


def sha256(array: np.ndarray) -> str:
    """The SHA-256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def stale(path: str | Path, why: str, stage: str) -> UserError:
    """The error for a file that `stage` has to write again."""
    return UserError(f"{path}: {why}; run the stage {stage} again")
