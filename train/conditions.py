"""What a base is told of an image's size and crop: the micro-conditions of SDXL and PixArt-alpha.

SDXL (arXiv 2307.01952, Algorithm 1): the size of the source before any rescaling, and the corner of the crop in pixels of the
image *after* its shorter side was resized to the training's. So a crop of the same region has the same corner whatever the
size in which the image is stored. PixArt-alpha: the size of the source, and the aspect ratio of what is trained on.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shards.geometry import Geometry


class Sizes(NamedTuple):
    """All in pixels."""

    source_height: int
    source_width: int
    """Of the source, before extraction shrank it."""
    top: int
    left: int
    """Corner of the crop in the source, scaled as the crop was to the size trained on. Of the mirrored source, if mirrored."""
    height: int
    width: int
    """What is trained on."""


def sizes_of(meta: Mapping[str, Any], stored: tuple[int, int], geometry: Geometry) -> Sizes:
    """meta: the sample's json. stored: (height, width) of its image, of which `geometry` is the part trained on.

    An image whose json does not say what extraction made of its source counts as its own source.
    """
    (source_height, source_width), (top, left, kept_height, kept_width) = _source(meta, stored)
    x, y, width, height = geometry.box

    # The crop in pixels of the source
    down, across = kept_height / stored[0], kept_width / stored[1]
    top, left = top + y * down, left + x * across
    if geometry.flip:
        left = source_width - left - width * across

    # And in pixels of what is trained on
    return Sizes(
        source_height,
        source_width,
        round(top * geometry.height / (height * down)),
        round(left * geometry.width / (width * across)),
        geometry.height,
        geometry.width,
    )


def _source(meta: Mapping[str, Any], stored: tuple[int, int]) -> tuple[tuple[int, int], tuple[float, ...]]:
    """(height, width) of the source, and (top, left, height, width) of the part of it that is stored."""
    image = meta.get("intrinsics", {})
    image = image.get("image", {}) if isinstance(image, Mapping) else {}
    image = image if isinstance(image, Mapping) else {}
    size = _numbers(image.get("original_size"), 2)
    crop = _numbers(image.get("crop"), 4)
    if size is None or min(size) < 1:
        return stored, (0, 0, *stored)
    width, height = size
    if crop is None or min(crop) < 0 or min(crop[2:]) < 1 or crop[0] + crop[2] > width or crop[1] + crop[3] > height:
        crop = [0, 0, width, height]
    return (height, width), (crop[1], crop[0], crop[3], crop[2])


def _numbers(value: Any, count: int) -> list[int] | None:
    whole = isinstance(value, list) and len(value) == count and all(type(item) is int for item in value)
    return list(value) if whole else None
