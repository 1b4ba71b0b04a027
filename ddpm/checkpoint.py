"""Resume state: what an interrupted stage needs to go on, kept outside the outputs that DVC deletes.

A state belongs to one fingerprint of parameters, data, code and library versions, so it is never picked up by
another run. Files are written whole or not at all, carry a checksum, and the one before is kept beside them.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ddpm.runtime import lock

# A part of a long loop by its name: what an interrupted run has kept of it, else computed now
Keep = Callable[[str, Callable[[], np.ndarray]], np.ndarray]


def not_kept(name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """A `Keep` that keeps nothing."""
    return compute()


def fingerprint(*facts: object) -> str:
    """A short name for what decides a run's result wherever it runs: `facts` (JSON-like) and our code."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    # by the name in __spec__: a stage run by `python -m` is called __main__ in sys.modules
    names = {getattr(getattr(module, "__spec__", None), "name", ""): module for module in list(sys.modules.values())}
    for name, module in sorted(names.items()):
        if name.split(".")[0] in ("ddpm", "stages") and getattr(module, "__file__", None):
            digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def state_folder(parent: Path, stage: str, run: str) -> Path:
    """Where the state of a stage's run is: one folder for each fingerprint, on each kind of machine, with each version
    of torch and Python."""
    here = f"{run} {torch.__version__} {platform.machine()} {platform.python_version()}"
    return parent / f"{stage}-{hashlib.sha256(here.encode()).hexdigest()[:16]}"


class ResumeState:
    """The folder of one run's state, held by one process at a time.

    Use as a context manager.

    Raises:
        UserError: another process holds the folder and does not end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = (folder / "state.pt", folder / "state.previous.pt")

    def __enter__(self) -> "ResumeState":
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = (self.folder / "lock").open("a")
            except FileNotFoundError:  # its holder has just removed the folder, as the run is complete
                continue
            try:
                lock(self._lock.fileno(), self.folder, "another process is at work on this very run")
            except BaseException:
                self._lock.close()
                raise
            if os.fstat(self._lock.fileno()).st_nlink:
                return self
            self._lock.close()  # removed while this process waited for it

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.close()

    def save(self, state: dict[str, Any]) -> None:
        """Write `state` (tensors, numbers, strings, containers) so that a crash leaves this or the one before."""
        buffer = io.BytesIO()  # torch.save into a file would put the file's name into the bytes
        torch.save(state, buffer)
        current, previous = self._files
        temporary = self._write(current, buffer.getbuffer())
        if current.exists():
            current.replace(previous)
        temporary.replace(current)

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole, or None. A damaged one is named on stderr and passed over."""
        for path in self._files:
            if (data := self._read(path)) is not None:
                try:
                    return dict(torch.load(data, weights_only=True, map_location="cpu"))
                except Exception:  # of a dozen kinds. With a right checksum: not ours; torch has run nothing of it
                    print(f"{path}: damaged, passed over", file=sys.stderr)
        return None

    def keep(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array that an interrupted run kept under this name; where there is none, computed now, and kept."""
        path = self.folder / f"{name}.npy"
        if (data := self._read(path)) is not None:
            try:
                return np.lib.format.read_array(data, allow_pickle=False)
            except Exception:
                print(f"{path}: damaged, passed over", file=sys.stderr)
        buffer = io.BytesIO()
        np.save(buffer, array := compute())
        self._write(path, buffer.getbuffer()).replace(path)
        return array

    def _write(self, path: Path, content: memoryview) -> Path:
        """A temporary file, which has reached the disk, of the checksum and the content that `path` is to hold."""
        temporary = path.with_suffix(".tmp")
        self.folder.mkdir(parents=True, exist_ok=True)  # someone may have cleaned up under a running stage
        with temporary.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    def _read(self, path: Path) -> io.BytesIO | None:
        """The content of a whole file; None where there is none. A damaged one is named on stderr."""
        if not path.exists():
            return None
        data = memoryview(path.read_bytes())
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return io.BytesIO(data[32:])
        print(f"{path}: damaged, passed over", file=sys.stderr)
        return None

    def remove(self) -> None:
        """Delete the folder: the run is complete and its outputs are written."""
        done = self.folder.with_suffix(".done")
        shutil.rmtree(done, ignore_errors=True)  # of a run that was killed here
        self.folder.rename(done)  # at once: another process may be about to lock it
        shutil.rmtree(done)
