"""Objects that parameters may name by `_target_`: optimizers, learning-rate schedulers and image transforms.

Parameters may come from a stranger's experiment, so a name is looked up in three fixed modules of torch, among the
few classes of this project that are allowed in the same place (`own`), and nowhere else.
A class that cannot work here is refused with the reason (`not_for_params`). Names and arguments are checked
against the modules' source text, without importing it: importing torch takes longer than the two seconds in which a
wrong parameter has to be refused.
"""

import ast
import difflib
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TORCH_DTYPES = ("uint8", "int64", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Kind:
    """One of the three modules.

    Attributes:
        module: where the classes are looked up.
        base: the class that they all inherit from.
        instead: advice for a user who names one that cannot work here.
        not_for_params: the classes that cannot work here, each with the reason.
        own: classes of this project that are allowed in the same place, by their full names.
    """

    module: str
    base: str
    instead: str
    not_for_params: Mapping[str, str] = field(hash=False)
    own: tuple[str, ...] = ()


OPTIMIZER = Kind(
    "torch.optim",
    "Optimizer",
    "use another, such as torch.optim.AdamW",
    {
        "LBFGS": "calls the loss several times per step",
        "SparseAdam": "takes sparse gradients only",
        "Muon": "takes matrices only, and the network has other parameters; optimizer=muon is this project's",
    },
    own=("ddpm.training.muon.Muon",),
)
LR_SCHEDULER = Kind(
    "torch.optim.lr_scheduler",
    "LRScheduler",
    "use another, such as torch.optim.lr_scheduler.CosineAnnealingLR",
    {
        "ReduceLROnPlateau": "follows a validation loss, which this training does not compute",
        "LambdaLR": "takes a Python function",
        "MultiplicativeLR": "takes a Python function",
        "SequentialLR": "takes schedulers that are built already",
        "ChainedScheduler": "takes schedulers that are built already",
    },
)
BOXES = "acts on boxes or key points, and the data has images alone"
BATCHES = "mixes a batch of images with their labels, and transforms see one image at a time"
SEVERAL = "gives several images in place of one"
TRANSFORM = Kind(
    "torchvision.transforms.v2",
    "Transform",
    "leave it out",
    {
        "Lambda": "takes a Python function",
        "LinearTransformation": "takes tensors, which YAML cannot give",
        "UniformTemporalSubsample": "acts on videos, and the data has images alone",
        "MixUp": BATCHES,
        "CutMix": BATCHES,
        "FiveCrop": SEVERAL,
        "TenCrop": SEVERAL,
        "ClampBoundingBoxes": BOXES,
        "ClampKeyPoints": BOXES,
        "ConvertBoundingBoxFormat": BOXES,
        "RandomIoUCrop": BOXES,
        "SanitizeBoundingBoxes": BOXES,
        "SanitizeKeyPoints": BOXES,
        "SetClampingMode": BOXES,
    },
)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Every class defined in the module's file, or in the files of its package, from their text."""
    top, _, rest = module.partition(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{top} is not installed: run make repro, or pip install -r requirements.txt")
    place = Path(spec.origin).parent.joinpath(*rest.split("."))
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return {
        node.name: node
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def _bases(name: str, classes: dict[str, ast.ClassDef]) -> list[str]:
    """The class and its base classes, nearest first, as far as the module defines them."""
    names = [name]
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            names += _bases(base.id, classes)
    return names


@cache
def allowed_names(kind: Kind) -> list[str]:
    """The class names that a parameter may ask for."""
    classes = _classes(kind.module)
    return sorted(
        name
        for name in classes
        if not name.startswith("_")
        and name != kind.base
        and name not in kind.not_for_params
        and kind.base in _bases(name, classes)
    )


@cache
def argument_names(kind: Kind, name: str) -> list[str]:
    """The arguments of a class's constructor, without the parameters or the optimizer that the caller passes.

    Args:
        name: the name of a class in the kind's module, or the full name of one of the project's own.
    """
    module, _, name = name.rpartition(".")
    classes = _classes(module or kind.module)
    for owner in _bases(name, classes):
        for node in classes[owner].body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if node.args.vararg:  # Compose-like transforms that take *args are not configurable by name
                    return []
                return [n for n in names if n not in ("self", "params", "optimizer")]
    return []


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, at most 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out integers of more than 4300 digits
        text = "a number too long to show"
    return text if len(text) <= 100 else text[:97] + "..."


def near(name: str, names: list[str]) -> str:
    """A hint at the allowed name closest to a misspelt one, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def target_faults(node: Any, kind: Kind, path: str) -> Iterator[str]:
    """Faults of a `_target_` mapping at `path`, one line per fault. Transforms may hold transforms."""
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        yield f"{path} = {shown(node)}: needs a _target_, the path of a class in {kind.module}"
        return
    module, _, name = node["_target_"].rpartition(".")
    names = allowed_names(kind)
    own = node["_target_"] in kind.own
    if module == kind.module and name in kind.not_for_params:
        yield f"{path}._target_ = {shown(node['_target_'])}: {kind.not_for_params[name]}; {kind.instead}"
        return
    if not own and (module != kind.module or name not in names):
        listed = ", or ".join((", ".join(names), *kind.own))
        yield (
            f"{path}._target_ = {shown(node['_target_'])}: unknown{near(name, names)}; "
            f"allowed are the classes {kind.module}.<name>: {listed}"
        )
        return
    arguments = argument_names(kind, node["_target_"] if own else name)
    for key, value in node.items():
        if key != "_target_" and key not in arguments:
            yield (
                f"{path}.{key} = {shown(value)}: {name} has no such argument{near(str(key), arguments)}; "
                f"its arguments are {', '.join(arguments)}"
            )
        else:
            yield from _value_faults(value, kind, f"{path}.{key}")


def _value_faults(value: Any, kind: Kind, path: str) -> Iterator[str]:
    """Faults of an argument's value: objects may be named at any depth of its lists and mappings."""
    if isinstance(value, dict) and "_target_" in value:
        yield from target_faults(value, kind, path)
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _value_faults(item, kind, f"{path}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} = {value}: must be a finite number"


def build(node: dict[str, Any], kind: Kind, *args: Any) -> Any:
    """Import and construct the class that a `_target_` mapping names, with `args` before its own arguments.

    Raises:
        ValueError: the mapping is not allowed, or the class refuses the values of its arguments.
    """
    if fault := next(target_faults(node, kind, kind.base.lower()), None):
        raise ValueError(fault)
    module, _, name = node["_target_"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    kwargs = {key: _value(value, kind) for key, value in node.items() if key != "_target_"}
    try:
        return cls(*args, **kwargs)
    except Exception as error:  # of any type: the code is torch's, so the fault is in the arguments
        text = " ".join(f"{error}".split()) or type(error).__name__
        raise ValueError(f"{node['_target_']}: {text}") from None


def _value(value: Any, kind: Kind) -> Any:
    if isinstance(value, list):
        return [_value(item, kind) for item in value]
    if isinstance(value, dict) and "_target_" in value:
        return build(value, kind)
    if isinstance(value, str) and value.removeprefix("torch.") in TORCH_DTYPES and value.startswith("torch."):
        return getattr(importlib.import_module("torch"), value.removeprefix("torch."))
    return value
