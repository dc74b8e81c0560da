"""Depth and normals by Marigold, a diffusion model, through its diffusers pipelines.

All images start from the same noise, so that one comes out the same in any batch and any run. Images are brought to sides
that the autoencoder divides, never padded: its normalisation would see the padding. Its normals are in our frame. Its depth
is depth up to an affine change, 0 nearest and 1 farthest, while what we store is inverse depth: 1 / (near + depth), where
`near` is how far away the nearest point is taken to be, as a share of the scene's depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator, Resolution, Size, relative_depth, resized, unit_normals
from extract.estimators.checkpoints import unreadable
from shards.core.errors import UserError
from shards.intrinsics import IntrinsicMap

PIPELINES = {"depth": "MarigoldDepthPipeline", "normal": "MarigoldNormalsPipeline"}
SEED = 0


def load(
    *, device: str, dtype: str, weights: Path, yields: str, resolution: dict[str, Any], steps: int, near: float = 0.2
) -> Estimator:
    """yields: "depth" or "normal". steps: of denoising."""
    pipeline = _load_pipeline(weights, yields).to(torch.device(device))
    if type(pipeline.scheduler).__name__ != "DDIMScheduler" and steps > 1:
        raise UserError(
            f"the estimator checkpoint {weights} draws new noise at each of its {steps} steps, so that no two runs are "
            "alike; set settings.steps = 1 in its row, or take a checkpoint with a DDIMScheduler"
        )
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    network = Marigold(pipeline, yields, steps, near)
    return NetworkEstimator(network, Resolution(**resolution), torch.device(device), getattr(torch, dtype))


def _load_pipeline(folder: Path, yields: str) -> Any:
    """The pipeline in float32. Raises UserError if a part is missing or damaged, or lacks weights."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    parts = {}
    try:
        for name, cls in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
            parts[name], report = cls.from_pretrained(
                folder, subfolder=name, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            if lacking := [*report["missing_keys"], *report["mismatched_keys"]]:
                raise UserError(f"its {name} has no fitting weights for {lacking[0]} and {len(lacking) - 1} others")
        pipeline = getattr(diffusers, PIPELINES[yields]).from_pretrained(folder, local_files_only=True, **parts)
    except Exception as error:  # what a damaged folder raises depends on where it is damaged
        raise unreadable(folder, error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass
class Marigold:
    """A Network (extract.estimators.batching)."""

    pipeline: Any
    yields: str
    steps: int
    near: float

    def predict(self, x: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        scale, channels = self.pipeline.vae_scale_factor, self.pipeline.vae.config.latent_channels
        shape = (1, channels, x.shape[2] // scale, x.shape[3] // scale)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(x.device)
        found = self.pipeline(
            x,
            num_inference_steps=self.steps,
            processing_resolution=0,  # it has its size already
            match_input_resolution=False,
            batch_size=len(x),
            latents=noise.repeat(len(x), 1, 1, 1),
            output_type="pt",
        ).prediction
        return [{self.yields: resized(one, size)} for one, size in zip(found, sizes, strict=True)]

    def maps(self, found: dict[str, np.ndarray], size: Size) -> dict[str, IntrinsicMap]:
        if self.yields == "normal":
            return {"normal": unit_normals(found["normal"])}
        return {"depth": relative_depth(affine_to_inverse(found["depth"][0], self.near))}


def affine_to_inverse(depth: np.ndarray, near: float) -> np.ndarray:
    """Inverse depth up to scale of depth in [0, 1] (H, W), 0 nearest, whose nearest point is `near` of its range away."""
    return 1 / (near + np.clip(depth, 0, 1))
