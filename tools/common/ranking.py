"""Which group of experiments is best, and which cannot be distinguished from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tools.common.experiments import METRICS, Group, compared, not_comparable
from tools.common.statistics import LEVEL, holm, mean, welch

BEST, WORSE, EQUAL, UNKNOWN = "best", "worse", "cannot be distinguished", "one run: not known"


def ranked(groups: Sequence[Group], metric: str) -> list[Group]:
    """Best mean first; groups without the metric last."""
    sign = METRICS[metric].sign
    return sorted(
        groups, key=lambda group: (not (values := group.values(metric)), sign * mean(values) if values else 0)
    )


@dataclass
class Ranking:
    """The comparison of each group with the best one, by its place in the list.

    `words` is empty where each group is one run, since nothing is known then. `p` is Welch's p-value, `corrected` the
    same by Holm's correction for all comparisons with the best.
    """

    words: dict[int, str] = field(default_factory=dict)
    p: dict[int, float] = field(default_factory=dict)
    corrected: dict[int, float] = field(default_factory=dict)


def beside_the_best(groups: Sequence[Group], metric: str) -> Ranking:
    """Compare each group with the best mean of those that have several runs: no single lucky run is the best."""
    found = Ranking()
    several = [i for i, group in enumerate(groups) if len(group.values(metric)) > 1]
    if not several:
        return found
    sign = METRICS[metric].sign
    best = min(several, key=lambda i: sign * mean(groups[i].values(metric)))
    for i, group in enumerate(groups):
        if i == best or not group.values(metric):
            continue
        sides = compared(groups[best], group, metric)
        if why := not_comparable(groups[best], group, metric):
            found.words[i] = f"not comparable: {why}"
        elif test := welch(*sides):
            found.p[i] = test.p
        else:
            found.words[i] = UNKNOWN if min(map(len, sides)) < 2 else "no spread: not known"
    found.corrected = dict(zip(found.p, holm(list(found.p.values())), strict=True))
    found.words |= {i: WORSE if p < LEVEL else EQUAL for i, p in found.corrected.items()}
    found.words[best] = BEST
    return found
