"""Metric depth, normals, validity and field of view by MoGe-2: its points become depth once the camera is known.

Its points are right up to a shift along the optical axis. Shift and focal length are those with which the points fall on
their own pixels (MoGe, arXiv 2410.19115, section 3.1); its authors solve for them with scipy image by image, here all images
of a batch are solved together on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator, Size, metric_depth, unit_normals, uploaded
from extract.estimators.checkpoints import load_strictly, read_weights
from extract.estimators.nets.dinov2 import PATCH_PX
from extract.estimators.nets.moge_net import MoGeConfig, MoGeNet, RawMaps, from_published, view_plane
from shards.core.errors import UsageError, UserError
from shards.intrinsics import IntrinsicMap

SIGNS = (1, -1, -1)  # its frame is x right, y down, z away from the camera
SAMPLES = 64  # the camera is found from a grid of 64 x 64 pixels
STEPS = 30


def load(*, device: str, dtype: str, weights: Path, file: str, tokens: int) -> Estimator:
    """tokens: about how many patches an image is seen in; MoGe-2 is meant for 1200 to 3600."""
    if tokens < 1:
        raise UsageError(f"tokens is {tokens}; it must be at least 1, and MoGe-2 is meant for 1200 to 3600")
    found = read_weights(weights, file)
    if not {"model_config", "model"} <= found.keys():
        raise UserError(
            f"the estimator checkpoint {weights / file} holds no model_config and model: it is not one of MoGe-2"
        )
    config = MoGeConfig.from_checkpoint(found["model_config"])
    with torch.device("meta"):
        net = MoGeNet(config)
    load_strictly(net, from_published(found["model"]), weights / file)
    net = net.float().to(device=torch.device(device), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return NetworkEstimator(
        MoGe(net, config.remap_output),
        partial(working_size, tokens=tokens),
        torch.device(device),
        getattr(torch, dtype),
        prepare,
    )


@dataclass
class MoGe:
    """A Network (extract.estimators.batching)."""

    net: nn.Module
    remap: str

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        aspects = torch.tensor([width / height for height, width in sizes], device=x.device)
        raw: RawMaps = self.net(x, aspects)
        images = [_at_size(raw, i, size, self.remap) for i, size in enumerate(sizes)]
        focal, shift = camera([image["points"] for image in images], [image["valid"] for image in images])
        scales = raw.log_scale.exp()
        return [
            {
                "depth": (image["points"][2] + shift[i]) * scales[i],
                "valid": image["valid"],
                "normal": image["normal"],
                "focal": focal[i],
            }
            for i, image in enumerate(images)
        ]

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        focal_px = float(found["focal"]) * np.hypot(*size) / 2
        depth = metric_depth(np.where(found["depth"] > 0, found["depth"], np.nan), focal_px, "estimated")
        normal = unit_normals(found["normal"], SIGNS)
        far = ~found["valid"]  # the mask says where geometry ends: in the sky
        depth.values[far] = np.inf
        normal.values[far] = np.nan
        return {"depth": depth, "normal": normal}


def working_size(size: Size, tokens: int) -> Size:
    """The size of the network's input: about `tokens` patches, in about the image's proportions."""
    aspect = size[1] / size[0]
    return round((tokens / aspect) ** 0.5) * PATCH_PX or PATCH_PX, round(
        (tokens * aspect) ** 0.5
    ) * PATCH_PX or PATCH_PX


def prepare(image: np.ndarray, size: Size, device: torch.device) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, h, w) in [0, 1]: resized as its authors do."""
    x = uploaded(image, device)[None]
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)[0]


def _at_size(raw: RawMaps, i: int, size: Size, remap: str) -> dict[str, Tensor]:
    """Image i at its own size: points (3, H, W) up to the shift, the normal (3, H, W), and where there is geometry (H, W)."""
    stacked = torch.cat([raw.points[i], raw.normal[i], raw.mask[i]])
    full = F.interpolate(stacked[None], size, mode="bilinear", align_corners=False)[0]
    points = full[:3]
    if remap == "exp":
        z = points[2:].exp()
        points = torch.cat([points[:2] * z, z])
    return {"points": points, "normal": F.normalize(full[3:6], dim=0), "valid": full[6] > 0}


# ---- the camera ------------------------------------------------------------------------------------------------------


def camera(points: Sequence[Tensor], valid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The focal lengths (N,), in half diagonals, and the shifts (N,) of N images: points (3, H, W), valid (H, W)."""
    xyz, weights, planes = [], [], []
    for image, known in zip(points, valid, strict=True):
        height, width = known.shape
        rows = torch.arange(SAMPLES, device=known.device) * height // SAMPLES
        columns = torch.arange(SAMPLES, device=known.device) * width // SAMPLES
        grid = rows[:, None], columns
        xyz.append(image[:, *grid].flatten(1))
        weights.append(known[grid].flatten())
        aspect = torch.tensor([width / height], device=known.device)
        planes.append(view_plane(height, width, aspect)[0][grid].flatten(0, 1).T)
    return focal_and_shift(torch.stack(xyz), torch.stack(planes), torch.stack(weights))


def focal_and_shift(xyz: Tensor, plane: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The f and s that minimise the sum over valid points of |f xy / (z + s) - plane|^2, next to s = 0.

    xyz (N, 3, P), plane (N, 2, P), valid (N, P); f and s are (N,), 1 and 0 where fewer than two points are valid. f follows
    from s in closed form, so that s alone is sought: Levenberg-Marquardt, all images at once, without a sync.
    """
    xyz, plane, weight = xyz.double(), plane.double(), valid.double()[:, None]
    xy, z = xyz[:, :2] * weight, torch.where(valid, xyz[:, 2], 1.0)[:, None]
    plane = plane * weight

    def total(x: Tensor) -> Tensor:
        return x.sum(dim=(1, 2))

    def at(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f, the cost, and its first derivative and Gauss-Newton's second one by s."""
        p = xy / (z + s[:, None, None])
        dp = -p / (z + s[:, None, None])
        square = total(p * p).clamp_min(1e-30)
        f = total(p * plane) / square
        df = (total(dp * plane) - 2 * f * total(p * dp)) / square
        residual = f[:, None, None] * p - plane
        slope = df[:, None, None] * p + f[:, None, None] * dp
        return f, total(residual * residual), total(slope * residual), total(slope * slope)

    s = torch.zeros(len(xyz), dtype=torch.float64, device=xyz.device)
    damping = torch.full_like(s, 1e-3)
    f, cost, gradient, curvature = at(s)
    for _ in range(STEPS):
        tried = s - gradient / (curvature * (1 + damping)).clamp_min(1e-30)
        now = at(tried)
        better = now[1] < cost
        s = torch.where(better, tried, s)
        f, cost, gradient, curvature = (
            torch.where(better, new, old) for new, old in zip(now, (f, cost, gradient, curvature), strict=True)
        )
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-9, 1e9)
    enough = valid.sum(dim=1) >= 2
    return torch.where(enough, f, 1.0).float(), torch.where(enough, s, 0.0).float()
