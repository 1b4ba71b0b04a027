"""Every configuration on a GPU that is not there: no tensor on the wrong device, and no step that waits for the GPU."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm import sampling
from ddpm.config.load import check
from ddpm.config.schema import Diffusion, Section, Train
from ddpm.core import samplers
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.core.ema import EMA
from ddpm.core.samplers import SAMPLERS, conditioned, guided, normal
from ddpm.core.unet import UNet
from ddpm.data.prepared import Images
from ddpm.evaluation.held_out import HeldOut, image_losses, variational_bound
from ddpm.runtime.resume import ResumeState
from ddpm.runtime.signals import Interrupted
from ddpm.training import held_out, loop, setup, step
from ddpm.training.loop import Training
from ddpm.training.setup import design, set_up
from tests.conftest import ROOT, composed, small_unet
from tests.support.pretended import Gpu, WrongDeviceError, pretended_gpu
from tests.support.stages import STAGES, run
from tests.support.training import Curves

CUDA = torch.device("cuda")
CLASSES = ["0", "1", "2"]
INFO = {"shape": [8, 8, 1], "classes": CLASSES}
IMAGES = Images(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8), np.arange(16) % 3)
TINY = ("model.base_channels=8", "model.norm_groups=4", "model.attention=[false,true]", "train.batch_size=8")
LENGTH = ("train.steps=2", "train.warmup_steps=1", "train.log_every_steps=1", "train.held_out_every_epochs=1")
OFTEN = (
    "train.preview_every_epochs=1",
    "sample.steps=3",
    "sample.count=4",
    "evaluate.neighbours=1",
    "evaluate.batch_size=1000",
)


def choices(field: str, section: type[Section] = Train) -> list[str]:
    """The values of a setting, without auto."""
    return [value for value in get_args(section.model_fields[field].annotation) if value != "auto"]


def group(name: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / name).glob("*.yaml"))


UNIFORM = "train.noise_levels=uniform train.noise_levels_width=null"
KNOBS = {  # each with all its values; a value is one setting or more
    "optimizer": [f"optimizer={name}" for name in group("optimizer")],
    "schedule": [f"lr_schedule={name}" for name in group("lr_schedule")],
    "diffusion": [f"diffusion={name}" for name in group("diffusion")],
    "sampler": [f"sample={name}" for name in group("sample")],
    "prediction": [f"diffusion.prediction={name}" for name in choices("prediction", Diffusion)],
    "precision": [f"train.precision={name}" for name in choices("precision")],
    "levels": [UNIFORM if name == "uniform" else f"train.noise_levels={name}" for name in choices("noise_levels")],
    "coupling": [f"train.noise_coupling={name}" for name in choices("noise_coupling")],
    "weighting": [f"train.weighting={name}" for name in choices("weighting")],
    "keep": [f"train.keep={name}" for name in choices("keep")],
    "classes": ["", "model.class_conditional=true", "model.class_conditional=true sample.guidance=2"],
    "variance": ["diffusion.learn_variance=false", "diffusion.learn_variance=true sample.variance=learned"],
    "averages": ["train.ema_widths=[0.1]", "train.ema_widths=[0.1,0.05,0]"],
    "accumulation": ["train.accumulation=1", "train.accumulation=2"],
    "clip": ["train.grad_clip=null", "train.grad_clip=1.0"],
    "eta": ["", "eta"],
} | {
    name: [f"train.{name}=false", f"train.{name}=true"]
    for name in ("channels_last", "activation_checkpointing", "stratified", "flip")
}


def every_value() -> list[tuple[str, ...]]:
    """As many rows as the longest knob has values: each value of each knob occurs."""
    return [tuple(values[i % len(values)] for values in KNOBS.values()) for i in range(max(map(len, KNOBS.values())))]


def every_pair() -> list[tuple[str, ...]]:
    """Few rows of one value per knob, in which each pair of values of two knobs occurs."""
    knobs = list(KNOBS.values())
    pairs = set()
    for (i, a), (j, b) in itertools.combinations(enumerate(knobs), 2):
        pairs |= {(i, x, j, y) for x in a for y in b}
    rows = []
    while pairs:
        first = min(pairs)
        row: dict[int, str] = {first[0]: first[1], first[2]: first[3]}
        for k, values in enumerate(knobs):
            if k not in row:
                row[k] = max(values, key=lambda v: sum((*sorted_pair(k, v, i, x),) in pairs for i, x in row.items()))
        pairs -= {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(knobs)), 2)}
        rows.append(tuple(row[k] for k in range(len(knobs))))
    return rows


def sorted_pair(i: int, x: str, j: int, y: str) -> tuple[int, str, int, str]:
    return (i, x, j, y) if i < j else (j, y, i, x)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    monkeypatch.setattr(held_out, "DRAWS", 4)
    monkeypatch.setattr(loop, "PREVIEW_IMAGES", 2)
    monkeypatch.setattr(loop, "PREVIEW_STEPS", 2)
    monkeypatch.setattr(loop, "epochs_between", lambda asked, *_: asked)
    with pretended_gpu() as there:
        yield there


def params_of(row: tuple[str, ...]) -> Any:
    overrides = [setting for value in row for setting in value.split() if setting != "eta"]
    if "eta" in row and "sample=ddim" in row:
        overrides.append("sample.eta=0.7")
    if "diffusion=linear" in row:
        overrides.append("diffusion.beta_end=0.2")  # as much noise as in 1,000 timesteps
    return check(composed(*TINY, *LENGTH, *OFTEN, *overrides))


def training(folder: Path, params: Any, stop_at: int | None = None) -> Any:
    planned = design(params, INFO)
    setup = set_up(params, planned, CUDA, len(IMAGES.images))
    with ResumeState(folder / "state") as state:
        tracker = Curves(folder / "curves", stop_at)
        return setup, Training(setup, params.train, IMAGES, IMAGES, tracker, state).run()


def expected_waits(params: Any) -> list[str]:
    """Where a step may wait for the GPU. Nowhere else.

    The assignment is found on the CPU. In fp16, GradScaler asks whether the step overflowed, unless the optimizer's
    kernel can skip a step by itself.
    """
    waits = []
    if params.train.noise_coupling == "assigned":
        waits += ["aten._to_copy.default"] * 2
    if params.train.precision == "fp16" and params.optimizer.target.endswith(("Muon", "SGD")):
        waits += ["aten._local_scalar_dense.default"]
    return waits


@pytest.mark.parametrize(
    "row", [*every_value(), *(pytest.param(row, marks=pytest.mark.slow) for row in every_pair())], ids=itertools.count()
)
@pytest.mark.process
def test_every_pair_of_settings_keeps_to_its_device_and_never_waits(tmp_path, monkeypatch, gpu, row):
    """Training, stop, resume, averages, previews, held-out loss, samples, bound."""
    params = params_of(row)
    waits, original = [], Training.optimizer_step

    def step(self, images, labels):
        gpu.waits.clear()
        original(self, images.pin_memory(), labels.pin_memory())
        waits.append(gpu.waits[:])

    monkeypatch.setattr(Training, "optimizer_step", step)
    with pytest.raises(Interrupted):
        training(tmp_path, params, stop_at=1)
    setup, averages = training(tmp_path, params)
    assert waits == [expected_waits(params)] * 2

    network, diffusion = averages[params.train.ema_widths[0]], setup.diffusion

    def on_step(_, evaluations, x):
        assert x.is_cuda
        if evaluations <= 1:  # the labels go to the GPU once per batch
            gpu.waits.clear()
        elif evaluations == params.sample.steps:
            assert gpu.waits == []

    classes = sampling.Classes(tuple(CLASSES) if network.config.classes else ())
    images = sampling.draw(network, diffusion, params.sample, classes, on_step=on_step)
    assert len(images) == 4
    some = HeldOut(IMAGES.images[:2], IMAGES.labels[:2] if network.config.classes else None)
    assert np.isfinite(image_losses(network, diffusion, some, bins=2, batch_size=2, seed=0)).all()
    one = HeldOut(some.images[:1], None if some.labels is None else some.labels[:1])
    bound = variational_bound(network, diffusion, one, variance=params.sample.variance, batch_size=1000, seed=0)
    assert np.isfinite(bound.bits_per_dim)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("row", every_pair(), ids=itertools.count())
def test_every_pair_of_settings_runs_on_a_real_gpu_and_never_waits(tmp_path, monkeypatch, row):
    """The driver itself refuses a wait within a step, where none is expected."""
    params, original = params_of(row), Training.optimizer_step

    def step(self, images, labels):
        torch.cuda.set_sync_debug_mode("default" if expected_waits(params) else "error")
        try:
            original(self, images.pin_memory(), labels.pin_memory())
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(held_out, "DRAWS", 4)
    monkeypatch.setattr(Training, "optimizer_step", step)
    with pytest.raises(Interrupted):
        training(tmp_path, params, stop_at=1)
    _, averages = training(tmp_path, params)
    assert all(weight.isfinite().all() and weight.is_cuda for weight in averages[0.1].parameters())


PLAIN = ("sample=ddpm", "optimizer=adam", "train.channels_last=false", "train.precision=fp32", "train.ema_widths=[0.1]")


class _LosesGradient(torch.autograd.Function):
    """A backward pass with a factor that stayed on the CPU."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.ones(gradient.shape)


