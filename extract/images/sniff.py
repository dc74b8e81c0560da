"""What a file is, told by its first bytes and never by its name; and header checks that are made before any decoding."""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_TEXT_START = rb"(?:\xef\xbb\xbf)?\s*"
_AVIF_BRANDS = rb"....ftyp(?:avif|avis|(?:mif1|msf1).{4}(?:....)*?avi[fs])"
_SOF_HUFFMAN = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive: what every JPEG reader can decode
_SOF_SEQUENTIAL = frozenset({0xC0, 0xC1})
SOF_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
SOF_ALL = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SOS, _EOI = 0xDA, 0xD9
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class Kind(NamedTuple):
    """A kind of content: its name, and the Pillow plugin that reads it ("" if it is refused by name)."""

    name: str
    plugin: str


# (what to match at the start of the file, kind); the first match counts.
_SIGNATURES: tuple[tuple[re.Pattern[bytes], Kind], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE if pattern.startswith(_TEXT_START) else re.DOTALL), kind)
    for pattern, kind in (
        (rb"\xff\xd8\xff", Kind("jpeg", "JPEG")),
        (rb"\x89PNG\r\n\x1a\n", Kind("png", "PNG")),
        (rb"RIFF....WEBP", Kind("webp", "WEBP")),
        (rb"GIF8[79]a", Kind("gif", "GIF")),
        (rb"BM.{8}....[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", Kind("bmp", "BMP")),
        (rb"II\x2a\x00|MM\x00\x2a|II\x2b\x00|MM\x00\x2b", Kind("tiff", "TIFF")),
        (_AVIF_BRANDS, Kind("avif", "AVIF")),
        (rb"....ftyp(?:heic|heix|hevc|heim|heis|mif1|msf1)", Kind("HEIC image", "")),
        (rb"....ftyp", Kind("video", "")),
        (rb"\x1a\x45\xdf\xa3|RIFF....AVI ", Kind("video", "")),
        (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", Kind("JPEG XL image", "")),
        (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", Kind("JPEG 2000 image", "")),
        (rb"8BPS", Kind("Photoshop document", "")),
        (rb"P[1-7]\s", Kind("PNM image", "")),
        (rb"\x00\x00[\x01\x02]\x00", Kind("icon", "")),
        (rb"%PDF", Kind("PDF document", "")),
        (rb"%!PS|\xc5\xd0\xd3\xc6", Kind("PostScript document", "")),
        (
            _TEXT_START + rb"(?:<\?xml.{0,2000}?)?(?:<!--.{0,2000}?-->\s*)?(?:<!doctype svg|<svg)",
            Kind("SVG drawing", ""),
        ),
    )
)
_NOT_IMAGES: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(_TEXT_START + rb"(?:<\?xml.{0,500}?)?<(?:!doctype html|html|head|body|script)", re.S | re.I),
        "an HTML page",
    ),
    (re.compile(rb"PK\x03\x04"), "a zip archive"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive"),
)
_HEAD_BYTES = 4096


def sniff(data: bytes) -> Kind | None:
    """The kind of an image or document, or None if the content is none that is known."""
    head = data[:_HEAD_BYTES]
    return next((kind for pattern, kind in _SIGNATURES if pattern.match(head)), None)


def guess_other(data: bytes) -> str:
    """Words for content that is not an image, for a message."""
    head = data[:_HEAD_BYTES]
    known = next((words for pattern, words in _NOT_IMAGES if pattern.match(head)), None)
    return known or f"unknown content that starts with {head[:8].hex(' ')}"


class JpegHeader(NamedTuple):
    """What the segments before the first scan say.

    complete: the scan was reached before the data ended. portable: Huffman-coded, so that every reader can decode it.
    one_scan: sequential, with all components in the first scan; a decoder then takes no second one.
    """

    complete: bool
    portable: bool
    one_scan: bool


def jpeg_header(data: bytes) -> JpegHeader:
    """Walks the segments of a JPEG up to its first scan."""
    position, portable = 2, False
    frames: list[tuple[int, int]] = []  # marker, number of components
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            position += 1  # some writers leave stray bytes between segments, and readers skip them
            continue
        marker = data[position + 1]
        if marker == _SOS:
            sequential = len(frames) == 1 and frames[0][0] in _SOF_SEQUENTIAL
            return JpegHeader(True, portable, sequential and data[position + 4 : position + 5] == bytes([frames[0][1]]))
        if marker == _EOI:
            break
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
            continue
        if marker in SOF_ALL:
            portable = marker in _SOF_HUFFMAN
            frames.append((marker, int.from_bytes(data[position + 9 : position + 10], "big")))
        position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    return JpegHeader(False, portable, False)


