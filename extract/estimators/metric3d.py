"""Metric depth and normals by Metric3D v2: images brought to its canonical camera, its maps brought back to ours.

Its depth is that of a camera with a focal length of 1000 px: seen by one with f px, the same picture is f / 1000 times as far
(Metric3D, arXiv 2307.10984, section 3.2). Web images do not say their focal length: it is assumed, and recorded with the map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator, Size, metric_depth, normalised, unit_normals, uploaded
from extract.estimators.checkpoints import load_strictly, read_weights
from extract.estimators.nets.metric3d_net import FAR_M, SIZES, Metric3DNet, Prediction, from_published
from shards.core.errors import UsageError
from shards.intrinsics import IntrinsicMap

CANONICAL_FOCAL_PX = 1000.0
STRIDE = 28
SIGNS = (1, -1, -1)  # its frame is x right, y down, z away from the camera
MOST_M = 300.0
FILL = (124, 116, 104)  # ImageNet's mean colour
UNLIMITED_M = 0.995 * FAR_M
"""Canonical depth from here on is the end of its range, where it puts the sky: it says "far", not how far."""


def load(
    *,
    device: str,
    dtype: str,
    weights: Path,
    file: str,
    size: str,
    canvas: Sequence[int] = (616, 1064),
    full_canvas: bool,
    focal_share: float,
) -> Estimator:
    """size: small, large or giant2. canvas: height and width that images are fitted into, (616, 1064) in training.

    full_canvas: whether images are filled up to the whole canvas, as its authors do, or only to multiples of 28.
    focal_share: the focal length as a share of the image's longer side. Raises UsageError, UserError.
    """
    if size not in SIZES:
        raise UsageError(f"there is no Metric3D of size {size!r}; the sizes are {', '.join(SIZES)}")
    if not focal_share > 0:
        raise UsageError(f"focal_share is {focal_share}; it must be positive, a share of the image's longer side")
    if len(canvas) != 2:
        raise UsageError(f"canvas is {list(canvas)}; it must be a height and a width, such as [616, 1064]")
    fit = Canvas(canvas[0], canvas[1], full_canvas)
    with torch.device("meta"):
        net = Metric3DNet(SIZES[size])
    found = read_weights(weights, file, f"{Path(file).stem}.safetensors")
    load_strictly(net, from_published(found.get("model_state_dict", found)), weights / file)
    net = net.float().to(device=torch.device(device), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    network = Metric3D(net, fit, focal_share)
    return NetworkEstimator(network, fit, torch.device(device), getattr(torch, dtype), fit.prepare)


@dataclass(frozen=True)
class Canvas:
    """The picture that the network sees: an image, in its own proportions, in the middle of the mean colour."""

    height: int
    width: int
    full: bool

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.height % STRIDE or self.width % STRIDE:
            raise UsageError(f"the canvas is {self.height} x {self.width}; both must be multiples of {STRIDE}")

    def __call__(self, size: Size) -> Size:
        """The size of the network's input for an image."""
        if self.full:
            return self.height, self.width
        height, width = self.fitted(size)
        return height + -height % STRIDE, width + -width % STRIDE

    def scale(self, size: Size) -> float:
        return min(self.height / size[0], self.width / size[1])

    def fitted(self, size: Size) -> Size:
        """The size of the image itself within the canvas."""
        scale = self.scale(size)
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))

    def prepare(self, image: np.ndarray, size: Size, device: torch.device) -> Tensor:
        """uint8 (H, W, 3) -> float32 (3, h, w) in [0, 1], resized as its authors do."""
        height, width = self.fitted((image.shape[0], image.shape[1]))
        filled = np.empty((*size, 3), np.uint8)
        filled[:] = FILL
        part = self._part(size, (height, width))
        filled[part] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return uploaded(filled, device)

    def back(self, x: Tensor, size: Size) -> Tensor:
        """Maps (C, h, w) of the network's input -> (C, H, W) of the image."""
        part = self._part((x.shape[1], x.shape[2]), self.fitted(size))
        return F.interpolate(x[:, *part][None], size, mode="bilinear", align_corners=False)[0]

    @staticmethod
    def _part(whole: Size, inner: Size) -> tuple[slice, slice]:
        top, left = (whole[0] - inner[0]) // 2, (whole[1] - inner[1]) // 2
        return slice(top, top + inner[0]), slice(left, left + inner[1])


@dataclass
class Metric3D:
    """A Network (extract.estimators.batching)."""

    net: nn.Module
    canvas: Canvas
    focal_share: float

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        found: Prediction = self.net(normalised(x))
        maps = torch.cat([found.depth, found.normal], dim=1)
        back = [self.canvas.back(image, size) for image, size in zip(maps, sizes, strict=True)]
        return [{"depth": image[0], "normal": image[1:]} for image in back]

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        focal_px = self.focal_share * max(size)
        depth_m = found["depth"] * (focal_px * self.canvas.scale(size) / CANONICAL_FOCAL_PX)
        depth = metric_depth(np.clip(depth_m, 0, MOST_M), focal_px, "assumed")
        normal = unit_normals(found["normal"], SIGNS)
        far = found["depth"] >= UNLIMITED_M
        depth.values[far] = np.inf
        normal.values[far] = np.nan
        return {"depth": depth, "normal": normal}
