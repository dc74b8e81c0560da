"""Normals by the transformers library's networks for that (AutoModelForNormalEstimation): Sapiens2, TIPSv2.

They are resized as the network gives them and renormalised at the end, at the image's size: the library's own
post-processing resizes unit vectors and leaves them too short.
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
    resized,
    unit_normals,
)
from extract.estimators.pretrained import load_pretrained, mean_and_std
from shards.intrinsics import IntrinsicMap


def load(*, device: str, dtype: str, weights: Path, resolution: dict[str, Any], signs: list[int]) -> Estimator:
    """signs: what each axis of the network's frame is multiplied by to give x right, y up, z towards the camera."""
    model = load_pretrained("AutoModelForNormalEstimation", weights, device)
    x, y, z = signs
    network = Normals(model, (x, y, z), *mean_and_std(weights))
    return NetworkEstimator(network, Resolution(**resolution), torch.device(device), getattr(torch, dtype))


def load_dense(*, device: str, dtype: str, weights: Path, resolution: dict[str, Any], signs: list[int]) -> Estimator:
    """TIPSv2's depth and normals from one pass. signs: as above."""
    model = load_pretrained("Tipsv2DptForDensePrediction", weights, device)
    x, y, z = signs
    network = Normals(model, (x, y, z), *mean_and_std(weights))
    return NetworkEstimator(network, Resolution(**resolution), torch.device(device), getattr(torch, dtype))


@dataclass
class Normals:
    """A Network (extract.estimators.batching)."""

    model: Any
    signs: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        out = self.model(pixel_values=normalised(x, self.mean, self.std))
        n = out.normals.float()
        n = n / n.norm(dim=1, keepdim=True).clamp(min=1e-6)  # each pixel has the same say in what lies between
        found = [{"normal": resized(one, size)} for one, size in zip(n, sizes, strict=True)]
        if (depth := getattr(out, "predicted_depth", None)) is not None:
            for one, z, size in zip(found, depth, sizes, strict=True):
                one["depth"] = resized(z[None], size)[0]
        return found

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        made = {"normal": unit_normals(found["normal"], self.signs)}
        return made | {"depth": metric_depth(found["depth"])} if "depth" in found else made
