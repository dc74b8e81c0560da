"""Constant maps: everything of an extraction but the estimators, for measuring and testing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from extract.estimators import Estimator
from shards.intrinsics import IntrinsicMap, describe_segments


def load(*, device: str, dtype: str, weights: Path | None) -> Estimator:
    return estimate


def estimate(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
    """A wall two metres away, in one segment, without a line."""
    return [_constant(*image.shape[:2]) for image in images]


def _constant(height: int, width: int) -> dict[str, IntrinsicMap]:
    ids = np.ones((height, width), np.uint16)
    facing = np.zeros((height, width, 3), np.float32)
    facing[..., 2] = 1
    info = {"kind": "metric", "focal_px": float(max(height, width)), "focal_from": "assumed"}
    return {
        "depth": IntrinsicMap(np.full((height, width), 2, np.float32), info),
        "normal": IntrinsicMap(facing),
        "segmentation": IntrinsicMap(ids, {"segments": describe_segments(ids, {}, {})}),
        "line": IntrinsicMap(np.zeros((height, width), np.float32)),
    }
