from functools import partial

import numpy as np
import pytest
import torch

from ddpm.config.schema import check
from ddpm.core import samplers
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.film import FILM_MOMENTS, STRIP_COLUMNS, Moments
from ddpm.runtime.resume import ResumeState
from tests.conftest import composed, small_unet

CPU = torch.device("cpu")


def filmed(folder, count, batch_size, steps=4, damage=False, stop_at=None):
    """The strip, the film and the samples."""
    settings = check(composed()).sample.model_copy(update={"steps": steps, "batch_size": batch_size})
    d = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v"))
    draw = partial(samplers.draw, small_unet(), d, settings, 0, device=CPU)
    with ResumeState(folder) as state:
        moments = Moments(steps, count, batch_size, 64, state)

        def watch(start, evaluations, x):
            if (start, evaluations) == stop_at:
                raise KeyboardInterrupt
            moments.watch(start, evaluations, x)

        images = draw(count, on_step=watch, keep=state.keep)
        if damage:
            (folder / "moments-0.npy").write_bytes(b"damaged")
        return *moments.pictures(lambda count, on_step: draw(count, on_step=on_step)), images


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 7, 47, 48, 49])
def test_strip_and_film_show_the_same_images_whatever_the_batch(tmp_path, batch_size):
    whole_strip, whole_film, images = filmed(tmp_path / "whole", 50, 50)
    strip, film, _ = filmed(tmp_path / "parts", 50, batch_size)
    assert strip.shape == (6, 5, 8, 8, 1)  # the noise and 4 steps
    assert [moment.shape for moment in film] == [(48, 8, 8, 1)] * 5
    np.testing.assert_allclose(strip.astype(int), whole_strip, atol=1)
    np.testing.assert_allclose(np.array(film).astype(int), whole_film, atol=1)
    np.testing.assert_allclose(film[-1].astype(int), images[:48], atol=1)
    np.testing.assert_allclose(strip[:, -1].astype(int), images[:6], atol=1)


@pytest.mark.parametrize("count", [2, 5, 6, 7])
def test_of_few_samples_all_are_shown(tmp_path, count):
    strip, film, _ = filmed(tmp_path, count, 2)
    assert len(strip) == min(count, 6)
    assert len(film[0]) == count


def test_many_steps_are_shown_at_moments_from_noise_to_image(tmp_path):
    strip, film, images = filmed(tmp_path, 3, 2, steps=200)
    assert strip.shape[1] == STRIP_COLUMNS
    assert len(film) == FILM_MOMENTS
    np.testing.assert_array_equal(strip[:, -1], images)


def test_moments_of_an_interrupted_run_are_shown_whole_by_the_next(tmp_path):
    expected = filmed(tmp_path / "whole", 10, 3)
    with pytest.raises(KeyboardInterrupt):
        filmed(tmp_path / "state", 10, 3, stop_at=(6, 2))  # two batches are kept, and not drawn again
    again = filmed(tmp_path / "state", 10, 3)
    for one, other in zip(again, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_damaged_moments_are_drawn_again(tmp_path):
    expected, found = filmed(tmp_path / "whole", 10, 3), filmed(tmp_path / "damaged", 10, 3, damage=True)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