class _StaysBehind(EMA):
    """An average that stayed on the CPU."""

    def __init__(self, model, width):
        super().__init__(model, width)
        self._average = [weight.cpu() for weight in self._average]


def _noise(monkeypatch):
    original = step.coupled
    monkeypatch.setattr(step, "coupled", lambda *given: original(*given).cpu())


def _tables(monkeypatch):
    monkeypatch.setattr(setup, "GaussianDiffusion", lambda config, _: GaussianDiffusion(config))


def _backward(monkeypatch):
    original = GaussianDiffusion.losses

    def losses(self, model, *rest):
        return original(self, lambda x, t: _LosesGradient.apply(model(x, t)), *rest)

    monkeypatch.setattr(GaussianDiffusion, "losses", losses)


def _average(monkeypatch):
    monkeypatch.setattr(loop, "EMA", _StaysBehind)


def _resumed(monkeypatch):
    original = torch.optim.Adam.load_state_dict

    def load(self, saved):
        original(self, saved)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].cpu()

    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", load)


def _preview(monkeypatch):
    monkeypatch.setattr(samplers, "normal", lambda draws, shape, _: normal(draws, shape))


def _held_out(monkeypatch):
    monkeypatch.setattr(held_out, "normal", lambda draws, shape, _: normal(draws, shape))


