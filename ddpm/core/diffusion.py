"""Gaussian diffusion (Ho et al. 2020): noise schedules, q(x_t | x_0), its posterior, losses and bound."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.core.schedules import LEAST_NOISE, LEAST_SIGNAL

Schedule = Literal["linear", "cosine", "sigmoid"]
Prediction = Literal["epsilon", "x0", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned"]
Weighting = Literal["simple", "min_snr"]

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023 find it robust


@dataclass(frozen=True)
class DiffusionConfig:
    """The settings of the forward process and of the network's output. The cosine schedule does not use the betas."""

    timesteps: int
    schedule: Schedule
    prediction: Prediction
    beta_start: float = 1e-4
    beta_end: float = 0.02
    learn_variance: bool = False


class Losses(NamedTuple):
    """The loss of each image, float32 (B,) each.

    Attributes:
        objective: the loss that the training minimises.
        simple: the mean squared error of the prediction (Ho et al. 2020, eq. 14), whatever the objective is.
        bound: the bound's part of the objective where the variance is learned, else None.
    """

    objective: Tensor
    simple: Tensor
    bound: Tensor | None


def make_betas(config: DiffusionConfig) -> np.ndarray:
    """The variances beta_t of the forward process, t = 0 ... T-1: float64 (T,).

    linear: from beta_start to beta_end (Ho et al. 2020, section 4).
    cosine: from alphas_cumprod = cos^2, capped at 0.999 (Nichol & Dhariwal 2021, eq. 17).
    sigmoid: beta_start to beta_end along a logistic curve from -6 to 6, as in diffusers.
    """
    steps = config.timesteps
    if config.schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64)
    if config.schedule == "sigmoid":
        curve = 1 / (1 + np.exp(-np.linspace(-6, 6, steps)))
        return config.beta_start + curve * (config.beta_end - config.beta_start)

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((t + 1) / steps) / alpha_bar(t / steps), 0.999) for t in range(steps)])


