"""From samples to what the networks read: both VAEs' posteriors and the text's embeddings. Everything here is frozen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from infer.model.vae import full_precision, scaled
from train.cache.format import encode_text
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

    def take(self, rows: Tensor) -> "Encoded":
        """These samples, of int64 (B,)."""
        return Encoded(self.mean[:, rows], self.std[:, rows], {name: value[rows] for name, value in self.text.items()})

    def put(self, first: int, other: "Encoded") -> None:
        """Another's samples in the place of those from `first` on."""
        rows = slice(first, first + other.mean.shape[1])
        self.mean[:, rows], self.std[:, rows] = other.mean, other.std
        for name, value in other.text.items():
            self.text[name][rows] = value

    def room(self, count: int, begin: "Encoded | None") -> "Encoded":
        """Room for `count` samples of this kind, of which the first are those of `begin`."""
        streams, _, *shape = self.mean.shape
        mean, std = (self.mean.new_empty((streams, count, *shape)) for _ in range(2))
        made = Encoded(mean, std, {name: v.new_empty((count, *v.shape[1:])) for name, v in self.text.items()})
        if begin is not None:
            made.put(0, begin)
        return made


class Encoder:
    """Encodes batches. Where the samples are few and are seen often, each is encoded once and remembered, on the device.

    On the CPU each is then encoded alone, so that what it gives never depends on its neighbours, nor on where a run was
    resumed. GPUs promise no such thing: there a batch's new ones are encoded together.
    """

    def __init__(
        self, pipeline: Any, vae: AutoencoderKL, *, without: Sequence[slice], size_px: int, keep: bool
    ) -> None:
        """without: packed channels that are left out. keep: whether to remember."""
        self._pipeline, self._vae, self._without, self._keep = pipeline, vae, without, keep
        self._rows: dict[tuple[str, int, bool], int] = {}  # of the memory, by key, dataset and flip
        self._memory: Encoded | None = None
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.shape = (int(vae.config["latent_channels"]), size_px // factor, size_px // factor)
        """(C, h, w) of a latent."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Encoded:
        if batch.samples[0].cached is not None:
            return self._from_caches(batch.samples)
        if not self._keep:
            return self._encode(batch.samples)
        self.remember(batch.samples)
        assert self._memory is not None
        rows = torch.tensor([self._rows[_name(sample)] for sample in batch.samples])
        return self._memory.take(rows.to(self._memory.mean.device, non_blocking=True))

    @torch.no_grad()
    def remember(self, samples: Sequence[Sample]) -> None:
        """Encodes those that it has not seen before."""
        new = list({_name(sample): sample for sample in samples if _name(sample) not in self._rows}.values())
        alone = next(self._vae.parameters()).device.type == "cpu"
        for group in [[sample] for sample in new] if alone else [new] if new else []:
            found, first = self._encode(group), len(self._rows)
            if self._memory is None or first + len(group) > self._memory.mean.shape[1]:
                self._memory = found.room(2 * first + len(group), self._memory)
            self._memory.put(first, found)
            self._rows |= {_name(sample): first + i for i, sample in enumerate(group)}

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

    def _encode(self, samples: Sequence[Sample]) -> Encoded:
        batch, found = Batch(samples), []
        device = next(self._vae.parameters()).device
        packed = batch.packed(device)
        for channels in self._without:
            packed[:, channels] = 0
        with torch.autocast(device.type, enabled=False):
            for vae, pixels in ((self._pipeline.vae, batch.image(device)), (self._vae, packed)):
                with full_precision(vae):
                    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
                mean, std = posterior.mean.float(), posterior.std.float()
                found.append((scaled(vae, mean), scaled(vae, mean + std) - scaled(vae, mean)))
            text = encode_text(self._pipeline, [sample.caption for sample in samples])
        # a VAE that is not shared gives rows (4, B)
        mean, std = (torch.cat(column).unflatten(0, (-1, len(samples))) for column in zip(*found, strict=True))
        return Encoded(mean, std, text)


def _name(sample: Sample) -> tuple[str, int, bool]:
    """What decides how a sample is encoded."""
    return (sample.key, *sample.variant)