@pytest.mark.process
@pytest.mark.parametrize("plant", [_noise, _tables, _backward, _average, _resumed, _preview, _held_out])
def test_a_tensor_that_is_planted_on_the_wrong_device_is_found(tmp_path, monkeypatch, gpu, plant):
    params = params_of(PLAIN)
    plant(monkeypatch)
    with pytest.raises(WrongDeviceError, match=r"tensors on cuda:0 and on cpu"):
        with pytest.raises(Interrupted):  # a fault before it passes
            training(tmp_path, params, stop_at=1)
        training(tmp_path, params)


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "to": lambda x: torch.ones(x.shape).to(x.device, non_blocking=True),  # of memory that is not pinned
    "copy": lambda x: x.copy_(torch.zeros(x.shape)),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_wait_for_the_gpu_that_is_planted_is_found(gpu, wait):
    x = torch.rand(3, device=CUDA)
    assert gpu.waits == []
    wait(x)
    assert gpu.waits


@pytest.mark.process
def test_the_pretended_gpu_computes_what_the_cpu_does(tmp_path, gpu):
    params = params_of(PLAIN)
    _, there = training(tmp_path / "there", params)
    planned = design(params, INFO)
    with ResumeState(tmp_path / "here") as state:
        ready = set_up(params, planned, torch.device("cpu"), len(IMAGES.images))
        here = Training(ready, params.train, IMAGES, IMAGES, Curves(tmp_path / "curves"), state).run()
    for a, b in zip(here[0.1].parameters(), there[0.1].parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.process
def test_the_whole_pipeline_runs_on_the_pretended_gpu(tmp_path, monkeypatch, gpu):
    """`.to`, the model folder both ways, samples, distances and all else that the evaluation computes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for stage in STAGES:
        run(
            stage,
            "runtime.device=cuda",
            "train.steps=2",
            "train.warmup_steps=1",
            "evaluate.nfe_curve=[{sampler: ddim, steps: [2]}]",
            "evaluate.nfe_samples=8",
            "diffusion.timesteps=50",
            "sample.steps=3",
            "dataset.subset=200",
        )
    assert (tmp_path / "results/evaluate/metrics.json").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("precision", choices("precision"))
@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_kernels_of_cuda_take_every_precision(monkeypatch, precision, scale):
    """By torch's own fake CUDA tensors, which have the casts of autocast, but neither values nor a backward pass."""
    labelled = {"num_class_embeds": 4, "has_no_label": True} if scale else {}
    config = replace(small_unet(out_channels=2).config, **labelled)
    with FakeTensorMode(allow_non_fake_inputs=True), CUDA:  # without a GPU it replaces what would ask the driver
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        model, dtype = UNet(config), step.AUTOCAST.get(precision)
        diffusion = GaussianDiffusion(DiffusionConfig(50, "cosine", "v", learn_variance=True), CUDA)
        seen = []
        model.conv_in.register_forward_hook(lambda _, x, y: seen.append(y.dtype))
        x0, t = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        predict = conditioned(model, t if scale else None)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            losses = diffusion.losses(predict, x0, t, x0)
        assert seen == [dtype or torch.float32]
        assert all(part.dtype == torch.float32 and part.is_cuda for part in losses)
        if scale:
            predict = guided(model, t, scale)
        for sampler in SAMPLERS.values():
            *_, last = sampler(
                predict, diffusion, x0, [40, 20, 3], lambda: torch.randn_like(x0), variance="learned", eta=0.5
            )
            assert last.x.is_cuda
