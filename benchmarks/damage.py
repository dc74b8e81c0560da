"""Damaged image files: how many are refused, by kind and format, and whether any good file is.

    python -m benchmarks.damage [--good 2000] [--damaged 500] [--seed 0]

Good files are photographs, drawings and flat images (white bottoms, black bars, one colour) in every format that is read,
written by Pillow, OpenCV, tifffile, simplejpeg, imageio and, where it is installed, libjpeg-turbo's `cjpeg` (arithmetic
coding, restart markers, unusual sampling). A damaged file is a good one that was cut, flipped, zeroed or closed too early;
only files whose pixels really change, or that no longer decode, count.
"""

import argparse
import functools
import io
import shutil
import struct
import subprocess
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import imageio.v3 as imageio
import numpy as np
import simplejpeg
import tifffile
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from skimage import data as photographs

from extract.images.prepare import ImageProblem, ImageRules, prepare
from extract.images.sniff import sniff

RULES = ImageRules(size_px=None, min_side_px=8, max_aspect=100, format="png")


@dataclass(frozen=True)
class File:
    """An image file. format: by content; encoder: who wrote it and how; scene: what is on it."""

    format: str
    encoder: str
    scene: str
    content: bytes


# ---- what is on the images -------------------------------------------------------------------------------------------


@functools.cache
def _sources() -> list[np.ndarray]:
    return [photographs.astronaut(), photographs.coffee(), photographs.chelsea(), photographs.rocket()]


def _photograph(rng: np.random.Generator) -> np.ndarray:
    pixels = _sources()[rng.integers(len(_sources()))]
    height, width = (int(side) for side in rng.integers(40, 290, 2))
    y, x = (int(rng.integers(0, limit)) for limit in (pixels.shape[0] - height, pixels.shape[1] - width))
    return np.ascontiguousarray(pixels[y : y + height, x : x + width])


def _white_bottom(rng: np.random.Generator) -> np.ndarray:
    pixels = _photograph(rng)
    pixels[int(pixels.shape[0] * rng.uniform(0.2, 0.9)) :] = 255
    return pixels


def _letterbox(rng: np.random.Generator) -> np.ndarray:
    pixels = _photograph(rng)
    bar = int(pixels.shape[0] * rng.uniform(0.05, 0.4))
    pixels[:bar] = pixels[-bar:] = int(rng.choice([0, 0, 16]))
    return pixels


def _one_colour(rng: np.random.Generator) -> np.ndarray:
    height, width = (int(side) for side in rng.integers(40, 500, 2))
    colour = rng.choice([np.zeros(3), np.full(3, 255), np.full(3, 128), rng.integers(0, 256, 3)])
    return np.full((height, width, 3), colour, np.uint8)


def _drawing(rng: np.random.Generator) -> np.ndarray:
    image = Image.new("RGB", tuple(int(side) for side in rng.integers(60, 400, 2)), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 6))):
        box = np.sort(rng.integers(0, min(image.size), (2, 2)), axis=0)
        draw.ellipse([int(value) for value in box.ravel()], fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    return np.asarray(image)


def _night(rng: np.random.Generator) -> np.ndarray:
    """A few lights on pure black: rows that begin bright and end in zeros."""
    pixels = np.zeros((int(rng.integers(50, 300)), int(rng.integers(50, 300)), 3), np.uint8)
    for _ in range(12):
        y, x = (int(rng.integers(0, side - 4)) for side in pixels.shape[:2])
        pixels[y : y + 4, x : x + 4] = rng.integers(60, 256, 3)
    return pixels


def _turned(rng: np.random.Generator) -> np.ndarray:
    """A photograph that was turned a little, with black corners."""
    image = Image.fromarray(_photograph(rng))
    return np.asarray(image.rotate(float(rng.uniform(-20, 20)), expand=bool(rng.integers(2))))


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (*(int(side) for side in rng.integers(40, 200, 2)), 3), np.uint8)


SCENES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "photograph": _photograph,
    "white bottom": _white_bottom,
    "letterbox": _letterbox,
    "one colour": _one_colour,
    "drawing": _drawing,
    "night": _night,
    "turned": _turned,
    "noise": _noise,
}
_SHARES = (0.5, 0.1, 0.1, 0.06, 0.08, 0.05, 0.06, 0.05)


