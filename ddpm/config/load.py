"""Read `params.yaml`, check it and report every fault in one line. Imports neither torch nor NumPy."""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from ddpm.config.checks import Faults, fault_lines, setting_faults
from ddpm.config.schema import Params
from ddpm.config.targets import LR_SCHEDULER, OPTIMIZER, TRANSFORM, near, shown, target_faults
from ddpm.core.schedules import crosses_zero, schedule_faults
from ddpm.errors import UserError

RENAMED = {
    "train.ema_decay": "train.ema_widths",
    "train.log_every": "train.log_every_steps",
    "train.sample_every": "train.preview_every_epochs",
    "train.save_every": "train.save_every_seconds",
    "evaluate.inception_weights": "evaluate.weights",
}
REMOVED = {"evaluate.kid_subset_size": "removed, since KID takes all pairs of images; delete the line"}
# Settings that only some choices of their group use: the setting that decides, and its values that use them (for
# `timm:<name>` the part before the colon)
USED_BY = {
    "dataset.test_fraction": ("name", ("digits", "folder")),
    "dataset.on_broken": ("name", ("folder",)),
    "dataset.max_megapixels": ("name", ("folder",)),
    "diffusion.beta_start": ("schedule", ("linear", "sigmoid")),
    "diffusion.beta_end": ("schedule", ("linear", "sigmoid")),
    "sample.eta": ("sampler", ("ddim",)),
    "evaluate.weights": ("features", ("inception", "timm")),
    "evaluate.input_size": ("features", ("timm",)),
}
FILES = {"timm": "dinov2"}  # the file in conf/ of a choice, where the names differ
WATCHED = "requirements.txt"  # dataset.path of every set but folder: what DVC watches


def load_all(path: str | Path = "params.yaml") -> Params:
    """Read and check all of `path`, with OmegaConf, since PyYAML reads `1e-4` as a string.

    Raises:
        UserError: the file is missing, unreadable or has faults, one line per fault.
    """
    OmegaConf.clear_resolver("oc.env")  # a stranger's parameters must not carry this machine's secrets into records
    try:
        text = Path(path).read_text(encoding="utf-8")
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):  # a few aliases can expand to more than memory holds
                raise ValueError(
                    f"line {token.start_mark.line + 1}: write out what the alias *{token.value} stands for"
                )
        tree = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run this in the repository's root") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not readable as YAML: {reason[:300]}") from None
    return check(tree, str(path))


def load_params(sections: tuple[str, ...], path: str | Path = "params.yaml") -> Any:
    """Read and check all of `path`; return an object that has the named sections and no others.

    Every stage checks the whole file, so that a misspelt evaluation setting stops the run before the training and
    not after it.

    Raises:
        UserError: as `load_all`.
    """
    params = load_all(path)
    return SimpleNamespace(**{name: getattr(params, name) for name in sections})


def plain(params: Params) -> dict[str, Any]:
    """The sections of `load_params` as plain values, `_target_` under that name."""
    return {name: section and section.model_dump(by_alias=True) for name, section in vars(params).items()}


def check(tree: Any, source: str = "params.yaml") -> Params:
    """Validate a plain tree of parameters.

    Args:
        source: the file that the tree comes from, for the messages.

    Raises:
        UserError: one line per fault, each with the path of the setting, its value and what is allowed.
    """
    if not isinstance(tree, dict) or not tree.keys() & Params.model_fields.keys():
        raise UserError(f"{source}: holds no section of parameters; compose it again from conf/ (make params)")
    lines = list(_target_lines(tree))
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        lines = _schema_lines(error) + lines
    else:
        lines = lines or [*fault_lines(_cross_section_faults(params), params), *setting_faults(params)]
        if not lines:
            return params
    first: dict[str, str] = {}  # fault of each setting
    for line in lines:
        first.setdefault(line.partition(" = ")[0], line)
    # a key may hold a line break or a terminal's control characters
    printable = (line if line.isprintable() else line.encode("unicode_escape").decode() for line in first.values())
    raise UserError("\n".join(f"{source}: {line}" for line in printable))


# Faults of one setting, by the schema


def _schema_lines(error: ValidationError) -> list[str]:
    found = {".".join(map(str, fault["loc"])): fault for fault in error.errors()}
    for old, new in RENAMED.items():
        if old in found and new in found and found[new]["type"] == "missing":
            del found[new]  # not missing: the file has the setting under its old name
    return [_schema_line(path, fault) for path, fault in found.items()]


