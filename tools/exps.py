"""The experiments of the commit you are on, best first: where their parameters differ, and how good their samples are.

Runs that differ in their seeds alone are one row: mean ± standard error over the runs, and n. For a single run, ± is
the error from its evaluation. `--by PARAMETER` sorts by a parameter and draws the metric against it, `--metric` names
another metric than the Fréchet distance, `--p` adds the p-values, `--runs` gives each run a row.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from rich import box
from rich.table import Table

from ddpm.config.targets import near
from tools.common.charts import by_parameter
from tools.common.experiments import MAIN, METRICS, SEEDS, Group, Run, check_metric, differing, grouped, read, shown
from tools.common.ranking import beside_the_best, ranked
from tools.common.statistics import number
from tools.common.tables import print_whole


def draws(group: Group, metric: str) -> str:
    """n of a group: its number of trainings, or, for a single training, of draws of samples."""
    n = len(group.values(metric))
    return f"{n} draws" if group.trainings == 1 and n > 1 else str(n)


def title(group: Group) -> str:
    """The first of the group's names, and the number of the others."""
    more = len(group.runs) - 1
    return group.runs[0].name + (f" +{more}" if more else "")


def changed_code(base: Run, row: Group | Run) -> str:
    """The dependencies in which a row differs from the base; the prepared data only where no parameter says so."""
    names = differing([base.code, row.code]) if row.code else []
    changed = differing([base.params, row.runs[0].params if isinstance(row, Group) else row.params])
    if any(name.startswith("dataset.") for name in changed):
        names = [name for name in names if not name.startswith("data/")]
    return ", ".join(names)


