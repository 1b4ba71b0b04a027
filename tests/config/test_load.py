"""params.yaml is read and checked as a whole: each fault is reported in one line that says what to do."""

import copy
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm.config.load import RENAMED, USED_BY, check, load_params
from ddpm.config.schema import Params
from ddpm.errors import UserError
from tests.conftest import ROOT, composed
from tests.support.trees import DEFAULT, DELETED, changed, faults, only_fault

CROP = "torchvision.transforms.v2.RandomCrop"


def test_an_unknown_key_is_named_with_the_nearest_allowed_one():
    line = only_fault(train__bacth_size=4)
    assert line.startswith("params.yaml: train.bacth_size = 4: unknown key (did you mean batch_size?); allowed: seed, ")
    assert "save_every_seconds" in line


@pytest.mark.parametrize("key", ["Train", "trian", "TRAIN "])
def test_an_unknown_section_is_named_whatever_its_case(key):
    line = only_fault(**{key: {}})
    assert line.startswith(f"params.yaml: {key} = {{}}: unknown key")
    assert "allowed: runtime, dataset" in line


def test_an_unknown_key_in_capitals_keeps_its_path():
    assert only_fault(model__Dropout=1).startswith(
        "params.yaml: model.Dropout = 1: unknown key (did you mean dropout?)"
    )


def test_a_missing_key_is_reported_with_how_to_restore_it():
    assert only_fault(train__seed=DELETED) == (
        "params.yaml: train.seed: missing; add it, or compose the file again from conf/ (make params)"
    )
    assert only_fault(sample=DELETED).startswith("params.yaml: sample: missing; ")
    assert only_fault(optimizer___target_=DELETED).startswith("params.yaml: optimizer._target_: missing; ")


def test_momentum_has_to_be_below_one():
    sgd = composed("optimizer=sgd")["optimizer"]
    check(changed(optimizer=sgd))
    assert only_fault(optimizer=sgd | {"momentum": 1.5}).startswith("params.yaml: optimizer.momentum = 1.5: should be")


def test_the_pair_of_eps_that_adafactor_takes_is_allowed():
    check(changed(optimizer={"_target_": "torch.optim.Adafactor", "lr": 0.01, "eps": [None, 0.001]}))


@pytest.mark.parametrize("name", ["digits", "cifar10", "mnist", "fashion_mnist"])
def test_a_folder_for_a_data_set_that_reads_none_is_refused(name):
    tree = composed(f"dataset={name}", "model=small", "dataset.path=/my/pictures")
    assert [line for line in faults(tree) if "image_size" not in line] == [
        f"params.yaml: dataset.path = '/my/pictures': is not read where dataset.name = {name!r}; "
        "add -S dataset=folder to take the images there, or set it to requirements.txt"
    ]
    assert check(composed("dataset=folder", "dataset.path=/my/pictures")).dataset.path == "/my/pictures"


VALUES = {
    "dataset.test_fraction": 0.1,
    "dataset.on_broken": "stop",
    "dataset.max_megapixels": 179.0,
    "diffusion.beta_start": 1e-4,
    "diffusion.beta_end": 0.02,
    "sample.eta": 0.0,
    "evaluate.weights": None,
    "evaluate.input_size": None,
}


@pytest.mark.parametrize("path", USED_BY)
def test_a_setting_that_a_choice_cannot_use_is_refused(path):
    section, _, setting = path.partition(".")
    decisive, users = USED_BY[path]
    refused = 0
    for file in sorted((ROOT / "conf" / section).glob("*.yaml")):
        tree = composed(f"{section}={file.stem}")
        choice = tree[section][decisive]
        used = choice.partition(":")[0] in users
        assert (setting in tree[section]) == used, file
        check(tree)
        if not used:
            tree[section][setting] = VALUES[path]
            assert faults(tree) == [
                f"params.yaml: {path} = {VALUES[path]!r}: has no effect where {section}.{decisive} = {choice!r}; "
                f"remove it, or take the whole choice by {section}={choice}"
            ]
            refused += 1
    assert refused


