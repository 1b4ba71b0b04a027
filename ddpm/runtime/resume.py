"""Resume state: what an interrupted stage needs to continue, kept outside the outputs that DVC deletes.

A state belongs to one fingerprint of parameters, data, code and library versions, so it is never picked up by
another run. Files are written whole or not at all and carry a checksum; the previous state is kept beside the newest.
"""

import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ddpm.errors import UserError
from ddpm.files import write_file
from ddpm.runtime import processes
from ddpm.runtime.imports import code_of
from ddpm.runtime.progress import Progress
from ddpm.runtime.workspace import lock

MAX_UNFINISHED_RUNS = 10  # per stage; abandoned ones would fill the disk
ORIGIN = "origin.json"  # in the folder of a state: the code and the libraries that it was made with


class Store:
    """Runs a long loop over batches. This class only computes; `ResumeState` also keeps the finished batches."""

    def kept(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of this name, which this class always computes."""
        return compute()

    def batches(
        self, name: str, count: int, size: int, compute: Callable[[slice], np.ndarray], bar: Progress
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The batches of `count` rows, `size` rows each and the last one perhaps fewer: (rows, array), in order.

        Args:
            name: of the loop, unique in its run; it begins the names of the batches' files.
            compute: returns the array of the batch of these rows; it may move the bar as it works.
            bar: its total stands for all `count` rows; it also moves for a batch that is read back.
        """
        for rows in _slices(count, size):
            array = self.kept(_part(name, rows), partial(compute, rows))
            bar.update(max(0, bar.total * rows.stop // count - bar.n))
            yield rows, array


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _part(name: str, rows: slice) -> str:
    return f"{name}-{rows.start}-{rows.stop}"


def fingerprint(*facts: object) -> str:
    """The name of a run, 16 hexadecimal digits: it depends on `facts` (JSON-like: parameters, data) alone."""
    return _short(json.dumps(facts, sort_keys=True, default=str))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def origin(stage: str) -> dict[str, str]:
    """What a state depends on besides its run: the version of each library and the hash of each of the stage's files,
    by their names."""
    versions = {"torch": torch.__version__, "Python": platform.python_version(), "machine": platform.machine()}
    return versions | code_of(stage)


def state_folder(parent: Path, stage: str, run: str) -> Path:
    """Where the state of a stage's run is: one folder per run and origin."""
    return parent / f"{stage}-{run}-{_short(json.dumps(origin(stage)))}"


def stage_of(folder: Path) -> str:
    """The stage that a state belongs to."""
    return folder.name.partition("-")[0]


def adopt(folder: Path) -> Path:
    """Let today's code resume the state of an unfinished run that other code has saved.

    A state that today's code has saved of the same run is deleted.

    Returns:
        The state's new folder.

    Raises:
        UserError: there is no such state, it is already that of today's code, or a process holds one of the two.
    """
    stage, run = stage_of(folder), folder.name.rpartition("-")[0].partition("-")[2]
    new = state_folder(folder.parent, stage, run)
    if not folder.is_dir() or folder == new:
        what = "is already the state of today's code" if folder.is_dir() else "there is no such state"
        raise UserError(f"{folder}: {what}; make states shows all")
    if in_use(folder) or (new.exists() and not discard(new)):
        raise UserError(f"{folder}: a stage is running on this state or on the one that it replaces; stop it first")
    folder.rename(new)
    write_file(new / ORIGIN, json.dumps(origin(stage)).encode())
    return new


def states(parent: Path, stage: str = "*") -> list[Path]:
    """The folders of all unfinished runs of a stage, in the order of their last saves."""
    saved = {}
    for folder in parent.glob(f"{stage}-*"):
        with suppress(FileNotFoundError):  # the run has completed meanwhile
            saved[folder] = folder.stat().st_mtime
    return sorted(saved, key=lambda folder: saved[folder])


def in_use(folder: Path) -> bool:
    """Whether a process holds the state of an unfinished run."""
    with suppress(FileNotFoundError), (folder / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def discard(folder: Path) -> bool:
    """Delete the state of an unfinished run; False where a process holds it."""
    with suppress(FileNotFoundError), (folder / "lock").open("a") as file:  # the run has completed meanwhile
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _delete(folder)
    return True


def _delete(folder: Path) -> None:
    done = folder.with_suffix(".done")
    if folder != done:
        shutil.rmtree(done, ignore_errors=True)  # left by a run that was killed here
        folder.rename(done)  # at once: another process may be about to lock it
    shutil.rmtree(done)


class ResumeState(Store):
    """The folder of one run's state, held by one process at a time, or by several that work as one.

    Use as a context manager. Entering it removes the stage's oldest unfinished runs beyond `MAX_UNFINISHED_RUNS`, apart
    from those that a process holds.

    Raises:
        UserError: another process holds the folder and does not end in time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = (folder / "state.pt", folder / "state.previous.pt")
        self._writer = ThreadPoolExecutor(1)
        self._saving: list[Future[None]] = []  # one at most

    def __enter__(self) -> "ResumeState":
        if processes.rank() == 0:
            self._hold()
        processes.barrier()  # the others read the state once rank 0 holds the folder
        return self

    def _hold(self) -> None:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = (self.folder / "lock").open("a")
            except FileNotFoundError:  # its holder has completed the run and removed the folder
                continue
            try:
                lock(self._lock.fileno(), self.folder, "another process is at work on this very run")
            except BaseException:
                self._lock.close()
                raise
            if os.fstat(self._lock.fileno()).st_nlink:
                break
            self._lock.close()  # removed while this process waited for it
        stage = stage_of(self.folder)
        if not (self.folder / ORIGIN).exists():
            self._report_other_origins(stage)
            write_file(self.folder / ORIGIN, json.dumps(origin(stage)).encode())
        others = [folder for folder in states(self.folder.parent, stage) if folder != self.folder]
        for folder in others[: max(0, len(others) + 1 - MAX_UNFINISHED_RUNS)]:
            if discard(folder):
                print(
                    f"{folder}: removed, the oldest of more than {MAX_UNFINISHED_RUNS} unfinished runs", file=sys.stderr
                )

    def _report_other_origins(self, stage: str) -> None:
        """Print a line where the same run has a state that other code or other libraries have made."""
        for other in self.folder.parent.glob(f"{self.folder.name.rpartition('-')[0]}-*"):
            if other == self.folder or not (other / ORIGIN).exists():
                continue
            there, here = json.loads((other / ORIGIN).read_bytes()), origin(stage)
            changed = sorted(name for name in there | here if there.get(name) != here.get(name))
            print(
                f"{other}: an unfinished run of these parameters and data, with another version of "
                f"{', '.join(changed)}; it is kept, and this run starts over. To resume it instead, stop this run "
                f"and type: make states ADOPT={other.name}",
                file=sys.stderr,
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if processes.rank() == 0:
            wait(
                self._saving
            )  # if a second signal interrupts this, the lock is held until the process has written and ended
            self._lock.close()
            self.saved()

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` (tensors, numbers, strings, containers) now and write it in the background.

        A crash leaves either this state or the previous one.

        Raises:
            OSError: the previous save could not be written.
        """
        if processes.rank():
            return  # the first process writes the same
        self.saved()
        buffer = io.BytesIO()  # torch.save into a file would put the file's name into the bytes
        torch.save(state, buffer)
        self._saving = [self._writer.submit(self._replace, buffer)]

    def saved(self) -> None:
        """Wait until the last save has reached the disk.

        Raises:
            OSError: the save could not be written.
        """
        wait(self._saving)
        while self._saving:
            self._saving.pop().result()

    def _replace(self, buffer: io.BytesIO) -> None:
        current, previous = self._files
        temporary = self._write(current, buffer.getbuffer())
        if current.exists():
            current.replace(previous)
        temporary.replace(current)

    def load(self) -> dict[str, Any] | None:
        """The newest state that is not damaged, or None. A damaged one is reported on stderr and skipped."""
        self.saved()
        for path in self._files:
            if (data := self._read(path)) is not None:
                try:
                    return dict(torch.load(data, weights_only=True, map_location="cpu"))
                except Exception:  # of a dozen kinds. The checksum fits, so others wrote it; torch has run none of it
                    print(f"{path}: damaged, skipped", file=sys.stderr)
        return None

    def batches(
        self, name: str, count: int, size: int, compute: Callable[[slice], np.ndarray], bar: Progress
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """As `Store.batches`. Finished batches survive a kill. Several processes share the work; each yields all."""
        if processes.size() > 1:
            for rows in _slices(count, size)[processes.rank() :: processes.size()]:
                self.kept(_part(name, rows), partial(compute, rows))
            processes.barrier()  # all are done
        yield from super().batches(name, count, size, compute, bar)

    def kept(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array that an interrupted run kept under this name; if there is none, compute it and keep it."""
        path = self.folder / f"{name}.npy"
        if (data := self._read(path)) is not None:
            try:
                return np.lib.format.read_array(data, allow_pickle=False)
            except Exception:
                print(f"{path}: damaged, skipped", file=sys.stderr)
        buffer = io.BytesIO()
        np.save(buffer, array := compute())
        self._write(path, buffer.getbuffer()).replace(path)
        return array

    def _write(self, path: Path, content: memoryview) -> Path:
        """Write checksum and content for `path` to a temporary file, fsync it, and return it."""
        temporary = path.with_suffix(".tmp")
        self.folder.mkdir(parents=True, exist_ok=True)  # a person may have deleted it under a running stage
        try:
            with temporary.open("wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)  # the disk may be full: leave nothing there
            error.filename = str(temporary)  # the error of a failed write names no file
            raise
        return temporary

    def _read(self, path: Path) -> io.BytesIO | None:
        """The content behind a file's checksum; None where the file is missing or, reported on stderr, damaged."""
        if not path.exists():
            return None
        data = memoryview(path.read_bytes())
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return io.BytesIO(data[32:])
        print(f"{path}: damaged, skipped", file=sys.stderr)
        return None

    def remove(self) -> None:
        """Delete the folder: the run is complete and its outputs are written."""
        processes.barrier()  # no process reads it any more
        if processes.rank() == 0:
            wait(self._saving)
            self._saving.clear()  # a failed save no longer matters
            _delete(self.folder)
