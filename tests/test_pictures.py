import numpy as np
import pytest
from PIL import Image

from ddpm import pictures


def test_small_images_are_enlarged_without_blur():
    images = np.array([[[[0], [255]], [[255], [0]]]], dtype=np.uint8)  # one image, 2x2
    picture = np.asarray(pictures.tile(images, columns=1))
    assert picture.shape == (68, 68)  # 2 pixels of 32, and the gap around them
    assert picture[2:34, 2:34].max() == 0
    assert picture[2:34, 34:66].min() == 255


def test_images_run_along_the_rows_and_gaps_are_white():
    images = np.stack([np.full((64, 64, 3), value, dtype=np.uint8) for value in (10, 20, 30)])
    picture = np.asarray(pictures.grid(images))
    assert picture.shape == (134, 134, 3)
    assert [picture[40, 40, 0], picture[40, 100, 0], picture[100, 40, 0]] == [10, 20, 30]
    assert picture[0].min() == picture[100, 100, 0] == 255


def test_a_picture_is_written_with_the_same_bytes(tmp_path):
    picture = pictures.grid(np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1))
    for name in ("a", "b"):
        pictures.save(picture, tmp_path / "new" / f"{name}.png")
    assert (tmp_path / "new/a.png").read_bytes() == (tmp_path / "new/b.png").read_bytes()
    assert Image.open(tmp_path / "new/a.png").info == {}


def test_a_grid_of_no_images_is_refused():
    with pytest.raises(ValueError, match="no image"):
        pictures.tile(np.empty((0, 8, 8, 1), dtype=np.uint8), columns=1)


def test_a_pairs_images_stand_closer_than_two_pairs():
    left, right = (np.full((3, 8, 8, 1), value, dtype=np.uint8) for value in (10, 20))
    picture = np.asarray(pictures.pairs(left, right, columns=2))
    assert picture.shape == (2 * 64 + 3 * 16, 2 * 130 + 3 * 16)
    row = picture[20]
    assert row[16:80].tolist() == [10] * 64
    assert row[80:82].tolist() == [255] * 2
    assert row[82:146].tolist() == [20] * 64
    assert row[146:162].tolist() == [255] * 16


def test_a_film_plays_every_moment_or_shows_the_last(tmp_path):
    moments = [np.full((3, 8, 8, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    for name in ("a", "b"):
        pictures.save_film(moments, tmp_path / "new" / f"{name}.png")
    assert (tmp_path / "new/a.png").read_bytes() == (tmp_path / "new/b.png").read_bytes()
    film = Image.open(tmp_path / "new/a.png")
    assert film.info["loop"] == 0  # for ever
    seen = []
    for frame in range(film.n_frames):
        film.seek(frame)
        seen.append((np.asarray(film)[30, 30].tolist(), film.info.get("duration")))
    assert seen == [([30] * 3, None), ([10] * 3, 600), ([20] * 3, 80), ([30] * 3, 2500)]


@pytest.mark.parametrize(("shape", "images"), [((8, 8, 1), 48), ((28, 28, 1), 15), ((32, 32, 3), 4), ((99, 99, 3), 1)])
def test_a_film_of_larger_images_shows_fewer(shape, images):
    assert pictures.film_images(int(np.prod(shape))) == images
