"""Line drawings by the networks of controlnet_aux, called in float and in batches instead of through their 8-bit wrappers.

They work at the image's own size up to a shorter side of `shorter` pixels. A network of convolutions whose output grid is
larger than the image by a few pixels is cut, not resampled: pixel (0, 0) is pixel (0, 0).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator, Resolution, Size, resized, white_on_black
from extract.estimators.checkpoints import load_strictly, read_weights
from extract.estimators.nets.controlnet_aux_nets import made_quietly, network_class, without_prefix
from shards.intrinsics import IntrinsicMap

Draw = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """A network: how it is made, where its weights lie in the file, how it is called, and to which multiple sides go.

    draw: float32 RGB (N, 3, h, w) in [0, 1] -> (N, 1, >= h, >= w), 1 on a line.
    """

    make: Callable[[], nn.Module]
    draw: Draw
    inside: str = ""
    multiple: int = 1


def _lineart(net: nn.Module, x: Tensor) -> Tensor:
    """Dark lines on white, by a sigmoid."""
    return 1 - net(x)


def _lineart_anime(net: nn.Module, x: Tensor) -> Tensor:
    """Dark lines on white, in [-1, 1]."""
    return 0.5 - net(2 * x - 1) / 2


def _pidinet(net: nn.Module, x: Tensor) -> Tensor:
    """Takes BGR; the last of its outputs fuses the others; white on black, by a sigmoid."""
    return net(x.flip(1))[-1]


def _mean_of_sides(net: nn.Module, x: Tensor) -> Tensor:
    """TEED and HED: take 0..255; logits at several sizes, white on black."""
    sides = [side.float() for side in net(255 * x)]
    size = (x.shape[2], x.shape[3])
    logits = [torch.nn.functional.interpolate(side, size, mode="bilinear", align_corners=False) for side in sides]
    return torch.sigmoid(torch.stack(logits).mean(dim=0))


def _make_lineart() -> nn.Module:
    return made_quietly(network_class("lineart", "Generator"), 3, 1, 3)


def _make_lineart_anime() -> nn.Module:
    norm = partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)
    return made_quietly(network_class("lineart_anime", "UnetGenerator"), 3, 1, 8, 64, norm, False)


KINDS: dict[str, Kind] = {
    "lineart": Kind(_make_lineart, _lineart),
    # eight halvings: both sides go to the next multiple of 256, as where it was published
    "lineart_anime": Kind(_make_lineart_anime, _lineart_anime, multiple=256),
    "pidinet": Kind(lambda: made_quietly(network_class("pidi", "pidinet")), _pidinet, inside="state_dict"),
    "teed": Kind(lambda: made_quietly(network_class("teed", "TED")), _mean_of_sides, multiple=8),
    "hed": Kind(lambda: made_quietly(network_class("hed", "ControlNetHED_Apache2")), _mean_of_sides),
}


def load(*, device: str, dtype: str, weights: Path, kind: str, file: str, shorter: int) -> Estimator:
    """kind: of KINDS. file: the weights' file; a .safetensors of the same stem is taken first."""
    row = KINDS[kind]
    found = read_weights(weights, file, f"{Path(file).stem}.safetensors")
    if isinstance(found.get(row.inside), dict):
        found = found[row.inside]
    net = row.make()
    load_strictly(net, without_prefix(found), weights / file)
    net = net.to(device=torch.device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    resolution = Resolution(shorter=shorter, most=1.0, multiple=row.multiple, up=True)
    return NetworkEstimator(LineNetwork(net, row.draw), resolution, torch.device(device), getattr(torch, dtype))


@dataclass
class LineNetwork:
    """A Network (extract.estimators.batching) that draws lines."""

    net: nn.Module
    draw: Draw

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        lines = self.draw(self.net, x)[:, :, : x.shape[2], : x.shape[3]]
        return [{"line": resized(line, size)} for line, size in zip(lines, sizes, strict=True)]

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        return {"line": white_on_black(found["line"][0])}