@pytest.mark.parametrize(("path", "choice"), [(path, choice) for path in USED_BY for choice in USED_BY[path][1]])
def test_a_setting_that_a_choice_uses_must_be_given(path, choice):
    section, _, setting = path.partition(".")
    decisive, users = USED_BY[path]
    group = choice if section == "dataset" else "dinov2" if choice == "timm" else users[0]
    choice = "timm:test_vit.r160_in1k" if choice == "timm" else choice
    tree = composed(f"{section}={group}", f"{section}.{decisive}={choice}")
    del tree[section][setting]
    assert faults(tree) == [
        f"params.yaml: {path}: missing, and {section}.{decisive} = {choice!r} uses it; add it as in "
        f"conf/{section}/{users[0] if section == 'dataset' else group}.yaml"
    ]


def test_eta_is_allowed_if_a_curve_samples_by_ddim():
    curve = "evaluate.nfe_curve=[{sampler: ddim, steps: [2]}]"
    check(composed("sample=ddpm", curve))
    assert check(composed("sample=ddpm", curve, "+sample.eta=0.5")).sample.eta == 0.5
    assert faults(composed("sample=ddpm", "+sample.eta=0.5"))


def test_an_unused_setting_has_the_default_of_its_group():
    params = check(composed())
    assert (params.diffusion.beta_start, params.diffusion.beta_end) == (1e-4, 0.02)
    assert params.evaluate.weights is None
    assert check(composed("sample=ddpm")).sample.eta == check(composed("sample=dpm_solver")).sample.eta == 0


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_setting_is_answered_with_its_new_name(old, new):
    former, present = old.replace(".", "__"), new.replace(".", "__")
    line = f"params.yaml: {old} = 25: renamed to {new}"
    section, _, name = new.partition(".")
    if name in composed()[section]:
        assert only_fault(**{former: 25, present: DELETED}) == line
    assert only_fault(**{former: 25}) == line  # both


def test_a_removed_setting_is_answered_with_the_reason():
    line = only_fault(evaluate__kid_subset_size=500)
    assert line == (
        "params.yaml: evaluate.kid_subset_size = 500: removed, since KID takes all pairs of images; delete the line"
    )


def test_a_path_with_a_tilde_is_refused_with_a_command():
    tree = composed("dataset=folder")
    tree["dataset"]["path"] = "~/pictures"
    assert faults(tree) == [
        "params.yaml: dataset.path = '~/pictures': ~ is not replaced by the home folder here; "
        "type the full path that this prints: echo ~/pictures"
    ]


def test_an_image_that_the_levels_cannot_halve_is_refused():
    line = faults(changed(dataset__image_size=30, model__channel_multipliers=[1, 2, 2]))[0]
    assert line.startswith("params.yaml: dataset.image_size = 30: must be a multiple of 4, since model.channel_mult")


def test_groups_that_do_not_divide_the_channels_are_refused():
    line = only_fault(model__norm_groups=7, model__base_channels=48)
    assert line.startswith("params.yaml: model.norm_groups = 7: must divide every level's channels, and 48 x 1 = 48")


def test_attention_has_one_flag_for_each_level():
    line = only_fault(model__attention=[True])
    assert line.startswith(
        "params.yaml: model.attention = [True]: must have one true or false for each of the 2 levels"
    )


def test_more_sampling_steps_than_timesteps_are_refused():
    line = only_fault(diffusion__timesteps=20, sample__steps=21)
    assert line == "params.yaml: sample.steps = 21: must be at most diffusion.timesteps = 20"
    check(changed(diffusion__timesteps=20, sample__steps=20))


@pytest.mark.parametrize("schedule", ["linear", "sigmoid", "cosine"])
@pytest.mark.parametrize("timesteps", [2, 10, 1000, 10_000, 20_000, 100_000])
@pytest.mark.parametrize("betas", [(1e-300, 0.02), (1e-4, 0.02), (1e-5, 1e-3), (1e-4, 0.9), (0.5, 0.9999)])
def test_a_schedule_whose_tables_fail_is_refused_before_any_work(schedule, timesteps, betas):
    from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion

    tree = changed(diffusion__timesteps=timesteps, diffusion__schedule=schedule, sample__steps=2)
    if schedule != "cosine":  # which has none
        tree["diffusion"] |= {"beta_start": betas[0], "beta_end": betas[1]}
    tree["train"] |= {"noise_levels": "uniform", "noise_levels_width": None}  # the others need a log SNR that crosses 0
    try:
        GaussianDiffusion(DiffusionConfig(timesteps, schedule, "epsilon", *betas))
    except ValueError:
        lines = faults(tree)
        assert lines
        assert all(line.startswith(("params.yaml: diffusion.timesteps", "params.yaml: diffusion.be")) for line in lines)
    else:
        check(tree)


