"""Find damage in image files that Pillow's decoders do not report."""

import re
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

# A scan ends at the first marker that is not part of it: FF 00 is a data byte FF, D0 to D7 are restarts, FF FF is fill.
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1, 0xC9), (0xC2, 0xCA)
_SOS, _EOI = 0xDA, 0xD9
# Hardware encoders pad a file to whole words; more bytes than that between image and end marker are a lost part.
_ALIGNMENT = re.compile(r"Corrupt JPEG data: [1-7] extraneous bytes before marker 0xd9")
_HOLE = bytes(16)
_SPARE = 8  # bytes at the end of a WebP's picture that an encoder may add to align it
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file")


def decode_jpeg(content: bytes, colorspace: str, height: int, width: int) -> npt.NDArray[np.uint8] | None:
    """A JPEG as uint8 (h, w, channels), at the smallest scale with h >= `height` and w >= `width`; 0, 0: full size.

    The pixels are those of libjpeg-turbo, which Pillow uses, too. Returns None where this strict decoder does not know
    the kind of JPEG, or warns of something that does not harm the pixels: use another decoder then.

    Args:
        content: of the whole file.
        colorspace: RGB or GRAY; CMYK for JPEGs of four components only.

    Raises:
        ValueError: a part of the image is missing or damaged.
    """
    if _lacks_scans(content):
        raise ValueError("Premature end of JPEG file: the last scans of the progressive image are missing")
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colorspace, min_height=height, min_width=width)
        return pixels
    except ValueError as error:
        faults = [str(error)]
    # libjpeg reports only its first warning, and a harmless one may hide a serious one: remove what is harmless.
    for zeros in (len(content), 0, 1):  # 1: where the image itself ends in a zero
        try:
            simplejpeg.decode_jpeg(_bare(content, zeros), colorspace, min_height=1, min_width=1)
            return None
        except ValueError as error:
            faults.append(str(error))
            if _ALIGNMENT.fullmatch(faults[-1]):
                return None
    damage = [fault for fault in faults if fault.startswith(_DAMAGE)]
    if damage:
        raise ValueError(damage[-1])
    return None


def _bare(content: bytes, zeros: int) -> bytes:
    """A JPEG reduced to what its pixels need: no application segments, comments, or bytes between segments.

    Args:
        zeros: how many zeros to keep at the end of each scan, where they may be padding.
    """
    parts, sequential = [b"\xff\xd8"], False
    for marker, segment, scan in _segments(content):
        sequential = sequential or marker in _SEQUENTIAL
        if marker == _SOS and sequential:  # some cameras leave the values that only progressive scans use undefined
            segment = segment[:-3] + b"\x00\x3f\x00"
        if not 0xE0 <= marker <= 0xEF and marker != 0xFE:
            parts += [segment, scan[: len(scan.rstrip(b"\0")) + zeros]]
    return b"".join(parts)


def _lacks_scans(content: bytes) -> bool:
    """Whether a progressive JPEG lacks the last bit of any coefficient of its first component."""
    first, missing = -1, set(range(64))
    for marker, segment, _ in _segments(content):
        if marker in _PROGRESSIVE and len(segment) > 10:
            first = segment[10]
        elif marker in _SEQUENTIAL:
            return False
        elif marker == _SOS and first in segment[5:-3:2] and segment[-1] & 15 == 0:
            missing -= set(range(segment[-3], segment[-2] + 1))
    return first >= 0 and bool(missing)


def _segments(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each segment up to the end marker: its marker, the whole segment, and the entropy-coded data behind it."""
    at = 2
    while 0 <= (at := content.find(b"\xff", at)) < len(content) - 1:
        marker = content[at + 1]
        if marker in (0, 1, 0xFF) or 0xD0 <= marker <= 0xD8:  # without content
            at += 1
        elif marker == _EOI:
            yield marker, content[at : at + 2], b""
            return
        else:
            segment = content[at : at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")]
            at = end = at + max(2, len(segment))
            if marker == _SOS:
                end = found.start() if (found := _SCAN_END.search(content, at)) else len(content)
            yield marker, segment, content[at:end]
            at = end


def png_is_damaged(content: bytes) -> bool:
    """Whether the checksum of a chunk of pixels or of the palette does not fit, in a PNG that decodes."""
    view, at = memoryview(content), 8
    while at + 8 <= len(content):
        size, tag = int.from_bytes(view[at : at + 4], "big"), view[at + 4 : at + 8]
        end = at + 8 + size
        if tag in (b"IDAT", b"PLTE") and zlib.crc32(view[at + 4 : end]).to_bytes(4, "big") != view[end : end + 4]:
            return True
        if tag == b"IEND":
            break
        at = end + 4
    return False


def webp_has_a_hole(content: bytes) -> bool:
    """Whether a part of the first frame was lost and is zeros, as in a broken download, in a WebP that decodes.

    Any bytes decode to some picture, and intact files may hold thousands of zeros. But the decoder reads an intact file
    to its last byte, and a file with a hole not to the end: such a file decodes even without its last bytes.
    """
    picture = _webp_picture(content)
    if _HOLE not in picture:
        return False
    tag, data = picture[:4], picture[8:-_SPARE]
    body = b"WEBP" + tag + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2)
    try:
        with Image.open(BytesIO(b"RIFF" + len(body).to_bytes(4, "little") + body), formats=("WEBP",)) as image:
            image.load()
    except Exception:
        return False
    return True


def _webp_picture(content: bytes) -> bytes:
    """The chunk that holds the pixels of the first frame, apart from its alpha channel; empty if there is none."""
    at = 12
    while at + 8 <= len(content):
        tag, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if tag in (b"VP8 ", b"VP8L"):
            return content[at : at + 8 + size]
        at += 8 + (16 if tag == b"ANMF" else size + size % 2)  # a frame of an animation holds chunks of its own
    return b""
