"""The study of a search in Optuna's storage: which worker has which trial, the losses, and the hopeless trials."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from ddpm.core.seeding import derive
from ddpm.errors import UserError
from tools.common.experiments import METRICS
from tools.common.searches import Search

# attributes of a trial
WORKER, VOID, REASON, VALUES = "worker", "void", "reason", "values"
HOPELESS = 0.75  # a trial is stopped if its loss is worse than this share of the other trials' losses
MOST_ATTEMPTS = 10  # to open a database while other workers create its tables
CONNECTION = {"pool_pre_ping": True}  # a run takes longer than an idle connection may last
MOST_PROPOSALS = 50  # in a row that were tried already: the space has few other settings, or none
MODEL_PROPOSALS = 10  # of these, from Optuna's model, which may propose the best of a few choices again and again
# Losses with different values of these are on different scales: a network that was trained with assigned noise is worse
# at the independent noise of the held-out loss
SCALES = ("diffusion", "dataset", "train.weighting", "train.noise_coupling")


def open_storage(address: str) -> BaseStorage:
    """A file (Optuna's journal), or one of Optuna's databases by its URL.

    Raises:
        UserError: the storage cannot be reached, or its driver is not installed. A password is not shown.
    """
    shown = address
    try:
        if "://" not in address:
            Path(address).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(address))
        if address.startswith("redis"):
            return JournalStorage(JournalRedisBackend(address))
        shown = make_url(address).render_as_string(hide_password=True)
        return _database(address)
    except (ImportError, SQLAlchemyError, OSError, ValueError) as error:
        missing = getattr(error.__cause__ or error, "name", None)
        reason = (
            f"install its driver, the package {missing}"
            if missing
            else " ".join(str(error).split())[:200].split(" (Back")[0]
        )
        raise UserError(f"storage = {shown}: cannot be opened: {reason}") from None


def _database(address: str) -> RDBStorage:
    """Open a database, and create missing tables; where several workers do so at once, some have to try again."""
    for _ in range(MOST_ATTEMPTS - 1):
        try:
            return RDBStorage(address, engine_kwargs=CONNECTION)
        except SQLAlchemyError as error:
            if "exist" not in str(error):
                raise
        time.sleep(1)
    return RDBStorage(address, engine_kwargs=CONNECTION)


class Pruner(BasePruner):
    """Stop a trial whose loss on held-out images is worse than that of three quarters of the trials before it.

    A loss is compared with the others' at the same step, and within one kind of diffusion: another prediction or
    schedule has another scale.
    """

    def __init__(self, after: int, share: float) -> None:
        self._after, self._share = after, share

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the last reported loss is hopeless."""
        step = trial.last_step
        finished = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if _same_scale(t, trial)]
        losses = [loss for t in finished if (loss := _loss_at(t, step or 0)) is not None]
        if step is None or len(losses) < self._after:
            return False
        if step < self._share * max(t.last_step or 0 for t in finished):
            return False
        return trial.intermediate_values[step] > float(np.quantile(losses, HOPELESS))


def _same_scale(a: FrozenTrial, b: FrozenTrial) -> bool:
    names = {name for trial in (a, b) for name in trial.params if name.startswith(SCALES)}
    return all(a.params.get(name) == b.params.get(name) for name in names)


def _loss_at(trial: FrozenTrial, step: int) -> float | None:
    """The loss of a trial at a step, or at the last measured step before it."""
    steps = [known for known in trial.intermediate_values if known <= step]
    return trial.intermediate_values[max(steps)] if steps else None


