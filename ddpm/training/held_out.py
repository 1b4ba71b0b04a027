"""The loss of held-out images during a training, on fixed draws: it rises when the network memorises its images."""

import numpy as np
import torch
from torch import Tensor

from ddpm.core.diffusion import GaussianDiffusion
from ddpm.core.pixels import to_model_range
from ddpm.core.samplers import conditioned, normal
from ddpm.core.seeding import generator
from ddpm.core.unet import UNet
from ddpm.data.batches import as_tensor
from ddpm.data.prepared import Images

DRAWS = 512  # forward passes per measurement
RANGES = 4  # of the timesteps, of equal length
NAMES = ("held_out_loss", *(f"held_out_loss_{i + 1}_of_{RANGES}" for i in range(RANGES)))


class HeldOutLoss:
    """The simple loss (Ho et al. 2020, eq. 14) of held-out images, the same images, timesteps and noise each time.

    The timesteps are spread evenly over 0 ... T-1, so that trainings with different distributions of timesteps can be
    compared. The images are spread evenly over the split, and repeated where it has fewer than `DRAWS`.

    Args:
        held_out: the test split.
        seed: of timesteps and noise.
        batch_size: images per forward pass.
    """

    def __init__(self, held_out: Images, diffusion: GaussianDiffusion, seed: int, batch_size: int) -> None:
        self._diffusion, self._seed, self._batch_size = diffusion, seed, batch_size
        self._images, self._labels = held_out
        rows = np.linspace(0, len(self._images) - 1, min(DRAWS, len(self._images))).astype(int)
        draws = generator(seed, "held-out curve")
        # Shuffled: the split may be sorted by class, and the timesteps ascend
        self._rows = draws.permutation(np.resize(rows, DRAWS))
        self._t = ((np.arange(DRAWS) + draws.random(DRAWS)) / DRAWS * diffusion.timesteps).astype(np.int64)

    @torch.no_grad()
    def __call__(self, model: UNet) -> dict[str, float]:
        """The mean loss, and the mean of each range of timesteps from the least noise to the most, by `NAMES`.

        Args:
            model: in evaluation mode; a class-conditional one is given each image's class.
        """
        losses = np.empty(DRAWS)
        for start in range(0, DRAWS, self._batch_size):
            part = slice(start, start + self._batch_size)
            losses[part] = self._losses(model, part).double().cpu().numpy()
        ranges = losses.reshape(RANGES, -1).mean(axis=1)
        return dict(zip(NAMES, map(float, (ranges.mean(), *ranges)), strict=True))

    def _losses(self, model: UNet, part: slice) -> Tensor:
        device, rows, shape = self._diffusion.device, self._rows[part], self._images.shape[1:]
        x0 = to_model_range(as_tensor(self._images[rows]).to(device))
        labels = torch.from_numpy(self._labels[rows]).to(device) if model.config.classes else None
        t = torch.from_numpy(self._t[part]).to(device)
        draws = [generator(self._seed, "held-out curve", place) for place in range(DRAWS)[part]]
        noise = normal(draws, (shape[2], *shape[:2]), device)
        return self._diffusion.losses(conditioned(model, labels), x0, t, noise).simple
