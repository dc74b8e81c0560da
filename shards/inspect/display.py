"""Intrinsic maps as colours to look at: single pictures, and sheets of image and maps side by side.

Every picture is uint8 RGB (H, W, 3). Nothing here is read back as data.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.intrinsics import INTRINSICS, IntrinsicMap

SKY = (176, 205, 236)
"""The colour of infinitely far: a pale blue, which the colours of depth do not have."""
_INVALID = (96, 112)  # greys of the stripes over invalid pixels
_PAPER, _INK, _MUTED = (250, 250, 249), (28, 27, 25), (120, 118, 114)


def picture(name: str, item: IntrinsicMap, image: np.ndarray | None = None) -> np.ndarray:
    """The picture of any intrinsic by its name. image: uint8 RGB (H, W, 3), over which segments are laid."""
    if name == "segmentation":
        return segmentation_picture(item, image)
    return {"depth": depth_picture, "normal": normal_picture, "line": line_picture}[name](item)


def depth_picture(depth: IntrinsicMap) -> np.ndarray:
    """Near bright yellow, far dark violet, in even steps of lightness; sky pale blue; invalid grey stripes.

    Metric depth is shown by its logarithm, relative by inverse depth; each over the map's own 1 % to 99 %.
    """
    z = depth.values.astype(np.float64)
    finite = np.isfinite(z)
    nearness = np.where(finite, z, 1)
    if depth.info.get("kind") == "metric":
        nearness = -np.log(np.maximum(nearness, 1e-6))
    low, high = np.quantile(nearness[finite], (0.01, 0.99)) if finite.any() else (0.0, 1.0)
    codes = np.clip(np.rint(255 * (nearness - low) / ((high - low) or 1.0)), 0, 255).astype(np.uint8)
    colours = colour_table()[codes]
    colours[np.isinf(z)] = SKY
    return _striped(colours, np.isnan(z))


def normal_picture(normal: IntrinsicMap) -> np.ndarray:
    """The usual colours: right reddish, up greenish, a surface that faces the camera bluish; invalid grey stripes."""
    invalid = ~INTRINSICS["normal"].valid(normal.values)
    codes = np.rint(127.5 * (np.where(invalid[..., None], 0, normal.values) + 1))
    return _striped(np.clip(codes, 0, 255).astype(np.uint8), invalid)


def segmentation_picture(
    segmentation: IntrinsicMap, image: np.ndarray | None = None, share: float = 0.62
) -> np.ndarray:
    """A colour for each segment, light borders between them; over the image's grey where an image is given.

    image: uint8 RGB (H, W, 3). share: of the segment's colour against the image, 0..1. Pixels of no segment stay grey.
    """
    ids = segmentation.values.astype(np.int64)
    grey: np.ndarray = np.full(ids.shape, 128, np.uint8)
    if image is not None and image.shape[:2] == ids.shape:
        grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    colours: np.ndarray = _segment_colours(int(ids.max()) + 1)[ids].astype(np.float32)
    base = np.repeat(grey[..., None], 3, axis=2).astype(np.float32)
    mixed: np.ndarray = np.where((ids > 0)[..., None], share * colours + (1 - share) * base, 0.5 * base)
    border = np.zeros(ids.shape, bool)
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    border[1:] |= ids[1:] != ids[:-1]
    mixed[border] = 0.2 * mixed[border] + 0.8 * 255
    return np.rint(mixed).astype(np.uint8)


def line_picture(line: IntrinsicMap) -> np.ndarray:
    """Dark on white, as drawn on paper."""
    grey = np.rint(255 * (1 - np.clip(line.values, 0, 1))).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def fit(pixels: np.ndarray, size_px: int) -> Image.Image:
    """A picture made smaller (never larger) so that its longer side is at most `size_px`."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    return picture


def _on_sheet(pixels: np.ndarray, size_px: int) -> Image.Image:
    height, width = pixels.shape[:2]
    if 3 * max(height, width) > size_px:
        return fit(pixels, size_px)
    factor = size_px / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)