def test_class_frequencies_of_an_unconditional_model_are_refused():
    line = only_fault(sample__class_frequencies="data")
    assert line == "params.yaml: sample.class_frequencies = 'data': needs model.class_conditional = true"
    check(changed(sample__class_frequencies="data", model__class_conditional=True))


def test_as_many_neighbours_as_samples_are_refused():
    line = only_fault(sample__count=10, evaluate__neighbours=10)
    assert line == "params.yaml: evaluate.neighbours = 10: must be below sample.count = 10"


def test_an_unknown_target_is_answered_with_the_allowed_ones():
    line = only_fault(optimizer___target_="torch.optim.Admw")
    assert line.startswith(
        "params.yaml: optimizer._target_ = 'torch.optim.Admw': unknown (did you mean Adam?); allowed "
    )
    assert "SGD" in line
    line = only_fault(lr_schedule={"_target_": "os.system"})
    assert line.startswith(
        "params.yaml: lr_schedule._target_ = 'os.system': unknown; allowed are the classes torch.opt"
    )
    line = only_fault(train__transforms=[{"_target_": CROP, "size": 8}, {"_target_": "os.system"}])
    assert line.startswith(
        "params.yaml: train.transforms.1._target_ = 'os.system': unknown; allowed are the classes tor"
    )


def test_an_unknown_argument_is_answered_with_the_allowed_ones():
    line = only_fault(optimizer__rho=0.9)
    assert line.startswith(
        "params.yaml: optimizer.rho = 0.9: Muon has no such argument; its arguments are lr, momentum, betas"
    )
    line = only_fault(optimizer={"_target_": "torch.optim.Adam", "lr": 0.1, "momentum": 0.9})
    assert line.startswith(
        "params.yaml: optimizer.momentum = 0.9: Adam has no such argument; its arguments are lr, betas"
    )
    line = only_fault(train__transforms=[{"_target_": CROP, "szie": 8}])
    assert (
        "transforms.0.szie = 8: RandomCrop has no such argument (did you mean size?); its arguments are size, " in line
    )


def test_a_transform_without_a_target_is_refused():
    line = only_fault(train__transforms=[{}])
    assert line.startswith("params.yaml: train.transforms.0 = {}: needs a _target_")


def test_all_faults_are_reported_at_once():
    lines = faults(
        changed(
            train__batch_size="x",
            train__seed=DELETED,
            optimizer__lr=-1.0,
            optimizer__eps=-1.0,
            optimizer__betas=[0.9, 0.5],
            optimizer__foo=1,
            sample__foo=1,
            diffusion__schedule="foo",
            lr_schedule={"_target_": "os.system"},
        )
    )
    paths = {line.removeprefix("params.yaml: ").split(" = ")[0].split(":")[0] for line in lines}
    assert paths == {
        *("train.batch_size", "train.seed", "optimizer.lr", "optimizer.eps", "optimizer.betas", "optimizer.foo"),
        *("sample.foo", "diffusion.schedule", "lr_schedule._target_"),
    }
    assert len(lines) == len(paths)


def test_all_faults_between_sections_are_reported_at_once():
    lines = faults(changed(model__norm_groups=7, sample__steps=2000, evaluate__neighbours=5000))
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sample__guidance": 2.0}, "sample.guidance = 2.0: needs model.class_conditional = true"),
        ({"train__label_dropout": 0.0}, "train.label_dropout = 0.0: needs model.class_conditional = true; set it to a"),
        ({"train__label_dropout": 1}, "train.label_dropout = 1: should be auto, or a number from 0 up and below 1"),
        ({"train__label_dropout": True}, "train.label_dropout = True: should be auto, or a number from 0 up and belo"),
        ({"sample__classes": ["cat"]}, "sample.classes = ['cat']: needs model.class_conditional = true"),
        (
            {"model__class_conditional": True, "sample__guidance": 2.0, "train__label_dropout": 0.0},
            "sample.guidance = 2.0: needs train.label_dropout above 0",
        ),
        ({"sample__classes": []}, "sample.classes = []: "),
        ({"sample__classes": [True]}, "sample.classes"),
        ({"sample__guidance": -1.0}, "sample.guidance = -1"),
    ],
)
def test_classes_and_guidance_need_a_network_that_learns_them(changes, fault):
    assert all(fault in line for line in faults(changed(**changes)))