class GaussianDiffusion:
    """The forward process and what a network's output means. Timesteps are integers 0 ... T-1.

    Tables are computed with NumPy in float64 and looked up as float32: torch's float32 square root gives
    different last bits on different processors.

    Raises:
        ValueError: the schedule begins with no noise or ends with no signal, within the precision of floats.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.betas = make_betas(config)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        if not (1 - self.alphas_cumprod[0] >= LEAST_NOISE and self.alphas_cumprod[-1] >= LEAST_SIGNAL):
            raise ValueError(
                f"the {config.schedule} schedule with timesteps = {config.timesteps}, beta_start = "
                f"{config.beta_start:g} and beta_end = {config.beta_end:g}: alpha_bar runs from 1 - "
                f"{1 - self.alphas_cumprod[0]:.1e} to {self.alphas_cumprod[-1]:.1e}; it must start at or below 1 - "
                f"{LEAST_NOISE:g} and end at or above {LEAST_SIGNAL:g}"
            )
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        # the variance of q(x_{t-1} | x_t, x_0), eq. 7; at t = 0 nothing is left to draw: the value of t = 1 replaces it
        following = np.append(1.0, self.alphas_cumprod[:-1])
        tilde = self.betas * (1 - following) / (1 - self.alphas_cumprod)
        tilde[0] = tilde[1]
        self.posterior_variance = tilde
        tables = {
            "signal": self.sqrt_alphas_cumprod,
            "noise": self.sqrt_one_minus_alphas_cumprod,
            "mean_x0": self.betas * np.sqrt(following) / (1 - self.alphas_cumprod),
            "mean_x_t": (1 - following) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod),
            "log_small": np.log(tilde),
            "log_large": np.log(np.append(tilde[1], self.betas[1:])),  # at t = 0 as in the paper's code
            "log_betas": np.log(self.betas),
            "min_snr": self._min_snr_weights(),
        }
        self._tables = {name: torch.tensor(table, dtype=torch.float32, device=device) for name, table in tables.items()}

    @property
    def timesteps(self) -> int:
        return self.config.timesteps

    def _min_snr_weights(self) -> np.ndarray:
        """The weight of each timestep's loss (Hang et al. 2023, eq. 5 to 7): min(SNR, gamma) on x0, translated to
        what the network predicts."""
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        divisor = {"epsilon": snr, "x0": np.ones_like(snr), "v": snr + 1}[self.config.prediction]
        return np.minimum(snr, MIN_SNR_GAMMA) / divisor

    def _at(self, table: str, t: Tensor) -> Tensor:
        """The table's values at t, int64 (B,), as (B, 1, 1, 1).

        `gather` refuses an index outside of 0 ... T-1 on every device, at no cost; `[]` would read -1 as T-1.
        """
        return self._tables[table].gather(0, t).view(-1, 1, 1, 1)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, 1, 1)."""
        return self._at("signal", t), self._at("noise", t)

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

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a network's output (B, C or 2C, H, W) into the prediction and the variance's share (or None)."""
        if not self.config.learn_variance:
            return output, None
        prediction, share = output.chunk(2, dim=1)
        return prediction, share

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7): (B, C, H, W)."""
        return self._at("mean_x0", t) * x0 + self._at("mean_x_t", t) * x_t

    def log_variance(self, t: Tensor, variance: Variance, share: Tensor | None) -> Tensor:
        """log of the variance of p(x_{t-1} | x_t): beta-tilde, beta, or a value between the two (Nichol & Dhariwal
        2021, eq. 15), where the network's `share` is -1 for beta-tilde and 1 for beta."""
        if variance == "learned":
            assert share is not None
            small, large = self._at("log_small", t), self._at("log_betas", t)
            return small + (share + 1) / 2 * (large - small)
        return self._at("log_small" if variance == "fixed_small" else "log_large", t)

    def bound_term(self, x0: Tensor, x_t: Tensor, t: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """One term of the variational bound, in bits per dimension: float32 (B,).

        L_{t-1}, the divergence of p(x_{t-1} | x_t), given by `mean` and `log_variance`, from the true posterior
        (Ho et al. 2020, eq. 5 and 8); at t = 0 the negative log-likelihood L_0 (eq. 13).
        """
        true_mean, true_log_variance = self.posterior_mean(x0, x_t, t), self._at("log_small", t)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
            - 1
        )
        nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        term = torch.where(t.view(-1, 1, 1, 1) == 0, nll, divergence)
        return term.mean(dim=(1, 2, 3)) / math.log(2)

    def prior_term(self, x0: Tensor) -> Tensor:
        """L_T, the divergence of q(x_T | x_0) from a standard normal, in bits per dimension: float32 (B,)."""
        t = torch.full((len(x0),), self.timesteps - 1, device=x0.device)
        signal, sigma = self._rates(t)
        divergence = 0.5 * (sigma**2 + (signal * x0) ** 2 - 1 - 2 * torch.log(sigma))
        return divergence.mean(dim=(1, 2, 3)) / math.log(2)

    def losses(
        self, model: Callable[..., Tensor], x0: Tensor, t: Tensor, noise: Tensor, weighting: Weighting = "simple"
    ) -> Losses:
        """The training loss of each image, and its parts.

        simple: the mean squared error (Ho et al. 2020, eq. 14). min_snr: the same, weighted by timestep (Hang et
        al. 2023). With a learned variance, plus 0.001 times the bound, through which only the variance learns
        (L_hybrid, Nichol & Dhariwal 2021, eq. 16).
        """
        x_t = self.q_sample(x0, t, noise)
        output, share = self.split(model(x_t, t).float())
        simple = F.mse_loss(output, self.target(x0, t, noise), reduction="none").mean(dim=(1, 2, 3))
        objective = simple * self._at("min_snr", t).view(-1) if weighting == "min_snr" else simple
        if share is None:
            return Losses(objective, simple, None)
        mean = self.posterior_mean(self.predict_x0(x_t, t, output.detach()).clamp(-1, 1), x_t, t)
        term = self.bound_term(x0, x_t, t, mean, self.log_variance(t, "learned", share))
        bound = 0.001 * self.timesteps * term
        return Losses(objective + bound, simple, bound)


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log p(x_0) of 8-bit pixels under a normal that is integrated over each level (Ho et al. 2020, eq. 13).

    x0: float32 (B, C, H, W), levels mapped to [-1, 1]; the lowest and the highest bin extend to infinity.
    """
    plus, minus = ((x0 - mean + side / 255) * torch.exp(-log_scale) for side in (1, -1))
    below_plus, below_minus = (0.5 * (1 + torch.erf(z / math.sqrt(2))) for z in (plus, minus))
    probability = torch.where(
        x0 < -0.999, below_plus, torch.where(x0 > 0.999, 1 - below_minus, below_plus - below_minus)
    )
    return probability.clamp(min=1e-12).log()
