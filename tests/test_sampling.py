import numpy as np
import pytest

from ddpm import sampling
from ddpm.config.load import check
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.core.pixels import to_pixels
from ddpm.errors import UserError
from ddpm.runtime.resume import ResumeState, Store
from ddpm.sampling import (
    FILM_MOMENTS,
    STRIP_COLUMNS,
    UNKNOWN,
    Classes,
    Moments,
    check_variance,
    chosen_classes,
    class_sequence,
)
from tests.conftest import composed, small_unet

PETS = {"num_class_embeds": 3, "has_no_label": True}
NAMES = Classes(("cat", "dog"))


def settings(**changes):
    return check(composed()).sample.model_copy(update={"steps": 4, "batch_size": 3} | changes)


def test_classes_come_in_turn_and_each_sample_depends_on_its_own():
    d, unet = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v")), small_unet(**PETS)
    every = sampling.draw(unet, d, settings(count=7), NAMES)
    dogs = sampling.draw(unet, d, settings(count=7, classes=["dog"]), NAMES)
    turned = sampling.draw(unet, d, settings(count=7, classes=["dog", "cat"], batch_size=7), NAMES)
    np.testing.assert_allclose(every[1::2], dogs[1::2], atol=1)
    np.testing.assert_allclose(turned[::2], dogs[::2], atol=1)
    assert (every[::2] != dogs[::2]).mean() > 0.1
    assert (turned[1::2] != dogs[1::2]).mean() > 0.1


@pytest.mark.parametrize(
    ("network", "names", "changes", "fault"),
    [
        (PETS, NAMES, {"classes": ["cow"]}, "sample.classes: 'cow' is not a class of models/ddpm; known: cat, dog"),
        ({"num_class_embeds": 3}, UNKNOWN, {"classes": [3]}, "'3' is not a class of models/ddpm; known: 0, 1, 2"),
        ({"num_class_embeds": 3}, UNKNOWN, {"guidance": 2.0}, "guidance = 2: must be 1 .*not learnt to do without"),
        ({"num_class_embeds": 2}, NAMES, {"guidance": 0.5}, "sample.guidance = 0.5: must be 1"),
        ({}, UNKNOWN, {"classes": ["cat"]}, "'cat' is not a class of models/ddpm; models/ddpm is unconditional"),
        ({}, UNKNOWN, {"guidance": 2.0}, "sample.guidance = 2: must be 1"),
    ],
)  # fmt: skip
def test_a_class_or_guidance_unknown_to_the_network_is_refused(network, names, changes, fault):
    d = GaussianDiffusion(DiffusionConfig(1000, "linear", "epsilon"))
    with pytest.raises(UserError, match=fault):
        sampling.draw(small_unet(**network), d, settings(count=2, **changes), names)


MANY = {"num_class_embeds": 7}
LETTERS = tuple("abcdefg")
COUNTS = (5000, 3000, 1200, 500, 0, 250, 50)
COUNTED = Classes(LETTERS, COUNTS)


def test_classes_follow_the_datas_frequencies_in_every_prefix():
    config, p = small_unet(**MANY).config, settings(class_frequencies="data")
    sequence = np.array(class_sequence(p, config, COUNTED, 5000))
    drawn = np.cumsum(sequence[:, None] == np.arange(7), axis=0)
    expected = np.arange(1, 5001)[:, None] * np.array(COUNTS) / sum(COUNTS)
    assert abs(drawn - expected).max() <= 1
    assert class_sequence(p, config, COUNTED, 100) == sequence[:100].tolist()
    assert drawn[-1].tolist() == [2500, 1500, 600, 250, 0, 125, 25]


def test_the_selected_classes_keep_their_frequencies():
    config = small_unet(**MANY).config
    p = settings(class_frequencies="data", classes=["f", "b", "b"])
    assert np.bincount(class_sequence(p, config, COUNTED, 1300)).tolist() == [0, 1200, 0, 0, 0, 100]