SheetRow = tuple[np.ndarray, Mapping[str, IntrinsicMap], str]
"""An image, uint8 RGB (H, W, 3); its maps by name; its caption."""


def sheet(rows: Sequence[SheetRow], size_px: int = 256) -> Image.Image:
    """Rows of image and maps side by side, each with its caption, under the names of the columns.

    rows: may differ in size and in the maps that they have; a column is there if any row has it. size_px: the longer side
    of each picture, at most; tiny ones, of a third of it or less, are enlarged to it. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("a sheet needs at least one row")
    names = [name for name in INTRINSICS if any(name in maps for _, maps, _ in rows)]
    pad, gap = max(12, size_px // 16), max(4, size_px // 48)
    heading, text = (ImageFont.load_default(size=max(10, round(size_px * share))) for share in (0.055, 0.06))
    longest = [max(image.shape[:2]) for image, _, _ in rows]
    column_px = (size_px if 3 * min(longest) <= size_px else min(size_px, max(longest))) + gap
    width = 2 * pad + column_px * (1 + len(names)) - gap
    drawn = []
    for image, maps, caption in rows:
        pictures: list[Image.Image | None] = [_on_sheet(image, size_px)]
        pictures += [_on_sheet(picture(name, maps[name], image), size_px) if name in maps else None for name in names]
        drawn.append((pictures, _wrapped(caption, text, width - 2 * pad)))
    line_px = round(1.45 * max(10, size_px * 0.06))
    heights = [max(p.height for p in pictures if p) + (len(lines) + 1) * line_px for pictures, lines in drawn]
    canvas = Image.new("RGB", (width, 2 * pad + line_px + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(["image", *names]):
        draw.text((pad + column * column_px, pad), name, _MUTED, heading)
    y = pad + line_px
    for (pictures, lines), height in zip(drawn, heights, strict=True):
        below = y + max(p.height for p in pictures if p)
        for column, shown in enumerate(pictures):
            if shown:
                canvas.paste(shown, (pad + column * column_px, y))
        for number, words in enumerate(lines):
            draw.text((pad, below + round((number + 0.2) * line_px)), words, _INK, text)
        y += height
    return canvas


def _wrapped(caption: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> list[str]:
    """A caption in at most three lines of `width` pixels."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == 3:
            lines[-1] += " ..."
            break
        else:
            lines.append(word)
    return lines


# ---- colours ---------------------------------------------------------------------------------------------------------

_TO_CONES = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@lru_cache(maxsize=1)
def colour_table() -> np.ndarray:
    """uint8 (256, 3): from dark violet over red and orange to bright yellow, lightness rising evenly (in OKLab)."""
    t = np.linspace(0, 1, 256)
    chroma = 0.07 + 0.12 * np.sin(np.pi * t**0.9) ** 0.8 + 0.05 * t
    return _from_oklch(0.20 + 0.74 * t, chroma, np.radians(285 + 175 * t))


@lru_cache(maxsize=8)
def _segment_colours(count: int) -> np.ndarray:
    """uint8 (count, 3): hues a golden angle apart, so that neighbouring ids differ, in three steps of lightness."""
    ids = np.arange(count)
    lightness = np.array([0.72, 0.60, 0.82])[ids % 3]
    return _from_oklch(lightness, np.full(count, 0.16), np.radians(ids * 137.50776 % 360))


def _from_oklch(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """OKLab in polar form -> uint8 sRGB (N, 3). The matrices are those of the definition of OKLab."""
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    linear = np.clip((lab @ _TO_CONES.T) ** 3 @ _TO_RGB.T, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


def _striped(colours: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Grey diagonal stripes where `mask` (H, W) is true."""
    rows, columns = np.nonzero(mask)
    colours[rows, columns] = np.asarray(_INVALID, np.uint8)[((rows + columns) // 4) % 2][:, None]
    return colours