def jpeg_scans(data: bytes) -> int:
    """An upper bound of the number of scans: inside compressed data the byte FF is never followed by a marker's code."""
    return 1 if jpeg_header(data).one_scan else data.count(b"\xff\xda")


def webp_canvas(data: bytes) -> tuple[int, int, bool] | None:
    """(width, height, animated) of a WebP by its first chunk, before a decoder allocates its canvas; None if unreadable."""
    kind, body = data[12:16], data[20:]
    if kind == b"VP8X" and len(body) >= 10:
        return _int24(body[4:7]) + 1, _int24(body[7:10]) + 1, bool(body[0] & 2)
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, False
    if kind == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        return _int16(body[6:8]) & 0x3FFF, _int16(body[8:10]) & 0x3FFF, False
    return None


def _int16(data: bytes) -> int:
    return int.from_bytes(data, "little")


_int24 = _int16


def is_cut_off(data: bytes, name: str) -> bool:
    """Whether the container's own lengths say that the file of this kind ends too early."""
    if name == "jpeg":
        return not jpeg_header(data).complete
    if name == "png":
        return not _png_has_end(data)
    if name == "webp":
        return len(data) < 12 or int.from_bytes(data[4:8], "little") + 8 > len(data)
    if name == "gif":
        return not data.rstrip(b"\x00").endswith(b";")
    if name == "bmp":
        return len(data) < 26
    if name == "tiff":
        big_endian = data[:1] == b"M"
        return len(data) < 8 or int.from_bytes(data[4:8], "big" if big_endian else "little") + 2 > len(data)
    return _boxes_cut_off(data)


def _png_has_end(data: bytes) -> bool:
    return any(kind == b"IEND" for kind, _, _ in png_chunks(data))


def png_is_damaged(data: bytes) -> bool:
    """Whether the checksum of a chunk that matters is wrong; Pillow does not look at those of the pixels."""
    view = memoryview(data)
    return any(
        kind in (b"IHDR", b"PLTE", b"IDAT") and zlib.crc32(view[start - 4 : end]) != _int32(data[end : end + 4])
        for kind, start, end in png_chunks(data)
    )


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start and end of its content) of each chunk that is there as a whole."""
    position = 8
    while (end := position + 8 + _int32(data[position : position + 4])) + 4 <= len(data):
        kind = data[position + 4 : position + 8]
        yield kind, position + 8, end
        if kind == b"IEND":
            return
        position = end + 4


def png_data_size(header: bytes) -> int:
    """How many bytes the pixels of a PNG are before compression, by the content of its IHDR."""
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", header)
    bits_per_pixel = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 0)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)  # first column and row, and steps
    size = 0
    for x, y, step_x, step_y in passes:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            size += rows * (1 + (columns * bits_per_pixel + 7) // 8)
    return size


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start and end of its content) of each chunk of a WebP that is there as a whole."""
    position = 12
    while (start := position + 8) <= len(data):
        end = start + int.from_bytes(data[position + 4 : start], "little")
        if end > len(data):
            return
        yield data[position : position + 4], start, end
        position = end + (end - start) % 2


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start and end of its content) of each box of an ISO media file (AVIF), or of those within a box."""
    end = len(data) if end is None else end
    position = start
    while position + 8 <= end:
        size, head = _int32(data[position : position + 4]), 8
        if size == 1:  # 64-bit size follows
            size, head = _int32(data[position + 8 : position + 16]), 16
        if size == 0:  # to the end
            size = end - position
        if size < head or position + size > end:
            return
        yield data[position + 4 : position + 8], position + head, position + size
        position += size


def _int32(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _boxes_cut_off(data: bytes) -> bool:
    """Whether the last top-level box of an ISO media file (AVIF) reaches beyond the end."""
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 0:  # to the end of the file
            return False
        if size == 1:  # 64-bit size follows
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:
            return False  # not a length: the file is corrupt rather than cut off
        position += size
    return position > len(data)
