"""The intrinsic VAE: the base model's AutoencoderKL, widened to the packed intrinsic channels (paper, sec. 3.2).

The channels come in groups: depth 1, normal 3, segmentation 3, line 1 (shards.packing). What the paper leaves open and
we chose is how the first and the last convolution start:

    first   every group of three gets the base's RGB filters, every single channel their sum, all divided by the number
            of groups. So a picture that is shown in every group at once (its grey value in the single channels) gives
            the base's own activations exactly where it is grey; different contents give the activations of their mean.
    last    every group of three gets the base's RGB filters, every single channel their mean: each group shows what the
            base would have drawn.

All other weights, `scaling_factor` and `shift_factor` are the base's. The result is a plain AutoencoderKL: it is saved
and loaded as any other diffusers VAE folder.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from shards.core.errors import UserError
from shards.intrinsics import INTRINSICS

GROUPS: tuple[int, ...] = tuple(row.channels for row in INTRINSICS.values())
"""The sizes of the packed channel groups, in order: (1, 3, 3, 1)."""


def widen(vae: AutoencoderKL, groups: Sequence[int] = GROUPS) -> AutoencoderKL:
    """A new AutoencoderKL with sum(groups) channels in and out, started from an RGB one as the module says.

    Latents keep the base's shape and scaling. The base is not changed; weights keep their dtype and device.
    Raises UserError if the base does not read and write 3 channels, or a group is neither 1 nor 3 wide.
    """
    if (_config(vae).in_channels, _config(vae).out_channels) != (3, 3):
        raise UserError(
            f"only an RGB autoencoder can be widened; this one reads {_config(vae).in_channels} channels "
            f"and writes {_config(vae).out_channels}"
        )
    if not groups or any(size not in (1, 3) for size in groups):
        raise UserError(f"channel groups must be 1 or 3 wide, not {tuple(groups)}")
    state = dict(vae.state_dict())
    first, last, last_bias = (state[name] for name in _EDGES)
    state[_EDGES[0]] = torch.cat([_reads(first, size) for size in groups], dim=1) / len(groups)
    state[_EDGES[1]] = torch.cat([_writes(last, size) for size in groups])
    state[_EDGES[2]] = torch.cat([_writes(last_bias, size) for size in groups])
    return _with_channels(vae, sum(groups), state)


def narrow(vae: AutoencoderKL, groups: Sequence[int] = GROUPS) -> AutoencoderKL:
    """Back to an RGB AutoencoderKL: it reads and writes with the mean of the groups of three.

    The exact inverse of `widen` as long as the edges are untrained. Raises UserError if the channels do not fit.
    """
    if (_config(vae).in_channels, _config(vae).out_channels) != (sum(groups), sum(groups)) or 3 not in groups:
        raise UserError(f"an autoencoder of {_config(vae).in_channels} channels has no channel groups {tuple(groups)}")
    state = dict(vae.state_dict())
    first, last, last_bias = (state[name] for name in _EDGES)
    colours = [i for i, size in enumerate(groups) if size == 3]
    reads, writes, biases = first.split(list(groups), dim=1), last.split(list(groups)), last_bias.split(list(groups))
    state[_EDGES[0]] = torch.stack([reads[i] for i in colours]).mean(dim=0) * len(groups)
    state[_EDGES[1]] = torch.stack([writes[i] for i in colours]).mean(dim=0)
    state[_EDGES[2]] = torch.stack([biases[i] for i in colours]).mean(dim=0)
    return _with_channels(vae, 3, state)


_EDGES = ("encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_out.bias")


def _config(vae: nn.Module) -> Any:
    return vae.config  # diffusers gives it to every model, but does not declare it


def _reads(filters: Tensor, size: int) -> Tensor:
    """First convolution (O, 3, k, k) as seen by a group of `size` channels. A grey picture gives the same response."""
    return filters if size == 3 else filters.sum(dim=1, keepdim=True)


def _writes(filters: Tensor, size: int) -> Tensor:
    """Last convolution, weight (3, I, k, k) or bias (3,), of a group of `size` channels."""
    return filters if size == 3 else filters.mean(dim=0, keepdim=True)


def _with_channels(vae: AutoencoderKL, channels: int, state: dict[str, Tensor]) -> AutoencoderKL:
    config = {key: value for key, value in _config(vae).items() if not key.startswith("_")}
    with torch.device("meta"):
        made = AutoencoderKL.from_config(config | {"in_channels": channels, "out_channels": channels})
    made.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    return made.train(vae.training)


def encode(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents (B, C, h, w), scaled as the diffusion model reads them, of pixels (B, channels, H, W) in [-1, 1].

    For the base VAE (an image) and for the intrinsic VAE (packed intrinsics) alike; a SeparateVae gives (4 B, C, h, w).
    The mode of the posterior, or with `generator` a sample of it.
    """
    posterior = vae.encode(pixels.to(get_module_execution_device(vae), vae.dtype)).latent_dist
    return scaled(vae, posterior.mode() if generator is None else posterior.sample(generator))


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels (B, channels, H, W), clipped to [-1, 1], of scaled latents (B, C, h, w)."""
    z = unscaled(vae, latents).to(get_module_execution_device(vae), vae.dtype)
    return vae.decode(z, return_dict=False)[0].clamp(-1, 1)


def scaled(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """The VAE's latents z in the scale in which the diffusion model works: (z - mean) scaling_factor / std."""
    mean, std = _statistics(vae, z)
    return (z - mean) * _config(vae).scaling_factor / std


def unscaled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The inverse of `scaled`."""
    mean, std = _statistics(vae, latents)
    return latents * std / _config(vae).scaling_factor + mean


def _statistics(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation by which the diffusion model sees latents: per channel, one shift, or none."""
    config = _config(vae)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std
    return float(config.get("shift_factor") or 0.0), 1.0


@contextlib.contextmanager
def full_precision(vae: nn.Module) -> Iterator[None]:
    """For a while in float32 if this VAE overflows in float16 (its config says so, as SDXL's does); else as it is."""
    overflows = vae.dtype == torch.float16 and bool(_config(vae).get("force_upcast"))
    if overflows:
        nn.Module.to(vae, dtype=torch.float32)
    try:
        yield
    finally:
        if overflows:
            nn.Module.to(vae, dtype=torch.float16)
