"""Cheap scores that find bad labels without ground truth, stored in json["intrinsics"]["quality"] for filtering.

They are measured on a grid of at most about GRID x GRID pixels: scores want no more, and large maps cost no more than
small ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from shards.intrinsics import INTRINSICS, IntrinsicMap

GRID = 160
JUMP = 0.15
"""A difference of depth between neighbours that counts as an edge: of its logarithm, or as a share of the range."""
DEFAULT_FOCAL_RATIO = 1.0
"""The focal length assumed where none is known, as a share of the longer side (a field of view of 53 degrees)."""


EDGE_SCORES = ("depth_edges", "segment_edges", "line_edges")


def quality_scores(maps: Mapping[str, IntrinsicMap], image: np.ndarray | None = None) -> dict[str, float]:
    """Scores of one image's maps; only those whose maps are there. image: uint8 (H, W, 3), for the last three.

    <name>_invalid     share of invalid pixels, 0..1
    depth_range        log(95 % quantile / 5 % quantile) of metric depth; of relative depth the quantiles' distance
                       over the full range; about 0 for a constant map
    depth_flatness     share of pixels whose depth equals that of the right and of the lower neighbour, 0..1
    normal_depth_angle mean angle in degrees between the normals and the normals of the depth (metric depth only)
    segments           number of segments;  segmented  share of the image inside a segment, 0..1
    line_density       mean of the line drawing, 0..1
    depth_edges, segment_edges, line_edges
                       whether the image changes where the map does: the mean, over the places where depth jumps, segments
                       meet or lines are, of the share of the image that changes less; 1 at best, 0.5 by chance, for the
                       maps of another image, and where there is no such place
    """
    scores = {
        f"{name}_invalid": float(1 - INTRINSICS[name].valid(_grid(item.values)).mean())
        for name, item in maps.items()
        if name in ("depth", "normal")
    }
    if "depth" in maps:
        scores |= _depth_scores(maps["depth"])
    if "depth" in maps and "normal" in maps and maps["depth"].info.get("kind") == "metric":
        scores["normal_depth_angle"] = normal_depth_angle(maps["depth"], maps["normal"].values)
    if "segmentation" in maps:
        ids = maps["segmentation"].values
        scores |= {"segments": float(ids.max()), "segmented": float((_grid(ids) > 0).mean())}
    if "line" in maps:
        scores["line_density"] = float(_grid(maps["line"].values).mean())
    if image is not None:
        scores |= _edge_scores(maps, image)
    return {name: round(score, 6) for name, score in scores.items()}


def _grid(values: np.ndarray) -> np.ndarray:
    step = _step(values)
    return values[::step, ::step]


def _step(values: np.ndarray) -> int:
    return max(1, -(-min(values.shape[:2]) // GRID))  # rounded up: never more than GRID x GRID


def _depth_scores(depth: IntrinsicMap) -> dict[str, float]:
    z, step = depth.values, _step(depth.values)
    grid = _grid(z)
    finite = grid[np.isfinite(grid)]
    if finite.size == 0:
        return {"depth_range": 0.0, "depth_flatness": 1.0}
    low, high = (float(q) for q in np.quantile(finite, (0.05, 0.95)))
    if depth.info.get("kind") == "metric":
        spread = float(np.log(high / low))
    else:
        full = float(finite.max() - finite.min())
        spread = (high - low) / full if full else 0.0
    inner = z[:-1:step, :-1:step]
    flat = (inner == z[:-1:step, 1::step]) & (inner == z[1::step, :-1:step]) if min(z.shape) > 1 else np.ones(1, bool)
    return {"depth_range": spread, "depth_flatness": float(flat.mean())}


def _edge_scores(maps: Mapping[str, IntrinsicMap], image: np.ndarray) -> dict[str, float]:
    """How well the edges of each map coincide with those of the image, on the grid."""
    smaller = _rank_of_change(_grid(image))
    scores = {}
    for name, key, edges_of in (
        ("depth", "depth_edges", _depth_jumps),
        ("segmentation", "segment_edges", _differs),
        ("line", "line_edges", _on_line),
    ):
        if name in maps:
            edges = edges_of(_grid(maps[name].values), maps[name].info)
            scores[key] = float(smaller[edges].mean()) if edges.any() else 0.5
    return scores


def _rank_of_change(image: np.ndarray) -> np.ndarray:
    """For each pixel of uint8 (h, w, 3) the share of pixels around which less changes, ties by half; float (h, w)."""
    values = image.astype(np.int16)
    change = np.zeros(image.shape[:2], np.int64)
    for axis in (0, 1):
        difference = np.abs(np.diff(values, axis=axis)).max(axis=2)
        for part in (np.s_[1:], np.s_[:-1]):
            place = (part, np.s_[:]) if axis == 0 else (np.s_[:], part)
            np.maximum(change[place], difference, out=change[place])
    counts = np.bincount(change.ravel(), minlength=256)
    return ((np.cumsum(counts) - counts / 2) / change.size)[change]


def _differs(ids: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    """bool (h, w): pixels beside a pixel of another id."""
    return _beside(ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1])


def _depth_jumps(depth: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    """bool (h, w): pixels beside one whose depth is another by JUMP (metric), or by JUMP of the map's range (relative)."""
    finite = depth[np.isfinite(depth)]
    if info.get("kind") == "metric":
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.log(depth)
        least = JUMP
    else:
        z, least = depth, JUMP * float(finite.max() - finite.min()) if finite.size else JUMP
    with np.errstate(invalid="ignore"):  # from infinitely far to infinitely far is no jump
        return _beside(np.abs(z[1:] - z[:-1]) > least, np.abs(z[:, 1:] - z[:, :-1]) > least)


