import importlib
import inspect
import io
import itertools
import re

import pytest
import torch
from torchvision.transforms import v2

from ddpm.config import targets
from ddpm.config.targets import LR_SCHEDULER, OPTIMIZER, TRANSFORM, build, target_faults
from tests.conftest import ROOT

V2 = "torchvision.transforms.v2"
KINDS = (OPTIMIZER, LR_SCHEDULER, TRANSFORM)
ALLOWED = [(kind, name) for kind in KINDS for name in targets.allowed_names(kind)]


def ids(value):
    return value if isinstance(value, str) else value.base


def faults(node, kind):
    return list(target_faults(node, kind, "here"))


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "eval",
        "",
        ".",
        ".Adam",
        "torch.hub.load",
        "torch.load",
        "torch.optim",
        "torch.optim.",
        "torch.optim.Optimizer",
        "torch.optim.adam.Adam",
        "torch.optim._multi_tensor.Adam",
        "torch.optim.lr_scheduler.torch.hub.load",
        "torch.optim.lr_scheduler.torch",
        "torch.optim.lr_scheduler.types",
        "torch.optim.lr_scheduler.warnings.sys.modules",
        "torch.optim.lr_scheduler.warnings.warn",
        "torch.optim.Adam.__init__",
        "torch.optim.Adam.__init__.__globals__",
        "torch.optim.Adam.__class__.__base__.__subclasses__",
        "torchvision.transforms.v2.Compose.__init__.__builtins__.eval",
        "torch.optim.lr_scheduler.LambdaLR",
        "torch.optim.lr_scheduler.Optimizer",
        "torchvision.transforms.v2.functional.to_tensor",
        "torchvision.transforms.v2.functional",
        "torchvision.transforms.v2.Lambda",
        "torchvision.transforms.v2.Transform",
        "torchvision.transforms.v2._container.Compose",
        "torchvision.transforms.v2.query_size",
        "torchvision.transforms.Resize",
        " torch.optim.Adam",
        "torch.optim.Adam ",
        "torch.optim.Adam\n",
        "torch.optim.__loader__",
        3,
        None,
        ["torch.optim.Adam"],
        {"a": 1},
    ],
)
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_nothing_outside_the_three_modules_is_built(path, kind, monkeypatch):
    assert len(faults({"_target_": path}, kind)) == 1
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(ValueError, match="_target_"):
        build({"_target_": path}, kind)


@pytest.mark.parametrize(("kind", "other"), itertools.permutations(KINDS, 2), ids=ids)
def test_an_object_of_another_kind_is_refused(kind, other):
    node = {"_target_": f"{other.module}.{targets.allowed_names(other)[0]}"}
    (line,) = faults(node, kind)
    assert f"allowed are the classes {kind.module}.<name>: " in line


BAD = {"_target_": "os.system", "command": "exit 1"}


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ({"_target_": f"{V2}.RandomApply", "transforms": [BAD]}, "here.transforms.0"),
        ({"_target_": f"{V2}.RandomApply", "transforms": BAD}, "here.transforms"),
        ({"_target_": f"{V2}.RandomApply", "transforms": [[{"x": [BAD]}]]}, "here.transforms.0.0.x.0"),
        ({"_target_": f"{V2}.Pad", "padding": 1, "fill": {"a": BAD}}, "here.fill.a"),
        (
            {"_target_": f"{V2}.Compose", "transforms": [{"_target_": f"{V2}.RandomOrder", "transforms": [BAD]}]},
            "here.transforms.0.transforms.0",
        ),
        ({"_target_": f"{V2}.RandomApply", "transforms": [{"_target_": 3}]}, "here.transforms.0"),
    ],
)
def test_nested_names_are_refused_as_well(node, path):
    (line,) = faults(node, TRANSFORM)
    assert line.startswith(path)
    with pytest.raises(ValueError, match="_target_"):
        build(node, TRANSFORM)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in kind.not_for_params], ids=ids)
def test_a_class_that_can_never_work_is_refused_with_the_reason(kind, name):
    node = {"_target_": f"{kind.module}.{name}"}
    reason = f"{kind.not_for_params[name]}; {kind.instead}"
    (line,) = faults(node, kind)
    assert line.startswith(f"here._target_ = '{kind.module}.{name}': {reason}")
    if kind is TRANSFORM:
        (line,) = faults({"_target_": f"{V2}.RandomApply", "transforms": [node]}, kind)
        assert line.startswith("here.transforms.0._target_ = ")


def test_all_faults_of_a_mapping_are_reported():
    node = {
        "_target_": f"{V2}.RandomApply",
        "pp": 1,
        "p": float("nan"),
        "transforms": [BAD, {"_target_": f"{V2}.RandomCrop", "szie": 3}],
    }
    lines = faults(node, TRANSFORM)
    assert [line.split(" = ")[0] for line in lines] == [
        *("here.pp", "here.p", "here.transforms.0._target_", "here.transforms.1.szie")
    ]
    assert "(did you mean size?); its arguments are size, padding" in lines[-1]


@pytest.mark.parametrize("node", [None, 3, "torch.optim.Adam", [], {}, {"lr": 1}])
def test_anything_but_a_mapping_with_a_target_is_refused(node):
    (line,) = faults(node, OPTIMIZER)
    assert line.endswith("needs a _target_, the path of a class in torch.optim")


def test_the_allowed_names_are_those_that_the_modules_export():
    for kind in KINDS:
        module = importlib.import_module(kind.module)
        base = getattr(module, kind.base)
        exported = {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, base) and value is not base and not name.startswith("_")
        }
        assert exported - set(kind.not_for_params) == set(targets.allowed_names(kind))
        assert exported >= set(kind.not_for_params)


