"""JPEG files decoded strictly: what libjpeg only warns of is an error where it changes the image.

Pillow decodes by libjpeg-turbo too, pixel for pixel the same, but drops its warnings. What libjpeg warns of, and how it is
judged:

    premature end, bad code, lost restart marker, wrong order of scans    the image is damaged
    bytes left over after the last block                                  damaged, unless they are at most two, or padding
    unknown version of JFIF, Adobe marker or ICC profile                  harmless; the rest of the file is looked at alone

Scans that are not there at all (a progressive file that was cut between two of them) are no warning: they are counted here.
"""

import re
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image

from extract.images.sniff import SOF_ALL, SOF_PROGRESSIVE

_COLOUR_SPACES = {"L": "GRAY", "RGB": "RGBX", "CMYK": "CMYK"}
"""Pillow's mode: the library's name for pixels that lie in memory as Pillow's do."""
_MOST_KEPT_BYTES = 4 * 16_000_000
_kept = threading.local()
_LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_OF_THE_HEADER = re.compile(r"JFIF revision|Adobe color transform|ICC marker")
_ENDS_EARLY = re.compile(r"premature end", re.IGNORECASE)
_UNKNOWN_SAMPLING = "subsampling level"
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_MOST_STRAY_BYTES = 2  # some cameras leave one or two before the end marker
_SOS, _EOI, _APP0, _APP15, _COM, _ADOBE = 0xDA, 0xD9, 0xE0, 0xEF, 0xFE, 0xEE


class DamagedImage(OSError):
    """A file that some decoders show, but not as it was. cut_off: it ends too early."""

    def __init__(self, message: str, cut_off: bool = False) -> None:
        super().__init__(message)
        self.cut_off = cut_off


def decode(data: bytes, mode: str, size: tuple[int, int], reduced: bool) -> Image.Image | None:
    """The image of a JPEG whose header Pillow read as `mode`; None if Pillow has to decode it.

    That is so where this decoder does not know the sampling, or stumbles over a header that is harmless.
    The image is read-only, and lies in memory that the next call in the same thread uses again.

    size: what is decoded to; reduced: whether that is 1/2, 1/4 or 1/8 of the file's own. Raises DamagedImage, ValueError.
    """
    try:
        pixels = _pixels(data, mode, size, reduced)
    except ValueError as error:
        message = str(error)
        if _UNKNOWN_SAMPLING in message:
            return None
        _judge(data, mode, message)
        _check_scans(data)
        return None
    _check_scans(data)
    if mode == "CMYK":  # files hold inks inverted
        np.invert(pixels, out=pixels)
    return _image_over(pixels, mode)


def _image_over(pixels: np.ndarray, mode: str) -> Image.Image:
    """A read-only image in the memory of the pixels: a copy would cost a tenth of decoding them."""
    height, width = pixels.shape[:2]
    if mode == "RGB":
        cells = pa.Array.from_buffers(pa.uint8(), pixels.size, [None, pa.py_buffer(pixels)])
        return Image.fromarrow(cells, mode, (width, height))
    return Image.frombuffer(mode, (width, height), pixels, "raw", mode, 0, 1)


def _pixels(data: bytes, mode: str, size: tuple[int, int], reduced: bool) -> np.ndarray:
    width, height = size if reduced else (0, 0)
    space = _COLOUR_SPACES[mode]
    memory = _memory(size[0] * size[1] * (1 if mode == "L" else 4))
    pixels = simplejpeg.decode_jpeg(data, space, min_width=width, min_height=height, buffer=memory)
    if pixels.shape[1::-1] != size:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels came where {size[0]} x {size[1]} were due")
    return pixels


def _memory(size: int) -> np.ndarray:
    """At least `size` bytes, those of the thread if they are not too many: fresh pages can cost as much as decoding."""
    if size > _MOST_KEPT_BYTES:
        return np.empty(size, np.uint8)
    kept: np.ndarray | None = getattr(_kept, "memory", None)
    if kept is None or kept.size < size:
        kept = _kept.memory = np.empty(size, np.uint8)
    return kept


# ---- warnings --------------------------------------------------------------------------------------------------------


