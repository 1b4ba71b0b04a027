"""Build and apply the image transforms that train.transforms names, and check them by one rule.

The rule: a list returns images of the shape that it was given, as uint8 or as float32 in [0, 1]. ddpm/core/pixels.py
maps both to the network's [-1, 1]. A list that breaks the rule is refused: it would train without an error, and the
samples would be grey.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.config.targets import TRANSFORM, build
from ddpm.core.seeding import derive, generator
from ddpm.errors import UserError, legible

TOLERANCE = 1e-3  # by which rounding may take floats out of [0, 1]: a quarter of a grey level
SPAN = 1 / 8  # of the whole range: white and black images that end closer together than this have lost their contrast
MODULE = TRANSFORM.module
RULE = "the list must end in uint8 images, or in float32 in [0, 1]"
ARGUMENTS = "change its arguments, or leave it out"
NORMALIZE = "leave Normalize out: the training itself maps images to [-1, 1]"


class Transforms:
    """A list of transforms, as `_target_` mappings.

    Raises:
        UserError: a class refuses its arguments.
    """

    def __init__(self, nodes: Sequence[dict[str, Any]]) -> None:
        self.nodes = nodes
        self._steps: list[tuple[int, Any]] = []  # the transforms, each with its place in the list
        for i, node in enumerate(nodes):
            for part in _flat(node):
                try:
                    self._steps.append((i, build(part, TRANSFORM)))
                except ValueError as error:
                    text = str(error).removeprefix(f"{part['_target_']}: ")
                    remedy = "write a dtype as torch.float32" if "torch.dtype" in text else ARGUMENTS
                    raise self._fault(i, text.rstrip("."), remedy) from None

    def __call__(self, image: Tensor, seed: int, *, closely: bool = False) -> Any:
        """Transform uint8 (C, H, W). Seeds torch's global generator, which the caller has to fork.

        Args:
            closely: refuse floats outside [0, 1] after each transform. The next transform may hide them: many of
                torchvision's clamp floats to [0, 1].

        Returns:
            What the last transform gives, which `stack` checks.

        Raises:
            UserError: a transform fails; the line names it.
        """
        torch.manual_seed(seed)
        for i, step in self._steps:
            given = image
            try:
                image = step(given)
            except Exception as error:  # of any class: the code is torchvision's, so the list is at fault
                text = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
                remedy = NORMALIZE if self._names("Normalize", i) else ARGUMENTS
                raise self._fault(i, f"{text} (given {_described(given)})", remedy) from None
            if closely:
                self._check_range(image, i)
        return image

    def stack(self, images: Sequence[Any], shape: Sequence[int]) -> Tensor:
        """The transformed images, each of `shape` (C, H, W), as a batch: uint8, or float32 in [0, 1].

        Raises:
            UserError: the images are anything else.
        """
        for image in images:
            if not isinstance(image, Tensor):
                raise self._fault(None, f"gives {_described(image)}", f"{RULE}; add ToImage")
            if image.shape != tuple(shape):
                remedy = "end the list with a Resize or a crop to that size"
                if image.ndim == len(shape) and image.shape[0] != shape[0]:
                    remedy = f"give Grayscale num_output_channels: {shape[0]}, or leave out what changes the channels"
                remedy = f"the network takes {tuple(shape)}; {remedy}"
                raise self._fault(None, f"gives images of shape {tuple(image.shape)}", remedy)
        dtypes = sorted({_dtype(image) for image in images})
        if len(dtypes) > 1:
            remedy = f"{RULE}; apply the conversion to every image, or to none"
            raise self._fault(None, f"gives {' or '.join(dtypes)} at random", remedy)
        if dtypes[0] not in ("uint8", "float32"):
            remedy = f"{RULE}; end it with ToDtype (dtype: torch.float32, scale: true), or leave the conversion out"
            raise self._fault(None, f"gives images of {dtypes[0]}", remedy)
        batch = torch.stack(list(images))
        self._check_range(batch, None)
        return batch

    def probe(self, shape: Sequence[int]) -> None:
        """Try the list on noise, black and white images of `shape` (C, H, W), so that a fault shows at once.

        Raises:
            UserError: as for a call and `stack`; or white and black images become nearly the same.
        """
        if not self.nodes:
            return
        draws = min(64, max(8, 2**20 // int(np.prod(shape))))
        noise = generator(0, "probe").choice(np.array([0, 1, 77, 128, 200, 254, 255], np.uint8), (draws, *shape))
        images = [*torch.from_numpy(noise), *(torch.full(tuple(shape), level, dtype=torch.uint8) for level in (0, 255))]
        with torch.random.fork_rng(devices=[]):
            given = [self(image, derive(0, "probe", i), closely=True) for i, image in enumerate(images)]
        batch = self.stack(given, shape)
        low, high = (float(bound) for bound in batch.aminmax())
        if (high - low) / (1 if batch.is_floating_point() else 255) < SPAN:
            remedy = "that is hardly any contrast; give scale: true to each ToDtype, and leave Normalize out"
            raise self._fault(None, f"gives {_dtype(batch)} from {low:.4g} to {high:.4g} for any image", remedy)

    def _check_range(self, images: Any, i: int | None) -> None:
        """Refuse float images outside [0, 1]; transform `i` returned them, or for None the whole list."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            return
        low, high = (float(bound) for bound in images.aminmax())
        if low >= -TOLERANCE and high <= 1 + TOLERANCE:  # NaN is neither
            return
        remedy = "put what resizes, pads, rotates or erases before ToDtype, or give it a fill in [0, 1]"
        if self._names("Normalize", i):
            remedy = NORMALIZE
        elif high > 2 and self._names("ToDtype", i):
            remedy = "give scale: true to ToDtype"
        raise self._fault(i, f"gives floats from {low:.4g} to {high:.4g}, and must stay in [0, 1]", remedy)

    def _names(self, name: str, i: int | None) -> bool:
        """Whether transform `i`, or for None any of the list, is of this class or contains one that is."""
        return f"'{MODULE}.{name}'" in str(self.nodes if i is None else self.nodes[i])

    def _fault(self, i: int | None, text: str, remedy: str) -> UserError:
        name = "" if i is None else f".{i} ({str(self.nodes[i]['_target_']).rpartition('.')[2]})"
        return UserError(f"params.yaml: train.transforms{name}: {legible(text)}; {remedy}")


def _dtype(image: Tensor) -> str:
    return str(image.dtype).removeprefix("torch.")


def _flat(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The transform, or those that a Compose holds."""
    if node.get("_target_") == f"{MODULE}.Compose" and isinstance(node.get("transforms"), list):
        for inner in node["transforms"]:
            yield from _flat(inner)
    else:
        yield node


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value)} of shape {tuple(value.shape)}"
    kind = type(value)
    return f"a {kind.__module__.partition('.')[0]} {kind.__name__}" if kind.__module__ != "builtins" else kind.__name__
