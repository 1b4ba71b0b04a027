"""The features of samples and of real images, and what is computed once per set."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from ddpm.config.schema import Evaluate
from ddpm.data.prepared import Prepared
from ddpm.evaluation import blocks, cache, distances, features, pairs
from ddpm.evaluation.cache import Cache
from ddpm.evaluation.distances import Normal
from ddpm.evaluation.estimates import Estimate
from ddpm.runtime.resume import Store
from ddpm.runtime.workspace import root

REAL = ("train", "test", "all")


def chosen_rows(train: int, test: int, reference: str, limit: int | None) -> dict[str, np.ndarray]:
    """The rows of the splits that are compared with samples: at most `limit` of the reference, evenly spaced.

    `train` and `test` are the numbers of images. Where the reference is one split, the other also has at most `limit`.
    """
    if reference == "all":
        total = train + test
        rows = _spaced(total, limit)
        return {"train": rows[rows < train], "test": rows[rows >= train] - train}
    return {"train": _spaced(train, limit), "test": _spaced(test, limit)}


def _spaced(count: int, limit: int | None) -> np.ndarray:
    return np.linspace(0, count - 1, min(limit or count, count)).astype(int)


def _hardware(device: torch.device) -> str | None:
    """The processor, on which the last bits of a result depend."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else os.environ.get("ATEN_CPU_CAPABILITY")


class FeatureSets:
    """The features of samples, train, test and the reference, (N, D) each.

    Attributes:
        reference: the name of the set that samples are compared with: train, test or all.
        extractor: it computed the features.
        rows: the images of the splits train and test that they belong to.
    """

    def __init__(
        self, settings: Evaluate, samples: np.ndarray, data: Prepared, store: Store, device: torch.device
    ) -> None:
        self.reference, self.device = settings.reference, device
        self.extractor = features.open_extractor(settings, device)
        self._settings, self._store, self._cache = settings, store, Cache(root() / ".cache/features")
        counts, limit = data.info["counts"], settings.reference_images
        self.rows = chosen_rows(counts["train"], counts["test"], self.reference, limit)
        self._facts = {
            "features": str(self.extractor),
            "weights": self.extractor.digest,
            "batch_size": settings.batch_size,  # changes the rounding
            "data": data.info["sha256"],
            "rows": [self.reference, limit],
            "code": cache.code_digest(*(str(module.__file__) for module in (features, blocks, distances, pairs))),
            "torch": [torch.__version__, torch.get_num_threads()],
            "hardware": [device.type, _hardware(device)],
        } | self.extractor.facts
        self._sets = {"samples": self.extract(samples, "samples")}
        for name, split in (("train", data.train), ("test", data.test)):
            images = split.images if len(self.rows[name]) == counts[name] else split.images[self.rows[name]]
            if self.extractor.network is None:
                self._sets[name] = self.extract(images, name)
            else:
                self._sets[name] = self._kept(name, "features", partial(self.extract, images, name))
        if self.reference == "all":
            self._sets["all"] = np.concatenate([self._sets["train"], self._sets["test"]])
        self._normals: dict[str, Normal] = {}
        self._distances: dict[tuple[str, str], Estimate] = {}

    def _kept(self, name: str, what: str, compute: Callable[[], np.ndarray], **more: Any) -> np.ndarray:
        return self._cache.array(self._facts | {"set": name, "what": what} | more, compute)

    def extract(self, images: np.ndarray, name: str) -> np.ndarray:
        """The features of images, uint8 (N, H, W, C), as (N, D); `name` names the set."""
        return self.extractor(images, self._settings.batch_size, self.device, self._store, name)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._sets[name]

    def normal(self, name: str) -> Normal:
        """The normal distribution fitted to a set."""
        if name not in self._normals:
            count, width = self[name].shape
            if name in REAL and count > width and 2 * count * width**2 + 60 * width**3 >= cache.WORTH:
                packed = self._kept(name, "normal", lambda: Normal(self[name], self.device, name).packed())
                self._normals[name] = Normal.unpacked(self[name], packed, self.device)
            else:
                self._normals[name] = Normal(self[name], self.device, name)
        return self._normals[name]

    def frechet(self, a: str, b: str) -> Estimate:
        """The Fréchet distance between two sets; its error is for another draw of the first."""
        if (a, b) not in self._distances:
            self._distances[a, b] = distances.frechet_distance(self.normal(a), self.normal(b))
        return self._distances[a, b]

    def real_pairs(self) -> pairs.Real:
        """The neighbourhoods and the kernel of the reference."""
        real, neighbours = self[self.reference], self._settings.neighbours
        if 2 * len(real) ** 2 * real.shape[1] < cache.WORTH:
            return pairs.real_pairs(real, neighbours, self.device)
        packed = self._kept(
            self.reference,
            "pairs",
            lambda: pairs.real_pairs(real, neighbours, self.device).packed(),
            neighbours=neighbours,
        )
        return pairs.Real.unpacked(real, packed, self.device)
