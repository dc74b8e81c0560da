"""Depth by the transformers library: DepthAnything v2, DepthPro, ZoeDepth, DPT, and TIPSv2's depth.

`kind` says what the network gives, and what becomes of it:

    relative   inverse depth up to an affine change, larger is nearer    stored as it is
    metric     metres                                                    stored as it is
    canonical  1 / metres for a camera whose focal length is the image's width, and a field of view (DepthPro):
               depth = focal / width / value, the focal length in pixels from the field of view, recorded
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.estimators import Estimator
from extract.estimators.batching import (
    NetworkEstimator,
    Resolution,
    Size,
    metric_depth,
    normalised,
    relative_depth,
    resized,
)
from extract.estimators.pretrained import load_pretrained, mean_and_std
from shards.core.errors import UsageError
from shards.intrinsics import DEPTH_FAR_M, DEPTH_NEAR_M, IntrinsicMap

KINDS = ("relative", "metric", "canonical")


def load(*, device: str, dtype: str, weights: Path, resolution: dict[str, Any], kind: str) -> Estimator:
    """kind: see above; "configured" for DepthAnything, whose config says whether its depth is relative or metric."""
    model = load_pretrained("AutoModelForDepthEstimation", weights, device)
    if kind == "configured":
        kind = str(getattr(model.config, "depth_estimation_type", "relative"))
    if kind not in KINDS:
        raise UsageError(f"the estimator checkpoint {weights}: depth of kind {kind!r}; known are {', '.join(KINDS)}")
    network = Depth(model, kind, *mean_and_std(weights))
    return NetworkEstimator(network, Resolution(**resolution), torch.device(device), getattr(torch, dtype))


@dataclass
class Depth:
    """A Network (extract.estimators.batching)."""

    model: Any
    kind: str
    mean: Sequence[float]
    std: Sequence[float]

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        out = self.model(pixel_values=normalised(x, self.mean, self.std))
        depth = out.predicted_depth.float()
        found = [{"depth": resized(z[None], size)[0]} for z, size in zip(depth, sizes, strict=True)]
        if self.kind == "canonical" and out.field_of_view is not None:
            for one, degrees in zip(found, out.field_of_view.float().reshape(-1), strict=True):
                one["degrees"] = degrees[None]
        return found

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        depth = found["depth"]
        if self.kind == "relative":
            return {"depth": relative_depth(depth)}
        if self.kind == "metric":
            return {"depth": metric_depth(depth)}
        degrees = found["degrees"][0] if "degrees" in found else None
        return {"depth": canonical_to_metric(depth, degrees, size[1])}


def canonical_to_metric(inverse: np.ndarray, degrees: float | None, width: int) -> IntrinsicMap:
    """Metric depth from inverse depth (H, W) for a camera of focal length `width`, and the horizontal field of view.

    Without a field of view the camera is taken to be that one.
    """
    known = degrees is not None and 1 < degrees < 179
    focal_px = 0.5 * width / np.tan(np.deg2rad(degrees or 0) / 2) if known else float(width)
    # limits as where it was published: 0.1 mm to 10 km; what is stored is narrower
    z = focal_px / width / np.clip(inverse, 1 / DEPTH_FAR_M * focal_px / width, focal_px / width / DEPTH_NEAR_M)
    return metric_depth(z, focal_px, "estimated by the network" if known else "assumed")
