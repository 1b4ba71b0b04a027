"""Arrays that depend on the data and an extractor alone, computed once and kept for later evaluations.

They are kept in `.cache/features/` of the main checkout, which all trials of a sweep share; the folder may be deleted
at any time. A file is named by all that its array depends on, written whole or not at all, and ends in its sha256.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.runtime import processes
from ddpm.runtime.resume import fingerprint

DIGEST = hashlib.sha256().digest_size
WORTH = 1e11  # operations: about five seconds of a CPU. An array that takes less is computed each time


def code_digest(*files: str) -> str:
    """A digest of the code of these files, one of the facts of the arrays that they compute."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


class Cache:
    """The arrays in a folder. Several processes and several runs may read and write at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def array(self, facts: Mapping[str, Any], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array that depends on `facts` (JSON-like): memory-mapped if it is kept, else computed and kept.

        A damaged file is named on stderr and replaced. If the array cannot be written, a warning is printed.
        """
        path = self.folder / f"{fingerprint(facts)}.npy"
        kept = _read(path)
        if processes.any_process(kept is None):  # all processes compute, since they share the work
            kept = compute()
            if processes.rank() == 0:
                try:
                    _write(path, kept)
                except OSError as error:
                    print(f"{path}: not kept for later evaluations: {error.strerror}", file=sys.stderr)
        assert kept is not None
        return kept


def _read(path: Path) -> np.ndarray | None:
    try:
        with path.open("rb") as file:
            rest, digest = os.fstat(file.fileno()).st_size - DIGEST, hashlib.sha256()
            while rest > 0:
                part = file.read(min(rest, 2**20))
                digest.update(part)
                rest -= len(part)
            sound = file.read() == digest.digest()
        array: np.ndarray | None = np.lib.format.open_memmap(path, mode="r") if sound else None
    except FileNotFoundError:  # even now: the user may delete the folder at any time
        return None
    except OSError as error:
        print(f"{path}: not readable, computed again: {error.strerror}", file=sys.stderr)
        return None
    if not sound:
        print(f"{path}: damaged, computed again", file=sys.stderr)
    return array


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # another run may write the same
    temporary = Path(name)
    try:
        with open(descriptor, "w+b") as file:  # noqa: PTH123  a descriptor has no path
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.write(digest)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