def test_only_a_conditional_network_learns_without_labels():
    assert check(changed(model__class_conditional=True, sample__guidance=2.0)).train.hidden_labels == 0.1
    assert check(changed(model__class_conditional=True, train__label_dropout=0)).train.hidden_labels == 0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"train__noise_levels": "uniform", "train__noise_levels_width": 2.0},
            "train.noise_levels_width = 2.0: has no effect where train.noise_levels",
        ),
        (
            {"train__noise_levels": "normal", "train__noise_levels_width": None},
            "train.noise_levels_width = None: train.noise_levels = 'normal' needs one",
        ),
        (
            {
                "train__noise_levels": "laplace",
                "train__noise_levels_width": 1.0,
                "diffusion__schedule": "linear",
                "diffusion__timesteps": 10,
                "diffusion__beta_start": 1e-4,
                "diffusion__beta_end": 0.02,
                "sample__steps": 10,
            },
            "train.noise_levels = 'laplace': needs a schedule whose log SNR crosses 0",
        ),
        ({"train__ema_widths": [0.1, 0.1]}, "train.ema_widths = [0.1, 0.1]: names a width twice"),
        (
            {"train__ema_widths": [0.1, 0.05, 0.05000001]},
            "train.ema_widths = [0.1, 0.05, 0.05000001]: two widths are equal",
        ),
        ({"train__ema_widths": []}, "train.ema_widths = []: "),
        ({"train__ema_widths": [0.3]}, "train.ema_widths.0 = 0.3: should be less than or equal to 0.28"),
        ({"sample__ema_width": 0.03}, "sample.ema_width = 0.03: must be one of train.ema_widths = [0.1, 0.0]"),
        ({"evaluate__ema_widths": [0, 0]}, "evaluate.ema_widths = [0.0, 0.0]: names a width twice"),
        (
            {"evaluate__ema_widths": [0.03]},
            "evaluate.ema_widths = [0.03]: 0.03 is not in train.ema_widths = [0.1, 0.0]",
        ),
        (
            {"evaluate__ema_widths": [0.1]},
            "evaluate.ema_widths = [0.1]: 0.1 is the samples' width, which is measured",
        ),
        (
            {"evaluate__ema_widths": [0], "sample__ema_width": 0},
            "evaluate.ema_widths = [0.0]: 0 is the samples' width",
        ),
        ({"evaluate__ema_widths": [0.3]}, "evaluate.ema_widths.0 = 0.3: should be less than or equal to 0.28"),
        ({"train__held_out_every_epochs": 0}, "train.held_out_every_epochs = 0: should be greater than"),
    ],
)
def test_impossible_noise_levels_and_averages_are_refused(changes, fault):
    (line,) = faults(changed(**changes))
    assert line.startswith(f"params.yaml: {fault}")


