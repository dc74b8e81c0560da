"""Networks in batches: images brought to the size at which a network works, bucketed by it, and its maps brought back.

Images of one bucket have the same size for the network, so that nothing is ever padded or distorted to make a batch. How
many images an estimator is given at once is not their affair (extract.run.batches).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.core.errors import UsageError
from shards.intrinsics import DEPTH_NEAR_M, IntrinsicMap

Size = tuple[int, int]
"""(height, width)"""
SHORTEST_FOCAL_PX = 0.001  # to what it is rounded
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The size at which a network sees an image.

    shorter, longer: that side in pixels, the other in proportion; square: both, whatever the proportions; none of them:
    the image's own size. most: the scale never exceeds it (1.0: images are never enlarged). multiple: both sides are
    multiples of it, the nearest, or with up=True the next above.
    """

    shorter: int = 0
    longer: int = 0
    square: int = 0
    most: float = 0.0
    multiple: int = 1
    up: bool = False

    def __post_init__(self) -> None:
        if sum(map(bool, (self.shorter, self.longer, self.square))) > 1 or self.multiple < 1:
            raise UsageError(f"a resolution has one of shorter, longer and square, and a multiple from 1; found {self}")

    def __call__(self, size: Size) -> Size:
        height, width = size
        if self.square:
            return self.square, self.square
        scale = 1.0
        if self.shorter:
            scale = self.shorter / min(height, width)
        elif self.longer:
            scale = self.longer / max(height, width)
        if self.most:
            scale = min(scale, self.most)
        return self._round(height * scale), self._round(width * scale)

    def _round(self, side: float) -> int:
        steps = side / self.multiple
        return max(1, int(np.ceil(steps - 1e-9)) if self.up else round(steps)) * self.multiple

    def __str__(self) -> str:
        rule = next(
            (f"{name} side {side} px" for name, side in (("shorter", self.shorter), ("longer", self.longer)) if side),
            "",
        )
        rule = f"{self.square} x {self.square}" if self.square else rule or "the image's own"
        return rule + (f", multiples of {self.multiple}" if self.multiple > 1 else "")


class Network(Protocol):
    """What differs between networks; the rest is NetworkEstimator."""

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        """x: float32 RGB (N, 3, h, w) in [0, 1] on the device; sizes: of the N images. For each, tensors on the device."""
        ...

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        """The maps of one image from those tensors, by now in main memory."""
        ...


@dataclass
class NetworkEstimator:
    """An Estimator (extract.estimators) from a network and the resolution at which it works.

    On a GPU the next bucket computes while the maps of the one before are finished. On a CPU images together
    gain next to nothing, and do not agree to the last bit with the same images alone: there each is a bucket of its own, so
    that the bytes of a dataset do not depend on batches. prepare: how an image is brought to that resolution, where it is
    not by to_network. alone: whether each image is a bucket of its own; None for on a CPU.
    """

    network: Network
    resolution: Callable[[Size], Size]
    device: torch.device
    dtype: torch.dtype
    prepare: Callable[[np.ndarray, Size, torch.device], Tensor] | None = None
    alone: bool | None = None

    def networks(self) -> list[nn.Module]:
        """Those that can be compiled."""
        return [part for part in vars(self.network).values() if isinstance(part, nn.Module)]

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        alone = self.device.type == "cpu" if self.alone is None else self.alone
        results: dict[int, dict[str, IntrinsicMap]] = {}
        before: tuple[list[int], list[_Copied]] = ([], [])
        for members in [*([[i] for i in range(len(images))] if alone else buckets(images, self.resolution)), []]:
            now = (members, self._predict([images[i] for i in members]) if members else [])
            for i, copied in zip(*before, strict=True):
                results[i] = self.network.maps(copied.wait(), (images[i].shape[0], images[i].shape[1]))
            before = now
        return [results[i] for i in range(len(images))]

    @torch.inference_mode()
    def _predict(self, images: Sequence[np.ndarray]) -> "list[_Copied]":
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        prepare = self.prepare or to_network
        x = torch.stack(
            [prepare(image, self.resolution(size), self.device) for image, size in zip(images, sizes, strict=True)]
        )
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = self.network.predict(x.contiguous(memory_format=torch.channels_last), sizes)
        return [_Copied(tensors) for tensors in found]


