"""Images to feature vectors: pixels as they are, features of Inception (by torch-fidelity) or of a model of timm."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm.config.extractors import TIMM, fetch
from ddpm.config.schema import Evaluate
from ddpm.data.batches import as_tensor
from ddpm.errors import UserError
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import Store

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Extractor:
    """Turns images into features.

    Attributes:
        name: `evaluate.features`.
        network: uint8 (B, 3, H, W) to floats (B, D); None for pixels.
        digest: sha256 of the file of its weights, or "none".
        facts: what else its features depend on, by name.
    """

    name: str
    network: Network | None = None
    digest: str = "none"
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        side = self.facts.get("size")
        return self.name + (f", images resized to {side}x{side}" if side else "")

    def __call__(
        self,
        images: np.ndarray,
        batch_size: int,
        device: torch.device,
        store: Store | None = None,
        name: str = "images",
    ) -> np.ndarray:
        """Features of images: uint8 (N, H, W, C) to (N, D).

        The features of pixels are the pixels themselves, uint8, not copied; those of a network are float32.

        Args:
            device: the network's.
            store: runs the batches, under `name` and the weights; None: nothing is kept.
        """
        network = self.network
        if network is None:
            return images.reshape(len(images), -1)

        def one_batch(rows: slice) -> np.ndarray:
            batch = as_tensor(images[rows]).to(device)
            return network(batch.expand(-1, 3, -1, -1)).float().cpu().numpy()

        with Progress(len(images), f"features of {name}", "img") as bar, torch.no_grad():
            loop = f"features-{self.digest[:16]}-{name}"
            batches = (store or Store()).batches(loop, len(images), batch_size, one_batch, bar)
            return np.concatenate([batch for _, batch in batches])


def open_extractor(settings: Evaluate, device: torch.device) -> Extractor:
    """The extractor of `evaluate.features`, with its weights, on the device.

    Raises:
        UserError: the weights are missing and cannot be downloaded, or belong to another model.
    """
    path = fetch(settings.features, settings.weights)
    if path is None:
        return Extractor(settings.features)
    facts: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if settings.features.startswith(TIMM):
            network, facts = _timm(settings.features.removeprefix(TIMM), path, settings.input_size, device)
        else:
            network = _inception(path, device)
        return Extractor(settings.features, network, digest, facts)
    except (OSError, EOFError, RuntimeError, UnpicklingError, SafetensorError, ValueError, AssertionError) as error:
        raise UserError(
            f"params.yaml: evaluate.weights = {settings.weights!r}: {path.name} does not load as the weights of "
            f"{settings.features}: {' '.join(str(error).split())[:200]}; give its own file, or null to download it"
        ) from None


def _inception(path: Path, device: torch.device) -> Network:
    from torch_fidelity.utils import create_feature_extractor

    torch.load(path, weights_only=True)  # torch-fidelity unpickles anything: this refuses code first
    extractor = create_feature_extractor(
        "inception-v3-compat",
        ["2048"],
        cuda=device.type == "cuda",
        verbose=False,
        feature_extractor_weights_path=str(path),
    )
    return lambda batch: extractor(batch)[0]


def _timm(name: str, path: Path, size: int | None, device: torch.device) -> tuple[Network, dict[str, Any]]:
    """A model of timm without its classifier, and what its features depend on.

    The whole image is resized to the model's input size, as uint8, and normalised as in the model's training.
    """
    import timm
    from timm.data import resolve_model_data_config
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import normalize, resize

    known = timm.get_pretrained_cfg(name)
    fixed = known is not None and known.fixed_input_size  # a transformer: built for one size
    options: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(path), "custom_load": False}}
    if fixed and size is not None:
        options["img_size"] = size
    model: Any = timm.create_model(name, pretrained=True, **options)  # with its classifier: every name must fit
    model.reset_classifier(0)
    model.eval().requires_grad_(False).to(device)
    config = resolve_model_data_config(model)
    side = size or max(config["input_size"][1:])
    mode = InterpolationMode(config["interpolation"])

    def network(batch: Tensor) -> Tensor:
        small = resize(batch, [side, side], interpolation=mode, antialias=True)
        return model(normalize(small.float() / 255, list(config["mean"]), list(config["std"])))

    width = network(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)).shape
    if len(width) != 2:
        raise ValueError(f"the model gives features of {tuple(width)}, not one vector per image")
    return network, {"timm": timm.__version__, "size": side, "interpolation": mode.value}
