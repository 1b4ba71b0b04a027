"""Every image file becomes a square of 8-bit pixels, or a reason why it cannot."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from ddpm.data.decode import decode_file, image_files, to_pixels
from ddpm.errors import UserError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def solid(mode: str, color: Any, size: int = 8) -> Image.Image:
    return Image.new(mode, (size, size), color)


def saved(path: Path, image: Image.Image, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(
    levels: np.ndarray,
    depth: int,
    colour_type: int,
    *,
    interlaced: bool = False,
    size: tuple[int, int] | None = None,
    **chunks: bytes,
) -> bytes:
    """A PNG of levels (h, w, samples) in 0 .. 2**depth - 1; `chunks` come before the pixels, `size` is what it says."""

    def part(kind: str, data: bytes) -> bytes:
        body = kind.encode() + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    def row(values: np.ndarray) -> bytes:
        bits = (values.reshape(-1, 1) >> np.arange(depth - 1, -1, -1)) & 1
        return b"\0" + np.packbits(bits.astype(np.uint8)).tobytes()

    passes = [levels[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [levels]
    raw = b"".join(row(values) for image in passes if image.size for values in image)
    width, height = size or (levels.shape[1], levels.shape[0])
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    others = b"".join(part(kind, data) for kind, data in chunks.items())
    pixels = part("IDAT", zlib.compress(raw)) + part("IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + part("IHDR", header) + others + pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extension", ["png", "bmp", "gif"])
def test_an_image_of_the_wanted_size_keeps_its_pixels(tmp_path: Path, channels: int, extension: str) -> None:
    grey = noise(16, 16, 1)
    path = saved(tmp_path / f"a.{extension}", Image.fromarray(grey[..., 0]))
    assert np.array_equal(decode_file(path, 16, channels, 179), np.repeat(grey, channels, axis=2))


def test_a_colour_image_of_the_wanted_size_keeps_its_pixels(tmp_path: Path) -> None:
    pixels = noise(16, 16, 3)
    assert np.array_equal(decode_file(saved(tmp_path / "a.png", Image.fromarray(pixels)), 16, 3, 179), pixels)
    lossless = saved(tmp_path / "a.webp", Image.fromarray(pixels), lossless=True)
    assert np.array_equal(decode_file(lossless, 16, 3, 179), pixels)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (solid("RGBA", (255, 0, 0, 0)), (255, 255, 255)),
        (solid("RGBA", (255, 0, 0, 255)), (255, 0, 0)),
        (solid("RGBA", (0, 0, 0, 51)), (204, 204, 204)),
        (solid("LA", (10, 0)), (255, 255, 255)),
        (solid("LA", (10, 255)), (10, 10, 10)),
        (solid("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        (solid("1", 1), (255, 255, 255)),
        (solid("1", 0), (0, 0, 0)),
        (solid("L", 77), (77, 77, 77)),
        (solid("F", 99.6), (100, 100, 100)),
        (solid("F", float("nan")), (0, 0, 0)),
        (solid("YCbCr", (128, 128, 128)), (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb_over_white(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert to_pixels(image, 8, 3)[3, 3].tolist() == list(expected)


def test_transparency_of_a_palette_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    image.paste(1, (4, 0, 8, 8))
    for transparency in (1, bytes([255, 0, 255])):  # one palette entry, or an alpha for each
        path = saved(tmp_path / "a.png", image, transparency=transparency)
        pixels = decode_file(path, 8, 3, 179)
        assert not isinstance(pixels, str)
        assert pixels[0, 0].tolist() == [10, 20, 30] and pixels[0, 7].tolist() == [255, 255, 255]
    assert to_pixels(image.convert("PA"), 8, 3)[0, 7].tolist() == [200, 100, 50]


PNG_KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16)]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour_type", "depth"), [*PNG_KINDS, (6, 8), (6, 16)])
def test_transparency_of_every_kind_of_png_is_laid_over_white(
    tmp_path: Path, colour_type: int, depth: int, interlaced: bool
) -> None:
    samples, most = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type], 2**depth - 1
    levels = np.random.default_rng(0).integers(0, most + 1, (16, 16, samples))
    levels[3, 4], levels[5] = levels[0, 0], levels[0, 0]  # the transparent colour, where one is named
    if depth == 16:
        levels[6] = levels[0, 0] ^ 1  # the same in 8 bits, but another colour
    chunks, alpha = {}, np.ones((16, 16, 1))
    if colour_type == 3:
        palette = np.random.default_rng(1).integers(0, 256, (most + 1, 4))
        chunks = {"PLTE": palette[:, :3].astype(np.uint8).tobytes(), "tRNS": palette[:, 3].astype(np.uint8).tobytes()}
        shades, alpha = palette[levels[..., 0], :3], palette[levels[..., 0], 3:] / 255
    else:
        shades = levels * 255 / most
        if colour_type in (4, 6):
            shades, alpha = shades[..., :-1], shades[..., -1:] / 255
        else:
            unused = 0 if depth == 16 else 2**15  # bits above the depth mean nothing
            chunks = {"tRNS": (levels[0, 0] + (0 if depth == 1 else unused)).astype(">u2").tobytes()}
            alpha = 1.0 - (levels == levels[0, 0]).all(axis=-1, keepdims=True)
    (tmp_path / "a.png").write_bytes(png(levels, depth, colour_type, interlaced=interlaced, **chunks))
    pixels = decode_file(str(tmp_path / "a.png"), 16, 3, 179)
    assert not isinstance(pixels, str), pixels
    expected = np.broadcast_to(shades * alpha + 255 * (1 - alpha), (16, 16, 3))
    assert np.abs(pixels - expected).max() < 2  # Pillow takes the high byte of 16-bit colours
    if colour_type in (0, 2):
        assert (pixels[5] == 255).all() and (depth < 16 or not (pixels[6] == 255).all())


@pytest.mark.parametrize("alpha", [0, 128])
def test_an_empty_alpha_channel_of_a_bmp_is_ignored(tmp_path: Path, alpha: int) -> None:
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 8, 8, 1, 32, 3, 256, 0, 0, 0, 0) + masks + bytes(52)
    content = b"BM" + struct.pack("<IHHI", 122 + 256, 0, 0, 122) + header + bytes([100, 100, 100, alpha]) * 64
    (tmp_path / "a.bmp").write_bytes(content)
    with Image.open(tmp_path / "a.bmp") as image:
        assert image.mode == "RGBA"
    assert (decode_file(str(tmp_path / "a.bmp"), 8, 3, 179) == (177 if alpha else 100)).all()


def test_transparent_colour_of_an_image_without_alpha_is_white(tmp_path: Path) -> None:
    assert (decode_file(saved(tmp_path / "l.png", solid("L", 9), transparency=9), 8, 1, 179) == 255).all()
    assert (
        decode_file(saved(tmp_path / "rgb.png", solid("RGB", (1, 2, 3)), transparency=(1, 2, 3)), 8, 3, 179) == 255
    ).all()


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_16_bit_greys_are_rounded_to_8_bits(kind: str) -> None:
    deep = np.array([[0, 128, 129, 257], [385, 386, 32768, 65535], [1, 2, 3, 4], [65406, 65407, 65278, 65280]])
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[kind]
    image = Image.frombytes(kind, (4, 4), deep.astype(dtype).tobytes())
    assert np.array_equal(to_pixels(image, 4, 1)[..., 0], np.rint(deep / 257))


def test_16_bit_png_is_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pixels = decode_file(saved(tmp_path / "a.png", Image.fromarray(ramp)), 8, 1, 179)
    assert not isinstance(pixels, str) and np.array_equal(pixels[..., 0], np.rint(ramp / 257))


def test_images_are_turned_upright_by_their_exif_tag(tmp_path: Path) -> None:
    upright = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the left, as a phone held upright stores it
    path = saved(tmp_path / "a.png", Image.fromarray(np.rot90(upright)), exif=exif)
    assert np.array_equal(decode_file(path, 8, 3, 179), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_damage_to_the_pixels(tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff\xff")
    assert np.array_equal(decode_file(path, 8, 3, 179), pixels)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 7), (1, 1)])
def test_any_shape_is_cropped_to_its_centre_square(size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.zeros((height, width), dtype=np.uint8)
    side = min(size)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 200
    assert (to_pixels(Image.fromarray(pixels), 8, 1) == 200).all()


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than the small image can show: must become its mean
    inner = to_pixels(Image.fromarray(stripes), 8, 1)[2:-2, 2:-2]
    assert abs(inner.astype(int) - 127).max() <= 2


def test_a_large_jpeg_is_shrunk_as_if_decoded_in_full(tmp_path: Path) -> None:
    y, x = np.mgrid[:512, :512] / 512
    photo = np.stack([255 * x, 255 * y, 127 + 120 * np.sin(20 * x * y)], axis=-1).astype(np.uint8)
    path = saved(tmp_path / "a.jpg", Image.fromarray(photo), quality=95)
    with Image.open(path) as image:
        full = to_pixels(image, 32, 3)
    drafted = decode_file(path, 32, 3, 179)
    assert not isinstance(drafted, str) and abs(drafted.astype(int) - full).max() <= 4


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [solid("L", 50), solid("L", 200)]
    for extension in ("gif", "webp"):
        path = saved(tmp_path / f"a.{extension}", frames[0], save_all=True, append_images=frames[1:], lossless=True)
        assert np.abs(np.asarray(decode_file(path, 8, 1, 179), dtype=int) - 50).max() <= 1


def test_a_jpeg_of_several_pictures_gives_the_first(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", solid("L", 50), format="MPO", save_all=True, append_images=[solid("L", 200)])
    assert np.abs(np.asarray(decode_file(path, 8, 1, 179), dtype=int) - 50).max() <= 1


def test_a_broken_file_comes_back_with_the_reason(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:-600])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "disguised.png", "TIFF")  # a format whose reader is not used
    reasons = {path.name: decode_file(str(path), 8, 3, 179) for path in tmp_path.iterdir()}
    assert "Premature end" in str(reasons["cut.jpg"])
    assert reasons["text.png"] == reasons["disguised.png"] == "not a png, jpg, webp, bmp or gif image"
    assert reasons["empty.png"] == "the file is empty"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_picture_above_the_limit_is_refused_with_its_setting(tmp_path: Path) -> None:
    bomb = png(np.zeros((1, 1, 1), int), 8, 0, size=(60_000, 60_000))
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert decode_file(str(tmp_path / "bomb.png"), 8, 1, 179) == (
        "has 60000 x 60000 pixels, more than dataset.max_megapixels = 179 allows; "
        "if the picture is genuine, set that to 3600"
    )
    path = saved(tmp_path / "a.png", solid("L", 7, size=1000))
    assert "set that to 1" in str(decode_file(path, 8, 1, 0.5)) and "= 0.5 allows" in str(decode_file(path, 8, 1, 0.5))
    assert not isinstance(decode_file(path, 8, 1, 1), str)


@pytest.mark.heavy
def test_a_large_picture_within_the_limit_gives_no_warning(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("1", (20_000, 10_000), 1))  # 200 megapixels; Pillow refuses 179
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (decode_file(path, 8, 1, 200) == 255).all()


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "gif"])
def test_damage_anywhere_in_a_file_is_reported_or_harmless(tmp_path: Path, extension: str) -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(24, 24, 3)).save(whole, {"jpg": "JPEG"}.get(extension, extension))
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{extension}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            content = bytearray(whole.getvalue())
            for position in rng.integers(0, len(content), 3):
                content[position] = rng.integers(256)
            path.write_bytes(content[: rng.integers(1, len(content) + 1)])
            result = decode_file(str(path), 8, 3, 179)
            assert isinstance(result, str) or result.shape == (8, 8, 3)


def test_listing_ignores_what_systems_add(tmp_path: Path) -> None:
    made = ("@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/cat/b.png", "cat/Thumbs.db", "cat/THUMBS.DB", "Desktop.ini")
    made += ("$RECYCLE.BIN/c.jpg", "System Volume Information/d.png", "#recycle/e.png", "lost+found/f.png")
    for name in (*made, "cat/@EADIR/a.jpg", ".ipynb_checkpoints/g.png", "cat/a.png", "cat/b.txt", "thumbs/c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "__MACOSX" / "out").symlink_to("/")  # links in such folders are not followed
    assert image_files(tmp_path) == (["cat/a.png", "thumbs/c.png"], 1)


def test_listing_ignores_hidden_files_and_counts_others(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "sub/deep/c.GIF", "notes.txt", ".hidden.png", ".git/d.png", "sub/Thumbs.db"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    assert image_files(tmp_path) == (["a.jpeg", "b.PNG", "sub/deep/c.GIF"], 1)


def test_links_stay_inside_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    (inside / "sub/a.png").touch()
    (outside / "b.png").touch()
    (inside / "alias.png").symlink_to("sub/a.png")
    (inside / "circle").symlink_to(".")
    (inside / "self.png").symlink_to("self.png")
    assert image_files(inside) == (["alias.png", "sub/a.png"], 2)
    for target in (outside / "b.png", outside):
        link = inside / "sub" / target.name
        link.symlink_to(target)
        with pytest.raises(UserError, match=f"{link}: is a link that leads out"):
            image_files(inside)
        link.unlink()
    (tmp_path / "elsewhere").symlink_to(inside)  # the folder itself may be a link
    assert image_files(tmp_path / "elsewhere")[0] == ["alias.png", "sub/a.png"]
