"""From samples to what the networks read: both VAEs' posteriors and the text's embeddings. Everything here is frozen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from infer.vae import full_precision, scaled
from train.cached import encode_text
from train.data import Batch, Sample


@dataclass(frozen=True)
class Encoded:
    """B samples. mean, std: float32 (S, B, C, h, w), the posteriors of image and intrinsics, scaled as the network reads
    them. text: the pipeline's embeddings, each (B, ...)."""

    mean: Tensor
    std: Tensor
    text: dict[str, Tensor]

    def sample(self, noise: Tensor) -> Tensor:
        """Clean latents (S, B, C, h, w)."""
        return self.mean + self.std * noise


class Encoder:
    """Encodes batches. Where the samples are few and are seen often, each is encoded once, alone, and kept in memory: so
    what it gives never depends on its neighbours, nor on where a run was resumed."""

    def __init__(
        self, pipeline: Any, vae: AutoencoderKL, *, without: Sequence[slice], size_px: int, keep: bool
    ) -> None:
        """without: packed channels that are left out. keep: whether to remember."""
        self._pipeline, self._vae, self._without, self._keep = pipeline, vae, without, keep
        self._kept: dict[tuple[str, int, bool], Encoded] = {}
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.shape = (int(vae.config["latent_channels"]), size_px // factor, size_px // factor)
        """(C, h, w) of a latent."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Encoded:
        if batch.samples[0].cached is not None:
            return self._from_caches(batch.samples)
        if not self._keep:
            return self._encode(batch.samples)
        rows = [self._known(sample) for sample in batch.samples]
        return Encoded(
            torch.cat([row.mean for row in rows], dim=1),
            torch.cat([row.std for row in rows], dim=1),
            {name: torch.cat([row.text[name] for row in rows]) for name in rows[0].text},
        )

    def _from_caches(self, samples: Sequence[Sample]) -> Encoded:
        device, tensors = next(self._vae.parameters()).device, [dict(sample.cached or {}) for sample in samples]
        found = []
        for vae, name in ((self._pipeline.vae, "image"), (self._vae, "intrinsics")):
            mean, std = (torch.stack([t.pop(f"{name}.{m}") for t in tensors]).to(device) for m in ("mean", "std"))
            found.append((scaled(vae, mean), scaled(vae, mean + std) - scaled(vae, mean)))
        dtype = self._pipeline.vae.dtype
        text = {name: torch.stack([t[name] for t in tensors]).to(device) for name in tensors[0]}
        text = {name: rows.to(dtype) if rows.is_floating_point() else rows for name, rows in text.items()}
        means, stds = (torch.stack(column) for column in zip(*found, strict=True))
        return Encoded(means, stds, text)

    def _known(self, sample: Sample) -> Encoded:
        name = (sample.key, *sample.variant)
        if name not in self._kept:
            self._kept[name] = self._encode([sample])
        return self._kept[name]

    def _encode(self, samples: Sequence[Sample]) -> Encoded:
        batch, found = Batch(samples), []
        packed = batch.packed()
        for channels in self._without:
            packed[:, channels] = 0
        device = next(self._vae.parameters()).device
        with torch.autocast(device.type, enabled=False):
            for vae, pixels in ((self._pipeline.vae, batch.image()), (self._vae, packed)):
                with full_precision(vae):
                    posterior = vae.encode(pixels.to(device, vae.dtype)).latent_dist
                mean, std = posterior.mean.float(), posterior.std.float()
                found.append((scaled(vae, mean), scaled(vae, mean + std) - scaled(vae, mean)))
            text = encode_text(self._pipeline, [sample.caption for sample in samples])
        # a VAE that is not shared gives rows (4, B)
        mean, std = (torch.cat(column).unflatten(0, (-1, len(samples))) for column in zip(*found, strict=True))
        return Encoded(mean, std, text)
