"""Damaged image files are reported; intact ones of every kind are accepted, with the pixels that Pillow reads."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from ddpm.data.damage import decode_jpeg, webp_has_a_hole
from ddpm.data.decode import decode_file, to_pixels

PLACES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95)
EOI = b"\xff\xd9"


def photo(width: int = 160, height: int = 120) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 100 * np.sin(x / 37), 127 + 90 * np.cos(y / 51 + x / 90), (x * 3 + y * 2) % 256], -1)
    pixels += np.random.default_rng(0).normal(0, 12, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or photo()).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes, folder: Path, size: int = 32, channels: int = 3) -> np.ndarray | str:
    path = folder / "image.jpg"
    path.write_bytes(content)
    return decode_file(str(path), size, channels, 179)


def as_pillow_reads(content: bytes, size: int, channels: int = 3) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        image.draft(image.mode, (2 * size, 2 * size))
        return to_pixels(image, size, channels)


def shortened(content: bytes, start: int, tail: bytes = b"") -> Iterator[bytes]:
    """Cut, or zeros from there on as in a download into a file that had its size from the start; then `tail`."""
    for place in PLACES:
        at = start + int(place * (len(content) - start))
        yield content[:at] + tail
        yield content[:at] + bytes(len(content) - at - len(tail)) + tail


JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "fine": {"quality": 95, "subsampling": 0},
    "restarts": {"restart_marker_blocks": 5},
    "progressive with restarts": {"progressive": True, "restart_marker_rows": 1},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_ends_early_is_broken_with_any_end(kind: str, mode: str, tmp_path: Path) -> None:
    whole = saved("JPEG", photo().convert(mode), **JPEGS[kind])
    assert not isinstance(decoded(whole, tmp_path), str)
    start = whole.index(b"\xff\xda") + 14
    for tail in (b"", EOI):
        for content in shortened(whole, start, tail):
            assert re.match("Corrupt JPEG data|Premature end", str(decoded(content, tmp_path)))


def test_a_progressive_jpeg_without_its_last_scans_is_broken(tmp_path: Path) -> None:
    whole = saved("JPEG", progressive=True)
    ends = [found.start() for found in re.finditer(rb"\xff[\xc4\xda]", whole)][1:]
    assert len(ends) > 8
    for end in ends:  # between two scans, where nothing else is amiss
        assert "Premature end" in str(decoded(whole[:end] + EOI, tmp_path))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("WEBP", {}), ("WEBP", {"method": 0}), ("WEBP", {"lossless": True}), ("PNG", {}), ("GIF", {})],
)
def test_other_files_that_end_early_are_broken(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole = saved(kind, **options)
    assert not isinstance(decoded(whole, tmp_path), str)
    for content in shortened(whole, 800 if kind == "GIF" else 100):
        assert isinstance(decoded(content, tmp_path), str)


def test_a_hole_in_a_webp_is_found_with_animation_or_alpha(tmp_path: Path) -> None:
    clear = photo()
    clear.putalpha(200)
    for whole in (saved("WEBP", clear), saved("WEBP", save_all=True, append_images=[photo().rotate(90)])):
        assert not isinstance(decoded(whole, tmp_path), str)
        start = whole.index(b"VP8 ")
        size = int.from_bytes(whole[start + 4 : start + 8], "little")
        middle = start + size // 2
        assert isinstance(decoded(whole[:middle] + bytes(start + 8 + size - middle), tmp_path), str)


@pytest.mark.heavy
@pytest.mark.parametrize("method", [0, 4])
@pytest.mark.parametrize("lossless", [False, True])
def test_zeros_in_an_intact_webp_are_no_hole(method: int, lossless: bool) -> None:
    zeros = 0
    for colour in ((0, 0, 0), (255, 255, 255), (90, 120, 200)):
        for top in (0, 50, 250):
            image = photo(450, 350)
            image.paste(colour, (0, top, 450, 350))
            content = saved("WEBP", image, method=method, lossless=lossless)
            zeros += bytes(16) in content
            assert not webp_has_a_hole(content)
    assert zeros or method == 4


def odd_but_whole() -> dict[str, bytes]:
    """JPEGs as cameras, phones and editors write them, some of which libjpeg warns of although nothing is missing."""
    rng = np.random.default_rng(0)
    plain, progressive = saved("JPEG"), saved("JPEG", progressive=True)
    table, scan = plain.index(b"\xff\xdb"), plain.index(b"\xff\xda")
    application = b"".join(
        bytes([0xFF, 0xE1 + k]) + (2000).to_bytes(2, "big") + rng.bytes(1998).replace(b"\xff", b"x") for k in range(12)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = saved("JPEG", photo().convert("L"))
    size = grey.index(b"\xff\xc0")
    return {
        "bytes behind the end": plain + rng.bytes(5000),
        "zeros behind the end": plain + bytes(5000),
        "another picture behind the end": plain + progressive,
        "twelve application segments": plain[:2] + application + plain[2:],
        "a comment": saved("JPEG", comment=b"\xff\xd9" * 9),
        "fill before markers": plain.replace(b"\xff\xdb", b"\xff\xff\xff\xdb").replace(b"\xff\xda", b"\xff\xff\xda"),
        "bytes between segments": plain[:table] + b"abcdefghijk" + plain[table:],
        "unknown JFIF version": plain.replace(b"JFIF\0\1", b"JFIF\0\7"),
        "undefined scan parameters": plain[: scan + 11] + b"\0\0\0" + plain[scan + 14 :],
        "both": plain[:table] + b"abc" + plain[table : scan + 11] + b"\0\0\0" + plain[scan + 14 :],
        "the end aligned": plain[:-2] + b"\x12\x34\x56\x78" + EOI,
        "zeros before the end": plain[:-2] + bytes(4096) + EOI,
        "fill before the end": plain[:-2] + b"\xff" * 100 + EOI,
        "zeros behind each scan": re.sub(rb"(?<!^)(?<!\xff\xc2)(?=\xff\xc4|\xff\xd9)", bytes(40), progressive),
        "turned": saved("JPEG", exif=exif),
        "several pictures": saved("MPO", save_all=True, append_images=[photo().rotate(90)]),
        "grey of 2x2": grey[: size + 11] + b"\x22" + grey[size + 12 :],
        "colours not converted": saved("JPEG", keep_rgb=True),
        "colours not converted, progressive": saved("JPEG", keep_rgb=True, progressive=True),
        "a profile": saved("JPEG", icc_profile=rng.bytes(100_000)),
    } | {name: saved("JPEG", **options) for name, options in JPEGS.items()}


@pytest.mark.parametrize("name", odd_but_whole())
def test_an_odd_jpeg_that_is_intact_keeps_its_pixels(name: str, tmp_path: Path) -> None:
    content = odd_but_whole()[name]
    for size in (8, 32, 120):
        pixels = decoded(content, tmp_path, size)
        assert not isinstance(pixels, str), pixels
        if name != "turned":
            assert np.array_equal(pixels, as_pillow_reads(content, size))


def test_pixels_of_an_intact_jpeg_are_those_of_pillow(tmp_path: Path) -> None:
    for width, height in ((1, 1), (3, 7), (7, 7), (8, 8), (9, 16), (17, 33), (321, 207)):
        image = photo(width, height)
        for options in ({}, {"quality": 1}, {"quality": 98, "subsampling": 0}, {"progressive": True, "subsampling": 1}):
            for mode in ("RGB", "L", "CMYK"):
                content = saved("JPEG", image.convert(mode), **options)
                for size, channels in ((4, 3), (16, 1), (64, 3)):
                    pixels = decoded(content, tmp_path, size, channels)
                    assert np.array_equal(pixels, as_pillow_reads(content, size, channels))


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_every_chroma_subsampling_is_accepted(subsampling: str, tmp_path: Path) -> None:
    content = simplejpeg.encode_jpeg(np.asarray(photo()), colorsubsampling=subsampling)
    for size in (8, 120):
        assert np.array_equal(decoded(content, tmp_path, size), as_pillow_reads(content, size))


def test_a_subsampling_the_strict_decoder_lacks_goes_to_pillow(tmp_path: Path) -> None:
    plain = saved("JPEG", Image.new("RGB", (32, 16), (128, 128, 128)), subsampling=0)
    frame, scan = plain.index(b"\xff\xc0"), plain.index(b"\xff\xda") + 14
    header = bytearray(plain[:scan])
    header[frame + 11] = 0x42  # 4:1:0, whose blocks are eight of luma (001010 each) and two of chroma (0000 each)
    content = bytes(header) + int("001010" * 8 + "0000" * 2, 2).to_bytes(7, "big") + EOI
    assert decode_jpeg(content, "RGB", 0, 0) is None
    assert (decoded(content, tmp_path, 16) == 128).all()


def test_any_bytes_are_a_picture_or_a_fault() -> None:
    rng = np.random.default_rng(0)
    whole = saved("JPEG", progressive=True)
    for _ in range(200):
        content = bytearray(whole[: rng.integers(2, len(whole))])
        for position in rng.integers(0, len(content), 4):
            content[position] = rng.choice([0, 0xC0, 0xC2, 0xD9, 0xDA, 0xFF])
        try:
            pixels = decode_jpeg(bytes(content), "RGB", 1, 1)
        except ValueError:
            continue
        assert pixels is None or pixels.ndim == 3
    assert not webp_has_a_hole(b"RIFF") and not webp_has_a_hole(bytes(100))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
