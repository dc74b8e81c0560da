"""The set `demo`: depth, normals, segments and lines of an image from one pass of the embedded network."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from extract.estimators import Estimator
from extract.estimators.nets.demo_net import DemoNet, load_demo_net
from extract.estimators.regions import segments
from shards.intrinsics import DEPTH_FAR_M, DEPTH_NEAR_M, IntrinsicMap, describe_segments, order_segments

ASSUMED_FOCAL = 1.1
"""Focal length as a share of the longer side: about the middle of the demo world's cameras."""
LINE_SHARE = 0.4
"""How much an outline counts as a border of segments; photographs have outlines where the network sees no border."""


def load(*, device: str, dtype: str, weights: Path, working_px: int) -> Estimator:
    net = load_demo_net(weights).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DemoEstimator(net, working_px, getattr(torch, dtype))


@dataclass
class DemoEstimator:
    """Works at a shorter side of at most `working_px`; maps are brought back to the image's size.

    Images are batched by shape; sides are filled up to the network's stride by repeating the border.
    """

    net: DemoNet
    working_px: int
    dtype: torch.dtype

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        small = [self.shrink(image) for image in images]
        buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(small):
            buckets[image.shape].append(i)
        results: dict[int, dict[str, IntrinsicMap]] = {}
        for members in buckets.values():
            raw = self._forward(np.stack([small[i] for i in members]))
            for row, i in enumerate(members):
                results[i] = _maps(raw[row], images[i].shape[:2])
        return [results[i] for i in range(len(images))]

    def shrink(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        scale = self.working_px / min(height, width)
        if scale >= 1:
            return image
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)

    @torch.inference_mode()
    def _forward(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, h, w, 3) -> float32 (N, 7, h, w): log depth, sky, normal, boundary and line, the last as logits."""
        x = self.input(images)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            p = self.net(x)
        channels = torch.cat([torch.stack([p.log_depth, p.sky, p.boundary, p.line], dim=1), p.normal], dim=1)
        height, width = images.shape[1:3]
        return channels[:, :, :height, :width].float().cpu().numpy()

    def input(self, images: np.ndarray) -> Tensor:
        """uint8 (N, h, w, 3) -> float32 (N, 3, h, w) in [0, 1] on the device, filled up to the network's stride."""
        x = torch.from_numpy(images).to(self.net.head.weight.device).permute(0, 3, 1, 2).float() / 255
        height, width, stride = *x.shape[2:], self.net.config.stride
        x = F.pad(x, (0, -width % stride, 0, -height % stride), mode="replicate")
        return x.contiguous(memory_format=torch.channels_last)


def _maps(raw: np.ndarray, size: tuple[int, int]) -> dict[str, IntrinsicMap]:
    """The four maps of one image (H, W) = size from the network's channels (7, h, w)."""
    height, width = size
    log_depth, sky, line = (_resize(raw[channel], size) for channel in (0, 1, 3))
    far = sky > 0
    z = np.exp(np.clip(log_depth, np.log(DEPTH_NEAR_M), np.log(DEPTH_FAR_M))).astype(np.float32)
    n = _resize(np.moveaxis(raw[4:7], 0, 2), size)
    n /= np.maximum(np.linalg.norm(n, axis=2, keepdims=True), 1e-6)
    n[far | (np.linalg.norm(n, axis=2) < 0.5)] = np.nan
    ids = order_segments(_nearest(segments(np.maximum(_sigmoid(raw[2]), LINE_SHARE * _sigmoid(raw[3]))), size))
    focal = {"focal_px": ASSUMED_FOCAL * max(height, width), "focal_from": "assumed"}
    return {
        "depth": IntrinsicMap(np.where(far, np.float32(np.inf), z), {"kind": "metric", **focal}),
        "normal": IntrinsicMap(n.astype(np.float32)),
        "segmentation": IntrinsicMap(ids, {"segments": describe_segments(ids, {}, {})}),
        "line": IntrinsicMap(_sigmoid(line).astype(np.float32)),
    }


def _resize(channel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if channel.shape[:2] == size:
        return channel.copy()
    return cv2.resize(channel, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def _nearest(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Ids (h, w) at another size, each pixel taking its nearest."""
    rows = ((np.arange(size[0]) + 0.5) * ids.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * ids.shape[1] / size[1]).astype(np.int64)
    return ids[rows[:, None], columns]


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))
