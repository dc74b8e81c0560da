"""Damage that decoders keep silent about, in the formats that have no checksum; for JPEG see jpeg.py.

A crash or a broken download leaves zeros where pixels were, a crop of the file leaves nothing. Flat parts alone prove
nothing: many good images end in white or black. So each check asks whether the *file* could have been written like this:

    WebP    its decoder wants every byte of a whole file: one that still decodes without its last bytes was not whole
    AVIF    its coder never writes long runs of zeros
    PNG     where the last row is zero, its rows are counted
    BMP, TIFF (raw pixels), JPEG of rare sampling
            a flat rest begins within a row, under a row that goes on: pictures end at the edges of rows
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from extract.images import sniff
from extract.images.jpeg import DamagedImage

_RUNS_OF_WEBP = (bytes(32), b"\xff" * 32)  # good ones of flat parts have them, too, but seldom: each is decoded twice
_ENDS_OF_WEBP = (bytes(8), b"\xff" * 8)
_ZEROS_OF_AVIF, _END_OF_AVIF = bytes(48), bytes(8)  # good ones have up to 20, and none at the end
_WEBP_SPARE_BYTES = 12
_LEAST_STEP = 4  # levels, from the last pixel to the flat rest, and of the row above to it
_LEAST_MEAN = 16  # levels, of the part of the row above that the flat rest lies under
_WHOLE_SHARE = 0.95
_MIN_CELLS = 4


def check_file(data: bytes, kind: str) -> None:
    """Raises DamagedImage for what the bytes of a file say, before it is decoded."""
    if kind == "avif" and _avif_is_zeroed(data):
        raise DamagedImage("parts of its image are zeros, as no encoder writes them")
    if kind == "webp" and _webp_has_spare_bytes(data):
        raise DamagedImage("its image is complete before its data end: parts of them were lost or overwritten")


def check_pixels(image: Image.Image, data: bytes, kind: str) -> None:
    """Raises DamagedImage for what the pixels say: `image` as it was decoded, before anything was done to it."""
    if kind == "png" and _row_is_zero(image, image.height - 1) and not _png_has_all_rows(data):
        raise DamagedImage("it has fewer rows of pixels than its header says", cut_off=True)
    raw = kind == "bmp" or (kind == "tiff" and image.info.get("compression") == "raw")
    if raw and _ends_in_zeros(image, upwards=kind == "bmp" and data[25] < 128):  # a negative height: top to bottom
        raise DamagedImage("its pixels end in zeros, within a row")
    if kind == "jpeg" and flat_rest(_blocks(image)):
        raise DamagedImage("its last blocks are all alike, from within a row on", cut_off=True)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _avif_is_zeroed(data: bytes) -> bool:
    return any(
        data.find(_ZEROS_OF_AVIF, start, end) >= 0 or data.endswith(_END_OF_AVIF, start, end)
        for kind, start, end in sniff.boxes(data)
        if kind == b"mdat"
    )


def _webp_has_spare_bytes(data: bytes) -> bool:
    """Whether a WebP with a suspicious run of equal bytes in its image decodes without the last bytes of it, too."""
    for kind, start, end in sniff.webp_chunks(data):
        if kind in (b"VP8 ", b"VP8L") and end - start > 2 * _WEBP_SPARE_BYTES:
            has_run = any(data.find(run, start, end) >= 0 for run in _RUNS_OF_WEBP)
            suspicious = has_run or data.endswith(_ENDS_OF_WEBP, start, end)
            return suspicious and _decodes(_webp_with_less(data, start, end))
    return False


def _webp_with_less(data: bytes, start: int, end: int) -> bytes:
    """A WebP whose image chunk, from start to end, lacks its last bytes; with right lengths."""
    size = (end - start - _WEBP_SPARE_BYTES) // 2 * 2
    shorter = data[: start - 4] + struct.pack("<I", size) + data[start : start + size] + data[end + end % 2 :]
    return shorter[:4] + struct.pack("<I", len(shorter) - 8) + shorter[8:]


def _decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            image.load()
    except (OSError, ValueError):
        return False
    return True


# ---- rows of PNG -----------------------------------------------------------------------------------------------------


def _row_is_zero(image: Image.Image, y: int) -> bool:
    """Pillow leaves what was not there at zero."""
    return not np.asarray(image.crop((0, y, image.width, y + 1))).any()


def _png_has_all_rows(data: bytes) -> bool:
    """Whether the compressed pixels of a PNG are as many as its header says, and end with their checksum."""
    size, packed = 0, zlib.decompressobj()
    for kind, start, end in sniff.png_chunks(data):
        if kind == b"IHDR":
            size = sniff.png_data_size(data[start:end])
        elif kind == b"IDAT" and not packed.eof:
            piece = packed.decompress(data[start:end], 1 << 20)
            while piece or packed.unconsumed_tail:
                size -= len(piece)
                piece = packed.decompress(packed.unconsumed_tail, 1 << 20)
    return size <= 0 and packed.eof


# ---- flat rests ------------------------------------------------------------------------------------------------------


def _ends_in_zeros(image: Image.Image, upwards: bool) -> bool:
    """Whether raw pixels, stored row by row (upwards: from the lowest on), end in zeros from within a row on."""
    if not _row_is_zero(image, 0 if upwards else image.height - 1):  # nearly always, and it costs nothing
        return False
    return flat_rest(_cells(image)[:: -1 if upwards else 1])


def _cells(image: Image.Image) -> np.ndarray:
    """float32 (H, W): how far each pixel is from zero, in levels; colours of palettes as their numbers."""
    values = np.asarray(image)
    if values.dtype == bool or image.mode == "P":  # no levels: zero is any colour
        return np.where(values, 255.0, 0.0).astype(np.float32)
    levels = values.max(axis=2) if values.ndim == 3 else values
    scale = 1.0 if levels.dtype == np.uint8 else 255 / 65535
    return levels.astype(np.float32) * np.float32(scale)


def _blocks(image: Image.Image) -> np.ndarray:
    """float32 (rows, columns): how far each block of 32 x 32 pixels is from the last pixel; all 0 if that is black or white.

    A decoder that finds no data repeats the last block's mean, which is hardly ever quite black or white.
    """
    size = 32
    values = np.asarray(image).astype(np.int16)
    values = values.reshape(*values.shape[:2], -1)
    last = values[-1, -1]
    if last.min() >= 247 or last.max() <= 8:
        return np.zeros((1, 1), np.float32)
    distance = np.abs(values - last).max(axis=2)
    rows, columns = distance.shape[0] // size, distance.shape[1] // size
    blocks = distance[: rows * size, : columns * size].reshape(rows, size, columns, size)
    return blocks.max(axis=(1, 3)).astype(np.float32)


def flat_rest(distance: np.ndarray) -> bool:
    """Whether cells (rows, columns), in the order of the file, are flat from within a row on to the end.

    distance: from the flat value, in levels. The row above must go on to its end where the last row breaks off, both by a
    clear step; so black bars, dark corners and silhouettes do not count.
    """
    rows, columns = distance.shape
    busy = np.flatnonzero(distance.any(axis=1))
    if rows < 3 or columns < 2 * _MIN_CELLS or not busy.size or not 1 <= busy[-1] < rows - 1:
        return False
    row, above = distance[busy[-1]], distance[busy[-1] - 1]
    first = int(np.flatnonzero(row)[-1]) + 1  # of the flat rest
    if first < 1 or columns - first < _MIN_CELLS:
        return False
    goes_on = float((above[first:] > _LEAST_STEP).mean()) >= _WHOLE_SHARE and float(above[first:].mean()) > _LEAST_MEAN
    return goes_on and float(row[max(0, first - 2) : first].max()) > _LEAST_STEP
