"""Find image files and turn them into pixels.

Every image becomes 8-bit grey or RGB of one square size: turned upright by its EXIF tag, transparency laid over white,
cropped at the centre, resized with antialiasing.
"""

import hashlib
import math
import os
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm.data.damage import decode_jpeg, png_is_damaged, webp_has_a_hole
from ddpm.errors import UserError, legible

Pixels = npt.NDArray[np.uint8]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
# The formats of these extensions; a file may have the extension of another format. Pillow's other readers are never
# used on files from strangers.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
# Files and folders that systems add to a user's folders, in lower case. Hidden ones are ignored anyway.
SYSTEM_NAMES = frozenset(
    (
        *("@eadir", "@tmp", "@sharebin", "#recycle", "#snapshot"),  # Synology
        *("@recycle", "@recently-snapshot"),  # QNAP
        *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "system volume information"),
        *("lost+found", "~snapshot"),  # file systems
        *("__pycache__", "picasa.ini"),  # programs
    )
)
Image.MAX_IMAGE_PIXELS = None  # dataset.max_megapixels replaces Pillow's limit and its warning


def image_files(folder: Path) -> tuple[list[str], int]:
    """The image files below `folder`, as sorted posix paths relative to it, and how many other files are there.

    Hidden files and folders, and those that systems make, such as thumbnails, are ignored. A link may name a
    file inside `folder`; links to folders inside are skipped, since their files are found in their own place.

    Raises:
        UserError: a link leads out of `folder`.
    """
    real = folder.resolve()
    files, others, pending = [], 0, [folder]
    while pending:
        for entry in os.scandir(pending.pop()):
            path = Path(entry.path)
            is_image, is_folder = path.name.lower().endswith(EXTENSIONS), path.is_dir()
            if path.name.startswith(".") or path.name.lower() in SYSTEM_NAMES:
                continue
            if entry.is_symlink() and (is_image or is_folder):
                if not Path(os.path.realpath(path)).is_relative_to(real):
                    raise UserError(
                        f"{legible(path)}: is a link that leads out of {folder}; put the images themselves there"
                    )
                is_folder = False
            if is_folder:
                pending.append(path)
            elif is_image and path.is_file():
                files.append(path.relative_to(folder).as_posix())
            else:
                others += 1
    return sorted(files), others


def to_pixels(image: Image.Image, size: int, channels: int) -> Pixels:
    """The centre square of a loaded image of any mode, as uint8 (size, size, channels); channels is 1 or 3.

    A square of that size already keeps its pixels as they are.
    """
    image = _eight_bits(image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        # Pillow widens the filter with the scale, so that shrinking does not alias (torchvision's resize needs
        # antialias=True for it). Of its filters Lanczos keeps most detail; FID is computed on such images as a rule.
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.uint8).reshape(size, size, channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in mode "1", "L" or "RGB", without transparency."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        grey = (deep + 128) // 257  # 65535 = 255 x 257; Pillow's own conversion clips at 255 instead
        grey[deep == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(np.rint(np.clip(np.nan_to_num(np.asarray(image)), 0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode in ("1", "L") else image.convert("RGB")


def decode_file(path: str, size: int, channels: int, max_megapixels: float) -> Pixels | str:
    """One image file (the first frame of an animation) as uint8 (size, size, channels), or why it is not an image.

    A file whose header states more than `max_megapixels` million pixels is refused before they are decoded into memory.

    Raises:
        UserError: the file cannot be read, which says nothing about its image.
    """
    content = _read(path)
    if not content:
        return "the file is empty"
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as opened:
            megapixels = opened.width * opened.height / 1e6
            if megapixels > max_megapixels:
                return (
                    f"has {opened.width} x {opened.height} pixels, more than dataset.max_megapixels = "
                    f"{max_megapixels:g} allows; if the picture is genuine, set that to {math.ceil(megapixels)}"
                )
            image = _decoded(opened, content, size)
            with suppress(Exception):  # a damaged EXIF block is no damage to the pixels
                ImageOps.exif_transpose(image, in_place=True)
            return to_pixels(image, size, channels)
    except UnidentifiedImageError:
        return "not a png, jpg, webp, bmp or gif image"
    except Exception as error:  # Pillow's readers raise a dozen kinds, from struct.error to SyntaxError
        return " ".join(str(error).split()) or type(error).__name__


def _decoded(image: Image.Image, content: bytes, size: int) -> Image.Image:
    """Load the pixels of an opened image, and correct what Pillow gets wrong about its transparency.

    Raises:
        ValueError: a part of the image is missing or damaged, as far as its format shows. Pillow raises other errors.
    """
    if image.format in ("JPEG", "MPO"):
        return _decoded_jpeg(image, content, size)
    image.load()
    if image.format == "WEBP" and webp_has_a_hole(content):
        raise ValueError("a part of the file was lost and is zeros")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # all transparent: a channel that was never filled in
    if image.format == "PNG" and png_is_damaged(content):
        raise ValueError("a checksum does not fit the pixels")
    if image.format == "PNG" and "transparency" in image.info:
        _mend_transparency(image, content)
    return image


def _decoded_jpeg(image: Image.Image, content: bytes, size: int) -> Image.Image:
    full = image.size
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, several times faster. Twice the wanted size is kept for
    # the resize to work on.
    image.draft(image.mode, (2 * size, 2 * size))
    if image.mode == "CMYK":
        decode_jpeg(content, "CMYK", 1, 1)
    else:
        height, width = (0, 0) if image.size == full else (image.height, image.width)
        pixels = decode_jpeg(content, "GRAY" if image.mode == "L" else image.mode, height, width)
        if pixels is not None and pixels.shape[:2] == (image.height, image.width):
            whole = Image.fromarray(pixels.squeeze(2) if image.mode == "L" else pixels)
            whole.info = image.info
            return whole
    image.load()
    return image


def _mend_transparency(image: Image.Image, content: bytes) -> None:
    """Convert the transparent colour of a loaded PNG to 8 bits, as Pillow has converted its pixels.

    The file gives the colour at its own bit depth, in the low bits of 16-bit numbers (PNG specification, 11.3.2.1).
    """
    depth, colour_type, colour = content[24], content[25], image.info["transparency"]
    if colour_type == 0 and depth in (2, 4, 8):
        most = 2**depth - 1
        image.info["transparency"] = (colour & most) * (255 // most)
    elif colour_type == 2 and depth == 8:
        image.info["transparency"] = tuple(level & 255 for level in colour)
    elif colour_type == 2:  # 16 bits, of which Pillow reads the high ones: two colours may look the same
        with Image.open(BytesIO(content), formats=("PNG",)) as low:
            low.tile = [low.tile[0]._replace(args="RGB;16L")]  # the file is big-endian: this takes the low ones
            deep = np.asarray(image).astype(np.uint16) * 256 + np.asarray(low)
        del image.info["transparency"]
        clear = Image.fromarray((deep == np.array(colour)).all(axis=2))
        image.paste((255, 255, 255), mask=clear)


def digest_file(path: str) -> bytes:
    """The SHA-256 of a file's content.

    Raises:
        UserError: the file cannot be read.
    """
    return hashlib.sha256(_read(path)).digest()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{legible(path)}: {error.strerror or error}") from None