@pytest.mark.parametrize(("kind", "name"), ALLOWED, ids=ids)
def test_the_arguments_read_from_the_source_are_the_real_ones(kind, name):
    cls = getattr(importlib.import_module(kind.module), name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    real = [
        p.name
        for p in parameters
        if p.name not in ("self", "params", "optimizer") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert targets.argument_names(kind, name) == real


@pytest.mark.parametrize("name", targets.allowed_names(OPTIMIZER))
def test_every_optimizer_is_built_and_takes_a_step(name):
    parameters = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = build({"_target_": f"torch.optim.{name}", "lr": 0.1}, OPTIMIZER, parameters)
    sum((p**2).sum() for p in parameters).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() and (p < 1).all() for p in parameters)


NEEDED = {
    "CosineAnnealingLR": {"T_max": 9},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0},
    "ExponentialLR": {"gamma": 0.9},
    "MultiStepLR": {"milestones": [3, 6]},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 9},
    "StepLR": {"step_size": 5},
}


@pytest.mark.parametrize("name", targets.allowed_names(LR_SCHEDULER))
def test_every_schedule_is_built_and_resumes_from_its_state(name):
    def built():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
        node = {"_target_": f"torch.optim.lr_scheduler.{name}"} | NEEDED.get(name, {})
        return optimizer, build(node, LR_SCHEDULER, optimizer)

    def rates(optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            yield optimizer.param_groups[0]["lr"]

    whole, before = list(rates(*built(), 8)), built()
    first, resumed, saved = list(rates(*before, 4)), built(), io.BytesIO()
    torch.save([part.state_dict() for part in before], saved)
    saved.seek(0)
    for part, state in zip(resumed, torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert first + list(rates(*resumed, 4)) == whole


def test_a_schedule_is_built_on_the_optimizer_that_is_passed():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    node = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 10}
    assert build(node, LR_SCHEDULER, optimizer).optimizer is optimizer


@pytest.mark.parametrize("name", ["RandomApply", "RandomChoice", "RandomOrder", "Compose"])
def test_containers_hold_the_transforms_that_are_named_in_them(name):
    inner = [{"_target_": f"{V2}.RandomHorizontalFlip", "p": 1.0}, {"_target_": f"{V2}.Pad", "padding": [1, 2]}]
    built = build({"_target_": f"{V2}.{name}", "transforms": inner}, TRANSFORM)
    assert type(built) is getattr(v2, name)
    assert [type(t) for t in built.transforms] == [v2.RandomHorizontalFlip, v2.Pad]
    assert built.transforms[0].p == 1.0
    assert isinstance(built(torch.zeros(1, 4, 4, dtype=torch.uint8)), torch.Tensor)


@pytest.mark.parametrize("dtype", targets.TORCH_DTYPES)
def test_a_dtype_may_be_given_as_text(dtype):
    built = build({"_target_": f"{V2}.ToDtype", "dtype": f"torch.{dtype}", "scale": True}, TRANSFORM)
    assert built.dtype is getattr(torch, dtype)


def test_other_text_stays_text():
    built = build({"_target_": f"{V2}.Pad", "padding": 1, "padding_mode": "reflect"}, TRANSFORM)
    assert built.padding_mode == "reflect"


@pytest.mark.parametrize(
    ("node", "kind", "args"),
    [
        ({"_target_": "torch.optim.Adam", "lr": 0.1, "betas": [2, 3]}, OPTIMIZER, 1),  # ValueError
        ({"_target_": "torch.optim.Adam", "lr": 0.1, "betas": 3}, OPTIMIZER, 1),  # TypeError
        ({"_target_": "torch.optim.Adam", "lr": 0.1, "fused": True, "foreach": True}, OPTIMIZER, 1),  # RuntimeError
        ({"_target_": "torch.optim.Adam", "lr": 0.1, "weight_decay": []}, OPTIMIZER, 1),
        ({"_target_": f"{V2}.RandomCrop"}, TRANSFORM, 0),  # size is missing
        ({"_target_": f"{V2}.RandomCrop", "size": []}, TRANSFORM, 0),
        ({"_target_": f"{V2}.AutoAugment", "policy": "no such policy"}, TRANSFORM, 0),
        ({"_target_": f"{V2}.Normalize", "mean": None, "std": {}}, TRANSFORM, 0),
    ],
)
def test_a_refusal_of_the_constructor_names_the_target(node, kind, args):
    parameters = [[torch.nn.Parameter(torch.ones(1))]] * args
    with pytest.raises(ValueError, match=node["_target_"].replace(".", r"\.") + ": .") as caught:
        build(node, kind, *parameters)
    assert "\n" not in str(caught.value)


def test_a_schedule_that_starts_mid_way_is_refused_by_name():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    node = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "last_epoch": 5}
    with pytest.raises(ValueError, match=r"torch\.optim\.lr_scheduler\.StepLR: "):  # torch raises KeyError
        build(node, LR_SCHEDULER, optimizer)


def test_a_missing_library_is_reported_with_what_to_do():
    with pytest.raises(ModuleNotFoundError, match="no_such_library is not installed: run make repro"):
        targets.allowed_names(targets.Kind("no_such_library.part", "Base", "", {}))


def test_a_value_in_a_message_is_short_and_on_one_line():
    for value, text in (("a\nb", r"'a\nb'"), ([1] * 99, "..."), (16**5000, "too long to show")):
        line = targets.shown(value)
        assert text in line
        assert len(line) <= 100
        assert line.isprintable()


@pytest.mark.parametrize("kind", (OPTIMIZER, LR_SCHEDULER), ids=ids)
def test_the_documents_name_exactly_the_classes_that_are_refused(kind):
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{kind.module}` |"))
    assert set(re.findall(r"`(\w+)`", row)) == set(kind.not_for_params)
