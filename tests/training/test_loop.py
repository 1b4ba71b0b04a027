import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ddpm import sampling
from ddpm.config.checks import steps_per_epoch
from ddpm.config.load import check
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.core.ema import EMA
from ddpm.core.pixels import to_model_range
from ddpm.core.seeding import derive
from ddpm.core.unet import UNet, initialise
from ddpm.data.batches import as_tensor
from ddpm.errors import UserError
from ddpm.runtime.resume import ResumeState
from ddpm.runtime.signals import Interrupted
from ddpm.training import held_out, loop
from tests.conftest import composed, small_unet
from tests.support.training import IMAGES, NAMES, SHALLOW, TINY, TWO_CLASSES, same, split_of, train, train_all

DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
pytestmark = pytest.mark.process
STILL = SHALLOW | {"dropout": 0.0}
run = partial(train, network=SHALLOW)


RECIPE = (  # every knob that keeps something of its own from step to step, or draws
    "optimizer=muon",
    "train.ema_widths=[0.1,0.05,0]",
    "train.held_out_every_epochs=1",
    "train.keep=best",
    "train.noise_coupling=assigned",
    "train.noise_levels=normal",
    "train.noise_levels_width=2.0",
)


@pytest.fixture(autouse=True)
def few_held_out_draws(monkeypatch):
    monkeypatch.setattr(held_out, "DRAWS", 8)


@pytest.fixture
def previews_at_will(monkeypatch):
    """As often as the settings say: the images of these tests are too few for the bound."""
    monkeypatch.setattr(loop, "epochs_between", lambda asked, evaluations, share, epoch, whole: asked)


@pytest.fixture
def trained_on(monkeypatch):
    """The images, timesteps and noise (x0, t, noise) of each training step, in order."""
    seen, original = [], GaussianDiffusion.losses

    def losses(self, model, x0, t, noise, *rest):
        if torch.is_grad_enabled():  # not for the held-out loss
            seen.append((x0, t, noise))
        return original(self, model, x0, t, noise, *rest)

    monkeypatch.setattr(GaussianDiffusion, "losses", losses)
    return seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("network", "recipe"), [({}, ()), (SHALLOW | TWO_CLASSES, RECIPE)], ids=["plain", "recipe"])
@pytest.mark.usefixtures("previews_at_will")
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path, device, network, recipe):
    changes = ("train.flip=true", "train.preview_every_epochs=2", *recipe)
    whole, curves = run(tmp_path, *changes, device=device, network=network)
    for stop_at in (3, 9, 10):  # 10: with one of the three values of the next point of the curves
        with pytest.raises(Interrupted):
            run(tmp_path, *changes, device=device, stop_at=stop_at, name="cut", network=network)
    resumed, replayed = run(tmp_path, *changes, device=device, name="cut", network=network)
    assert same(whole, resumed)
    assert replayed.logged == curves.logged
    for name in ("loss", "learning_rate", "grad_norm", *held_out.NAMES):
        file = f"plots/metrics/{name}.tsv"
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_parameters_train_the_same_weights(tmp_path, device):
    torch.manual_seed(1)
    first, _ = run(tmp_path, device=device, name="a")
    torch.rand(7)
    second, _ = run(tmp_path, device=device, name="b")
    other, _ = run(tmp_path, "train.seed=1", device=device, name="c")
    assert same(first, second)
    assert not same(first, other)