@pytest.mark.parametrize(
    ("network", "changes", "counts", "fault"),
    [
        (MANY, {}, (), "training.json does not hold the class_counts of its 7 classes; set it to equal"),
        (MANY, {}, (1, 2), "training.json does not hold the class_counts of its 7 classes; set it to equal"),
        (MANY, {"classes": ["e"]}, COUNTS, r"no image of sample.classes = \['e'\]; set it to equal"),
        ({}, {}, (), "models/ddpm is unconditional; set it to equal"),
    ],
)
def test_frequencies_that_are_not_known_are_refused(network, changes, counts, fault):
    p = settings(class_frequencies="data", **changes)
    with pytest.raises(UserError, match=f"sample.class_frequencies = data: .*{fault}"):
        class_sequence(p, small_unet(**network).config, Classes(LETTERS if network else (), counts), 10)


def test_samples_have_the_classes_of_the_sequence_in_any_batch():
    d, unet = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v")), small_unet(**PETS)
    classes = Classes(NAMES.names, (1, 3))
    whole = sampling.draw(unet, d, settings(count=8, class_frequencies="data", batch_size=8), classes)
    parts = sampling.draw(unet, d, settings(count=8, class_frequencies="data"), classes)
    np.testing.assert_allclose(whole.astype(int), parts, atol=1)
    dogs = sampling.draw(unet, d, settings(count=8, classes=["dog"]), NAMES).astype(int)
    apart = abs(whole - dogs).max(axis=(1, 2, 3)) > 1
    assert apart.tolist() == [c == 0 for c in class_sequence(
        settings(class_frequencies="data"), unet.config, classes, 8)]  # fmt: skip
    assert apart.sum() == 2


def test_settings_that_change_an_image_change_its_stored_name():
    names = []

    class Names(Store):
        def kept(self, name, compute):
            names.append(name)
            return np.zeros((2, 8, 8, 1), np.uint8)

    d, unet = GaussianDiffusion(DiffusionConfig(1000, "linear", "v")), small_unet(**PETS)
    changes = [
        {}, {"steps": 5}, {"sampler": "ddpm"}, {"spacing": "quadratic"}, {"eta": 0.5}, {"variance": "fixed_large"},
        {"classes": ["cat"]}, {"class_frequencies": "data"}, {"guidance": 2.0}, {"spacing": "quadratic", "steps": 900},
        {"spacing": "quadratic", "steps": 901},
    ]  # fmt: skip
    for change in changes:
        sampling.draw(unet, d, settings(count=2, **change), Classes(NAMES.names, (1, 2)), Names())
    sampling.draw(unet, d, settings(seed=1, count=2), NAMES, Names())
    assert len(set(names)) == len(names) == len(changes) + 1
    sampling.draw(unet, d, settings(count=2, grid=3), NAMES, Names())
    assert names[-1] == names[0]


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_an_unused_learned_variance_is_reported(capsys, variance):
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon", learn_variance=True))
    check_variance(settings(variance=variance), d)
    said = "note: models/ddpm has learned its variance, and sample.variance = fixed_small does not use it"
    assert capsys.readouterr().out.startswith(said) == (variance != "learned")


def test_a_variance_that_was_not_learned_is_refused():
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon"))
    with pytest.raises(UserError, match=r"sample.variance = learned: models/ddpm has learned no variance; set it to"):
        check_variance(settings(variance="learned"), d)


def test_samples_are_the_last_state_in_rounded_pixels():
    d, states = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v")), []
    images = sampling.draw(small_unet(), d, settings(count=3), on_step=lambda start, i, x: states.append(x))
    np.testing.assert_array_equal(images, to_pixels(states[-1]))
    assert images.dtype == np.uint8


def test_classes_without_names_are_drawn_by_number():
    d, unet = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v")), small_unet(num_class_embeds=3)
    assert chosen_classes(settings(), unet.config, ()) == [0, 1, 2]
    assert sampling.draw(unet, d, settings(count=2, classes=[2])).shape == (2, 8, 8, 1)


