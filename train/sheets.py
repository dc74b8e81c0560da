"""Pictures made while training: from fixed prompts and seeds, by the same code that infer samples with."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import nn

from infer.bases.loading import describe_base, network_of, prediction_type_of
from infer.model.denoiser import JointDenoiser
from infer.model.separate_vae import SeparateVae
from infer.model.stages import stage_map_of
from infer.run_folder import Run, manifest_for
from infer.sampler import CoGenerator
from shards.core.errors import UserError
from shards.inspect.display import sheet
from train.config import LoraConfig


class TrainingGenerator(CoGenerator):
    """Samples with the joint attention that training installed, and the adapters as they are at the moment."""

    def __init__(self, pipeline: Any, denoiser: JointDenoiser, vae: AutoencoderKL) -> None:
        network: nn.Module = network_of(pipeline)
        lora = denoiser.lora_weights()
        manifest = manifest_for(
            network, "training", prediction_type_of(pipeline), lora, shared_vae=not isinstance(vae, SeparateVae)
        )
        self.run, self.base = Run(url="", manifest=manifest, lora=lora, vae=vae), describe_base(network, "training")
        self.pipeline, self.vae, self.denoiser = pipeline, vae, denoiser
        self.stages = stage_map_of(network)


def sample_sheet(
    generator: CoGenerator, prompts: Sequence[str], config: LoraConfig, size_px: int
) -> dict[str, Image.Image]:
    """One row for each prompt: the image and its four maps. {} if the base gives nothing finite yet."""
    try:
        made = generator(
            list(prompts),
            seeds=list(range(len(prompts))),
            size=size_px,
            steps=config.sample_steps,
            guidance=config.guidance,
        )
    except UserError as error:
        print(f"note: no sheet of samples: {error}", file=sys.stderr)
        return {}
    rows = [
        (np.asarray(image.convert("RGB")), maps, prompt)
        for image, maps, prompt in zip(made.images, made.intrinsics, prompts, strict=True)
    ]
    return {"samples": sheet(rows, 192)}
