"""The experiments of a repository: their parameters, numbers and code, and the groups that differ in seeds alone."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dvc.repo import Repo
from dvc.utils.flatten import flatten

from tools.common.statistics import mean

# Two runs that differ in these alone are two draws of one experiment. `evaluate.seed` is not among them: it belongs to
# the measurement. If it were, the same model and samples with another `evaluate.seed` would count as a further draw.
SEEDS = ("train.seed", "sample.seed")
NUMBERS = "results/evaluate/metrics.json"
MODEL, SAMPLES = "models/ddpm", "samples/images.npy"  # dependencies that depend on the seeds
DISTANCE = (
    "dataset.",
    "sample.count",
    "evaluate.features",
    "evaluate.input_size",
    "evaluate.reference",
    "evaluate.weights",
)


class Metric(NamedTuple):
    """A number of metrics.json: its heading, which direction is better, and which runs it may be compared between."""

    heading: str
    sign: int  # 1: lower is better; -1: higher is better; 0: neither
    comparable: tuple[str, ...]  # these parameters, or all that start with one of them, must be equal
    of_model: bool = False  # does not depend on the samples


METRICS = {
    "frechet_distance": Metric("Fréchet distance", 1, DISTANCE),
    "precision": Metric("precision", -1, (*DISTANCE, "evaluate.neighbours")),
    "recall": Metric("recall", -1, (*DISTANCE, "evaluate.neighbours")),
    "memorisation_ratio": Metric("memorisation ratio", 0, DISTANCE),
    "held_out_loss": Metric(
        "held-out loss",
        1,
        # its scale depends on the prediction, and its noise levels on the schedule
        (
            "dataset.",
            *(f"diffusion.{name}" for name in ("prediction", "schedule", "timesteps", "beta")),
            "evaluate.loss",
        ),
        of_model=True,
    ),
    "bits_per_dim": Metric("bits/dim", 1, ("dataset.", "evaluate.bound_images"), of_model=True),
}
MAIN = "frechet_distance"  # the metric that a comparison is about, unless another one is asked for


@dataclass(frozen=True)
class Run:
    """A commit or an experiment.

    Attributes:
        state: success, failed, queued or running; only a run that is done has numbers of its own.
        params: by dotted name.
        code: the hash of each dependency by path, data included; without those that depend on the seeds.
        model: the hash of the model folder; empty where it is not known.
    """

    name: str
    rev: str
    state: str = "success"
    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    model: str = ""

    @property
    def seeds(self) -> tuple[Any, ...]:
        """The seeds of the training and of the samples."""
        return tuple(self.params.get(name) for name in SEEDS)


def read(revs: Sequence[str] = ("HEAD",)) -> list[Run]:
    """Each of these commits, followed by the experiments that started from it; no run twice.

    Raises:
        DvcException: there is no such revision.
    """
    with Repo() as repo:
        found: dict[str, Run] = {}
        for base in repo.experiments.show(revs=list(revs), hide_workspace=True):
            for state, executor, name in [(base, None, base.name), *_experiments(base)]:
                found.setdefault(state.rev, _run(state, executor, name))
        return list(found.values())


def _experiments(base: Any) -> Iterable[tuple[Any, Any, str | None]]:
    for experiment in base.experiments or []:
        yield experiment.revs[0], experiment.executor, experiment.name


def _run(state: Any, executor: Any, name: str | None) -> Run:
    data, stage = state.data, executor.state if executor else "failed" if state.error else "success"
    if data is None:
        return Run(name or state.rev[:7], state.rev, "failed")
    params = {key: value for file in data.params.values() for key, value in flatten(file.get("data", {})).items()}
    metrics: dict[str, float] = {}
    if stage == "success":  # DVC gives unfinished runs the numbers of the commit that they started from
        numbers = data.metrics.get(NUMBERS, {}).get("data")  # the training's own metrics have other meanings
        metrics = {key: value for key, value in (numbers or {}).items() if isinstance(value, int | float)}
    code = {path: str(dep.hash) for path, dep in data.deps.items() if path not in (MODEL, SAMPLES)}
    model = str(data.deps[MODEL].hash or "") if MODEL in data.deps else ""
    return Run(name or state.rev[:7], state.rev, stage, params, metrics, code, model)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    runs: tuple[Run, ...]

    @property
    def params(self) -> dict[str, Any]:
        """The parameters without the seeds."""
        return {name: value for name, value in self.runs[0].params.items() if name not in SEEDS}

    @property
    def code(self) -> dict[str, str]:
        """The hash of each dependency."""
        return self.runs[0].code

    @property
    def trainings(self) -> int:
        """The number of different seeds of the training."""
        return len({run.seeds[0] for run in self.runs})

    def values(self, metric: str) -> list[float]:
        """Independent values of a metric: one per training, the mean over its samples.

        If all runs sample one training: one per seed of the samples, for a metric that depends on them. Runs with
        the same seeds are one draw, and count once.
        """
        draws: dict[Any, dict[Any, list[float]]] = {}
        for run in self.runs:
            if metric in run.metrics:
                draws.setdefault(run.seeds[0], {}).setdefault(run.seeds[1], []).append(run.metrics[metric])
        trainings = [[mean(values) for values in samples.values()] for samples in draws.values()]
        if len(trainings) == 1 and not METRICS[metric].of_model:
            return trainings[0]
        return [mean(values) for values in trainings]

    def error(self, metric: str) -> float | None:
        """The standard error from the evaluation of a single run, the first that has the metric."""
        return next((run.metrics.get(f"{metric}_se") for run in self.runs if metric in run.metrics), None)


def grouped(runs: Iterable[Run]) -> list[Group]:
    """The finished runs in groups that differ in seeds alone: all other parameters, code and data are equal."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.state == "success":
            rest = sorted((key, value) for key, value in run.params.items() if key not in SEEDS)
            groups.setdefault(repr((rest, sorted(run.code.items()))), []).append(run)
    return [Group(tuple(members)) for members in groups.values()]


