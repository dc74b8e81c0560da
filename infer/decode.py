"""From latents to what a user wants: the image stream through the base's VAE, the intrinsic stream through ours."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor

from infer.model.denoiser import AttentionShare
from infer.model.vae import decode, full_precision, unscaled
from shards.intrinsics import IntrinsicMap
from shards.packing import DepthRange, unpack


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What one call made, B images in order.

    intrinsics: for each image its maps by name, in the dataset's conventions (shards.intrinsics); [] when not asked for.
    latents, intrinsic_latents: (B, C, h, w), scaled as the network works on them (without a shared VAE intrinsic_latents has
    rows (4, B), those of each intrinsic in turn). flagged: what the pipeline's safety
    checker says of each image, if it has one. shares: the image's attention to the intrinsics, if recorded: one entry
    for each layer and step, its value (G, B) or (G, B, N). settings: JSON; with a seed and its prompt, enough to repeat it.
    """

    images: list[Image.Image]
    intrinsics: list[dict[str, IntrinsicMap]]
    latents: Tensor
    intrinsic_latents: Tensor | None
    prompts: list[str]
    seeds: list[int]
    flagged: list[bool] | None
    shares: list[AttentionShare] | None
    settings: dict[str, Any]


def decode_images(pipeline: DiffusionPipeline, latents: Tensor) -> tuple[list[Image.Image], list[bool] | None]:
    """The images of latents (B, C, h, w) as the stock pipeline makes them: upcast, watermark, safety checker and all."""
    vae, is_sdxl = pipeline.vae, type(pipeline).__name__.startswith("StableDiffusionXL")
    if is_sdxl:
        with full_precision(vae):
            z = unscaled(vae, latents.to(get_module_execution_device(vae), vae.dtype))
            pixels = vae.decode(z, return_dict=False)[0]
        if getattr(pipeline, "watermark", None) is not None:
            pixels = pipeline.watermark.apply_watermark(pixels)
    else:
        z = (latents / vae.config.scaling_factor).to(get_module_execution_device(vae), vae.dtype)
        pixels = vae.decode(z, return_dict=False)[0]
    flagged = None
    if getattr(pipeline, "safety_checker", None) is not None:
        pixels, flagged = pipeline.run_safety_checker(pixels, pixels.device, pixels.dtype)
    shown = None if flagged is None else [not bad for bad in flagged]
    return pipeline.image_processor.postprocess(pixels.detach(), output_type="pil", do_denormalize=shown), flagged


def decode_intrinsics(
    pipeline: DiffusionPipeline, vae: Any, latents: Tensor, depth: DepthRange
) -> list[dict[str, IntrinsicMap]]:
    """The four maps of each of latents (B, C, h, w), or, without a shared VAE, of latents (4 B, C, h, w).

    vae: the intrinsic AutoencoderKL, or the SeparateVae. It follows the base's: its device, its slicing and tiling, and, where
    the pipeline offloads its models, it goes back to the CPU afterwards.
    """
    for name in ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        if hasattr(pipeline.vae, name):
            setattr(vae, name, getattr(pipeline.vae, name))
    vae.to(get_module_execution_device(pipeline.vae))
    with full_precision(vae):
        packed = decode(vae, latents).float().cpu().numpy()
    if hasattr(pipeline.vae, "_hf_hook"):
        vae.to("cpu")
    return [unpack(channels, depth, blurred=True) for channels in packed]


def is_finite(latents: Tensor) -> bool:
    """Whether no latent is NaN or infinite (half precision overflowed, or the scheduler does not fit the base)."""
    return bool(torch.isfinite(latents).all())
