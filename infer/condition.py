"""More from the same checkpoint: image -> intrinsics, intrinsics -> image, and inpainting of either. All approximate.

Before every call of the network the known part of a stream is set to what the network is to see of it, whatever the sampler
made of it; the rest is sampled as ever and attends to it. There are two ways:

    noised    a(t) x0 + s(t) noise, as noisy as the rest: two streams at one timestep, as in the paper's training. At first
              little can be read of it.
    clean     x0 at timestep 0, from the first step on: for runs that were trained with timesteps of each stream's own
              (lora.known_stream, lora.independent_timesteps). A stream that is known in part is noised: one row has one
              timestep.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from infer.model.vae import encode, full_precision
from shards.core.errors import UsageError, UserError
from shards.intrinsics import IntrinsicMap
from shards.packing import SLICES, pack

Hold = Literal["noised", "clean"]
HOLDS: tuple[Hold, ...] = ("noised", "clean")


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of the picture: its image, any subset of its maps, or both.

    image: RGB, resized to the size asked for. maps: (H, W) of the size asked for; a map that is left out is zero, as in the
    VAE's training (where the VAE is not shared: unknown). repaint_image, repaint_maps: bool (H, W), True where that stream
    is to be made anew; None: nowhere.
    """

    image: Image.Image | None = None
    maps: Mapping[str, IntrinsicMap] = field(default_factory=dict)
    repaint_image: np.ndarray | None = None
    repaint_maps: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.image is None and not self.maps:
            raise UsageError("nothing is given: pass an image, maps, or both")
        if (self.image is None and self.repaint_image is not None) or (not self.maps and self.repaint_maps is not None):
            raise UsageError("a mask says what to repaint of something that is given; pass that too")

    def size(self) -> tuple[int, int]:
        """(height, width) of what is given."""
        if self.maps:
            height, width = next(iter(self.maps.values())).values.shape[:2]
            return int(height), int(width)
        assert self.image is not None
        return self.image.height, self.image.width


@dataclass(frozen=True)
class Known:
    """Clean latents (S, B, C, h, w) of all streams and where they are known, bool (S, B, 1, h, w)."""

    latents: Tensor
    where: Tensor

    @property
    def image_is_whole(self) -> bool:
        return bool(self.where[0].all())

    @property
    def intrinsics_are_whole(self) -> bool:
        """Whether the streams of the maps that are given are known everywhere (one mask is for all of them)."""
        return any(bool(stream.all()) for stream in self.where[1:])

    def put(self, latents: Tensor) -> Tensor:
        """Latents (S B, C, h, w) with the known part in its place."""
        made = latents.unflatten(0, (len(self.where), -1))
        return torch.where(self.where, self.latents.to(latents), made).flatten(0, 1)


def known_latents(
    given: Sequence[Given],
    image_vae: AutoencoderKL,
    intrinsic_vae: AutoencoderKL,
    like: Tensor,
    size: tuple[int, int],
    streams: int = 2,
) -> Known:
    """Encodes what is given of B images: of each its own, or of all of them one.

    like: the initial noise (B, C, h, w). size: (height, width) in pixels.
    """
    one = like[:1] if len(given) > 1 else like
    each = [_known_of(item, image_vae, intrinsic_vae, one, size, streams) for item in given]
    latents, where = (torch.cat(parts, dim=1) for parts in zip(*each, strict=True))
    return Known(latents, where.to(like.device))


def _known_of(
    given: Given,
    image_vae: AutoencoderKL,
    intrinsic_vae: AutoencoderKL,
    like: Tensor,
    size: tuple[int, int],
    streams: int,
) -> tuple[Tensor, Tensor]:
    """Clean latents (S, B, C, h, w), and where they are known, bool (S, B, 1, h, w), for as many images as `like` has."""
    latents = torch.zeros_like(like).repeat(streams, 1, 1, 1, 1)
    where = torch.zeros(streams, *like.shape, dtype=torch.bool)[:, :, :1]
    height, width = size
    if given.image is not None:
        pixels = torch.from_numpy(np.array(_resized(given.image, size))).float() / 127.5 - 1
        with full_precision(image_vae):
            latents[0] = encode(image_vae, pixels.movedim(2, 0)[None]).to(like)
        where[0] = _known(given.repaint_image, size, like)

    if given.maps:
        for name, item in given.maps.items():
            if item.values.shape[:2] != size:
                found = f"{item.values.shape[1]} x {item.values.shape[0]}"
                raise UserError(f"the given {name} map is {found}; the size asked for is {width} x {height}")
        with full_precision(intrinsic_vae):
            encoded = encode(intrinsic_vae, torch.from_numpy(pack(given.maps)[0])[None])
        latents[1:] = encoded[:, None].to(like)  # a row for each intrinsic stream
        of_each = [1 + number for number, name in enumerate(SLICES) if name in given.maps]
        where[[1] if streams == 2 else of_each] = _known(given.repaint_maps, size, like)
    return latents, where


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    rgb = image.convert("RGB")
    return rgb if rgb.size == (width, height) else rgb.resize((width, height), Image.Resampling.LANCZOS)


