"""Tables on a terminal: no number is ever cut."""

import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

UNBOUNDED = 10_000  # columns of a file or a pipe


def print_whole(make: Callable[[bool], Table]) -> None:
    """Print a table in its full width; on a narrower terminal, wrap the cells that can take two lines.

    Args:
        make: gives the table; its argument says whether cells may take two lines.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else UNBOUNDED)
    unbounded = console.options.update(width=UNBOUNDED)
    narrow = console.measure(make(False), options=unbounded).maximum > console.width
    made = make(narrow)
    Console(highlight=False, width=max(console.width, console.measure(made, options=unbounded).maximum)).print(made)
