"""Tiny random networks and pipelines of every base that the model half knows, built in memory in milliseconds.

networks: NETWORKS[name]() -> network in eval mode; inputs(network, rows) -> the keyword arguments of its forward.
pipelines: PIPELINES[name]() -> stock pipeline without text encoders: call it with embeddings(pipeline, prompts).
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

TEXT = 16  # width of the text embeddings
TOKENS = 5  # their number


def sd15(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Four levels as in SD 1.5: 1x1-convolution projections, the same number of heads everywhere."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": 2,  # SD 1.5 misnames it: the number of heads
        "cross_attention_dim": TEXT,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(config | changes)).eval()


def sd21(seed: int = 0) -> UNet2DConditionModel:
    """As SD 2.1: linear projections, heads that grow with the channels, upcast attention; predicts v."""
    return sd15(seed, attention_head_dim=(2, 2, 4, 4), use_linear_projection=True, upcast_attention=True)


def sdxl(seed: int = 0) -> UNet2DConditionModel:
    """Three levels as in SDXL: none, one and two transformer blocks, size and crop conditioning."""
    return sd15(
        seed,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=TEXT + 6 * 4,
    )


def pixart_alpha(seed: int = 0, sample_size: int = 128) -> PixArtTransformer2DModel:
    """As PixArt-alpha at 1024 px: resolution and aspect conditioning, learned sigma (8 channels out), heads 24 wide."""
    torch.manual_seed(seed)
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=4,
        cross_attention_dim=48,
        caption_channels=TEXT,
        sample_size=sample_size,
    )
    nn.init.normal_(network.proj_out.weight, std=0.2)
    return network.eval()


def pixart_sigma(seed: int = 0) -> PixArtTransformer2DModel:
    """As PixArt-Sigma: no extra conditioning."""
    return pixart_alpha(seed, sample_size=64)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sd15": sd15,
    "sd21": sd21,
    "sdxl": sdxl,
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
}


def inputs(network: nn.Module, rows: int, seed: int = 0, timestep: float = 500.0, size: int = 8) -> dict[str, Any]:
    """Random arguments of one forward with this many rows; latents are size x size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text = normal(rows, TOKENS, TEXT)
    if isinstance(network, PixArtTransformer2DModel):
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            added = {"resolution": normal(rows, 2).abs() * 100, "aspect_ratio": normal(rows, 1).abs()}
        mask = torch.ones(rows, TOKENS)
        mask[:, -1] = 0
        return {
            "hidden_states": normal(rows, 4, size, size),
            "encoder_hidden_states": text,
            "timestep": torch.full((rows,), timestep),
            "added_cond_kwargs": added,
            "encoder_attention_mask": mask,
        }
    arguments = {
        "sample": normal(rows, 4, size, size),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": text,
    }
    if network.config.addition_embed_type == "text_time":
        arguments["added_cond_kwargs"] = {"text_embeds": normal(rows, TEXT), "time_ids": normal(rows, 6).abs()}
    return arguments


def forward(network: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The network's prediction, (rows, C, h, w)."""
    return network(**arguments, return_dict=False)[0]


def vae(seed: int = 0) -> AutoencoderKL:
    """An image VAE that shrinks by 8."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """1,000 training steps, Stable Diffusion's noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def sd15_pipeline() -> StableDiffusionPipeline:
    return _sd_pipeline(sd15(), "epsilon")


def sd21_pipeline() -> StableDiffusionPipeline:
    return _sd_pipeline(sd21(), "v_prediction")


def _sd_pipeline(unet: UNet2DConditionModel, prediction_type: str) -> StableDiffusionPipeline:
    return _quiet(
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    parts = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    return _quiet(
        StableDiffusionXLPipeline(vae=vae(), unet=sdxl(), scheduler=scheduler(), add_watermarker=False, **parts)
    )


def pixart_alpha_pipeline() -> PixArtAlphaPipeline:
    return _quiet(
        PixArtAlphaPipeline(
            vae=vae(), transformer=pixart_alpha(), scheduler=scheduler(), tokenizer=None, text_encoder=None
        )
    )


def pixart_sigma_pipeline() -> PixArtSigmaPipeline:
    return _quiet(
        PixArtSigmaPipeline(
            vae=vae(), transformer=pixart_sigma(), scheduler=scheduler(), tokenizer=None, text_encoder=None
        )
    )


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd15": sd15_pipeline,
    "sd21": sd21_pipeline,
    "sdxl": sdxl_pipeline,
    "pixart_alpha": pixart_alpha_pipeline,
    "pixart_sigma": pixart_sigma_pipeline,
}


def embeddings(pipeline: DiffusionPipeline, prompts: int, seed: int = 0) -> dict[str, Any]:
    """Random text embeddings, positive and negative, as the pipeline's call takes them in place of prompts."""
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given[name] = torch.randn(prompts, TOKENS, TEXT, generator=generator)
        if isinstance(pipeline, StableDiffusionXLPipeline):
            pooled = name.replace("prompt_embeds", "pooled_prompt_embeds")
            given[pooled] = torch.randn(prompts, TEXT, generator=generator)
        elif not isinstance(pipeline, StableDiffusionPipeline):
            given[name.replace("embeds", "attention_mask")] = torch.ones(prompts, TOKENS)
            given["negative_prompt"] = None  # PixArt's default, "", is refused beside embeddings
    return given


def _quiet(pipeline: DiffusionPipeline) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
