"""The loss of the intrinsic VAE, each intrinsic in its own measure (ours; the paper does not say it). A few pure lines.

    depth          |y - x|                              of the packed log or inverse depth (shards.packing)
    normal         (1 - cos(y, x)) + mean |y - x|       the angle, and the length that makes the angle well-posed
    segmentation   mean |y - x|                         over the three channels of the segment's colour
    line           |y - x| + (y - x)^2                  thin lines are rare: a plain L1 would leave them out

Each is a mean over the sample's valid pixels, so that a batch is the mean of its samples, however it is cut.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.intrinsics import INTRINSICS
from shards.packing import SLICES


def reconstruction(y: Tensor, x: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """The error of each intrinsic, (B,). y, x: (B, 8, H, W), made and true; valid: bool (B, 4, H, W)."""
    error = (y - x).abs()
    pixels: dict[str, Tensor] = {}  # (B, H, W)
    for name, channels in SLICES.items():
        pixels[name] = error[:, channels].mean(dim=1)
    normal = SLICES["normal"]
    pixels["normal"] = pixels["normal"] + 1 - F.cosine_similarity(y[:, normal], x[:, normal], dim=1, eps=1e-6)
    pixels["line"] = pixels["line"] + pixels["line"].square()
    return {name: _mean(pixels[name], valid[:, i]) for i, name in enumerate(INTRINSICS)}


def _mean(pixels: Tensor, valid: Tensor) -> Tensor:
    """(B, H, W) -> (B,): over the valid pixels; 0 where there is none."""
    return (pixels * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1)


def kl(mean: Tensor, logvar: Tensor, prior_mean: Tensor | float, prior_std: Tensor | float) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(prior_mean, prior_std^2)) for each latent number, averaged to (B,).

    The prior has the mean and the deviation that each channel of the base's latents has for pictures: the diffusion model
    then sees of intrinsics what it does of images (ours).
    """
    prior = torch.as_tensor(prior_std, device=mean.device, dtype=mean.dtype)
    ratio = (logvar.exp() + (mean - prior_mean).square()) / prior.square()
    return (0.5 * (ratio - 1 - logvar + 2 * prior.log())).flatten(1).mean(dim=1)


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float], given: Tensor, missing: float) -> Tensor:
    """(B,): the weighted sum of the intrinsics' terms; those that were zeroed in the input count `missing` times.

    given: bool (B, 4), in the order of INTRINSICS.
    """
    asked = torch.where(given, 1.0, missing)
    return sum((weights[name] * asked[:, i] * terms[name] for i, name in enumerate(INTRINSICS)), start=torch.zeros(()))
