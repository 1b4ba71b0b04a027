"""The curves of a training: means between two points, and the check that the training has not diverged."""

import torch
from torch import Tensor

from ddpm.errors import UserError
from ddpm.runtime import processes

DIVERGED_LOSS = 10.0  # predicting zero scores about 1; ten times that will not recover


class Window:
    """The values of the curves since their last point, read from the device once per point.

    Args:
        names: of the curves; the first is the loss, the last the gradient's norm.
        size: the most steps between two points.
    """

    def __init__(self, names: tuple[str, ...], size: int, device: torch.device) -> None:
        self._names = names
        self._values = torch.zeros(size, len(names), device=device)
        self._count = 0

    def add(self, values: Tensor) -> None:
        """Add the values of one step, float32 (curves,)."""
        self._values[self._count] = values
        self._count += 1

    def refill(self, values: Tensor) -> None:
        """Refill the window with the values (n, curves) that `check` returned."""
        self._count = len(values)
        self._values[: self._count] = values

    def check(self, step: int) -> Tensor:
        """The values (n, curves) in the window, averaged over the processes, on the CPU.

        Args:
            step: the last step, counted from 0.

        Raises:
            UserError: a value is not finite.
        """
        values = processes.mean(self._values[: self._count].to("cpu", copy=True))
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise UserError(
                f"training diverged: the loss is {values[first, 0]:g} and the gradient's norm {values[first, -1]:g} at "
                f"step {step - self._count + 1 + first}; lower optimizer.lr, or set train.grad_clip. "
                f"The last good state is kept"
            )
        return values

    def take(self, step: int) -> dict[str, float]:
        """The mean of each curve since the last point, by its name; empties the window. `step`: as for `check`.

        Raises:
            UserError: a value is not finite, or the loss is far above that of a network that predicts zero.
        """
        means = dict(zip(self._names, self.check(step).double().mean(dim=0).tolist(), strict=True))
        loss = means["loss"]
        if loss > DIVERGED_LOSS:
            raise UserError(
                f"training diverged: the mean loss of steps {step - self._count + 1} to {step} is {loss:.1f}, and a "
                f"network that predicts zero has about 1; lower optimizer.lr, or set train.grad_clip"
            )
        self._count = 0
        return means
