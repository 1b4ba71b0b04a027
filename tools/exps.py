"""The experiments of the commit you are on, best first: where their parameters differ, and how good their samples are.

`dvc exp show` has a column for every parameter and file, and gives a trial that failed, or has yet to run, the numbers
of the commit that it started from.
"""

import sys
from pathlib import Path
from typing import Any

import dvc.api
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from ddpm.evaluation.card import measured

METRICS = {
    "frechet_distance": "Fréchet\ndistance",
    "precision": "precision",
    "recall": "recall",
    "memorisation_ratio": "memorisation\nratio",
    "held_out_loss": "held-out\nloss",
    "bits_per_dim": "bits/dim",
}


def done(row: dict[str, Any]) -> bool:
    """Whether the numbers in the row are its own."""
    return row["State"] in (None, "Success")


def number(row: dict[str, Any], name: str) -> float | None:
    """The row's own value of a metric; None where it has none (DVC fills the gap with a dash)."""
    return row[name] if done(row) and isinstance(row.get(name), float) else None


def with_errors(row: dict[str, Any]) -> dict[str, Any]:
    """The row's own metrics, each with its error where it has one."""
    return {key: value for name in METRICS for key in (name, f"{name}_se") if (value := number(row, key)) is not None}


def shown(name: str, value: Any) -> str:
    """A parameter in few characters: of a `_target_` the class alone."""
    if name.endswith("_target_"):
        return str(value).rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def main() -> None:
    """Print the table, what all trials share, and where to read why one failed."""
    sections = tuple(f"{name}." for name in yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8")))
    base, *trials = [row for row in dvc.api.exp_show() if row["rev"] != "workspace"]
    trials.sort(key=lambda row: (not done(row), (best := number(row, "frechet_distance")) is None, best or 0))
    params = [name for name in base if name.startswith(sections)]
    varied = [name for name in params if len({row[name] for row in trials}) > 1]
    shared = [name for name in params if name not in varied and trials and trials[0][name] != base[name]]

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("experiment", "state", *(name.replace(".", ".\n", 1) for name in varied)):
        table.add_column(heading, no_wrap=heading == "experiment", overflow="fold")
    for heading in METRICS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (base, *trials):
        numbers = ["" if number(row, name) is None else measured(with_errors(row), name) for name in METRICS]
        name, state = row["Experiment"] or row["rev"], "" if row is base else (row["State"] or "Success").lower()
        style = "bold" if row is base else "red" if state == "failed" else None
        table.add_row(name, state, *(shown(name, row[name]) for name in varied), *numbers, style=style)
    # a file or a pipe has no edge: no number may be cut there
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    console.print(table)
    if shared:
        changes = ", ".join(f"{name}={shown(name, trials[0][name])} ({shown(name, base[name])})" for name in shared)
        console.print(f"In all of them, and not in {base['rev']}: {changes}\n", markup=False)
    for row in trials:
        if row["State"] == "Failed":
            console.print(f"Why {row['Experiment']} failed: dvc queue logs {row['Experiment']}")


if __name__ == "__main__":
    main()
