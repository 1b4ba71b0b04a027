"""A function over many files on all cores, its results always in the order of the files."""

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
    """`function` of every file in the order of `files`, in lists of `chunk` results, made on all cores.

    At most two chunks per process are in flight, so memory does not grow with the number of files. Closing the
    generator, or an exception in it, ends the processes at once. `function` must be picklable. `label` names
    the work in its progress bar.

    Raises:
        UserError: a process was killed from outside.
    """
    # Relative names would be looked up in the folder that the program was started in.
    chunks = [
        [str(Path(file).absolute()) for file in files[start : start + chunk]] for start in range(0, len(files), chunk)
    ]
    workers = max(1, min(_cores(), len(chunks)))
    # Not fork: numpy's threads are running by now, and a copy of a running thread's lock can hang a process.
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
                "use fewer at once (taskset -c 0 leaves one)"
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
    """A worker leaves signals to its parent, which ends it, and ends with its parent however that dies."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, on odd metadata: what matters comes back as a broken file
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