def test_the_number_of_loader_workers_changes_nothing(tmp_path):
    crop = "train.transforms=[{_target_: torchvision.transforms.v2.RandomCrop, size: 8, padding: 2}]"
    alone, _ = run(tmp_path, crop, name="a")
    helped, _ = run(tmp_path, crop, "train.workers=2", name="b")
    assert same(alone, helped)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_in_parts_trains_as_the_whole(tmp_path, device):
    """To rounding: the parts of a sum are added in another order. Without dropout, which is drawn for each part."""
    whole, curves = run(tmp_path, device=device, network=STILL, name="a")
    parts, others = run(tmp_path, "train.accumulation=4", device=device, network=STILL, name="b")
    for step, metrics in curves.logged.items():
        assert others.logged[step] == pytest.approx(metrics, rel=1e-4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_recomputed_activations_change_nothing(tmp_path, device):
    """Nor does dropout, which is drawn the same a second time; and less is held between the two passes."""
    held = []

    def count(tensor):
        held[-1] += tensor.numel()
        return tensor

    models = []
    for flag in ("false", "true"):
        held.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            models.append(run(tmp_path, f"train.activation_checkpointing={flag}", device=device, name=flag)[0])
    assert same(*models)
    assert held[1] < held[0]


@pytest.mark.parametrize("device", DEVICES)
def test_the_memory_format_changes_a_training_by_rounding_alone(tmp_path, device):
    first, _ = run(tmp_path, "train.channels_last=false", device=device, network=STILL, name="a")
    last, _ = run(tmp_path, "train.channels_last=true", device=device, network=STILL, name="b")
    assert last.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(first.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_training_agrees_to_rounding(tmp_path):
    _, plain = run(tmp_path, network=STILL, name="a")
    _, compiled = run(tmp_path, "train.compile=true", network=STILL, name="b")
    for step, metrics in plain.logged.items():
        assert compiled.logged[step] == pytest.approx(metrics, rel=1e-3)


def test_no_memory_left_is_reported_with_the_settings_that_help(tmp_path, monkeypatch):
    def losses(*_):
        return torch.empty(2**60)

    monkeypatch.setattr(GaussianDiffusion, "losses", losses)
    with pytest.raises(UserError, match=r"^out of memory: set train.accumulation=2 .*activation_checkpointing"):
        run(tmp_path)


def test_a_run_without_memory_resumes_in_the_same_bytes(tmp_path, monkeypatch):
    saves = "train.save_every_seconds=1e-9"
    whole, _ = run(tmp_path, saves)
    original, steps = GaussianDiffusion.losses, []

    def losses(*arguments):
        steps.append(torch.is_grad_enabled())
        if sum(steps) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*arguments)

    monkeypatch.setattr(GaussianDiffusion, "losses", losses)
    with pytest.raises(UserError, match=r"^out of memory: [^\n]*$"):
        run(tmp_path, saves, name="cut")
    resumed, _ = run(tmp_path, saves, name="cut")
    assert len(steps) < 20 and same(whole, resumed)


@pytest.mark.parametrize(
    ("batch", "now", "more"),
    [(64, 1, "2 (the same step in parts of 32 images)"), (12, 3, "6"), (9, 1, "3"), (6, 2, "6")],
)
def test_the_advice_names_an_accumulation_that_divides(batch, now, more):
    settings = check(composed(f"train.batch_size={batch}", f"train.accumulation={now}")).train
    assert loop.memory_advice(settings).startswith(f"set train.accumulation={more}")


def test_a_batch_that_cannot_be_divided_gives_other_advice():
    settings = ("train.batch_size=4", "train.accumulation=4", "train.activation_checkpointing=true")
    params = check(composed(*settings, "train.precision=bf16"))
    assert loop.memory_advice(params.train) == "lower train.batch_size or model.base_channels"


def test_training_lowers_the_loss_and_records_the_curves(tmp_path):
    images = np.tile(IMAGES[:4], (8, 1, 1, 1))
    length = ("train.steps=80", "train.log_every_steps=10")
    _, curves = train(tmp_path, *length, "optimizer.lr=5e-3", images=images)
    losses = [metrics["loss"] for metrics in curves.logged.values()]
    assert list(curves.logged) == list(range(10, 81, 10))
    assert losses[-1] < 0.7 * losses[0]
    rates = [metrics["learning_rate"] for metrics in curves.logged.values()]
    assert rates[0] > rates[-1] > 0
    assert curves.pictures[:2] == ["inputs", "noise"]


def brightness(model, classes, guidance=1.0):
    """The mean pixel of 16 samples of each of these classes."""
    diffusion = GaussianDiffusion(DiffusionConfig(50, "cosine", "v"))
    settings = check(composed("sample.steps=10", "sample.batch_size=16", "diffusion.timesteps=50")).sample
    settings = settings.model_copy(update={"classes": classes, "guidance": guidance, "count": 16})
    return sampling.draw(model, diffusion, settings, sampling.Classes(NAMES)).mean()


def test_a_conditional_network_draws_the_class_it_is_given(tmp_path):
    """Dark and bright images: a class gives its own, no label gives both, guidance away from no label the extreme."""
    images = np.tile(np.array([60, 180], dtype=np.uint8).reshape(2, 1, 1, 1), (20, 8, 8, 1))  # labels alternate, too
    images += np.random.default_rng(0).integers(0, 16, images.shape, dtype=np.uint8)
    settings = ("train.steps=90", "optimizer.lr=8e-3", "train.log_every_steps=30", "train.label_dropout=0.2")
    settings += ("model.class_conditional=true",)
    model, _ = run(tmp_path, *settings, images=images, network=SHALLOW | TWO_CLASSES)
    dark, bright = brightness(model, ["dark"]), brightness(model, ["bright"])
    assert dark == pytest.approx(68, abs=15)
    assert bright == pytest.approx(188, abs=15)
    assert dark < brightness(model, None) < bright  # in turn
    assert brightness(model, ["bright"], guidance=3.0) > bright


def test_hiding_labels_is_what_teaches_the_class_of_no_label(tmp_path):
    network, given = SHALLOW | TWO_CLASSES, "model.class_conditional=true"
    untouched = run(tmp_path, given, "train.label_dropout=0.0", network=network, name="a")[0].class_embedding.weight
    taught = run(tmp_path, given, "train.label_dropout=0.5", network=network, name="b")[0].class_embedding.weight
    start = UNet(small_unet(**network).config)
    initialise(start, torch.Generator().manual_seed(derive(0, "init")))
    assert torch.equal(untouched[2], start.class_embedding.weight[2])
    assert not torch.equal(taught[2], start.class_embedding.weight[2])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_four_images_are_learnt_in_fifty_steps_on_every_seed(seed):
    diffusion = GaussianDiffusion(DiffusionConfig(1000, "linear", "epsilon"))
    unet = UNet(small_unet(block_out_channels=(32, 64)).config)
    initialise(unet, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(unet.parameters(), lr=5e-4)
    torch.manual_seed(seed)
    x0 = to_model_range(as_tensor(np.rint(load_digits().images[:4, ..., None] * 255 / 16).astype(np.uint8)))
    for _ in range(50):
        t, noise = torch.randint(0, 1000, (4,)), torch.randn_like(x0)
        optimizer.zero_grad()
        diffusion.losses(unet, x0, t, noise).objective.mean().backward()
        optimizer.step()
    # measured at all noise levels and not at four, so that the result is no matter of luck
    x0, t = x0.repeat(64, 1, 1, 1), torch.arange(256) * 1000 // 256
    with torch.no_grad():
        assert diffusion.losses(unet, x0, t, torch.randn_like(x0)).simple.mean().item() < 0.5


def test_with_a_learned_variance_the_curve_is_the_simple_loss(tmp_path):
    _, plain = run(tmp_path, "train.steps=3", name="plain", network=STILL)
    twice = STILL | {"out_channels": 2}
    _, hybrid = run(tmp_path, "train.steps=3", name="hybrid", network=twice, learn_variance=True)
    before, after = plain.logged[3], hybrid.logged[3]
    assert set(after) == set(before) | {"bound_loss"}
    assert set(before) == {"loss", "grad_norm", "learning_rate", *held_out.NAMES}
    assert 0 < after["bound_loss"] < 10
    assert 0.3 < after["loss"] < 1.5  # that of a network which has learnt nothing; the objective is far above it


def test_min_snr_weighs_the_objective_and_not_the_curve(tmp_path):
    """The first step sees the same weights, so its mean squared error is the same whatever is minimised."""
    one = ("train.steps=1", "train.warmup_steps=0", "train.log_every_steps=1")
    curves = [run(tmp_path, *one, f"train.weighting={kind}", name=kind)[1].logged[1]
              for kind in ("simple", "min_snr")]  # fmt: skip
    simple, weighted = curves
    assert simple["loss"] == weighted["loss"]
    assert simple["grad_norm"] != weighted["grad_norm"]


def test_epochs_are_counted_in_whole_batches(tmp_path):
    images = np.tile(IMAGES, (16, 1, 1, 1))  # 640, 5 batches of 128: two epochs are enough for a preview
    length = ("train.steps=null", "train.epochs=3", "train.batch_size=128")
    _, curves = run(tmp_path, *length, "train.preview_every_epochs=1", images=images, network=TINY)
    assert max(curves.logged) == 15
    assert curves.pictures[2:] == ["samples_epoch_00002"]


@pytest.mark.parametrize(
    ("settings", "images", "epochs"),
    [
        ((), 1438, 10),  # the committed run
        (("+experiment=smoke",), 1438, 1),
        (("+experiment=short",), 1600, 1),  # of 2,000 images
        (("+experiment=short",), 48, 38),  # of 60: 32 images are an epoch
        (("+experiment=cifar10",), 50_000, 10),
        (("+experiment=folder64",), 50_000, 50),
        (("+experiment=folder64",), 48, 400),  # a hundred thousand epochs
        (("train.preview_every_epochs=0",), 48, 0),
    ],
)
def test_previews_take_a_quarter_of_the_time_at_most(settings, images, epochs):
    p = check(composed(*settings)).train
    epoch = steps_per_epoch(images, p.batch_size) * p.batch_size
    evaluations = loop.PREVIEW_IMAGES * loop.PREVIEW_STEPS
    every = loop.epochs_between(p.preview_every_epochs, evaluations, 0.25, epoch, p.steps * p.batch_size)
    assert every == epochs


@pytest.mark.parametrize("size", [1, 47])
def test_a_folder_smaller_than_a_batch_is_trained_on(tmp_path, size, capsys):
    """And a run that was stopped ends as one that was not."""
    images = np.tile(IMAGES, (2, 1, 1, 1))[:size]
    settings = ("train.batch_size=48", "train.steps=null", "train.epochs=4")
    whole, curves = run(tmp_path, *settings, images=images)
    assert max(curves.logged) == 4  # an epoch is one step
    assert f"train.batch_size = 48: more than the {size} images, so each step repeats some" in capsys.readouterr().out
    with pytest.raises(Interrupted):
        run(tmp_path, *settings, images=images, stop_at=3, name="cut")
    assert same(whole, run(tmp_path, *settings, images=images, name="cut")[0])


def test_floats_from_transforms_train_as_pixels_do(tmp_path, trained_on):
    """ToDtype with scale, which once trained on [0, 1] as if it were [-1, 1]."""
    inputs = []
    node = "{_target_: torchvision.transforms.v2.ToDtype, dtype: torch.float32, scale: true}"
    for name, transforms in (("pixels", "[]"), ("floats", f"[{node}]")):
        run(tmp_path, f"train.transforms={transforms}", "train.steps=3", name=name)
        inputs.append((tmp_path / f"state-{name}/pictures/inputs.png").read_bytes())
    seen = [x0 for x0, *_ in trained_on]
    for pixels, floats in zip(seen[:3], seen[3:], strict=True):
        assert floats.min() < -0.9
        torch.testing.assert_close(pixels, floats)
    assert inputs[0] == inputs[1]  # the picture of a batch, too


@pytest.mark.parametrize("flip", [True, False])
def test_flips_mirror_about_half_of_the_images(tmp_path, trained_on, flip):
    images = np.zeros((40, 8, 8, 1), dtype=np.uint8)
    images[:, :, 0] = 255  # the left column is white
    run(tmp_path, f"train.flip={flip}", images=images)
    left = torch.cat([x0 for x0, *_ in trained_on])[:, 0, :, 0].eq(1).all(dim=1).float().mean().item()
    assert 0.3 < left < 0.7 if flip else left == 1.0


def test_timesteps_are_uniform_and_noise_is_normal_at_every_step(tmp_path, trained_on):
    uniform = ("train.noise_levels=uniform", "train.noise_levels_width=null", "train.stratified=false")
    images = np.tile(IMAGES, (2, 1, 1, 1))
    run(tmp_path, "train.steps=50", "train.batch_size=32", *uniform, images=images, network=TINY)
    t = torch.cat([t for _, t, _ in trained_on])
    noise = torch.stack([noise for *_, noise in trained_on]).double()
    counts = torch.bincount(t, minlength=50)
    assert len(counts) == 50  # 0 ... T-1
    assert counts.min() > 10  # 32 are expected, with a standard deviation of 6
    moments = [float(noise.pow(k).mean()) for k in (1, 2, 4)]
    assert moments == pytest.approx([0, 1, 3], abs=0.1)  # the fourth is 1.8 for uniform noise
    assert len(torch.unique(noise[:, 0, 0, 0, 0])) == 50


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains(tmp_path, device, precision):
    _, curves = run(tmp_path, f"train.precision={precision}", device=device)
    assert all(math.isfinite(metrics["loss"]) for metrics in curves.logged.values())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd"])
def test_every_optimizer_group_trains(tmp_path, optimizer):
    run(tmp_path, f"optimizer={optimizer}", "train.steps=3")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    with pytest.raises(UserError, match=r"training diverged: .* at step \d+; lower optimizer.lr"):
        run(tmp_path, "optimizer=sgd", "optimizer.lr=1e30", "train.grad_clip=null", "train.save_every_seconds=1e-9")
    with ResumeState(tmp_path / "state-run") as state:
        saved = state.load()
    assert saved is not None
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_loss_far_above_that_of_predicting_zero_stops_training(tmp_path):
    fault = r"training diverged: the mean loss of steps \d+ to \d+ is \d+\.\d, and .*; lower optimizer.lr"
    with pytest.raises(UserError, match=fault):
        run(tmp_path, "optimizer.lr=3.0", "train.warmup_steps=0", "train.steps=200")


def test_no_images_at_all_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there are no training images; run the stage prepare_data again"):
        run(tmp_path, images=IMAGES[:0])


def test_a_value_that_torch_refuses_is_reported_with_its_setting(tmp_path):
    with pytest.raises(UserError, match=r"params.yaml: optimizer: torch.optim.SGD: Nesterov momentum requires"):
        run(tmp_path, "optimizer=sgd", "optimizer.momentum=0.0", "optimizer.nesterov=true")
    with pytest.raises(UserError, match=r"params.yaml: lr_schedule: torch.optim.lr_scheduler.LinearLR: "):
        run(tmp_path, "lr_schedule=linear", "lr_schedule.start_factor=5.0")


def test_each_width_has_its_average_and_zero_is_the_network(tmp_path):
    averages, _ = train_all(tmp_path, "train.ema_widths=[0,0.05,0.2]")
    live, short, long = (torch.cat([p.flatten() for p in model.parameters()]) for model in averages.values())
    assert 0 < (short - live).norm() < (long - live).norm()


@pytest.mark.usefixtures("previews_at_will")
def test_the_best_weights_are_those_of_the_least_held_out_loss(tmp_path, capsys):
    changes = ("train.held_out_every_epochs=1", "train.steps=30", "train.ema_widths=[0.1,0]")
    opposites = {"images": IMAGES // 4, "held_out_images": 255 - IMAGES // 4}  # what helps with dark ones, then hurts
    opposites |= {"network": TINY}
    last, curves = train_all(tmp_path, *changes, name="last", **opposites)
    points = {step: values["held_out_loss"] for step, values in curves.logged.items() if "held_out_loss" in values}
    assert list(points) == [5, 10, 15, 20, 25, 30]
    best = min(points, key=lambda step: points[step])
    assert best < 30
    kept, _ = train_all(tmp_path, *changes, "train.keep=best", name="best", **opposites)
    assert f"kept the averages of step {best}, with the least held-out loss" in capsys.readouterr().out
    assert not any(same(last[width], kept[width]) for width in (0.1, 0.0))
    measure = held_out.HeldOutLoss(
        split_of(opposites["held_out_images"]), GaussianDiffusion(DiffusionConfig(50, "cosine", "v")), 0, 8
    )
    assert measure(kept[0.1])["held_out_loss"] == points[best]


@pytest.mark.usefixtures("previews_at_will")
def test_the_averaged_weights_are_previewed_and_kept(tmp_path, monkeypatch):
    seen, original = [], loop.preview
    monkeypatch.setattr(EMA, "update", lambda self, step: None)  # so that it stays at the initial weights
    monkeypatch.setattr(loop, "preview", lambda model, *rest: (seen.append(model), original(model, *rest))[1])
    kept, _ = run(tmp_path, "train.preview_every_epochs=2")
    start = UNet(kept.config)
    initialise(start, torch.Generator().manual_seed(derive(0, "init")))
    assert [same(start, model) for model in (*seen, kept)] == [True, True]
