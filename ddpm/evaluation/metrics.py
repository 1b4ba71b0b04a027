"""What is measured with a network: features of images (Inception, by torch-fidelity), and the held-out loss."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Literal
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from ddpm.core.diffusion import GaussianDiffusion
from ddpm.core.pixels import to_model_range
from ddpm.core.samplers import normal
from ddpm.core.seeding import generator
from ddpm.data.batches import as_tensor, told_labels
from ddpm.errors import UserError
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import Keep, not_kept, slices

Features = Literal["pixels", "inception"]


def extract_features(
    images: np.ndarray,
    features: Features,
    weights: str | None,
    batch_size: int,
    device: torch.device,
    keep: Keep = not_kept,
    name: str = "images",
) -> np.ndarray:
    """Features of images: uint8 (N, H, W, C) to (N, D).

    Those of pixels are the pixels themselves, uint8, with no copy made; Inception's are float32.

    Args:
        weights: a file with torch-fidelity's Inception weights; None downloads them.
        keep: keeps Inception's features of each batch under a name that starts with `name`.

    Raises:
        UserError: the weights are neither given nor to be downloaded, or the file holds more than weights.
    """
    if features == "pixels":
        return images.reshape(len(images), -1)
    try:
        path = inception_file(weights)
        if weights is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path))
        torch.load(path, weights_only=True)  # torch-fidelity loads any pickle, which could run code: not past here
        extractor = create_feature_extractor(
            "inception-v3-compat",
            ["2048"],
            cuda=device.type == "cuda",
            verbose=False,
            feature_extractor_weights_path=str(path),
        )
    except (OSError, EOFError, URLError, RuntimeError, UnpicklingError) as error:
        raise UserError(
            f"params.yaml: evaluate.inception_weights = {weights!r}: {' '.join(str(error).split())[:200]}; give the "
            f"file weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases, or use evaluate=pixels"
        ) from None
    with Progress(len(images), "inception features", "img") as bar, torch.no_grad():

        def one_batch(rows: slice) -> np.ndarray:
            batch = as_tensor(images[rows]).to(device)
            if batch.shape[1] == 1:
                batch = batch.expand(-1, 3, -1, -1)
            return extractor(batch)[0].cpu().numpy()

        parts = [
            (f"features-{name}-{rows.start}", partial(one_batch, rows)) for rows in slices(len(images), batch_size)
        ]
        out = []
        for batch in keep(parts):
            out.append(batch)
            bar.update(len(batch))
    return np.concatenate(out)


def inception_file(weights: str | None) -> Path:
    """The file with Inception's weights: the one that is given, or where a download is kept."""
    name = PurePosixPath(urlparse(URL_INCEPTION_V3).path).name
    return Path(weights) if weights else Path(torch.hub.get_dir(), "checkpoints", name)


def weights_digest(features: Features, weights: str | None) -> str:
    """sha256 of the weights file that `extract_features` has loaded; "none" where the extractor has no weights."""
    if features == "pixels":
        return "none"
    with inception_file(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def held_out_loss(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    images: np.ndarray,
    labels: np.ndarray | None,
    numbers: np.ndarray | None = None,
    *,
    bins: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    keep: Keep = not_kept,
) -> tuple[list[float], list[float] | None]:
    """The simple loss on images that were not trained on, by timestep.

    Each image gets one timestep from each of `bins` equal ranges of [0, T), and fresh noise for each.

    Args:
        images: uint8 (N, H, W, C).
        labels: int64 (N,) for a class-conditional network, else None.
        numbers: the place of each image in its data set, (N,), from which its timesteps and noise follow, and from
            nothing else; None for 0 ... N-1.
        keep: keeps the sums of each finished batch.

    Returns:
        The mean simple loss of each range, from clean to noisy; their mean is the loss over uniform timesteps. And the
        same for the bound's part of the objective, or None where no variance is learned.
    """
    numbers = np.arange(len(images)) if numbers is None else numbers
    totals = np.zeros((2, bins))
    with Progress(len(images) * bins, "held-out loss", "img") as bar:

        def one_batch(rows: slice) -> np.ndarray:
            x0 = to_model_range(as_tensor(images[rows]).to(device))
            given = told_labels(model, labels, rows, device)
            draws = [generator(seed, "held-out", int(number)) for number in numbers[rows]]
            sums = np.zeros((2, bins))
            for i in range(bins):
                u = (i + np.array([draw.random() for draw in draws])) / bins  # 1 by rounding, about never
                steps = np.minimum(u * diffusion.timesteps, diffusion.timesteps - 1).astype(np.int64)
                losses = diffusion.losses(given, x0, torch.from_numpy(steps).to(device), normal(draws, shape, device))
                sums[0, i] = losses.simple.double().sum().item()
                if losses.bound is not None:
                    sums[1, i] = losses.bound.double().sum().item()
                bar.update(len(x0))
            return sums

        batches = slices(len(images), batch_size)
        shape = (images.shape[3], *images.shape[1:3])
        kept = keep([(f"held-out-{rows.start}", partial(one_batch, rows)) for rows in batches])
        for rows, sums in zip(batches, kept, strict=True):
            totals += sums
            bar.update(rows.stop * bins - bar.n)  # a batch that was kept
    simple, bound = (totals / len(images)).tolist()
    return simple, bound if diffusion.config.learn_variance else None
