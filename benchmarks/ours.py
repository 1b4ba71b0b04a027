"""All that the benchmarks use of this project's own code: a change there asks for one here, and nowhere else.

torch is imported inside the functions, which run in processes of their own: some want an environment set before.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from benchmarks.workers import Send, cost, repeat, trainings
from ddpm.config.load import check
from ddpm.config.schema import Params
from ddpm.runtime.stage import REPRODUCIBLE_ENVIRONMENT

CONF = Path(__file__).parents[1] / "conf"
FASTEST = ["runtime.reproducible=false", "runtime.threads=null"]


def environment(reproducible: bool) -> dict[str, str]:
    """What a stage sets before torch is imported, beside GOMP_SPINCOUNT."""
    return REPRODUCIBLE_ENVIRONMENT if reproducible else {}


def composed(*overrides: str) -> DictConfig:
    """What conf/ composes, with changes as `dvc exp run -S` takes them: the content of params.yaml."""
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=["tracking.wandb=disabled", *overrides])


def params(*overrides: str) -> Params:
    """The same, checked."""
    return check(OmegaConf.to_container(composed(*overrides)))


def _network(p: Params, size: int, channels: int) -> Any:
    from ddpm.core.unet import UNet
    from ddpm.training.setup import unet_config

    return UNet(unet_config(p.model, size, channels, p.diffusion.learn_variance, 0, False))


def _diffusion(p: Params, device: Any) -> Any:
    from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion

    return GaussianDiffusion(DiffusionConfig(**p.diffusion.model_dump()), device)


def _train(p: Params, images: np.ndarray, turn: Callable[[], object] | None = None) -> Any:
    """The averaged network of a whole training, by the project's own loop; calls `turn` at each point of its curves."""
    from ddpm.data.prepared import Images
    from ddpm.runtime.device import choose_device
    from ddpm.runtime.resume import ResumeState
    from ddpm.runtime.tracking import Tracker
    from ddpm.training.loop import Training
    from ddpm.training.setup import Design, set_up

    class Turns(Tracker):
        def log(self, step: int, metrics: dict[str, float], machine: dict[str, float] | None = None) -> None:
            if turn:
                turn()

        def log_picture(self, *_: Any) -> None:
            pass

    device = choose_device(p.runtime)
    with tempfile.TemporaryDirectory() as folder, ResumeState(Path(folder)) as state:
        design = Design(_network(p, images.shape[1], images.shape[3]).config, _diffusion(p, device).config, ())
        setup = set_up(p, design, device, len(images))
        tracker = Turns(None, p.tracking, {}, "benchmark", "train")
        split = Images(images, np.zeros(len(images), np.int64))
        return Training(setup, p.train, split, split, tracker, state).run()[p.train.ema_widths[0]]


def training(send: Send, channels: int, size: int, batch: int, steps: int, overrides: list[str]) -> None:
    """Turns of so many steps of the training loop, all that a step does there included: batches, curves, averages."""
    p = params(
        "model=paper",
        f"model.base_channels={channels}",
        "diffusion=linear",
        f"train.batch_size={batch}",
        f"train.log_every_steps={steps}",
        "train.steps=1000000",
        "train.preview_every_epochs=0",
        "train.save_every_seconds=1e9",  # its clock would also run while the others take their turns
        "train.compile=false",  # unless it is asked for below
        *overrides,
    )
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    images = np.broadcast_to(image, (10_000 * batch, *image.shape))  # no epoch ends: that would save the state
    parameters = sum(x.numel() for x in _network(p, size, 3).parameters())
    since = time.perf_counter()

    def turn() -> None:
        nonlocal since
        send(cost(since, steps) | {"parameters": parameters})
        since = time.perf_counter()

    _train(p, images, turn)