def _on_line(line: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    return line > 0.5


def _beside(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """bool (h, w) from bool (h - 1, w) between rows and (h, w - 1) between columns: pixels on either side."""
    found = np.zeros((columns.shape[0], rows.shape[1]), bool)
    found[1:] |= rows
    found[:-1] |= rows
    found[:, 1:] |= columns
    found[:, :-1] |= columns
    return found


def depth_to_normal(depth_m: np.ndarray, focal_px: float, step: int = 1) -> np.ndarray:
    """Unit normals float32 of metric z-depth (H, W), by central differences of the points; NaN where undefined.

    Camera frame: x right, y up, z towards the camera; the principal point is the image's centre. Returns (H, W, 3); with
    step > 1 only every step-th row and column, from the first on.
    """
    height, width = depth_m.shape
    padded = np.pad(depth_m, 1, constant_values=np.nan)
    padded = np.where(np.isfinite(padded), padded, np.nan)
    x = (np.arange(-1, width + 1) + 0.5 - width / 2) / focal_px
    y = -(np.arange(-1, height + 1) + 0.5 - height / 2)[:, None] / focal_px

    def points(down: int, right: int) -> np.ndarray:
        """The points beside those of the grid, by an offset in pixels."""
        rows, columns = slice(1 + down, 1 + down + height, step), slice(1 + right, 1 + right + width, step)
        z = padded[rows, columns].astype(np.float64)
        return np.stack([z * x[columns], z * y[rows], -z], axis=2)

    n = np.cross(points(0, 1) - points(0, -1), points(-1, 0) - points(1, 0))
    with np.errstate(invalid="ignore"):
        return (n / np.linalg.norm(n, axis=2, keepdims=True)).astype(np.float32)


def normal_depth_angle(depth: IntrinsicMap, normal: np.ndarray) -> float:
    """Mean angle in degrees between `normal` (H, W, 3) and the normals of the metric depth, where both are defined.

    Returns 180 where nothing can be compared, so that such a sample counts as bad. The focal length is
    depth.info["focal_px"], else the longer side.
    """
    focal_px = depth.info.get("focal_px") or DEFAULT_FOCAL_RATIO * max(depth.values.shape)
    step = _step(normal)
    cosine = (depth_to_normal(depth.values, float(focal_px), step) * normal[::step, ::step]).sum(axis=2)
    cosine = cosine[np.isfinite(cosine)]
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean()) if cosine.size else 180.0
