"""Without the shared VAE (the paper's ablation, Tab. 5): each intrinsic is a picture to the base's own VAE, in a stream of
its own, so that there are five streams in all instead of two (sec. 3.2).

How an intrinsic becomes a picture is our choice: its packed channels (shards.packing), three as they are, a single one in
all three. Back, a single one is the mean of the three.
"""

from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from shards.core.errors import UserError
from shards.packing import SLICES


class SeparateVae(AutoencoderKL):
    """The base's VAE, unchanged, where else the intrinsic VAE stands: it reads and writes packed intrinsics.

    Where the intrinsic VAE makes one latent of each of B packed intrinsics (B, 8, H, W), this one makes four, rows
    (4, B) of a batch (4 B, C, h, w): all depths, then all normals, segmentations and line drawings.
    """

    @classmethod
    def of(cls, vae: AutoencoderKL) -> Self:
        """Made of a base's VAE, of which it has a copy. Raises UserError unless that reads and writes 3 channels."""
        config: Any = vae.config
        if (config["in_channels"], config["out_channels"]) != (3, 3):
            raise UserError(
                f"only an RGB autoencoder reads intrinsics as pictures, not one of {config['in_channels']} channels"
            )
        with torch.device("meta"):
            made: Any = cls.from_config({key: value for key, value in config.items() if not key.startswith("_")})
        made.load_state_dict({name: value.detach().clone() for name, value in vae.state_dict().items()}, assign=True)
        return made.eval()

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Any]:
        """As AutoencoderKL's, of packed intrinsics (B, 8, H, W) in [-1, 1]; its posterior has rows (4, B)."""
        return super().encode(pictures(x), return_dict=return_dict)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """As AutoencoderKL's, of latents (4 B, C, h, w), rows (4, B); its sample is packed, (B, 8, H, W)."""
        packed = packed_of(super().decode(z, return_dict=False, generator=generator)[0])
        return DecoderOutput(sample=packed) if return_dict else (packed,)


def pictures(packed: Tensor) -> Tensor:
    """Packed intrinsics (B, 8, H, W) -> RGB pictures (4 B, 3, H, W), rows (4, B)."""
    return torch.cat([packed[:, channels].expand(-1, 3, -1, -1) for channels in SLICES.values()])


def packed_of(pictures: Tensor) -> Tensor:
    """The inverse of `pictures`."""
    shown = zip(SLICES.values(), pictures.chunk(len(SLICES)), strict=True)
    return torch.cat([rows if c.stop - c.start == 3 else rows.mean(dim=1, keepdim=True) for c, rows in shown], dim=1)
