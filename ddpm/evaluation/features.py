"""Images to feature vectors: pixels as they are, or Inception's features (by torch-fidelity)."""

import hashlib
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Literal
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from ddpm.data.batches import as_tensor
from ddpm.errors import UserError
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import Store

Features = Literal["pixels", "inception"]


def extract_features(
    images: np.ndarray,
    features: Features,
    weights: str | None,
    batch_size: int,
    device: torch.device,
    store: Store | None = None,
    name: str = "images",
) -> np.ndarray:
    """Features of images: uint8 (N, H, W, C) to (N, D).

    Those of pixels are the pixels themselves, uint8, with no copy made; Inception's are float32.

    Args:
        weights: a file with torch-fidelity's Inception weights; None downloads them.
        store: runs the batches for Inception, under `name`; None: nothing is kept.

    Raises:
        UserError: the weights are neither given nor to be downloaded, or the file holds more than weights.
    """
    if features == "pixels":
        return images.reshape(len(images), -1)
    extractor = _inception(weights, device)

    def one_batch(rows: slice) -> np.ndarray:
        batch = as_tensor(images[rows]).to(device)
        if batch.shape[1] == 1:
            batch = batch.expand(-1, 3, -1, -1)
        return extractor(batch)[0].cpu().numpy()

    with Progress(len(images), "inception features", "img") as bar, torch.no_grad():
        batches = (store or Store()).batches(f"features-{name}", len(images), batch_size, one_batch, bar)
        return np.concatenate([batch for _, batch in batches])


def _inception(weights: str | None, device: torch.device) -> FeatureExtractorBase:
    """Inception, from its file; with no file given it is downloaded once."""
    try:
        path = inception_file(weights)
        if weights is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path))
        torch.load(path, weights_only=True)  # torch-fidelity loads any pickle, which could run code: not past here
        return create_feature_extractor(
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
