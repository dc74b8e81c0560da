"""Eq. 5 in a few pure lines: noising, targets, and the two streams' losses."""

import torch
from torch import Tensor


def noised(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) eps. clean, noise: (B, C, h, w); level: alphas_cumprod at t, (B,)."""
    a = level[:, None, None, None]
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def target(clean: Tensor, noise: Tensor, level: Tensor, prediction_type: str) -> Tensor:
    """What the network is to predict: eps, or v = sqrt(a) eps - sqrt(1 - a) x_0."""
    if prediction_type == "epsilon":
        return noise
    a = level[:, None, None, None]
    return a.sqrt() * noise - (1 - a).sqrt() * clean


def stream_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """||predicted - wanted||^2, the mean of each sample, (B,). A network that learned its variance too (PixArt) predicts
    twice the channels, the noise in the first half."""
    return (predicted[:, : wanted.shape[1]].float() - wanted.float()).square().flatten(1).mean(dim=1)


def snr_weight(level: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR weighting (arXiv 2303.09556), (B,): min(snr, gamma) / snr for eps, / (snr + 1) for v; 1 if gamma is 0."""
    if not gamma:
        return torch.ones_like(level)
    snr = level / (1 - level)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
