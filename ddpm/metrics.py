"""How good are the samples: distances to real images in a feature space (torch-fidelity), and the held-out loss."""

import hashlib
import math
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
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from ddpm.checkpoint import Keep, not_kept, slices
from ddpm.data import as_tensor, told_labels
from ddpm.diffusion import GaussianDiffusion
from ddpm.errors import UserError
from ddpm.images import to_model_range
from ddpm.progress import Progress
from ddpm.seeding import generator

Features = Literal["pixels", "inception"]
EXTRACTORS = {"pixels": ("pixels", "all"), "inception": ("inception-v3-compat", "2048")}


class Pixels(FeatureExtractorBase):
    """The pixels themselves, in [0, 1]: uint8 (B, C, H, W) to float64 (B, C * H * W)."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("all",)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images.flatten(1).double() / 255,)


register_feature_extractor("pixels", Pixels)


def extract_features(
    images: np.ndarray,
    features: Features,
    weights: str | None,
    batch_size: int,
    device: torch.device,
    keep: Keep = not_kept,
    name: str = "images",
) -> Tensor:
    """Features of images: uint8 (N, H, W, C) to (N, D) on the CPU.

    Args:
        weights: a file with torch-fidelity's Inception weights; None downloads them.
        keep: keeps the features of each batch under a name that starts with `name`; not those of pixels, which are
            sooner computed than read.

    Raises:
        UserError: the weights are neither given nor to be downloaded, or the file holds more than weights.
    """
    extractor_name, layer = EXTRACTORS[features]
    options: dict[str, str] = {}
    try:
        if features == "inception":
            path = inception_file(weights)
            if weights is None and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path))
            torch.load(path, weights_only=True)  # torch-fidelity loads any pickle, which could run code: not past here
            options["feature_extractor_weights_path"] = str(path)
        extractor = create_feature_extractor(
            extractor_name, [layer], cuda=device.type == "cuda", verbose=False, **options
        )
    except (OSError, EOFError, URLError, RuntimeError, UnpicklingError) as error:
        raise UserError(
            f"params.yaml: evaluate.inception_weights = {weights!r}: {' '.join(str(error).split())[:200]}; give the "
            f"file weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases, or use evaluate=pixels"
        ) from None
    with Progress(len(images), f"{features} features", "img") as bar, torch.no_grad():

        def one_batch(rows: slice) -> np.ndarray:
            batch = as_tensor(images[rows]).to(device)
            if features == "inception" and batch.shape[1] == 1:
                batch = batch.expand(-1, 3, -1, -1)
            return extractor(batch)[0].cpu().numpy()

        parts = [
            (f"features-{name}-{rows.start}", partial(one_batch, rows)) for rows in slices(len(images), batch_size)
        ]
        out = []
        for batch in (not_kept if features == "pixels" else keep)(parts):
            out.append(batch)
            bar.update(len(batch))
    return torch.from_numpy(np.concatenate(out))


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


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to two sets of features (N, D) (Heusel et al. 2017, eq. 6); of one image, NaN."""
    if min(len(a), len(b)) < 2:
        return math.nan  # no covariance
    statistics = [fid_features_to_statistics(features.double()) for features in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def compare(samples: Tensor, real: Tensor, *, neighbours: int, kid_subset_size: int, seed: int) -> dict[str, float]:
    """Distances between features of samples and of real images, (N, D) and (M, D).

    Returns:
        frechet_distance, kid and its standard deviation over subsets (Binkowski et al. 2018), precision and recall
        (Kynkaanniemi et al. 2019).
    """
    kid = kid_features_to_metric(
        samples,
        real,
        kid_subset_size=min(kid_subset_size, len(samples), len(real)),
        rng_seed=seed % 2**32,
        verbose=False,
    )
    prc = prc_features_to_metric(samples, real, prc_neighborhood=neighbours, save_cpu_ram=True, verbose=False)
    return {
        "frechet_distance": frechet_distance(samples, real),
        "kid": float(kid[KEY_METRIC_KID_MEAN]),
        "kid_std": float(kid[KEY_METRIC_KID_STD]),
        "precision": float(prc[KEY_METRIC_PRECISION]),
        "recall": float(prc[KEY_METRIC_RECALL]),
    }


def real_floor(real: Tensor, seed: int) -> float:
    """The Fréchet distance between two random halves of the real features (N, D): what a perfect model could reach
    with as few samples as a half."""
    order = torch.from_numpy(generator(seed, "halves").permutation(len(real)))
    half = len(real) // 2
    return frechet_distance(real[order[:half]], real[order[half:]])


def nearest(queries: Tensor, points: Tensor, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """The Euclidean distance (N,) and the index (N,) of the point (M, D) that is nearest to each query (N, D).

    In chunks, with no more than 256 MiB for the distances; in float64, with the distance itself taken anew from the
    difference, so that a copy is at distance 0.
    """
    found = []
    with Progress(len(queries), "nearest images", "img") as bar:
        for q in (chunk.to(device, torch.float64) for chunk in queries.split(2048)):
            least = torch.full((len(q),), math.inf, dtype=torch.float64, device=device)
            index = torch.zeros(len(q), dtype=torch.int64, device=device)
            for start in range(0, len(points), 8192):
                p = points[start : start + 8192].to(device, torch.float64)
                value, place = torch.addmm(p.square().sum(1), q, p.T, alpha=-2).min(dim=1)  # |p - q|^2 - |q|^2
                closer = value < least
                least, index = torch.where(closer, value, least), torch.where(closer, place + start, index)
            found.append(index.cpu())
            bar.update(len(q))
    indices = torch.cat(found)
    squares = [
        (q.double() - points[i].double()).square().sum(1)
        for q, i in zip(queries.split(2048), indices.split(2048), strict=True)
    ]
    return np.sqrt(torch.cat(squares).numpy()), indices.numpy()


def memorisation_ratio(samples: np.ndarray, held_out: np.ndarray) -> float:
    """How near the samples come to the training images, relative to how near new real images come.

    About 1: a sample is as far from the training set as a real image that was not trained on; well below, towards 0:
    samples are copies, or nearly; above 1: samples lie farther off than real images do, as blurred or broken ones.
    A median: a few copies among many samples do not show here, but in the picture of the nearest neighbours.
    NaN where half of the held-out images are themselves in the training set.

    Args:
        samples: the distance of each sample to its nearest training image, (N,).
        held_out: the same for real images that were not trained on, (M,).
    """
    scale = float(np.median(held_out))
    return float(np.median(samples)) / scale if scale else math.nan


@torch.no_grad()
def held_out_loss(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    bins: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    keep: Keep = not_kept,
) -> list[float]:
    """The simple loss on images that were not trained on, by timestep.

    Each image gets one timestep from each of `bins` equal ranges of [0, T), and fresh noise for each.

    Args:
        images: uint8 (N, H, W, C).
        labels: int64 (N,) for a class-conditional network, else None.
        keep: keeps the sums of each finished batch.

    Returns:
        The mean loss of each range, from clean to noisy. Their mean is the loss over uniform timesteps.
    """
    totals = np.zeros(bins)
    with Progress(len(images) * bins, "held-out loss", "img") as bar:

        def one_batch(rows: slice) -> np.ndarray:
            x0 = to_model_range(as_tensor(images[rows]).to(device))
            given = told_labels(model, labels, rows, device)
            draw = generator(seed, "held-out", rows.start)
            sums = np.zeros(bins)
            for i in range(bins):
                u = (i + draw.random(len(x0))) / bins
                t = torch.from_numpy((u * diffusion.timesteps).astype(np.int64)).to(device)
                noise = torch.from_numpy(draw.standard_normal(x0.shape, dtype=np.float32)).to(device)
                sums[i] = diffusion.losses(given, x0, t, noise).double().sum().item()
                bar.update(len(x0))
            return sums

        batches = slices(len(images), batch_size)
        kept = keep([(f"held-out-{rows.start}", partial(one_batch, rows)) for rows in batches])
        for rows, sums in zip(batches, kept, strict=True):
            totals += sums
            bar.update(rows.stop * bins - bar.n)  # a batch that was kept
    return [float(value) for value in totals / len(images)]
