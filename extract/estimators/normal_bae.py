"""Normals by NormalBae, the network of controlnet_aux: called in float and in batches.

Its frame is x left, y up, z towards the camera: the x axis is turned round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator, Resolution, Size, normalised, resized, unit_normals
from extract.estimators.checkpoints import load_strictly, read_weights
from extract.estimators.nets.controlnet_aux_nets import made_quietly, network_class, without_prefix
from shards.intrinsics import IntrinsicMap

SIGNS = (-1, 1, 1)
STRIDE = 32


def load(*, device: str, dtype: str, weights: Path, file: str, shorter: int) -> Estimator:
    found = read_weights(weights, file, f"{Path(file).stem}.safetensors")
    found = found["model"] if isinstance(found.get("model"), dict) else found
    options = SimpleNamespace(
        mode="client", architecture="BN", pretrained="scannet", sampling_ratio=0.4, importance_ratio=0.7
    )
    net = made_quietly(network_class("normalbae.nets.NNET", "NNET"), options)
    load_strictly(net, without_prefix(found), weights / file)
    net = net.to(device=torch.device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    resolution = Resolution(shorter=shorter, most=1.0, multiple=STRIDE)
    return NetworkEstimator(NormalBae(net), resolution, torch.device(device), getattr(torch, dtype))


@dataclass
class NormalBae:
    """A Network (extract.estimators.batching)."""

    net: nn.Module

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        finest = self.net(normalised(x))[0][-1][:, :3]  # the fourth channel says how sure it is
        return [{"normal": resized(n, size)} for n, size in zip(finest, sizes, strict=True)]

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        return {"normal": unit_normals(found["normal"], SIGNS)}
