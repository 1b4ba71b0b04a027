"""The unfinished runs: what each keeps in .state/ to resume from.

`--clean` deletes all states that no process is using; `--adopt <name>` lets today's code resume one.
"""

import argparse
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ddpm.errors import UserError
from ddpm.runtime.resume import adopt, discard, in_use, stage_of, states
from ddpm.runtime.workspace import root


def size(folder: Path) -> int:
    """The size of a folder in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Print a line for each state, the oldest first: and whether it is in use or was deleted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("--adopt", metavar="NAME")
    options = parser.parse_args()
    if options.adopt:
        try:
            adopt(root() / ".state" / options.adopt)
        except UserError as fault:
            sys.exit(f"error: {fault}")
    table = Table("stage", "run", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("hours ago", "MB", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for folder in states(root() / ".state"):
        stage, run = stage_of(folder), folder.name.partition("-")[2]
        age, megabytes = (time.time() - folder.stat().st_mtime) / 3600, size(folder) / 1e6
        what = "in use" if in_use(folder) else "deleted" if options.clean and discard(folder) else ""
        table.add_row(stage, run, f"{age:.1f}", f"{megabytes:.1f}", what)
    console = Console(highlight=False)
    console.print(table if table.row_count else "No run is unfinished.")


if __name__ == "__main__":
    main()
