"""Is B better than A? One paragraph: python -m tools.verdict A B [--metric METRIC]

It says what changed, what is better and worse, what is not known, and how many more seeds would settle that. A and B
are commits or experiments; each stands for all runs that differ from it in their seeds alone.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.experiments.utils import exp_refs_by_rev
from dvc.scm import resolve_rev

from ddpm.evaluation.card import decimals
from tools.common.experiments import (
    MAIN,
    METRICS,
    Group,
    check_metric,
    compared,
    differing,
    grouped,
    not_comparable,
    read,
    shown,
)
from tools.common.statistics import LEVEL, MOST_SEEDS, Difference, holm, mean, number, seeds_needed, welch

FEWEST = 3  # seeds per side from which a spread is informative


class Finding(NamedTuple):
    """One metric: the values of both sides, the test, and the p-value that it is judged by."""

    metric: str
    a: list[float]
    b: list[float]
    test: Difference | None
    p: float | None

    @property
    def settled(self) -> bool:
        """Whether the test finds a difference."""
        return self.p is not None and self.p < LEVEL

    @property
    def better(self) -> bool:
        """Whether the mean of b is the better one."""
        return METRICS[self.metric].sign * (mean(self.b) - mean(self.a)) < 0


def groups_of(names: Sequence[str]) -> list[Group]:
    """The group of runs that each name belongs to.

    Raises:
        DvcException: there is no such revision.
        SystemExit: a run is not done.
    """
    with Repo() as repo:
        revs = [resolve_rev(repo.scm, name) for name in names]
        bases = [next((ref.baseline_sha for ref in exp_refs_by_rev(repo.scm, rev)), rev) for rev in revs]
    runs = read([base for base in dict.fromkeys(bases) if base])
    groups = grouped(runs)
    found = []
    for name, rev in zip(names, revs, strict=True):
        group = next((group for group in groups if any(run.rev == rev for run in group.runs)), None)
        if group is None or not any(run.metrics for run in group.runs):
            sys.exit(f"error: REV: {name}: has no numbers: its run failed, or is not done")
        found.append(group)
    return found


def findings(a: Group, b: Group, main: str) -> tuple[list[Finding], list[str]]:
    """The finding of each metric that both have, the main one first; and why other metrics may not be compared.

    The main metric is judged by its own p-value; the others, which were not the question, by Holm's correction.
    """
    found, refused = [], []
    for metric in (main, *(name for name in METRICS if name != main and METRICS[name].sign)):
        sides = compared(a, b, metric)
        if not all(sides):
            continue
        if why := not_comparable(a, b, metric):
            refused.append(f"{METRICS[metric].heading} ({why})")
            continue
        test = welch(*sides)
        found.append(Finding(metric, *sides, test, test and test.p))
    tested = [i for i, finding in enumerate(found) if finding.test and finding.metric != main]
    for i, p in zip(tested, holm([found[i].test.p for i in tested]), strict=True):  # type: ignore[union-attr]
        found[i] = found[i]._replace(p=p)
    return found, refused


def described(finding: Finding) -> str:
    """The numbers of both sides, their difference and its interval."""
    sides = [f"{number(values)} (n = {len(values)})" for values in (finding.a, finding.b)]
    text = f"{METRICS[finding.metric].heading} {sides[0]} → {sides[1]}"
    if finding.test is None:
        return text
    d = finding.test
    value, low, high = (f"{x:+.{decimals((d.high - d.low) / 4)}f}" for x in (d.value, d.low, d.high))
    return f"{text}, a difference of {value} (95 % interval {low} to {high}, p = {finding.p:.2g})"


def more_seeds(finding: Finding) -> str:
    """How many more seeds would settle an unsettled difference, if the true difference is as large as the one seen."""
    if finding.test is None:
        return "no spread, so nothing to test"
    needed = seeds_needed(finding.a, finding.b)
    if needed is None:
        return f"too small a difference for {MOST_SEEDS} seeds"
    more = [max(0, needed - len(side)) for side in (finding.a, finding.b)]
    if more[0] == more[1]:
        return f"about {max(1, more[0])} more seeds of each"
    return f"about {more[0]} and {more[1]} more seeds"


def what_changed(a: Group, b: Group) -> str:
    """The parameters, code and data in which both differ."""
    names = differing([a.params, b.params])
    changes = [f"{name} ({shown(name, a.params.get(name))} → {shown(name, b.params.get(name))})" for name in names]
    code = [name for name in differing([a.code, b.code]) if not name.startswith("data/") or not names]
    return ", ".join(changes + [f"the content of {name}" for name in code])


def conclusion(names: Sequence[str], chief: Finding | None, refused: Sequence[str], main: str) -> str:
    """The sentences on the main metric."""
    a, b = names
    if chief is None:
        reason = next((text for text in refused if text.startswith(METRICS[main].heading)), None)
        return f"Whether {b} is better cannot be said: {reason or METRICS[main].heading + ' is missing'}."
    if chief.settled:
        return f"{b} is {'better' if chief.better else 'worse'} than {a}: {described(chief)}."
    text = f"Whether {b} is better is not known: {described(chief)}."
    lacking = {name: len(side) for name, side in zip(names, (chief.a, chief.b), strict=True) if len(side) < 2}
    if lacking:
        first = " and ".join(f"{FEWEST - n} more seeds of {name}" for name, n in lacking.items())
        return f"{text} One run does not show a spread, without which nothing can be said: first {first}."
    return f"{text} What would settle it: {more_seeds(chief)}."


def verdict(names: Sequence[str], a: Group, b: Group, main: str) -> str:
    """The paragraph."""
    if a is b:
        return f"{names[0]} and {names[1]} differ in their seeds alone, so that neither can be better."
    found, refused = findings(a, b, main)
    chief = next((finding for finding in found if finding.metric == main), None)
    others = [finding for finding in found if finding is not chief]
    sentences = [f"From {names[0]} to {names[1]}, this changed: {what_changed(a, b)}."]
    sentences.append(conclusion(names, chief, refused, main))
    for word, chosen in (
        ("Better", [finding for finding in others if finding.settled and finding.better]),
        ("Worse", [finding for finding in others if finding.settled and not finding.better]),
    ):
        if chosen:
            sentences.append(f"{word}: {'; '.join(map(described, chosen))}.")
    unknown = [finding for finding in others if not finding.settled]
    if unknown and min(len(side) for finding in unknown for side in (finding.a, finding.b)) < 2:
        sentences.append(f"Not known either: {', '.join(METRICS[finding.metric].heading for finding in unknown)}.")
    elif unknown:
        texts = (
            f"{METRICS[finding.metric].heading} {number(finding.a)} → {number(finding.b)} ({more_seeds(finding)})"
            for finding in unknown
        )
        sentences.append(f"Not known, with the seeds that would settle it: {'; '.join(texts)}.")
    if refused:
        sentences.append(f"Not to be compared: {'; '.join(refused)}.")
    if len({run.model for group in (a, b) for run in group.runs}) == 1 and a.trainings == 1:
        sentences.append("Both are samples of one training: this holds for that model alone.")
    return " ".join(sentences)


def main() -> None:
    """Print the paragraph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revisions", nargs="*")
    parser.add_argument("--metric", default=MAIN)
    asked = parser.parse_args()
    check_metric(asked.metric)
    if len(asked.revisions) != 2:
        sys.exit(f'error: REV = {" ".join(asked.revisions)!r}: takes two commits or experiments: REV="main <name>"')
    try:
        a, b = groups_of(asked.revisions)
    except DvcException as error:
        sys.exit(f"error: REV: {error}")
    print(verdict(asked.revisions, a, b, asked.metric))


if __name__ == "__main__":
    main()
