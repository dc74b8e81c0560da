"""A generated picture and its maps side by side, in colours to look at."""

from collections.abc import Mapping

import cv2
import numpy as np

from shards.intrinsics import IntrinsicMap


def sheet(image: np.ndarray, maps: Mapping[str, IntrinsicMap]) -> np.ndarray:
    """uint8 RGB (H, W, 3) and its maps -> uint8 RGB (H, (1 + maps) W, 3), in the order in which they are given."""
    return np.concatenate([image, *(_COLOURS[name](item) for name, item in maps.items())], axis=1)


def _depth(depth: IntrinsicMap) -> np.ndarray:
    """Near is bright and warm, far is dark; infinitely far black, invalid grey. Scaled to the picture's own range."""
    z = depth.values.astype(np.float64)
    finite = np.isfinite(z)
    metric = depth.info.get("kind") == "metric"
    nearness = np.where(finite, -np.log(np.where(finite, z, 1)) if metric else np.where(finite, z, 0), 0)
    low, high = (float(f(nearness[finite])) for f in (np.min, np.max)) if finite.any() else (0.0, 1.0)
    grey = np.clip(255 * (nearness - low) / ((high - low) or 1.0), 0, 255).astype(np.uint8)
    colours = cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO)[..., ::-1].copy()
    colours[np.isinf(z)], colours[np.isnan(z)] = 0, 128
    return colours


def _normal(normal: IntrinsicMap) -> np.ndarray:
    """The usual colours: a surface that faces the camera is bluish; invalid black."""
    return np.rint(127.5 * (np.nan_to_num(normal.values, nan=-1) + 1)).clip(0, 255).astype(np.uint8)


def _segmentation(segmentation: IntrinsicMap) -> np.ndarray:
    """A hue for each id, golden steps apart, so that neighbouring ids differ; none black."""
    ids = segmentation.values.astype(np.int64)
    hue, value = (ids * 111) % 180, 160 + (ids * 37) % 96
    hsv = np.stack([hue, np.full_like(ids, 190), value], axis=2).astype(np.uint8)
    colours = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    colours[ids == 0] = 0
    return colours


def _line(line: IntrinsicMap) -> np.ndarray:
    """Black on white, as drawn."""
    return np.repeat(np.rint(255 * (1 - line.values)).astype(np.uint8)[..., None], 3, axis=2)


_COLOURS = {"depth": _depth, "normal": _normal, "segmentation": _segmentation, "line": _line}