def _judge(data: bytes, mode: str, warning: str) -> None:
    """Raises DamagedImage unless the warning, and all that it may hide (only the first is told), is harmless."""
    left_over = _LEFT_OVER.search(warning)
    if _OF_THE_HEADER.search(warning) or (left_over and int(left_over[2], 16) != _EOI):
        bare = _without_extras(data)
        hidden = _warning(bare, mode)
        left_over = _LEFT_OVER.search(hidden)
        if hidden and not (left_over and int(left_over[2], 16) == _EOI and _is_padding(bare, mode, int(left_over[1]))):
            raise DamagedImage(hidden, bool(_ENDS_EARLY.search(hidden)))
        return
    if left_over and _is_padding(data, mode, int(left_over[1])):
        return
    raise DamagedImage(warning, bool(_ENDS_EARLY.search(warning)))


def _warning(data: bytes, mode: str) -> str:
    try:
        simplejpeg.decode_jpeg(data, _COLOUR_SPACES[mode], min_factor=8)
    except ValueError as error:
        return str(error)
    return ""


def _is_padding(data: bytes, mode: str, count: int) -> bool:
    """Whether `count` bytes that no block wanted, before the end marker, are only stray ones or padding.

    Bytes of one value may also be what was written over the image: then its last blocks were made of them.
    """
    if count <= _MOST_STRAY_BYTES:
        return True
    end = next((marker.start for marker in _markers(data) if marker.code == _EOI), len(data))
    tail = data[end - count : end]
    if len(set(tail)) != 1:
        return False
    scan = data[:end].rstrip(tail[:1])
    warning = _warning(data[: len(scan) + _MOST_STRAY_BYTES] + data[end:], mode)
    left_over = _LEFT_OVER.search(warning)
    return not warning or (left_over is not None and int(left_over[1]) <= _MOST_STRAY_BYTES)


def _without_extras(data: bytes) -> bytes:
    """The file without comments, application segments (but Adobe's, if it is a usual one) and bytes between segments."""
    kept = [data[:2]]
    for marker in _markers(data):
        if marker.code == _SOS:
            return b"".join(kept) + data[marker.start :]
        usual_adobe = marker.code == _ADOBE and data[marker.end - 1] <= 2
        if usual_adobe or not (_APP0 <= marker.code <= _APP15 or marker.code == _COM):
            kept.append(data[marker.start : marker.end])
    return data


# ---- scans -----------------------------------------------------------------------------------------------------------


class _Marker(NamedTuple):
    """A marker segment: where its FF is, and where it ends (after its length, not after the scan that may follow)."""

    code: int
    start: int
    end: int


def _markers(data: bytes) -> Iterator[_Marker]:
    """The markers of the first image of a file, up to its end marker; those within scans (restarts) left out."""
    position = 2
    while match := _NEXT_MARKER.search(data, position):
        start, code = match.start(), data[match.start() + 1]
        if code in (_EOI, 0x01, 0xD8):
            yield _Marker(code, start, start + 2)
            if code == _EOI:
                return
            position = start + 2
            continue
        position = start + 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
        yield _Marker(code, start, position)


def _check_scans(data: bytes) -> None:
    """Raises DamagedImage if the scans do not bring every coefficient of every component, to its last bit."""
    components: bytes = b""
    progressive = False
    missing: dict[int, set[int]] = {}
    for marker in _markers(data):
        body = data[marker.start + 4 : marker.end]
        if marker.code in SOF_ALL and len(body) >= 6:
            components = body[6 : 6 + 3 * body[5] : 3]
            progressive = marker.code in SOF_PROGRESSIVE
            missing = {component: set(range(64)) for component in components}
        elif marker.code == _SOS and len(body) >= 4:
            of_scan = body[1 : 1 + 2 * body[0] : 2]
            if not progressive and of_scan == components:
                return  # the usual file: all is in one scan
            first, last, low_bit = body[-3], body[-2], body[-1] & 15
            for component in of_scan:
                if component in missing and (not progressive or low_bit == 0):
                    missing[component] -= set(range(first, last + 1)) if progressive else set(range(64))
    if any(missing.values()):
        raise DamagedImage("it lacks scans that its header announces", cut_off=True)