def check_metric(name: str) -> None:
    """Refuse a name that is not a metric, or a metric that has no better and worse.

    Raises:
        SystemExit: with a line that names the allowed metrics.
    """
    allowed = [known for known, metric in METRICS.items() if metric.sign]
    if name not in allowed:
        sys.exit(f"error: METRIC = {name}: should be one of {', '.join(allowed)}")


def differing(several: Sequence[dict[str, Any]]) -> list[str]:
    """The names whose values differ between the mappings, in their order."""
    names = dict.fromkeys(name for one in several for name in one)
    return [name for name in names if any(one.get(name) != several[0].get(name) for one in several)]


def not_comparable(a: Group, b: Group, metric: str) -> str | None:
    """Why this metric of both groups cannot be compared, or None if it can."""
    different = [name for name in differing([a.params, b.params]) if name.startswith(METRICS[metric].comparable)]
    if different:
        return f"{', '.join(different)} differ{'s' * (len(different) == 1)}"
    if a.code.get("data/prepared") != b.code.get("data/prepared"):
        return "the data differs"
    return None


def compared(a: Group, b: Group, metric: str) -> tuple[list[float], list[float]]:
    """The values of both groups that a test of a against b may use.

    Several samples of one training speak for that training alone. They are used where both groups sampled the same
    model; else each side has one value per training.
    """
    sides = a.values(metric), b.values(metric)
    models = {run.model for group in (a, b) for run in group.runs}
    if len(models) == 1 and "" not in models:
        return sides
    first, second = (
        [mean(values)] if group.trainings == 1 and values else values
        for group, values in zip((a, b), sides, strict=True)
    )
    return first, second


def shown(name: str, value: Any) -> str:
    """A parameter's value in few characters: for a `_target_` the class name alone."""
    if name.endswith("_target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, bool | list):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)
