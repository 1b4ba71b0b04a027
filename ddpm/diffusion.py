"""Gaussian diffusion (Ho et al. 2020): noise schedules, q(x_t | x_0), and the training objective."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Schedule = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "x0", "v"]


@dataclass(frozen=True)
class DiffusionConfig:
    """What decides the forward process and the meaning of a network's output; both betas are the linear schedule's."""

    timesteps: int
    schedule: Schedule
    prediction: Prediction
    beta_start: float = 1e-4
    beta_end: float = 0.02


def make_betas(config: DiffusionConfig) -> np.ndarray:
    """The variances beta_t of the forward process, t = 0 ... T-1: float64 (T,).

    linear: from beta_start to beta_end (Ho et al. 2020, section 4).
    cosine: from alphas_cumprod = cos^2, capped at 0.999 (Nichol & Dhariwal 2021, eq. 17).
    """
    steps = config.timesteps
    if config.schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64)

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((t + 1) / steps) / alpha_bar(t / steps), 0.999) for t in range(steps)])


class GaussianDiffusion:
    """The forward process and what a network's output means. Timesteps are integers 0 ... T-1.

    Tables are computed with NumPy in float64 and looked up as float32: torch's float32 square root gives
    different last bits on different processors.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.betas = make_betas(config)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self._signal = torch.tensor(self.sqrt_alphas_cumprod, dtype=torch.float32, device=device)
        self._noise = torch.tensor(self.sqrt_one_minus_alphas_cumprod, dtype=torch.float32, device=device)

    @property
    def timesteps(self) -> int:
        return self.config.timesteps

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, 1, 1)."""
        return self._signal[t].view(-1, 1, 1, 1), self._noise[t].view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) (Ho et al. 2020, eq. 4). x0, noise: float32 (B, C, H, W); t: int64 (B,)."""
        signal, sigma = self._rates(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network learns to predict from x_t: (B, C, H, W).

        epsilon: the noise (Ho et al. 2020, eq. 14); x0: the image; v: Salimans & Ho 2022, appendix D.
        """
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x0":
            return x0
        signal, sigma = self._rates(t)
        return signal * noise - sigma * x0

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The image that a network output implies, unclipped: (B, C, H, W)."""
        if self.config.prediction == "x0":
            return output
        signal, sigma = self._rates(t)
        if self.config.prediction == "epsilon":
            return (x_t - sigma * output) / signal  # eq. 15
        return signal * x_t - sigma * output

    def losses(self, model: torch.nn.Module, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The simple objective (Ho et al. 2020, eq. 14), the mean squared error of each image: float32 (B,)."""
        output = model(self.q_sample(x0, t, noise), t)
        return F.mse_loss(output.float(), self.target(x0, t, noise), reduction="none").mean(dim=(1, 2, 3))

    def to_dict(self) -> dict[str, object]:
        return asdict(self.config)
