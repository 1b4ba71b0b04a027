"""A file of conf/search/: the space, the budget and the storage of a search, checked before anything runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.trial import Trial
from pydantic import Field, ValidationError, model_validator

from ddpm.config.load import check
from ddpm.config.schema import Count, Section, Seed
from ddpm.config.targets import near
from ddpm.errors import UserError
from tools.common.experiments import METRICS, SEEDS

FOLDER = Path("conf/search")
Choice = str | bool | int | float | None | list[Any]


class Span(Section):
    """The values of one parameter: from low to high, or one of the choices."""

    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    log: bool = False
    choices: list[Choice] | None = None

    @model_validator(mode="after")
    def _is_a_span_or_choices(self) -> "Span":
        if self.choices is not None:
            if not self.choices or {"low", "high", "step", "log"} & self.model_fields_set:
                raise ValueError("should be {choices: [...]} with one choice or more, or {low, high} with log or step")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("should be {low, high} with low below high, or {choices: [...]}")
        elif self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("with log: true, low should be above 0, and there should be no step")
        elif self.step is not None and self.step <= 0:
            raise ValueError("step should be above 0")
        return self

    def suggest(self, trial: Trial, name: str) -> Any:
        """A trial's value: the one that it has, or a new one. A choice is the text to type after the equals sign."""
        if self.choices is not None:
            return trial.suggest_categorical(name, [typed(choice) for choice in self.choices])
        assert self.low is not None and self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None):
            return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step or 1)
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def ends(self) -> list[str]:
        """The values to check: each choice, or both ends."""
        return [typed(value) for value in self.choices or [self.low, self.high]]


class Search(Section):
    """The settings of a search; conf/search/default.yaml explains each."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    storage: Annotated[str, Field(min_length=1)] | None
    remote: Annotated[str, Field(min_length=1)] | None
    metric: str
    seeds: Annotated[list[Seed], Field(min_length=2)]
    trials: Count
    prune_after: Count | None
    prune_from: Annotated[float, Field(ge=0, lt=1)]
    overrides: list[str]
    space: Annotated[dict[str, Span], Field(min_length=1)]

    def decisive(self) -> dict[str, Any]:
        """The settings on which the comparability of trials depends: all but the place of the trials and the budget."""
        return self.model_dump(include={"metric", "seeds", "overrides", "space"}, exclude_none=True)

    def run_overrides(self, params: Mapping[str, Any], seed: int) -> list[str]:
        """The overrides for `dvc exp run -S` of one run of a trial."""
        own = [f"{name}={typed(value)}" for name, value in params.items()]
        return [*self.overrides, *own, *(f"{name}={seed}" for name in SEEDS)]


def typed(value: Any) -> str:
    """A value as it is typed on Hydra's command line."""
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, float) else str(value)


def composed(overrides: Iterable[str]) -> dict[str, Any]:
    """The parameters that `dvc exp run -S ...` would compose.

    Raises:
        UserError: conf/ does not accept an override.
    """
    try:
        with initialize_config_dir(str(Path("conf").resolve()), version_base=None):
            tree = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())[:300]) from None
    return tree  # type: ignore[return-value]


def read_search(name: str) -> Search:
    """Read and check conf/search/<name>.yaml, with every end and choice of its space.

    Raises:
        UserError: one line per fault.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        raise UserError(f"SEARCH = {name}: there is no {path}{near(name, known)}; known: {', '.join(known)}")
    try:
        search = Search.model_validate(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except ValidationError as error:
        raise UserError("\n".join(_line(path, fault) for fault in error.errors())) from None
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: is not readable: {' '.join(str(error).split())[:300]}") from None
    lines = list(_faults(search))
    if lines:
        raise UserError("\n".join(f"{path}: {line}" for line in lines))
    return search


def _line(path: Path, fault: Any) -> str:
    message = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{path}: {'.'.join(map(str, fault['loc']))} = {fault['input']!r}: {message[0].lower()}{message[1:]}"


def _faults(search: Search) -> Iterable[str]:
    """Faults that the schema cannot see: the metric, and values that the pipeline would refuse."""
    allowed = [name for name, metric in METRICS.items() if metric.sign]
    if search.metric not in allowed:
        yield f"metric = {search.metric!r}: should be one of {', '.join(allowed)}"
    if search.metric == "held_out_loss" and any(name.startswith("diffusion") for name in search.space):
        yield "metric = 'held_out_loss': its scale depends on diffusion, which is in the space"
    if len(set(search.seeds)) < len(search.seeds):
        yield f"seeds = {search.seeds}: names a seed twice"
    for name, span in search.space.items():
        if name in SEEDS:
            yield f"space.{name}: is set by `seeds`"
            continue
        if name == "sample.count" or name.startswith(("evaluate", "dataset")):
            yield f"space.{name}: changes how the numbers are measured, so that trials could not be compared"
            continue
        for value in span.ends():
            try:
                check(composed([*search.overrides, f"{name}={value}"]), "its runs would be refused")
            except UserError as error:
                yield f"space.{name} = {value}: {str(error).splitlines()[0]}"