def table(
    base: Run, rows: Sequence[Group | Run], varied: Sequence[str], asked: argparse.Namespace, narrow: bool
) -> Table:
    """The table: a row per group of finished runs, best first, and one per run that is not done."""
    metric = asked.metric
    groups = [row for row in rows if isinstance(row, Group)]
    beside, several = beside_the_best(groups, metric), any(len(group.runs) > 1 for group in groups)
    codes = [changed_code(base, row) for row in rows]
    columns = [metric, *(name for name in METRICS if name != metric)]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("experiment", "state", *(name.replace(".", ".\n", 1) for name in varied)):
        made.add_column(heading, no_wrap=heading == "experiment", overflow="fold")
    if any(codes):
        made.add_column("code and data", overflow="fold")
    if several:
        made.add_column("n", justify="right", no_wrap=True)
    for name in columns:
        made.add_column(METRICS[name].heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    if beside.words:
        made.add_column("beside\nthe best", max_width=13 if narrow else None)
    if asked.p:
        made.add_column("p", justify="right")
        made.add_column("p, by\nHolm", justify="right")
    for i, row in enumerate(rows):
        group, params = (row, row.runs[0].params) if isinstance(row, Group) else (Group(()), row.params)
        name, state = (title(row), "success") if isinstance(row, Group) else (row.name, row.state)
        is_base = base in group.runs
        cells = [name, "" if is_base and len(group.runs) == 1 else state]
        cells += [shown(key, params.get(key)) for key in varied]
        cells += [codes[i]] * any(codes) + [draws(group, metric) if group.runs else ""] * several
        numbers = (number(group.values(key), group.error(key)) for key in columns)
        cells += [text.replace(" ± ", "\n± ") if narrow else text for text in numbers]
        cells += [beside.words.get(i, "")] * bool(beside.words)
        if asked.p:
            cells += [f"{p[i]:.4f}" if i in p else "" for p in (beside.p, beside.corrected)]
        made.add_row(*cells, style="bold" if is_base else "red" if state == "failed" else None)
    return made


def intervals(groups: Sequence[Group], metric: str) -> list[str]:
    """The line that explains the ± of the table; none where the table has no ±."""
    several = any(len(group.values(metric)) > 1 for group in groups)
    one = any(len(group.values(metric)) == 1 and group.error(metric) is not None for group in groups)
    meanings = ["of several runs, the standard error of their mean"] * several
    meanings += ["of one run, its own: over its samples and held-out images"] * one
    return [f"± is, {'; '.join(meanings)}"] if meanings else []


def notes(base: Run, groups: Sequence[Group], others: Sequence[Run], varied: Sequence[str]) -> list[str]:
    """Lines below the table: what all experiments share, what cannot be concluded, where to read why one failed."""
    lines, trials = [], [run for group in groups for run in group.runs if run is not base] + list(others)
    first = trials[0].params if trials else {}
    shared = [name for name in differing([base.params, first]) if name not in (*varied, *SEEDS)] if trials else []
    if shared:
        changes = (f"{name}={shown(name, first.get(name))} ({shown(name, base.params.get(name))})" for name in shared)
        lines.append(f"In all of them, and not in {base.name}: {', '.join(changes)}")
    if len(groups) > 1 and all(len(group.runs) == 1 for group in groups):
        lines.append("One run each does not show which is better: run further seeds of each (-S train.seed=1)")
    failed = (run.name for run in others if run.state == "failed")
    return lines + [f"Why {name} failed: dvc queue logs {name}" for name in failed]


def options() -> argparse.Namespace:
    """The arguments of the command line.

    Raises:
        SystemExit: the metric is unknown, or has no better and worse.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by", metavar="PARAMETER")
    parser.add_argument("--metric", default=MAIN)
    parser.add_argument("--p", action="store_true")
    parser.add_argument("--runs", action="store_true")
    parser.add_argument("--out", default="dvc_plots/exps.png")
    asked = parser.parse_args()
    check_metric(asked.metric)
    return asked


def check_by(name: str, groups: Sequence[Group]) -> None:
    """Refuse a parameter that is unknown, or equal in all groups.

    Raises:
        SystemExit: with a line that names the parameter.
    """
    known = [*dict.fromkeys(key for group in groups for key in group.params)]
    if name not in known:
        sys.exit(f"error: BY = {name}: no parameter{near(name, known)}; params.yaml has them all, such as optimizer.lr")
    values = {repr(group.params.get(name)) for group in groups}
    if len(values) < 2:
        sys.exit(f"error: BY = {name}: is {next(iter(values))} in all finished experiments; nothing to compare")


def main() -> None:
    """Print the table and its notes; draw the metric against a parameter if asked to."""
    asked = options()
    try:
        runs = read()
    except DvcException as error:
        sys.exit(f"error: {error}")
    base, others = runs[0], [run for run in runs if run.state != "success"]
    finished = [run for run in runs if run.state == "success"]
    groups = ranked([Group((run,)) for run in finished] if asked.runs else grouped(runs), asked.metric)
    if asked.by:
        check_by(asked.by, groups)
        groups.sort(key=lambda group: sort_key(group.params.get(asked.by)))
    rows: list[Group | Run] = [*groups, *others]
    varied = varied_in(rows, base, asked)
    print_whole(lambda narrow: table(base, rows, varied, asked, narrow))
    for line in intervals(groups, asked.metric) + notes(base, groups, others, varied):
        print(line)
    if asked.by:
        path = Path(asked.out)
        by_parameter(path, groups, asked.by, asked.metric, [name for name in varied if name != asked.by])
        print(f"{METRICS[asked.metric].heading} against {asked.by}: {path}")


def varied_in(rows: Sequence[Group | Run], base: Run, asked: argparse.Namespace) -> list[str]:
    """The parameters with a column: those in which the rows differ, not counting the base where it is its own row.

    A note names the parameters in which only the base differs. With one other row, that row is compared with the base.
    """
    trials = [row for row in rows if not isinstance(row, Group) or row.runs != (base,)]
    trees = [
        row.runs[0].params if isinstance(row, Group) else row.params for row in (trials if len(trials) > 1 else rows)
    ]
    names = [name for name in differing([tree for tree in trees if tree]) if asked.runs or name not in SEEDS]
    return [asked.by, *(name for name in names if name != asked.by)] if asked.by else names


def sort_key(value: Any) -> tuple[int, float, str]:
    """The sort key of a value: numbers by size, then all else by name."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if is_number else (1, 0.0, str(value))


if __name__ == "__main__":
    main()