class _Copied:
    """Tensors on their way from the device, on a stream of their own: what the device computes next does not wait for them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._event: Any = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            device = next(tensor.device for tensor in tensors.values() if tensor.is_cuda)
            stream = _copy_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))  # what is copied must be computed
            with torch.cuda.stream(stream):
                self._there = {name: _pinned_copy(tensor) for name, tensor in tensors.items()}
            for tensor in tensors.values():
                if tensor.is_cuda:
                    tensor.record_stream(stream)  # its memory must not be used again before
            self._event = stream.record_event()
        else:
            self._there = tensors

    def wait(self) -> dict[str, np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._there.items()}


@cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def _pinned_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def buckets(images: Sequence[np.ndarray], resolution: Callable[[Size], Size]) -> list[list[int]]:
    """The positions of the images (H, W, 3) that have the same size for the network, in order of first appearance."""
    found: dict[Size, list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        found[resolution((image.shape[0], image.shape[1]))].append(i)
    return list(found.values())


def uploaded(image: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1] on the device; nobody waits for a copy to a GPU."""
    x = torch.from_numpy(np.ascontiguousarray(image))
    x = x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
    return x.permute(2, 0, 1).float() / 255


def to_network(image: np.ndarray, size: Size, device: torch.device) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, h, w) in [0, 1] on the device; bicubic, antialiased where it shrinks."""
    x = uploaded(image, device)
    if x.shape[1:] == size:
        return x
    return F.interpolate(x[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


def normalised(x: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """(x - mean) / std for each channel of (N, 3, h, w)."""
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def resized(x: Tensor, size: Size) -> Tensor:
    """Channels (C, h, w) at another size, in float32: bilinear, antialiased where it shrinks."""
    if x.shape[1:] == size:
        return x.float()
    return F.interpolate(x[None].float(), size, mode="bilinear", antialias=True, align_corners=False)[0]


# ---- maps in our conventions -----------------------------------------------------------------------------------------


def metric_depth(depth_m: np.ndarray, focal_px: float = 0.0, focal_from: str = "") -> IntrinsicMap:
    """Depth in metres (H, W), never below what can be stored; what is not finite is invalid.

    Raises ValueError when a focal length that the network found is no camera's: depth for it means nothing.
    """
    if focal_from and not SHORTEST_FOCAL_PX <= focal_px < np.inf:
        raise ValueError(f"what the network sees fits no camera: its focal length comes out as {focal_px:.3f} px")
    z = np.where(np.isfinite(depth_m), np.maximum(depth_m, DEPTH_NEAR_M), np.nan).astype(np.float32)
    focal = {"focal_px": round(float(focal_px), 3), "focal_from": focal_from} if focal_px else {}
    return IntrinsicMap(z, {"kind": "metric", **focal})


def relative_depth(inverse: np.ndarray) -> IntrinsicMap:
    """Inverse depth (H, W) up to an affine change: larger is nearer. What is not finite is invalid."""
    values = np.where(np.isfinite(inverse), inverse, np.nan).astype(np.float32)
    return IntrinsicMap(values, {"kind": "relative"})


def unit_normals(n: np.ndarray, signs: tuple[int, int, int] = (1, 1, 1), least: float = 0.2) -> IntrinsicMap:
    """Normals (3, H, W) in a network's frame -> unit normals in ours: x right, y up, z towards the camera.

    signs: what each axis of the network is multiplied by. Interpolation shortens vectors: they are renormalised, and those
    shorter than `least`, between opposite directions or not finite, are invalid.
    """
    values = np.moveaxis(n, 0, 2).astype(np.float32) * np.asarray(signs, np.float32)
    length = np.sqrt(np.einsum("hwc,hwc->hw", values, values))
    with np.errstate(invalid="ignore", divide="ignore"):
        values /= length[..., None]
    values[~(length >= least)] = np.nan
    return IntrinsicMap(values)


def white_on_black(line: np.ndarray) -> IntrinsicMap:
    """A line drawing (H, W): 1 on a line, 0 on none; values beyond are cut."""
    return IntrinsicMap(np.clip(line, 0, 1).astype(np.float32))