def filmed(folder, count, batch_size, steps=4, damage=False, stop_at=None):
    """The strip, the film and the samples."""
    changes = {"steps": steps, "batch_size": batch_size}
    d = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v"))

    def draw(count, on_step, store=None):
        network = small_unet(block_out_channels=(16,), attention=(False,))
        return sampling.draw(network, d, settings(count=count, **changes), UNKNOWN, store, on_step)

    with ResumeState(folder) as state:
        moments = Moments(steps, count, batch_size, 64, state)

        def watch(start, evaluations, x):
            if (start, evaluations) == stop_at:
                raise KeyboardInterrupt
            moments.watch(start, evaluations, x)

        images = draw(count, watch, state)
        if damage:
            (folder / "moments-0.npy").write_bytes(b"damaged")
        return *moments.pictures(draw), images


@pytest.fixture(scope="module")
def whole_film(tmp_path_factory):
    """The strip, the film and the samples of 50 images in one batch."""
    return filmed(tmp_path_factory.mktemp("whole"), 50, 50)


@pytest.mark.heavy
@pytest.mark.parametrize("batch_size", [1, 5, 7, 47, 48, 49])  # a strip of 6, a film of 48
def test_strip_and_film_show_the_same_images_whatever_the_batch(tmp_path, whole_film, batch_size):
    whole_strip, whole_film, images = whole_film
    strip, film, _ = filmed(tmp_path / "parts", 50, batch_size)
    assert strip.shape == (6, 5, 8, 8, 1)  # the noise and 4 steps
    assert [moment.shape for moment in film] == [(48, 8, 8, 1)] * 5
    np.testing.assert_allclose(strip.astype(int), whole_strip, atol=1)
    np.testing.assert_allclose(np.array(film).astype(int), whole_film, atol=1)
    np.testing.assert_allclose(film[-1].astype(int), images[:48], atol=1)
    np.testing.assert_allclose(strip[:, -1].astype(int), images[:6], atol=1)


@pytest.mark.parametrize("count", [2, 5, 6, 7])
def test_all_of_few_samples_are_shown(tmp_path, count):
    strip, film, _ = filmed(tmp_path, count, 2)
    assert len(strip) == min(count, 6)
    assert len(film[0]) == count


@pytest.mark.heavy
def test_many_steps_are_shown_at_moments_from_noise_to_image(tmp_path):
    strip, film, images = filmed(tmp_path, 3, 2, steps=200)
    assert strip.shape[1] == STRIP_COLUMNS
    assert len(film) == FILM_MOMENTS
    np.testing.assert_array_equal(strip[:, -1], images)


def test_moments_of_an_interrupted_run_are_shown_by_the_next(tmp_path):
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


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": 11}, "^params.yaml: sample.steps = 11: must be from 1 to 10, the timesteps of the model$"),
        ({"variance": "learned"}, "sample.variance = learned: models/ddpm has learned no variance"),
        ({"classes": ["cat"]}, "'cat' is not a class of models/ddpm"),
        ({"guidance": 2.0}, "sample.guidance = 2: must be 1"),
        ({"class_frequencies": "data"}, "sample.class_frequencies = data: models/ddpm is unconditional"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(changes, fault):
    d = GaussianDiffusion(DiffusionConfig(10, "linear", "epsilon"))
    with pytest.raises(UserError, match=fault):
        sampling.check_settings(settings(**changes), small_unet(), d, UNKNOWN)
    sampling.check_settings(settings(), small_unet(), d, UNKNOWN)


def test_filmed_samples_are_the_drawn_samples(tmp_path):
    d, unet, p = GaussianDiffusion(DiffusionConfig(1000, "cosine", "v")), small_unet(), settings(count=5)
    with ResumeState(tmp_path) as state:
        images, strip, film = sampling.draw_filmed(unet, d, p, UNKNOWN, state)
    np.testing.assert_array_equal(images, sampling.draw(unet, d, p))
    np.testing.assert_array_equal(strip[:, -1], images)
    np.testing.assert_array_equal(film[-1], images)
    for one, other in zip(sampling.draw_filmed(unet, d, p, UNKNOWN, Store()), (images, strip, film), strict=True):
        np.testing.assert_array_equal(one, other)  # with nothing kept, the first samples are drawn again