class Study:
    """The trials of a search that all workers share.

    Args:
        worker: the name of this worker: it continues the trials that carry it.
        origin: the commit and code of the trials; all workers must have the same.

    Raises:
        UserError: the storage cannot be reached, or holds a search of this name with other settings or code.
    """

    def __init__(self, search: Search, storage: BaseStorage, worker: str, origin: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner: BasePruner = optuna.pruners.NopPruner()
        if search.prune_after is not None:
            pruner = Pruner(search.prune_after, search.prune_from)
        self.search, self.worker = search, worker
        self.study = optuna.create_study(
            storage=storage,
            study_name=search.study,
            direction="minimize" if METRICS[search.metric].sign > 0 else "maximize",
            load_if_exists=True,
            pruner=pruner,
        )
        # another seed for each worker and each start: the same draws would be settings that were tried already
        seed = derive(0, "search", *worker.encode(), len(self.study.get_trials(deepcopy=False)))
        self._samplers = TPESampler(seed=seed % 2**32, multivariate=True), RandomSampler(seed=seed % 2**32)
        self.study.sampler = self._samplers[0]
        self._agree({"search": json.dumps(search.decisive(), sort_keys=True), "origin": origin})

    def _agree(self, facts: dict[str, str]) -> None:
        """Refuse to mix trials that cannot be compared."""
        known = self.study.user_attrs
        for name, value in facts.items():
            if name not in known:
                self.study.set_user_attr(name, value)
            elif known[name] != value:
                what = {
                    "search": "another metric, seeds, overrides or space",
                    "origin": "another commit or other code",
                }[name]
                raise UserError(
                    f"study = {self.search.study}: was begun with {what}, so that its trials could not be compared "
                    f"with new ones; give the search another `study`, or go back"
                )

    def trials(self) -> list[FrozenTrial]:
        """The trials that count, in order: all that were not withdrawn before they ran."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if not trial.user_attrs.get(VOID)]

    def unfinished(self) -> list[Trial]:
        """The trials that this worker had begun when it was stopped."""
        return [
            Trial(self.study, trial._trial_id)
            for trial in self.trials()
            if trial.state == TrialState.RUNNING and trial.user_attrs.get(WORKER) == self.worker
        ]

    def adopt(self, worker: str) -> int:
        """Take over the unfinished trials of a worker that will not come back; return how many."""
        theirs = [t for t in self.trials() if t.state == TrialState.RUNNING and t.user_attrs.get(WORKER) == worker]
        for trial in theirs:
            Trial(self.study, trial._trial_id).set_user_attr(WORKER, self.worker)
        return len(theirs)

    def next(self) -> Trial | None:
        """A new trial with parameters that no other trial has; None: the budget is spent.

        Each worker first writes its trial and then reads those of the others, so that at least one of two that came
        to the same settings, or to the last place of the budget, sees the other and withdraws.
        """
        for proposal in range(MOST_PROPOSALS):
            self.study.sampler = self._samplers[proposal >= MODEL_PROPOSALS]
            if len(self.trials()) >= self.search.trials:
                return None
            trial = self._create()
            self.suggest(trial)
            others = self.trials()
            mine = next(other for other in others if other.number == trial.number)
            if sum(other.number < trial.number for other in others) >= self.search.trials:
                self._withdraw(trial, "beyond the budget")
                return None
            same = [other.number for other in others if other.params == mine.params and other.number != trial.number]
            if not same:
                return trial
            self._withdraw(trial, f"the settings of trial {same[0]}")
        print(f"{MOST_PROPOSALS} proposals in a row were tried already: the space has no other settings, or few")
        return None

    def _create(self) -> Trial:
        """A running trial that carries this worker's name from its first moment, whenever the worker is killed."""
        token = f"{self.worker} {time.time_ns()}"
        attributes = {WORKER: self.worker, "token": token}
        self.study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes))
        made = next(t for t in self.study.get_trials(deepcopy=False)[::-1] if t.user_attrs.get("token") == token)
        return Trial(self.study, made._trial_id)

    def _withdraw(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr(VOID, reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """The parameters of a trial: those that it has, or new ones."""
        return {name: span.suggest(trial, name) for name, span in self.search.space.items()}

    def points(self, trial: Trial) -> dict[int, float]:
        """The losses that a trial has reported, by step; not empty for a resumed trial."""
        return self.study.get_trials(deepcopy=False)[trial.number].intermediate_values

    def fail(self, trial: Trial, reason: str) -> None:
        """Record a failed trial with its reason."""
        trial.set_user_attr(REASON, reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def prune(self, trial: Trial, reason: str) -> None:
        """Record a trial that was stopped early."""
        trial.set_user_attr(REASON, reason)
        self.study.tell(trial, state=TrialState.PRUNED)

    def finish(self, trial: Trial, values: Sequence[float]) -> None:
        """Record the values of a trial's seeds; the search uses their mean."""
        trial.set_user_attr(VALUES, list(values))
        self.study.tell(trial, float(np.mean(values)))