# ---- who writes them -------------------------------------------------------------------------------------------------


def _pillow(pixels: np.ndarray, plugin: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.quantize(64) if mode == "P" else image.convert(mode)).save(buffer, plugin, **options)
    return buffer.getvalue()


def _opencv(pixels: np.ndarray, suffix: str, *options: int) -> bytes:
    return bytes(cv2.imencode(suffix, pixels if pixels.ndim == 2 else pixels[..., ::-1], list(options))[1])


def _tifffile(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", **options)
    return buffer.getvalue()


def _cjpeg(pixels: np.ndarray, *options: str) -> bytes:
    portable = _pillow(pixels, "PPM")
    return subprocess.run(["cjpeg", *options], input=portable, capture_output=True, check=True).stdout


def _grey(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _rgba(pixels: np.ndarray) -> np.ndarray:
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    alpha[: len(alpha) // 2] = np.linspace(60, 255, alpha.shape[1]).astype(np.uint8)
    return np.dstack([pixels, alpha])


def _huge_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    return exif.tobytes()


def _segments(content: bytes, count: int) -> bytes:
    """A JPEG with `count` further application segments of 60 KB before its image."""
    segment = b"\xff\xe2" + struct.pack(">H", 60_002) + b"A" * 60_000
    return content[:2] + segment * count + content[2:]


def _padded(content: bytes, fill: bytes) -> bytes:
    """A JPEG with fill bytes before its end marker, as encoders in hardware write it."""
    return content[:-2] + fill + content[-2:]


_QUALITY, _PROGRESSIVE, _RESTART = cv2.IMWRITE_JPEG_QUALITY, cv2.IMWRITE_JPEG_PROGRESSIVE, cv2.IMWRITE_JPEG_RST_INTERVAL
_OPTIMISED, _SAMPLING = cv2.IMWRITE_JPEG_OPTIMIZE, cv2.IMWRITE_JPEG_SAMPLING_FACTOR

ENCODERS: dict[str, dict[str, Callable[[np.ndarray], bytes]]] = {
    "jpeg": {
        "Pillow": lambda p: _pillow(p, "JPEG"),
        "Pillow, 4:4:4": lambda p: _pillow(p, "JPEG", quality=95, subsampling=0),
        "Pillow, quality 5": lambda p: _pillow(p, "JPEG", quality=5),
        "Pillow, optimised": lambda p: _pillow(p, "JPEG", optimize=True),
        "Pillow, progressive": lambda p: _pillow(p, "JPEG", progressive=True, subsampling=1),
        "Pillow, restart blocks": lambda p: _pillow(p, "JPEG", restart_marker_blocks=3),
        "Pillow, restart rows": lambda p: _pillow(p, "JPEG", restart_marker_rows=1),
        "Pillow, grey": lambda p: _pillow(p, "JPEG", "L"),
        "Pillow, grey progressive": lambda p: _pillow(p, "JPEG", "L", progressive=True),
        "Pillow, CMYK": lambda p: _pillow(p, "JPEG", "CMYK"),
        "Pillow, RGB kept": lambda p: _pillow(p, "JPEG", keep_rgb=True),
        "Pillow, huge EXIF": lambda p: _pillow(p, "JPEG", exif=_huge_exif()),
        "Pillow, many segments": lambda p: _segments(_pillow(p, "JPEG"), 12),
        "Pillow, comment": lambda p: _pillow(p, "JPEG", comment=b"\xff\xd9\xff\xda" * 9),
        "Pillow, two pictures": lambda p: _pillow(p, "MPO", save_all=True, append_images=[Image.fromarray(p)]),
        "Pillow, second picture cut": lambda p: _pillow(p, "MPO", save_all=True, append_images=[Image.fromarray(p)])[
            :-99
        ],
        "Pillow, a film after it": lambda p: _pillow(p, "JPEG") + b"\0\0\0\x18ftypmp42" + bytes(3000),
        "Pillow, zeros after it": lambda p: _pillow(p, "JPEG") + bytes(5000),
        "Pillow, zeros before end": lambda p: _padded(_pillow(p, "JPEG"), bytes(13)),
        "Pillow, FF before end": lambda p: _padded(_pillow(p, "JPEG"), b"\xff" * 9),
        "Pillow, a stray byte": lambda p: _padded(_pillow(p, "JPEG"), b"\x41"),
        "OpenCV": lambda p: _opencv(p, ".jpg"),
        "OpenCV, progressive": lambda p: _opencv(p, ".jpg", _PROGRESSIVE, 1, _OPTIMISED, 1),
        "OpenCV, restart": lambda p: _opencv(p, ".jpg", _RESTART, 5, _QUALITY, 70),
        "OpenCV, 4:1:1": lambda p: _opencv(p, ".jpg", _SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
        "OpenCV, 4:4:0": lambda p: _opencv(p, ".jpg", _SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
        "simplejpeg, 4:2:2": lambda p: simplejpeg.encode_jpeg(p, 85, "RGB", "422", False),
        "imageio": lambda p: bytes(imageio.imwrite("<bytes>", p, extension=".jpg")),
    },
    "png": {
        "Pillow": lambda p: _pillow(p, "PNG"),
        "Pillow, grey": lambda p: _pillow(p, "PNG", "L"),
        "Pillow, palette": lambda p: _pillow(p, "PNG", "P"),
        "Pillow, one bit": lambda p: _pillow(p, "PNG", "1"),
        "Pillow, alpha": lambda p: _pillow(_rgba(p), "PNG", "RGBA"),
        "OpenCV": lambda p: _opencv(p, ".png"),
        "OpenCV, 16 bits": lambda p: _opencv(p.astype(np.uint16) * 257, ".png"),
        "OpenCV, 16-bit grey": lambda p: _opencv(_grey(p).astype(np.uint16) * 257, ".png"),
    },
    "webp": {
        "Pillow": lambda p: _pillow(p, "WEBP"),
        "Pillow, quality 10": lambda p: _pillow(p, "WEBP", quality=10, method=6),
        "Pillow, fast": lambda p: _pillow(p, "WEBP", quality=90, method=0),
        "Pillow, lossless": lambda p: _pillow(p, "WEBP", lossless=True),
        "Pillow, alpha": lambda p: _pillow(_rgba(p), "WEBP", "RGBA"),
        "Pillow, EXIF": lambda p: _pillow(p, "WEBP", exif=_huge_exif()),
        "OpenCV": lambda p: _opencv(p, ".webp", cv2.IMWRITE_WEBP_QUALITY, 75),
    },
    "avif": {
        "Pillow": lambda p: _pillow(p, "AVIF", speed=9),
        "Pillow, quality 30": lambda p: _pillow(p, "AVIF", quality=30, speed=8),
        "Pillow, 4:4:4": lambda p: _pillow(p, "AVIF", quality=90, subsampling="4:4:4", speed=9),
        "Pillow, grey": lambda p: _pillow(p, "AVIF", "L", speed=9),
        "Pillow, alpha": lambda p: _pillow(_rgba(p), "AVIF", "RGBA", speed=9),
        "OpenCV": lambda p: _opencv(p, ".avif", cv2.IMWRITE_AVIF_SPEED, 9),
    },
    "tiff": {
        "Pillow": lambda p: _pillow(p, "TIFF"),
        "Pillow, LZW": lambda p: _pillow(p, "TIFF", compression="tiff_lzw"),
        "Pillow, deflate": lambda p: _pillow(p, "TIFF", compression="tiff_adobe_deflate"),
        "Pillow, packed bits": lambda p: _pillow(p, "TIFF", compression="packbits"),
        "Pillow, JPEG": lambda p: _pillow(p, "TIFF", compression="jpeg"),
        "Pillow, fax": lambda p: _pillow(p, "TIFF", "1", compression="group4"),
        "OpenCV": lambda p: _opencv(p, ".tiff"),
        "tifffile": lambda p: _tifffile(p),
        "tifffile, big endian": lambda p: _tifffile(p, byteorder=">"),
        "tifffile, strips": lambda p: _tifffile(p, rowsperstrip=7),
        "tifffile, zlib": lambda p: _tifffile(p, compression="zlib", predictor=True),
        "tifffile, tiles": lambda p: _tifffile(p, tile=(64, 64)),
        "tifffile, 16-bit grey": lambda p: _tifffile(_grey(p).astype(np.uint16) * 257),
    },
    "bmp": {
        "Pillow": lambda p: _pillow(p, "BMP"),
        "Pillow, grey": lambda p: _pillow(p, "BMP", "L"),
        "Pillow, palette": lambda p: _pillow(p, "BMP", "P"),
        "Pillow, one bit": lambda p: _pillow(p, "BMP", "1"),
        "OpenCV": lambda p: _opencv(p, ".bmp"),
    },
    "gif": {
        "Pillow": lambda p: _pillow(p, "GIF", "P"),
        "Pillow, interlaced": lambda p: _pillow(p, "GIF", "P", interlace=1),
        "Pillow, grey": lambda p: _pillow(p, "GIF", "L", interlace=0),
        "imageio": lambda p: bytes(imageio.imwrite("<bytes>", p, extension=".gif")),
    },
}
if shutil.which("cjpeg"):
    ENCODERS["jpeg"] |= {
        "cjpeg, arithmetic": lambda p: _cjpeg(p, "-arithmetic"),
        "cjpeg, arithmetic progressive": lambda p: _cjpeg(p, "-arithmetic", "-progressive"),
        "cjpeg, 4:1:0": lambda p: _cjpeg(p, "-sample", "4x2"),
        "cjpeg, restart": lambda p: _cjpeg(p, "-restart", "2B"),
        "cjpeg, optimised restart": lambda p: _cjpeg(p, "-optimize", "-restart", "1"),
        "cjpeg, odd sampling": lambda p: _cjpeg(p, "-sample", "2x2,2x1,1x2"),
    }
_FORMAT_SHARES = {"jpeg": 0.46, "png": 0.1, "webp": 0.14, "avif": 0.08, "tiff": 0.12, "bmp": 0.05, "gif": 0.05}


def good_files(count: int, seed: int) -> Iterator[File]:
    """Varied good files, the same for the same seed."""
    rng = np.random.default_rng([seed, 1])
    formats, scenes = list(_FORMAT_SHARES), list(SCENES)
    used: Counter[str] = Counter()
    for _ in range(count):
        kind = formats[rng.choice(len(formats), p=list(_FORMAT_SHARES.values()))]
        encoders = list(ENCODERS[kind])
        encoder = encoders[used[kind] % len(encoders)]
        used[kind] += 1
        scene = scenes[rng.choice(len(scenes), p=_SHARES)]
        if scene == "one colour" and "alpha" in encoder:  # blank, and refused as such
            scene = "drawing"
        yield File(kind, encoder, scene, ENCODERS[kind][encoder](SCENES[scene](rng)))


# ---- damage ----------------------------------------------------------------------------------------------------------


def _somewhere(content: bytes, rng: np.random.Generator) -> int:
    """A position in the part of a file that mostly holds pixels."""
    return int(len(content) * rng.uniform(0.3, 0.95))


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: _somewhere(content, rng)]


def _zero_tail(content: bytes, rng: np.random.Generator) -> bytes:
    at = _somewhere(content, rng)
    return content[:at] + bytes(len(content) - at)


def _zero_pages(content: bytes, rng: np.random.Generator) -> bytes:
    """The last pages of a file system were never written."""
    at = min(max(512, _somewhere(content, rng) // 512 * 512), len(content) - 1)
    return content[:at] + bytes(len(content) - at)


def _zero_hole(content: bytes, rng: np.random.Generator) -> bytes:
    at, size = _somewhere(content, rng), max(64, len(content) // 10)
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    at = _somewhere(content, rng)
    return content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :]


def _burst(content: bytes, rng: np.random.Generator) -> bytes:
    at = _somewhere(content, rng)
    return content[:at] + rng.bytes(len(content[at : at + 48])) + content[at + 48 :]


def _lost_piece(content: bytes, rng: np.random.Generator) -> bytes:
    at = _somewhere(content, rng)
    return content[:at] + content[at + max(40, len(content) // 20) :]


def closed(content: bytes) -> bytes:
    """A file that was cut, with the ends and lengths of its container put right."""
    kind = sniff(content)
    name = kind.name if kind else ""
    if name == "jpeg":
        return content + b"\xff\xd9"
    if name == "gif":
        return content + b"\0;"
    if name == "webp":
        chunk = 12 if content[12:16] != b"VP8X" else content.index(b"VP8", 30)
        body = content if len(content) % 2 == 0 else content + b"\0"
        sized = body[: chunk + 4] + struct.pack("<I", len(body) - chunk - 8) + body[chunk + 8 :]
        return sized[:4] + struct.pack("<I", len(sized) - 8) + sized[8:]
    if name == "png":
        at = content.index(b"IDAT") - 4
        data = content[at + 8 : at + 8 + struct.unpack_from(">I", content, at)[0]]
        chunks = ((b"IDAT", data), (b"IEND", b""))
        return content[:at] + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    return content


def _cut_and_closed(content: bytes, rng: np.random.Generator) -> bytes:
    return closed(_cut(content, rng))


DAMAGE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "cut": _cut,
    "cut and closed": _cut_and_closed,
    "zero tail": _zero_tail,
    "zero pages": _zero_pages,
    "zero hole": _zero_hole,
    "lost piece": _lost_piece,
    "48 random bytes": _burst,
    "one bit flipped": _flip,
}


def _pixels(content: bytes) -> np.ndarray | None:
    """What a decoder that forgives everything makes of a file; None if nothing."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception:
        return None


def damaged_files(count: int, seed: int) -> Iterator[tuple[str, File]]:
    """(kind of damage, file): files that no longer show what they showed, of each kind about as many."""
    rng = np.random.default_rng([seed, 2])
    kinds, made = list(DAMAGE), 0
    for file in good_files(20 * count, seed + 1000):
        if file.scene in ("one colour",):
            continue
        kind = kinds[made % len(kinds)]
        content = DAMAGE[kind](file.content, rng)
        before, after = _pixels(file.content), _pixels(content)
        if before is None or (after is not None and np.array_equal(before, after)):
            continue  # what was hit is not the image
        made += 1
        yield kind, File(file.format, file.encoder, file.scene, content)
        if made == count:
            return


def refusal(content: bytes) -> ImageProblem | None:
    try:
        prepare(content, RULES)
    except ImageProblem as problem:
        return problem
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged image files that are found, and good ones that are refused.")
    parser.add_argument("--good", type=int, default=2000)
    parser.add_argument("--damaged", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console()

    refused: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    for file in good_files(given.good, given.seed):
        formats[file.format] += 1
        if problem := refusal(file.content):
            refused[file.format] += 1
            console.print(f"refused, though good: {file.format} by {file.encoder}, {file.scene}: {problem}")
    found: Counter[tuple[str, str]] = Counter()
    counted: Counter[tuple[str, str]] = Counter()
    for kind, file in damaged_files(given.damaged, given.seed):
        counted[kind, file.format] += 1
        found[kind, file.format] += refusal(file.content) is not None

    table = Table(title=f"{given.damaged} damaged files: found / counted; {given.good} good files: refused / counted")
    table.add_column("")
    for name in (*ENCODERS, "all"):
        table.add_column(name, justify="right")
    for kind in DAMAGE:
        cells = [(found[kind, name], counted[kind, name]) for name in ENCODERS]
        table.add_row(kind, *_cells(cells))
    cells = [(sum(found[k, n] for k in DAMAGE), sum(counted[k, n] for k in DAMAGE)) for n in ENCODERS]
    table.add_row("damaged, all", *_cells(cells), end_section=True)
    table.add_row("good, refused", *_cells([(refused[name], formats[name]) for name in ENCODERS]))
    console.print(table)


def _cells(cells: list[tuple[int, int]]) -> list[str]:
    total = (sum(cell[0] for cell in cells), sum(cell[1] for cell in cells))
    return [f"{first} / {second}" if second else "" for first, second in (*cells, total)]


if __name__ == "__main__":
    main()