def _schema_line(path: str, fault: Any) -> str:
    if fault["type"] == "missing":
        return f"{path}: missing; add it, or compose the file again from conf/ (make params)"
    if path in RENAMED:
        message = f"renamed to {RENAMED[path]}"
    elif path in REMOVED:
        message = REMOVED[path]
    elif fault["type"] == "extra_forbidden":
        names = _field_names(fault["loc"])
        message = f"unknown key{near(str(fault['loc'][-1]), names)}; allowed: {', '.join(names)}"
    elif fault["type"] == "model_type":
        message = "should be a section, with its settings indented below it"
    else:
        message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path} = {shown(fault['input'])}: {message[0].lower()}{message[1:]}"


def _field_names(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed in place of an unknown one."""
    model: Any = Params
    for part in loc[:-1]:
        # an integer is a place in a list of sections
        model = get_args(model)[0] if isinstance(part, int) else model.model_fields[part].annotation
    return list(model.model_fields)


# Faults of what `_target_` names


def _target_lines(tree: dict[Any, Any]) -> Iterator[str]:
    """Faults of what `_target_` names and of its arguments, which belong to torch and so are not in the schema.

    Works on the plain tree, so that these faults are reported together with the schema's.
    """
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    for name, kind in (("optimizer", OPTIMIZER), ("lr_schedule", LR_SCHEDULER)):
        if isinstance(sections.get(name, {}).get("_target_"), str):  # else the schema reports it
            yield from target_faults(sections[name], kind, name)
    transforms = sections.get("train", {}).get("transforms")
    for i, node in enumerate(transforms if isinstance(transforms, list) else []):
        if isinstance(node, dict):
            yield from target_faults(node, TRANSFORM, f"train.transforms.{i}")
    yield from _optimizer_lines(sections.get("optimizer", {}))


def _optimizer_lines(node: dict[str, Any]) -> Iterator[str]:
    """Bounds of the arguments that most optimizers have; torch checks some of them, and only once data is read."""
    bounds = {"momentum": (1, "below 1"), "weight_decay": (1000, "below 1000"), "eps": (1000, "below 1000")}
    if str(node.get("_target_")).endswith(".Adafactor"):
        del bounds["eps"]  # a pair
    for name, (high, text) in bounds.items():
        value = node.get(name)
        if value is not None and not (_is_number(value) and 0 <= value < high):
            yield f"optimizer.{name} = {shown(value)}: should be a number from 0 up and {text}"
    betas = node.get("betas")
    pair = isinstance(betas, list) and len(betas) == 2 and all(map(_is_number, betas))
    if betas is not None and not (pair and 0 <= betas[0] < betas[1] < 1):
        yield f"optimizer.betas = {shown(betas)}: should be two numbers with 0 <= beta1 < beta2 < 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Faults between settings: each value is allowed, their combination is not


def _cross_section_faults(params: Params) -> Faults:
    for rule in (_used, _paths, _network, _processes, _schedule, _levels, _averages, _sampling, _classes, _evaluation):
        yield from rule(params)


def _used(params: Params) -> Faults:
    """A setting is given where the choice that decides about it uses it, and nowhere else."""
    for path, (decisive, users) in USED_BY.items():
        name, _, setting = path.partition(".")
        section = getattr(params, name)
        choice = getattr(section, decisive)
        kind = choice.partition(":")[0]
        given, used = setting in section.model_fields_set, kind in users
        if used and not given:
            file = FILES.get(kind, users[0])
            yield path, f"missing, and {name}.{decisive} = {choice!r} uses it; add it as in conf/{name}/{file}.yaml"
        if path == "sample.eta" and any(line.sampler in users for line in params.evaluate.nfe_curve):
            continue  # the curve draws by DDIM, too
        if given and not used:
            yield (
                path,
                f"has no effect where {name}.{decisive} = {choice!r}; remove it, or take the whole choice by "
                f"{name}={choice}",
            )


def _paths(params: Params) -> Faults:
    name, path = params.dataset.name, params.dataset.path
    if name != "folder" and path != WATCHED:
        yield (
            "dataset.path",
            f"is not read where dataset.name = {name!r}; add -S dataset=folder to take the images there, or set it to "
            f"{WATCHED}",
        )
    if name == "folder" and path.startswith("~"):
        yield (
            "dataset.path",
            f"~ is not replaced by the home folder here; type the full path that this prints: echo {shown(path)[1:-1]}",
        )


def _network(params: Params) -> Faults:
    model = params.model
    levels = len(model.channel_multipliers)
    stride = 2 ** (levels - 1)
    if params.dataset.image_size % stride:
        yield (
            "dataset.image_size",
            f"must be a multiple of {stride}, since model.channel_multipliers has {levels} levels and each but the "
            "last halves the image",
        )
    for multiplier in model.channel_multipliers:
        channels = model.base_channels * multiplier
        if channels % model.norm_groups:
            yield (
                "model.norm_groups",
                f"must divide every level's channels, and {model.base_channels} x {multiplier} = {channels} is no "
                "multiple of it",
            )
            break
    if len(model.attention) != levels:
        yield (
            "model.attention",
            f"must have one true or false for each of the {levels} levels of model.channel_multipliers",
        )


def _processes(params: Params) -> Faults:
    if params.runtime.launcher == "none" and params.runtime.processes is not None:
        yield "runtime.processes", "needs runtime.launcher = 'torchrun'"


def _schedule(params: Params) -> Faults:
    p = params.diffusion
    for name, message in schedule_faults(p.timesteps, p.schedule, p.beta_start, p.beta_end):
        yield f"diffusion.{name}", message


def _levels(params: Params) -> Faults:
    levels, width, p = params.train.noise_levels, params.train.noise_levels_width, params.diffusion
    if levels == "uniform" and width is not None:
        yield "train.noise_levels_width", "has no effect where train.noise_levels = 'uniform'; set it to null"
    if levels != "uniform" and width is None:
        yield "train.noise_levels_width", f"train.noise_levels = {levels!r} needs one; 2 is usual"
    if levels != "uniform" and not crosses_zero(p.timesteps, p.schedule, p.beta_start, p.beta_end):
        yield (
            "train.noise_levels",
            "needs a schedule whose log SNR crosses 0; set it to uniform, raise diffusion.beta_end, or use "
            "diffusion=cosine",
        )


def _averages(params: Params) -> Faults:
    widths, chosen = params.train.ema_widths, params.sample.ema_width
    if len(set(widths)) < len(widths):
        yield "train.ema_widths", "names a width twice"
    elif len({f"{width:g}" for width in widths}) < len(widths):  # as the files of the model folder are named
        yield "train.ema_widths", "two widths are equal in 6 digits, so that their weights would be one file; drop one"
    if chosen is not None and chosen not in widths:
        yield "sample.ema_width", f"must be one of train.ema_widths = {widths}, or null for the first"
    further, sampled = params.evaluate.ema_widths, widths[0] if chosen is None else chosen
    if len(set(further)) < len(further):
        yield "evaluate.ema_widths", "names a width twice"
    for width in further:
        if width not in widths:
            yield (
                "evaluate.ema_widths",
                f"{width:g} is not in train.ema_widths = {widths}; add it there, or leave it out",
            )
        elif width == sampled:
            yield "evaluate.ema_widths", f"{width:g} is the samples' width, which is measured anyway; leave it out"


def _sampling(params: Params) -> Faults:
    timesteps = params.diffusion.timesteps
    if params.sample.steps > timesteps:
        yield "sample.steps", f"must be at most diffusion.timesteps = {timesteps}"
    if params.sample.variance == "learned" and not params.diffusion.learn_variance:
        yield "sample.variance", "needs diffusion.learn_variance = true"


def _classes(params: Params) -> Faults:
    sample, conditional, needed = params.sample, params.model.class_conditional, "needs model.class_conditional = true"
    if not conditional and params.train.label_dropout != "auto":
        yield "train.label_dropout", f"{needed}; set it to auto"
    if not conditional and sample.classes is not None:
        yield "sample.classes", needed
    if not conditional and sample.class_frequencies != "equal":
        yield "sample.class_frequencies", needed
    if not conditional and sample.guidance != 1:
        yield "sample.guidance", f"{needed}; 1 is no guidance"
    if conditional and sample.guidance != 1 and params.train.hidden_labels == 0:
        yield (
            "sample.guidance",
            "needs train.label_dropout above 0, so that the network also learns to do without a label; 1 is no "
            "guidance",
        )


def _evaluation(params: Params) -> Faults:
    timesteps, count = params.diffusion.timesteps, params.sample.count
    for i, curve in enumerate(params.evaluate.nfe_curve):
        if max(curve.steps) > timesteps:
            yield f"evaluate.nfe_curve.{i}.steps", f"must each be at most diffusion.timesteps = {timesteps}"
    if params.evaluate.neighbours >= count:
        yield "evaluate.neighbours", f"must be below sample.count = {count}"
