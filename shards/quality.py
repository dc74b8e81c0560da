"""Cheap scores that find bad labels without ground truth, stored in json["intrinsics"]["quality"] for filtering."""

from collections.abc import Mapping

import numpy as np

from shards.intrinsics import INTRINSICS, IntrinsicMap

DEFAULT_FOCAL_RATIO = 1.0
"""The focal length assumed where none is known, as a share of the longer side (a field of view of 53 degrees)."""


def quality_scores(maps: Mapping[str, IntrinsicMap]) -> dict[str, float]:
    """Scores of one image's maps; only those whose maps are there.

    <name>_invalid     share of invalid pixels, 0..1
    depth_range        log(95 % quantile / 5 % quantile) of metric depth; of relative depth the quantiles' distance
                       over the full range; about 0 for a constant map
    depth_flatness     share of pixels whose depth equals that of the right and of the lower neighbour, 0..1
    normal_depth_angle mean angle in degrees between the normals and the normals of the depth (metric depth only)
    segments           number of segments;  segmented  share of the image inside a segment, 0..1
    line_density       mean of the line drawing, 0..1
    """
    scores = {
        f"{name}_invalid": float(1 - INTRINSICS[name].valid(item.values).mean())
        for name, item in maps.items()
        if name in ("depth", "normal")
    }
    if "depth" in maps:
        scores |= _depth_scores(maps["depth"])
    if "depth" in maps and "normal" in maps and maps["depth"].info.get("kind") == "metric":
        scores["normal_depth_angle"] = normal_depth_angle(maps["depth"], maps["normal"].values)
    if "segmentation" in maps:
        ids = maps["segmentation"].values
        scores |= {"segments": float(ids.max()), "segmented": float((ids > 0).mean())}
    if "line" in maps:
        scores["line_density"] = float(maps["line"].values.mean())
    return {name: round(score, 6) for name, score in scores.items()}


def _depth_scores(depth: IntrinsicMap) -> dict[str, float]:
    z = depth.values
    finite = z[np.isfinite(z)]
    if finite.size == 0:
        return {"depth_range": 0.0, "depth_flatness": 1.0}
    low, high = (float(q) for q in np.quantile(finite, (0.05, 0.95)))
    if depth.info.get("kind") == "metric":
        spread = float(np.log(high / low))
    else:
        full = float(finite.max() - finite.min())
        spread = (high - low) / full if full else 0.0
    inner = z[:-1, :-1]
    flat = (inner == z[:-1, 1:]) & (inner == z[1:, :-1]) if min(z.shape) > 1 else np.ones(1, bool)
    return {"depth_range": spread, "depth_flatness": float(flat.mean())}


def depth_to_normal(depth_m: np.ndarray, focal_px: float) -> np.ndarray:
    """Unit normals float32 (H, W, 3) of metric z-depth (H, W), by central differences of the points; NaN where undefined.

    Camera frame: x right, y up, z towards the camera; the principal point is the image's centre.
    """
    height, width = depth_m.shape
    z = np.where(np.isfinite(depth_m), depth_m, np.nan).astype(np.float64)
    u = np.arange(width) + 0.5 - width / 2
    v = np.arange(height) + 0.5 - height / 2
    points = np.stack([z * u / focal_px, -z * v[:, None] / focal_px, -z], axis=2)
    normal = np.full((height, width, 3), np.nan)
    if min(height, width) >= 3:
        right = points[1:-1, 2:] - points[1:-1, :-2]
        up = points[:-2, 1:-1] - points[2:, 1:-1]
        n = np.cross(right, up)
        with np.errstate(invalid="ignore"):
            normal[1:-1, 1:-1] = n / np.linalg.norm(n, axis=2, keepdims=True)
    return normal.astype(np.float32)


def normal_depth_angle(depth: IntrinsicMap, normal: np.ndarray) -> float:
    """Mean angle in degrees between `normal` (H, W, 3) and the normals of the metric depth, where both are defined.

    Returns 180 where nothing can be compared, so that such a sample counts as bad. The focal length is
    depth.info["focal_px"], else the longer side.
    """
    focal_px = depth.info.get("focal_px") or DEFAULT_FOCAL_RATIO * max(depth.values.shape)
    cosine = (depth_to_normal(depth.values, float(focal_px)) * normal).sum(axis=2)
    cosine = cosine[np.isfinite(cosine)]
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean()) if cosine.size else 180.0
