"""Apply a function to many files on all cores; the results keep the order of the files."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from ddpm.errors import UserError
from ddpm.runtime.progress import Progress

Result = TypeVar("Result")


def in_parallel(
    function: Callable[[str], Result], files: Sequence[str], chunk: int, label: str
) -> Generator[list[Result], None, None]:
    """Apply `function` to every file on all cores; yield the results in the order of `files`, `chunk` at a time.

    At most two chunks per process are in flight, so memory does not grow with the number of files. Closing the
    generator, or an exception in it, kills the processes at once.

    Args:
        function: picklable; it gets an absolute path.
        files: paths; relative ones start from the current folder.
        chunk: results per list; the last list may be shorter.
        label: names the work in its progress bar.

    Raises:
        UserError: a process was killed from outside. What `function` raises is raised here, too.
    """
    # The processes would look relative names up in the folder that the program was started in.
    chunks = [
        [str(Path(file).absolute()) for file in files[start : start + chunk]] for start in range(0, len(files), chunk)
    ]
    workers = max(1, min(_cores(), len(chunks)))
    # Not fork: NumPy's threads run by now, and a child that inherits a lock which one of them holds would hang.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    others = set(multiprocessing.active_children())
    under_way: deque[Future[list[Result]]] = deque()
    with (
        Progress(len(files), label, "images") as bar,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool,
    ):
        try:
            for number in range(-2 * workers, len(chunks)):
                if number + 2 * workers < len(chunks):
                    under_way.append(pool.submit(_apply, function, chunks[number + 2 * workers]))
                if number < 0:
                    continue
                results = under_way.popleft().result()
                yield results
                bar.update(len(results))
        except BrokenProcessPool:
            raise UserError(
                "a process that reads images was killed, most likely because memory ran out; "
                "use fewer processes (taskset -c 0 leaves one)"
            ) from None
        except BaseException:  # GeneratorExit and Interrupted too: the pending chunks are no longer needed
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _apply(function: Callable[[str], Result], files: list[str]) -> list[Result]:
    return [function(file) for file in files]


def _start_worker() -> None:
    """Ignore signals in a worker, since its parent ends it; exit when the parent dies, however that happens."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about odd metadata; damage to pixels is reported as a broken file
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
