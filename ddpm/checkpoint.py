"""Resume state: what an interrupted training needs to go on, kept outside the outputs that DVC deletes.

A state belongs to one fingerprint of parameters, data, code and library versions, so it is never picked up by
another run. Files are written whole or not at all, carry a checksum, and the one before is kept beside them.
"""

import fcntl
import hashlib
import io
import json
import os
import pickle
import platform
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ddpm.errors import UserError


def fingerprint(*facts: object) -> str:
    """A short name for everything that decides a run's result: `facts` (JSON-like), our code, torch's version."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(f"{torch.__version__} {platform.machine()} {platform.python_version()}".encode())
    # by the name in __spec__: a stage run by `python -m` is called __main__ in sys.modules
    names = {getattr(getattr(module, "__spec__", None), "name", ""): module for module in list(sys.modules.values())}
    for name, module in sorted(names.items()):
        if name.split(".")[0] in ("ddpm", "stages") and getattr(module, "__file__", None):
            digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


class ResumeState:
    """The folder of one run's state, held by one process at a time.

    Use as a context manager.

    Raises:
        UserError: another process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = (folder / "state.pt", folder / "state.previous.pt")

    def __enter__(self) -> "ResumeState":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the kernel, however the process ends
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"{self.folder}: another process is training this very run; wait for it or stop it"
            ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.close()

    def save(self, state: dict[str, Any]) -> None:
        """Write `state` (tensors, numbers, strings, containers) so that a crash leaves this or the one before."""
        buffer = io.BytesIO()  # torch.save into a file would put the file's name into the bytes
        torch.save(state, buffer)
        current, previous = self._files
        temporary = current.with_suffix(".tmp")
        self.folder.mkdir(parents=True, exist_ok=True)  # someone may have cleaned up under a running training
        with temporary.open("wb") as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if current.exists():
            current.replace(previous)
        temporary.replace(current)

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole, or None. A damaged one is named on stderr and passed over."""
        for path in self._files:
            if not path.exists():
                continue
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                try:
                    return dict(torch.load(io.BytesIO(data[32:]), weights_only=True, map_location="cpu"))
                except pickle.UnpicklingError:  # with a right checksum: not ours, and torch has run nothing of it
                    pass
            print(f"{path}: damaged, passed over", file=sys.stderr)
        return None

    def remove(self) -> None:
        """Delete the folder: the run is complete and its outputs are written."""
        shutil.rmtree(self.folder)
