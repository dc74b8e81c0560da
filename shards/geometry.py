"""Crops, resizes and flips an image together with its maps, so that they keep telling the truth about each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from shards.core.errors import UsageError
from shards.intrinsics import IntrinsicMap, describe_segments, order_segments


@dataclass(frozen=True)
class Geometry:
    """What is done to an image and its maps: crop to `box`, flip, resize to (height, width).

    box: (x, y, width, height) in pixels of the source. A focal length is scaled with the resize.
    """

    box: tuple[int, int, int, int]
    height: int
    width: int
    flip: bool = False

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (height, width, 3); area-averaged when it shrinks, Lanczos when it grows."""
        return self._resize(self._cut(image), cv2.INTER_AREA if self._shrinks else cv2.INTER_LANCZOS4)

    def maps(self, maps: Mapping[str, IntrinsicMap]) -> dict[str, IntrinsicMap]:
        """Depth, normals and segments take the nearest pixel, so that no value is made up across an edge; lines are
        averaged. A flip negates the normals' x. Segments are numbered anew."""
        return {name: self._map(name, item) for name, item in maps.items()}

    def _map(self, name: str, item: IntrinsicMap) -> IntrinsicMap:
        values, info = self._cut(item.values), dict(item.info)
        if name == "line":
            values = self._resize(values, cv2.INTER_AREA if self._shrinks else cv2.INTER_LINEAR)
            return IntrinsicMap(np.clip(values, 0, 1), info)
        values = self._nearest(values)
        if name == "normal" and self.flip:
            values = values * np.array([-1, 1, 1], np.float32)
        elif name == "segmentation":
            values, info = _renumber(values, info)
        elif name == "depth" and info.get("focal_px"):
            info["focal_px"] = float(info["focal_px"]) * self.width / self.box[2]
        return IntrinsicMap(values, info)

    @property
    def _shrinks(self) -> bool:
        return self.width < self.box[2]

    def _cut(self, values: np.ndarray) -> np.ndarray:
        x, y, width, height = self.box
        cut = values[y : y + height, x : x + width]
        if cut.shape[:2] != (height, width):
            raise UsageError(f"a crop {self.box} does not fit an image of {values.shape[1]} x {values.shape[0]} pixels")
        return np.ascontiguousarray(cut[:, ::-1] if self.flip else cut)

    def _resize(self, values: np.ndarray, interpolation: int) -> np.ndarray:
        if values.shape[:2] == (self.height, self.width):
            return values
        return cv2.resize(values, (self.width, self.height), interpolation=interpolation)

    def _nearest(self, values: np.ndarray) -> np.ndarray:
        """The pixel whose centre is nearest to the centre of each new pixel."""
        rows = ((np.arange(self.height) + 0.5) * values.shape[0] / self.height).astype(np.int64)
        columns = ((np.arange(self.width) + 0.5) * values.shape[1] / self.width).astype(np.int64)
        return values[rows[:, None], columns]


def _renumber(ids: np.ndarray, info: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Ordered ids of what is left of the segments, and the list that describes them."""
    ordered = order_segments(ids)
    old = {
        int(new): int(ids.flat[first]) for new, first in zip(*np.unique(ordered, return_index=True), strict=True) if new
    }
    known = {int(segment["id"]): segment for segment in info.get("segments", ())}
    scores = {new: float(known[i].get("score", 1.0)) for new, i in old.items() if i in known}
    labels = {new: str(known[i].get("label") or "") for new, i in old.items() if i in known}
    return ordered, info | {"segments": describe_segments(ordered, scores, labels)}


def fit(
    height: int, width: int, shape: tuple[int, int], *, rng: np.random.Generator | None = None, flip: bool = False
) -> Geometry:
    """The largest crop of an image (H, W) with the aspect ratio of shape (height, width), resized to it; in the centre, or
    anywhere if `rng` is given. The ratio is met to the pixel."""
    scale = min(height / shape[0], width / shape[1])
    tall, wide = (max(1, min(side, round(wanted * scale))) for side, wanted in zip((height, width), shape, strict=True))
    if rng is None:
        x, y = (width - wide) // 2, (height - tall) // 2
    else:
        x, y = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
    return Geometry((x, y, wide, tall), *shape, flip)


def square(
    height: int, width: int, size_px: int, *, rng: np.random.Generator | None = None, flip: bool = False
) -> Geometry:
    """The largest square of an image (H, W), resized to size_px; in the centre, or anywhere if `rng` is given."""
    return fit(height, width, (size_px, size_px), rng=rng, flip=flip)
