"""Which noise schedules floats can represent. Imports neither torch nor NumPy, like ddpm/config/schema.py."""

import math
from collections.abc import Iterator

LEAST_NOISE = 1e-12  # least 1 - alpha_bar at the first timestep: float64 keeps four digits of it
LEAST_SIGNAL = 1e-60  # least alpha_bar at the last timestep: float32 divides by its square root


def _log_signals(timesteps: int, schedule: str, beta_start: float, beta_end: float) -> tuple[float, float]:
    """log alpha_bar at the first timestep and at the last, of a linear or sigmoid schedule."""

    def beta(place: float) -> float:
        share = 1 / (1 + math.exp(6 - 12 * place)) if schedule == "sigmoid" else place
        return beta_start + share * (beta_end - beta_start)

    return math.log1p(-beta(0)), sum(math.log1p(-beta(t / (timesteps - 1))) for t in range(timesteps))


def crosses_zero(timesteps: int, schedule: str, beta_start: float, beta_end: float) -> bool:
    """Whether the log SNR starts above 0 and ends below 0: alpha_bar starts above a half and ends below it."""
    if schedule == "cosine":
        return timesteps > 2  # with two timesteps, alpha_bar starts at 0.494
    first, last = _log_signals(timesteps, schedule, beta_start, beta_end)
    return first > math.log(0.5) > last


def schedule_faults(timesteps: int, schedule: str, beta_start: float, beta_end: float) -> Iterator[tuple[str, str]]:
    """The faults of a schedule: a setting of `diffusion`, and why it is refused. Cosine schedules have none."""
    if schedule == "cosine":
        return
    first, signal = _log_signals(timesteps, schedule, beta_start, beta_end)
    if -math.expm1(first) < LEAST_NOISE:
        yield "beta_start", f"must be {LEAST_NOISE:g} or more: the first timestep adds no noise otherwise"
    if signal < math.log(LEAST_SIGNAL):
        most = int(timesteps * math.log(LEAST_SIGNAL) / signal)
        yield (
            "timesteps",
            f"with diffusion.beta_end = {beta_end:g}, alpha_bar falls to 1e{signal / math.log(10):.0f} and must stay "
            f"above {LEAST_SIGNAL:g}; use at most {most}, a lower diffusion.beta_end, or diffusion=cosine",
        )
