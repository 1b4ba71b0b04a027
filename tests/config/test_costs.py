import subprocess
import sys

import pytest

from ddpm.config.costs import evaluation_cost, evaluation_faults
from ddpm.config.load import check
from tests.conftest import ROOT, composed

GIB = 2**30
CPU = ("runtime.device=cpu", "runtime.threads=2")


def faults(shape, train, test, *overrides, memory=32 * GIB):
    params = check(composed(*CPU, *overrides))
    return list(evaluation_faults(params, shape, {"train": train, "test": test}, memory))


@pytest.mark.parametrize(
    ("shape", "train", "test", "overrides"),
    [
        ((8, 8, 1), 1527, 270, ()),
        ((28, 28, 1), 60_000, 10_000, ("+experiment=mnist",)),
        ((32, 32, 3), 50_000, 10_000, ("+experiment=cifar10",)),
        ((32, 32, 3), 4000, 1000, ()),
        ((64, 64, 3), 4000, 1000, ()),
        ((256, 256, 3), 400, 100, ("sample.count=500",)),
        ((256, 256, 3), 60_000, 10_000, ("evaluate=inception",)),
    ],
)
def test_a_feasible_evaluation_is_not_refused(shape, train, test, overrides):
    assert faults(shape, train, test, *overrides) == []


@pytest.mark.parametrize("reference", ["train", "all"])
def test_distances_that_take_too_long_are_refused_with_a_remedy(reference):
    [(path, message)] = faults((256, 256, 3), 60_000, 10_000, f"evaluate.reference={reference}")
    assert path == "evaluate.features"
    assert message.startswith("the distances between 2,000 samples and 70,000 images of 256x256x3 need about ")
    assert "use evaluate=inception, or a smaller dataset.image_size" in message
    assert "evaluate.reference=test" in message
    assert "\n" not in message


def test_too_little_memory_is_refused_with_the_available_amount():
    [(_, message)] = faults((64, 64, 3), 50_000, 1000, memory=4 * GIB)
    assert "GiB of memory, and this machine has 4" in message


def test_the_estimate_grows_with_all_that_is_measured():
    def operations(*overrides, train=5000):
        params = check(composed(*CPU, *overrides))
        return evaluation_cost(params, (32, 32, 3), {"train": train, "test": 1000}).operations

    base = operations()
    for overrides in (
        ("sample.count=3000",),
        ("evaluate.seeds=3",),
        ("evaluate.ema_widths=[0]",),
        ("evaluate.nfe_curve=[{sampler: ddim, steps: [5, 10]}]",),
    ):
        assert operations(*overrides) > base
    assert operations(train=6000) > base
    assert operations("evaluate.reference_images=3000") < base


def test_a_reproducible_evaluation_is_refused_earlier():
    large = ((64, 64, 3), 150_000, 1000, "sample.count=10000", "evaluate.reference=train")
    assert faults(*large, "runtime.reproducible=false") == []
    [(_, message)] = faults(*large, "runtime.reproducible=true")
    assert "hours, and at most 12 are allowed" in message


def test_a_smaller_reference_makes_a_large_set_measurable():
    large = ((64, 64, 3), 1_000_000, 1000, "sample.count=10000", "evaluate.reference=train")
    [(_, message)] = faults(*large)
    assert "or evaluate.reference_images=10000" in message
    assert faults(*large, "evaluate.reference_images=5000", "sample.count=5000") == []


def test_the_costs_are_estimated_without_torch():
    code = "import sys, ddpm.config.costs; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
