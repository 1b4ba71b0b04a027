"""The folders that a stage works in: where state is kept, who may work there, where sockets fit."""

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import get_temp_dir
from pathlib import Path

from ddpm.errors import UserError, legible

PATIENCE = 60.0  # seconds to wait for a process that was asked to stop and still saves
# The address of a socket has 104 bytes on macOS, 108 on Linux, its end included; multiprocessing's names take 32.
LONGEST_TMPDIR = 103 - len("/pymp-12345678/listener-12345678")
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def root() -> Path:
    """The folder that holds the resume state, the downloads and the W&B runs.

    DVC sets DVC_ROOT for its stages; inside the temporary workspace of a queued experiment it names the
    main checkout, so that what is kept there outlives the workspace.
    """
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def lock(file: int, place: Path, whose: str) -> None:
    """Lock an open file or folder until it is closed. The kernel frees it, however the process ends.

    Args:
        place: the file or folder, for the message.
        whose: who else may hold it, for the message.

    Raises:
        UserError: another process holds it and does not end in time.
        OSError: the file system has no such locks.
    """
    deadline, reported = time.monotonic() + PATIENCE, False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"{place}: {whose}; wait for it or stop it") from None
        if not reported:
            print(f"{place}: {whose}; waiting for it to end", file=sys.stderr, flush=True)
            reported = True
        time.sleep(0.1)


@contextmanager
def exclusive_folder() -> Iterator[None]:
    """Keep other stages out of the current folder: one that was asked to stop may still be writing.

    Raises:
        UserError: another stage works here and does not end in time.
    """
    folder = os.open(".", os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS locks no folders
            lock(folder, Path.cwd(), "another stage is at work here")
        yield
    finally:
        os.close(folder)


def shorten_sockets() -> None:
    """Where TMPDIR is too long for the address of a socket, put the sockets of worker processes into another folder.

    Only the sockets go there: TMPDIR is where the user wants large files.

    Raises:
        UserError: no other folder can be written.
    """
    try:
        folder = tempfile.gettempdir()
    except OSError:  # no folder at all: reported where one is needed
        return
    if len(os.fsencode(folder)) <= LONGEST_TMPDIR:
        return
    for short in SHORT_FOLDERS:
        tempfile.tempdir = short
        try:
            get_temp_dir()  # multiprocessing keeps using the folder that it has made, in the children too
        except OSError:
            continue
        finally:
            tempfile.tempdir = folder
        return
    raise UserError(
        f"TMPDIR = {legible(Path(folder))}: too long for the sockets of worker processes, which need "
        f"{LONGEST_TMPDIR} bytes at most, and none of {', '.join(SHORT_FOLDERS)} can be written; set a shorter one"
    )
