"""Faults that need more than a setting's bounds: the length of the training, files, the prepared data.

Every stage checks all of params.yaml, and prepare_data also checks what depends on the data, so that a wrong setting
of a later stage stops the first stage, not the run after hours of training. Imports neither torch nor NumPy.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpm.config import extractors
from ddpm.config.costs import evaluation_faults
from ddpm.config.schema import Params
from ddpm.config.targets import near, shown
from ddpm.errors import UserError, legible

MODEL = Path("models/ddpm")  # dvc removes it before each training
Faults = Iterator[tuple[str, str]]  # the path of a setting, and the fault of its value


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Optimizer steps per pass over the training images.

    The last, incomplete batch is dropped. Where a batch is larger than the data, an epoch is one step: see
    `ddpm.data.batches`.
    """
    return max(1, images // batch_size)


def fault_lines(faults: Faults, params: Params) -> Iterator[str]:
    """Each fault as a line: the path of the setting, its value where the file gives one, and the message."""
    for path, message in faults:
        value: Any = params
        given = True
        for part in path.split("."):
            given = isinstance(value, list) or part in value.model_fields_set
            value = value[int(part)] if isinstance(value, list) else getattr(value, part)
        yield f"{path} = {shown(value)}: {message}" if given else f"{path}: {message}"


# Checks that need no data: every stage makes them


def _length(params: Params) -> Faults:
    steps = params.train.steps
    if steps is not None and params.train.warmup_steps > steps:
        yield "train.warmup_steps", f"longer than the training, train.steps = {steps}; a tenth of it is usual"


def _processes(params: Params) -> Faults:
    p, processes = params.train, params.runtime.processes or 1
    if p.batch_size % (p.accumulation * processes):
        several = f" x runtime.processes = {processes}" if processes > 1 else ""
        yield "train.batch_size", f"must be a multiple of train.accumulation = {p.accumulation}{several}"


def _files(params: Params) -> Faults:
    init = params.train.init_from
    if init is None:
        return
    if Path(init).resolve() == MODEL.resolve():
        yield "train.init_from", "is removed before each training; start from a copy"
    elif not any(Path(init, name).is_file() for name in ("unet/config.json", "config.json")):
        what = "is not a model folder: holds no unet/config.json" if Path(init).is_dir() else "there is no such folder"
        yield "train.init_from", f"{what}; give a copy of models/ddpm, or a folder that diffusers has saved"


def _features(params: Params) -> Faults:
    features, weights = params.evaluate.features, params.evaluate.weights
    if fault := extractors.name_fault(features, weights):
        yield "evaluate.features", fault
    elif fault := extractors.file_fault(features, weights):
        yield "evaluate.weights", fault


def setting_faults(params: Params) -> list[str]:
    """Faults of the settings that do not depend on the data, one line per fault."""
    return [line for check in (_length, _processes, _features, _files) for line in fault_lines(check(params), params)]


# Checks that need the data: prepare_data makes them before it replaces the old data, and train before it starts


def _warmup(params: Params, info: Mapping[str, Any]) -> Faults:
    p = params.train
    if p.epochs is None:
        return
    per_epoch = steps_per_epoch(info["counts"]["train"], p.batch_size)
    if p.warmup_steps > p.epochs * per_epoch:
        yield (
            "train.warmup_steps",
            f"longer than the training: train.epochs = {p.epochs} of {per_epoch} steps each; a tenth of it is usual",
        )


def _classes(params: Params, info: Mapping[str, Any]) -> Faults:
    names, wanted = info["classes"], params.sample.classes
    if not params.model.class_conditional:
        return
    if not names:
        yield (
            "model.class_conditional",
            "the data has no classes; put the images of each class into a sub-folder of dataset.path, or set it to "
            "false",
        )
    for name in () if wanted is None or not names else map(str, wanted):
        if name not in names:
            known = ", ".join(map(legible, names[:50])) + (", ..." if len(names) > 50 else "")
            yield (
                "sample.classes",
                f"{shown(name)} is not a class of the data{legible(near(name, names))}; known: {known}",
            )


def _costs(params: Params, info: Mapping[str, Any]) -> Faults:
    return evaluation_faults(params, info["shape"], info["counts"])


CHECKS: list[Callable[[Params, Mapping[str, Any]], Faults]] = [_warmup, _classes, _costs]


def check_data(params: Params, info: Mapping[str, Any]) -> None:
    """Check the settings of all stages against the data: `info` is the content of dataset.json. Then download the
    weights that the evaluation needs: better to fail now than after the training.

    Raises:
        UserError: one line per fault.
    """
    lines = [line for check in CHECKS for line in fault_lines(check(params, info), params)]
    if lines:
        raise UserError("\n".join(f"params.yaml: {line}" for line in lines))
    extractors.fetch(params.evaluate.features, params.evaluate.weights)
