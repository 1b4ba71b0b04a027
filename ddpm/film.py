"""How the first samples appear out of the noise: their states at chosen moments, whatever the size of a batch."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from ddpm.core.pixels import to_pixels
from ddpm.pictures import film_images
from ddpm.runtime.resume import ResumeState, slices

STRIP_ROWS, STRIP_COLUMNS = 6, 11  # images and moments of the strip
FILM_MOMENTS = 25
Draw = Callable[[int, Callable[[int, int, Tensor], None]], object]  # draws so many samples, and shows each state


class Moments:
    """The states of the first samples, for a strip and a film of the denoising. Kept with the resume state.

    Args:
        steps: network evaluations of a sample.
        count: samples that are drawn. batch_size: of them at a time.
        values: numbers in an image.
    """

    def __init__(self, steps: int, count: int, batch_size: int, values: int, state: ResumeState) -> None:
        self._steps, self._state = steps, state
        self._film_images = film_images(values)
        self._images = min(count, max(STRIP_ROWS, self._film_images))
        self._batches = [slice(rows.start, min(rows.stop, self._images)) for rows in slices(count, batch_size)]
        self._strip = {0} | {round(i) + 1 for i in np.linspace(0, steps - 1, STRIP_COLUMNS - 1)}
        self._film = {round(i) for i in np.linspace(0, steps, FILM_MOMENTS)}
        self._moments = sorted(self._strip | self._film)  # in network evaluations so far
        self._seen: dict[int, list[np.ndarray]] = {}  # by the first image of a batch

    def watch(self, start: int, evaluations: int, x: Tensor) -> None:
        """Take the state x (B, C, H, W) of the batch from image `start` on; at the last evaluation, keep its states."""
        self._record(start, evaluations, x)
        if start < self._images and evaluations == self._steps:  # before the batch is kept, which may end the run
            self._state.kept(_name(start), lambda: np.stack(self._seen.pop(start)))

    def _record(self, start: int, evaluations: int, x: Tensor) -> None:
        if start < self._images and evaluations in self._moments:
            self._seen.setdefault(start, []).append(to_pixels(x[: self._images - start]))

    def pictures(self, draw: Draw) -> tuple[np.ndarray, list[np.ndarray]]:
        """The strip, uint8 (rows, moments, H, W, C), a row for each image, and the film, uint8 (N, H, W, C) each.

        Args:
            draw: draws the first samples again, where what was kept of them is damaged.
        """

        def again(rows: slice) -> np.ndarray:
            self._seen.clear()
            draw(rows.stop, self._record)
            return np.stack(self._seen[rows.start])

        batches = [rows for rows in self._batches if rows.start < self._images]
        kept = [self._state.kept(_name(rows.start), lambda rows=rows: again(rows)) for rows in batches]  # type: ignore[misc]
        states = dict(zip(self._moments, np.concatenate(kept, axis=1), strict=True))
        strip = np.stack([states[i][:STRIP_ROWS] for i in sorted(self._strip)], axis=1)
        return strip, [states[i][: self._film_images] for i in sorted(self._film)]


def _name(start: int) -> str:
    return f"moments-{start}"