def save_random_model(folder: Path) -> None:
    """The paper's network with weights that are random, and nowhere zero as fresh ones are, as a model folder."""
    import torch

    from ddpm.core.unet import initialise
    from ddpm.model_folder import save_model

    p = params("model=paper", "diffusion=linear")
    network = _network(p, 32, 3)
    generator = torch.Generator().manual_seed(0)
    initialise(network, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    save_model(folder, network, _diffusion(p, "cpu").config, {})


def sampling(send: Send, folder: str, batch: int, steps: int, out: str, overrides: list[str]) -> None:
    """Turns of one batch by DDIM; `out` receives it as float32 (batch, H, W, C) in [0, 1]."""
    import torch

    from ddpm.core import samplers
    from ddpm.core.diffusion import GaussianDiffusion
    from ddpm.model_folder import load_model
    from ddpm.runtime.device import choose_device, memory_format

    runtime = params(*overrides).runtime
    device = choose_device(runtime)
    model, config, _ = load_model(folder)
    model.to(device).to(memory_format=memory_format(runtime, device))
    diffusion = GaussianDiffusion(config, device)
    path = samplers.timesteps(diffusion.timesteps, steps, "leading")
    shape = (batch, model.config.in_channels, model.config.sample_size, model.config.sample_size)

    def draw() -> None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        *_, last = samplers.ddim(model, diffusion, x, path, lambda: x)
        np.save(out, (last.x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())

    repeat(send, draw, 1)


def prepared(folder: Path, *overrides: str, path: Path | None = None) -> Any:
    """The data set of the parameters, as `ddpm.data.prepared.Prepared`; made in `folder`/prepared if it is not there.

    Args:
        path: sets dataset.path, without Hydra's quotes.
    """
    from ddpm.data.prepare import prepare
    from ddpm.data.prepared import Prepared

    dataset = params(*overrides).dataset
    if path:
        dataset = dataset.model_copy(update={"path": str(path)})
    if not (folder / "prepared").exists():
        prepare(dataset, folder / "prepared", folder)
    return Prepared(folder / "prepared")


def distance(samples: np.ndarray, real: np.ndarray) -> float:
    """The Fréchet distance between two sets of images, uint8 (N, H, W, C), in pixel space; or of features (N, D)."""
    from ddpm.evaluation.distances import Normal, distance_alone

    return distance_alone(*(Normal(rows.reshape(len(rows), -1)) for rows in (samples, real)))


def quality(send: Send, images: str, count: int, seed: int, out: str, overrides: list[str]) -> None:
    """Turns of a whole training, or of its samples; see `trainings`."""
    from ddpm.runtime.device import choose_device
    from ddpm.sampling import draw

    def train(steps: int) -> Any:
        settings = (f"train.seed={seed}", f"train.steps={steps}", f"train.warmup_steps={steps // 10}")
        p = params(*overrides, *settings, "train.preview_every_epochs=0")
        return _train(p, np.load(images, mmap_mode="r"))

    def samples(model: Any) -> np.ndarray:
        p = params(*overrides, f"sample.count={count}", f"sample.seed={seed}")
        return draw(model, _diffusion(p, choose_device(p.runtime)), p.sample)

    trainings(send, train, samples, out)


def batches_of(images: str | Path, batch: int) -> Iterator[Any]:
    """Batches without end from a file that is memory-mapped."""
    from ddpm.data.batches import batches
    from ddpm.data.prepared import Images
    from ddpm.files import load_array

    array = load_array(images, "", "uint8", 4)
    split = Images(array, np.zeros(len(array), np.int64))
    return batches(split, batch_size=batch, seed=0, steps=range(10**9), transforms=[])


def reading(send: Send, images: str, batch: int, steps: int) -> None:
    """Turns of so many batches from a file that is memory-mapped."""
    stream = batches_of(images, batch)
    repeat(send, lambda: next(stream), steps)


def drawing(send: Send, count: int) -> None:
    """Turns that draw so many samples, in batches, with the default network and 10 steps of DDIM."""
    from ddpm.runtime.device import choose_device
    from ddpm.sampling import draw

    p = params("sample.steps=10", "sample.batch_size=64", f"sample.count={count}")
    device = choose_device(p.runtime)
    model = _network(p, 8, 1).to(device).eval()
    diffusion = _diffusion(p, device)
    repeat(send, lambda: draw(model, diffusion, p.sample), 1)


def stored(send: Send, folder: str, steps: int, overrides: list[str]) -> None:
    """Turns of so many steps of the training loop on the prepared data of a folder."""
    from ddpm.data.prepared import Prepared

    p = params(
        *overrides,
        f"train.log_every_steps={steps}",
        "train.steps=1000000",
        "train.save_every_seconds=1e9",  # its clock would also run while the others take their turns
    )
    since = time.perf_counter()

    def turn() -> None:
        nonlocal since
        send(cost(since, steps))
        since = time.perf_counter()

    _train(p, Prepared(Path(folder) / "data/prepared").train.images, turn)