def test_any_key_or_value_gives_a_fault_of_one_short_line():
    for tree in (changed(**{"train__a\nb\x1b[31m": "c\nd"}), changed(**{"optimizer__a\nb\u2028": [1] * 10_000})):
        (line,) = faults(tree)
        assert line.isprintable()
        assert len(line) < 450
    assert "a number too long to show" in only_fault(train__seed=16**5000)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_short_and_long_exponents_are_both_numbers(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    for number in ("2e-3", "2.0e-3", "0.002"):
        path = write(tmp_path / "params.yaml", re.sub(r"lr: [\d.]+", f"lr: {number}", text))
        assert load_params(("optimizer",), path).optimizer.lr == 2e-3


def test_only_the_named_sections_are_returned():
    params = load_params(("train", "runtime"), ROOT / "params.yaml")
    assert set(vars(params)) == {"train", "runtime"}
    with pytest.raises(AttributeError):
        _ = params.sample


def test_a_fault_in_any_other_section_is_reported(tmp_path):
    path = write(tmp_path / "p.yaml", (ROOT / "params.yaml").read_text().replace("spacing: trailing", "spacing: foo"))
    with pytest.raises(UserError, match=r"p\.yaml: sample\.spacing = 'foo': should be "):
        load_params(("train",), path)


UNREADABLE = {
    "empty": "",
    "only a comment": "# nothing\n",
    "null": "null\n",
    "list": "- 1\n- 2\n",
    "number": "3\n",
    "word": "hello\n",
    "binary": bytes(range(256)),
    "zeros": b"\0\0\0",
    "picture": b"\x89PNG\r\n\x1a\n\0\0",
    "another encoding": "train:\n  seed: 1\n".encode("utf-16"),
    "open bracket": "train: [1, 2",
    "tab": "train:\n\t- 1\n",
    "key twice": "train: 1\ntrain: 2\n",
    "two documents": "train: 1\n---\ntrain: 2\n",
    "list as key": "[1, 2]: 3\n",
    "no integer": "train: !!int x\n",
    "endless integer": "train: " + "1" * 5000,
    "wrong date": "train: !!timestamp 2020-13-45\n",
    "reference to nothing": "train: ${nothing}\n",
    "holds itself": "train: &x [*x]\n",
    "too deep": "[" * 600,
    "object": "train: !!python/object/apply:os.system ['exit 1']\n",
    "left open": (ROOT / "params.yaml").read_text().replace("path: requirements.txt", "path: ???"),
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_holds_no_parameters_is_reported_in_one_line(tmp_path, text):
    path = write(tmp_path / "params.yaml", text)
    with pytest.raises(UserError) as caught:
        load_params(("train",), path)
    line = str(caught.value)
    assert line.startswith((f"{path}: is not readable as YAML: ", f"{path}: holds no section of parameters; "))
    assert "\n" not in line


def test_aliases_that_would_grow_without_end_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]" for i in range(1, 12)]
    path = write(tmp_path / "params.yaml", (ROOT / "params.yaml").read_text() + "\n".join(lines))
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_params(("train",), path)
    assert str(caught.value).endswith("write out what the alias *a0 stands for")
    assert time.monotonic() - start < 5


def test_the_environment_is_not_read_into_the_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    text = (ROOT / "params.yaml").read_text()
    for value in ("${oc.env:SECRET}", "a${oc.decode:${oc.env:SECRET}}"):
        path = write(tmp_path / "params.yaml", text.replace("project: ddpm", f"project: {value}"))
        with pytest.raises(
            UserError, match=r"is not readable as YAML: Unsupported interpolation type oc\.env"
        ) as caught:
            load_params(("tracking",), path)
        assert "s3cr3t" not in str(caught.value)


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: not found; run this in the repository's root"):
        load_params(("train",), tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"is not readable as YAML: .*Is a directory"):
        load_params(("train",), tmp_path)


@pytest.mark.process
def test_reading_the_parameters_imports_neither_torch_nor_numpy():
    code = (
        "import sys, ddpm.config.load as c; c.load_params(('train',)); "
        "print({'torch', 'numpy', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def paths_of(node, path=()):
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from paths_of(value, (*path, key))


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([-(10**400), 10**400, 2**31, 2**63, 1e308, -1e-308, math.nan, math.inf, -math.inf])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["os.system", "torch.optim.SGD", CROP, "cosine", "torch.float32", "???", "${x}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["_target_", "lr", "size", "a\nb", "seed", "Train", "", ".", 3, None, 1.5, True]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
MUTATION = st.tuples(
    st.sampled_from([p for p in paths_of(DEFAULT) if p]), st.sampled_from(["set", "delete", "add"]), JUNK
)


def mutate(tree, path, action, value):
    node = tree
    for part in path[:-1]:
        if not holds(node, part):
            return  # an earlier mutation took it away
        node = node[part]
    there = holds(node, path[-1])
    if action == "set" and (there or isinstance(node, dict)):
        node[path[-1]] = value
    elif action == "delete" and there:
        del node[path[-1]]
    elif action == "add" and isinstance(node, dict):
        node[str(value)[:8] if not isinstance(value, int | float) else "new"] = value


def holds(node, part):
    if isinstance(node, dict):
        return part in node
    return isinstance(node, list) and isinstance(part, int) and part < len(node)


@pytest.mark.heavy
@settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(MUTATION, min_size=1, max_size=4))
def test_any_tree_is_valid_or_refused_line_by_line(mutations):
    tree = copy.deepcopy(DEFAULT)
    for mutation in mutations:
        mutate(tree, *copy.deepcopy(mutation))
    try:
        assert isinstance(check(tree), Params)
    except UserError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith("params.yaml: ") and line.isprintable() for line in lines)


def test_the_committed_file_is_what_conf_composes_to(tmp_path):
    from dvc.utils.hydra import compose_and_dump

    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", "", [])
    assert (tmp_path / "params.yaml").read_text() == Path(ROOT, "params.yaml").read_text()
