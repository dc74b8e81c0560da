"""Do the co-generated maps belong to the picture? They are held against estimators that look at the generated image.

Small images are enlarged before they are estimated, because the estimators know no scenes this small; the estimates are
brought back to the image's size. What the estimators get wrong by themselves is a floor that no generated map passes:
the evaluation states it, measured by the same code on real renderings.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from extract.estimators import Estimator
from extract.estimators.table import find_set, fingerprint, load, tasks_of
from shards.intrinsics import IntrinsicMap, order_segments
from shards.marks import digest
from shards.metrics import abs_rel, angular_error, edge_f_score, log_aligned, segment_boundaries

Maps = Mapping[str, IntrinsicMap]

ENLARGED_PX = 128
"""Smaller images are enlarged to this shorter side before they are estimated."""
LINE = 0.5
"""A line is where the drawing is above this."""
TOLERANCE = 1 / 64
"""Edges may be off by this share of the shorter side."""
MEASURES = ("abs_rel", "normal_deg", "boundary_f", "line_f")


class Estimators:
    """The estimators of a set, asked for all four maps of an image at the image's own size."""

    def __init__(self, name: str = "demo", device: str = "cpu", enlarged_px: int = ENLARGED_PX) -> None:
        """Raises UsageError for an unknown set, UserError for missing weights."""
        self.name = name
        rows = [task.row for task in tasks_of(find_set(name))]
        self.key = digest({"rows": [fingerprint(row) for row in rows]}) if name.endswith(".toml") else name
        """Changes with what the set is: a file of one's own may be edited."""
        self._parts: list[Estimator] = [load(task.row, device) for task in tasks_of(find_set(name))]
        self._wanted = [task.intrinsics for task in tasks_of(find_set(name))]
        self._enlarged_px = enlarged_px

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        """images: uint8 RGB (H, W, 3)."""
        large = [self._enlarge(image) for image in images]
        found: list[dict[str, IntrinsicMap]] = [{} for _ in images]
        for part, wanted in zip(self._parts, self._wanted, strict=True):
            for into, maps, image in zip(found, part(large), images, strict=True):
                into |= {name: resized(name, maps[name], image.shape[:2]) for name in wanted}
        return found

    def _enlarge(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        scale = self._enlarged_px / min(height, width)
        if scale <= 1:
            return image
        return cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_CUBIC)


def resized(name: str, item: IntrinsicMap, size: tuple[int, int]) -> IntrinsicMap:
    """A map at size (H, W): means of lines, depths (by logarithm) and normals; nearest ids; sky stays sky."""
    values = item.values
    if values.shape[:2] == size:
        return item
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, values.shape[:2], strict=True)
    )
    nearest = values[rows[:, None], columns]
    if name == "segmentation":
        return IntrinsicMap(order_segments(nearest), {})
    valid = np.isfinite(values).all(axis=2) if values.ndim == 3 else np.isfinite(values)
    mask = valid[..., None] if values.ndim == 3 else valid
    filled = np.where(mask, values, 1).astype(np.float32)
    share = _area(valid.astype(np.float32), size)
    means = _area(np.where(mask, np.log(filled) if name == "depth" else filled, 0), size)
    means = means / np.maximum(share[..., None] if values.ndim == 3 else share, 1e-6)
    if name == "normal":
        means /= np.maximum(np.linalg.norm(means, axis=2, keepdims=True), 1e-6)
    kept = np.exp(means) if name == "depth" else means
    whole = share[..., None] > 0.5 if values.ndim == 3 else share > 0.5
    return IntrinsicMap(np.where(whole, kept, nearest).astype(values.dtype), item.info)


def _area(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(cv2.resize(values, (size[1], size[0]), interpolation=cv2.INTER_AREA))


def agreement(made: Maps, seen: Maps) -> dict[str, float]:
    """The measures of one image, made maps against seen ones of the same size: MEASURES, NaN for a map that is missing.

    abs_rel: of depths, after scale and range of the made ones (which packing normalises: a made map has none of its own)
    were fitted to the seen ones.
    normal_deg: mean angle. boundary_f, line_f: F-scores of the borders of segments and of lines.
    """
    values = dict.fromkeys(MEASURES, float("nan"))
    both = [name for name in made if name in seen]
    if "depth" in both:
        d, truth = made["depth"].values, seen["depth"].values
        values["abs_rel"] = abs_rel(log_aligned(d, truth), truth)
    if "normal" in both:
        values["normal_deg"] = angular_error(made["normal"].values, seen["normal"].values)
    if "segmentation" in both:
        ours, theirs = (segment_boundaries(maps["segmentation"].values) for maps in (made, seen))
        values["boundary_f"] = edge_f_score(ours, theirs, _tolerance(ours))
    if "line" in both:
        ours, theirs = (maps["line"].values > LINE for maps in (made, seen))
        values["line_f"] = edge_f_score(ours, theirs, _tolerance(ours))
    return values


def _tolerance(edges: np.ndarray) -> float:
    return max(1.0, TOLERANCE * min(edges.shape))
