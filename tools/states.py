"""The unfinished runs: what each keeps in .state/ to go on from. `--clean` deletes what no process is at work on."""

import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ddpm.checkpoint import discard, in_use, states
from ddpm.runtime import root


def size(folder: Path) -> int:
    """In bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Print a line for each state, the oldest first, and what became of it."""
    clean = "--clean" in sys.argv[1:]
    table = Table("stage", "run", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("hours ago", "MB", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for folder in states(root() / ".state"):
        stage, _, run = folder.name.rpartition("-")
        age, megabytes = (time.time() - folder.stat().st_mtime) / 3600, size(folder) / 1e6
        what = "in use" if in_use(folder) else "deleted" if clean and discard(folder) else ""
        table.add_row(stage, run, f"{age:.1f}", f"{megabytes:.1f}", what)
    console = Console(highlight=False)
    console.print(table if table.row_count else "No run is unfinished.")


if __name__ == "__main__":
    main()
