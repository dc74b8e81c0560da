"""The base and the run that ship with the package: ordinary folders, small, and trained."""

import json

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open

from extract.world import compose, render
from infer.embedded import EMBEDDED
from infer.run_folder import load_manifest
from train.demo.text_to_image import psnr

BASE, RUN = EMBEDDED / "demo" / "base", EMBEDDED / "demo" / "run"


def test_the_base_is_a_small_stable_diffusion_folder_in_half_precision() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, use_safetensors=True)
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel" and pipeline.scheduler.config["prediction_type"]
    for file in BASE.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_tensor(name).dtype for name in weights.keys()} <= {torch.float16, torch.int64}  # noqa: SIM118
    assert sum(file.stat().st_size for file in BASE.rglob("*") if file.is_file()) <= 30e6
    image = pipeline("a red cube", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_the_base_gives_back_scenes_that_it_has_not_seen() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, use_safetensors=True)
    images = np.stack([render(compose(77, index), 64).image for index in range(16)])
    assert psnr(pipeline.vae, images) > 30


def test_the_run_was_trained_for_this_base() -> None:
    manifest = load_manifest(RUN)
    assert manifest.base.name == "demo"
    assert json.loads((RUN / "manifest.json").read_text())["prediction_type"] == "v_prediction"