def _known(repaint: np.ndarray | None, size: tuple[int, int], like: Tensor) -> Tensor:
    """bool (B, 1, h, w): latents of which no pixel is to be repainted."""
    if repaint is None:
        return torch.ones(like.shape[0], 1, *like.shape[2:], dtype=torch.bool)
    if repaint.shape != size:
        raise UserError(
            f"the mask is {repaint.shape[1]} x {repaint.shape[0]}; the size asked for is {size[1]} x {size[0]}"
        )
    touched = F.adaptive_max_pool2d(torch.from_numpy(repaint.astype(np.float32))[None, None], like.shape[2:])
    return (touched == 0).expand(like.shape[0], -1, -1, -1)


def signal_and_noise(alphas_cumprod: Tensor, timestep: float) -> tuple[float, float]:
    """a(t) and s(t) of x_t = a x0 + s noise, a^2 + s^2 = 1: what the network reads, whichever the sampler.

    alphas_cumprod: (T,), the scheduler's. Between two timesteps log(s / a) is linear, as samplers have it.
    """
    low = min(max(math.floor(timestep), 0), len(alphas_cumprod) - 1)
    high, share = min(low + 1, len(alphas_cumprod) - 1), timestep - math.floor(timestep)
    ratios = [math.log(max(1 - float(a), 1e-12) / max(float(a), 1e-12)) for a in alphas_cumprod[[low, high]]]
    log_ratio = ratios[0] if share == 0 else (1 - share) * ratios[0] + share * ratios[1]
    signal = 1 / (1 + math.exp(log_ratio))
    return math.sqrt(signal), math.sqrt(1 - signal)


class KnownStreams:
    """A forward pre-hook of the network that sets the known part of its input."""

    def __init__(self, known: Known, noise: Tensor, scheduler: Any, hold: Hold = "noised") -> None:
        """noise: (B, C, h, w). Raises UserError for a scheduler whose noise the network was not trained on."""
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"{type(scheduler).__name__} has no alphas_cumprod, so what is given cannot be noised by it"
            )
        self._known, self._noise, self._alphas = known, noise, scheduler.alphas_cumprod
        self._clean = known.where.flatten(1).all(dim=1) & (hold == "clean")  # (S,)

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = "sample" if "sample" in kwargs else "hidden_states"
        sample = args[0] if args else kwargs[name]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        time = float(torch.as_tensor(timestep).reshape(-1)[0])
        latents, noise = self._known.latents.to(sample), self._noise.to(sample)
        seen = _at(self._alphas, time, latents, noise)  # (S, B, C, h, w)
        rows = sample.unflatten(0, (-1, *seen.shape[:2]))  # (G, S, B, C, h, w)
        if self._clean.any():
            clean = self._clean.to(sample.device)
            seen = torch.where(clean[:, None, None, None, None], _at(self._alphas, 0, latents, noise), seen)
            times = torch.as_tensor(timestep, device=sample.device).reshape(-1)[0].expand(rows.shape[:3])
            timestep = times.masked_fill(clean[:, None], 0).flatten()
        sample = torch.where(self._known.where.to(sample.device), seen, rows).flatten(0, 2)

        if not args:
            return args, kwargs | {name: sample, "timestep": timestep}
        if len(args) > 1:
            return (sample, timestep, *args[2:]), kwargs
        return (sample,), kwargs | {"timestep": timestep}


def _at(alphas: Tensor, timestep: float, latents: Tensor, noise: Tensor) -> Tensor:
    """What the network reads of clean latents at this timestep."""
    signal, sigma = signal_and_noise(alphas, timestep)
    return signal * latents + sigma * noise
