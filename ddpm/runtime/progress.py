"""Progress on long work: a bar on a terminal, a plain line now and then elsewhere."""

import io
import sys
import time
from typing import Any

import psutil
from tqdm import tqdm

LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
LINE_EVERY = 10.0  # seconds between two lines where the output is not a terminal


class Progress(tqdm):
    """tqdm, but with whole lines in place of a redrawn bar where stderr is not a terminal (a log, a queue)."""

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0) -> None:
        self._terminal = sys.stderr.isatty()
        self._printed: float = initial
        options: dict[str, Any] = {"dynamic_ncols": True}
        if not self._terminal:
            # tqdm writes its own line breaks and carriage returns into this file, which is never shown
            options = {"bar_format": LINE, "mininterval": LINE_EVERY, "maxinterval": LINE_EVERY, "file": io.StringIO()}
        super().__init__(total=total, desc=desc, unit=unit, initial=initial, unit_scale=True, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self._terminal:
            super().display(msg, pos)
        elif self.n > self._printed:
            self._printed = self.n
            print(self, file=sys.stderr, flush=True)


def seconds_since_start() -> float:
    """Seconds since this process started."""
    return time.time() - psutil.Process().create_time()
