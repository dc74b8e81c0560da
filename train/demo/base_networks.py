"""The parts of an embedded base: an ordinary Stable Diffusion pipeline, small enough to ship and to train on two cores.

What differs between bases is a row of ARCHITECTURES; a base that ships is made by one of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from extract.world.vocabulary import words

TEXT_WIDTH, TEXT_LENGTH = 192, 32
PAD, BEGIN, END, UNKNOWN = "<pad>", "<begin>", "<end>", "<unknown>"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of the VAE and the U-Net. Every level of the U-Net has self-attention, so each is a stage of joint attention."""

    image_px: int = 64
    """Side of the images in pixels."""
    vae_channels: tuple[int, ...]
    """Channels of the VAE's levels. Each level after the first halves the side: four levels make stride 8, three stride 4."""
    latent_channels: int
    """Channels of a latent. As many numbers to a pixel in both rows of the table: 16 to 8 x 8 pixels, 4 to 4 x 4."""
    channels: tuple[int, ...]
    """Channels of the U-Net's levels, multiples of 16."""
    heads: tuple[int, ...]
    """Attention heads of each level."""
    layers: tuple[int, ...]
    """Transformer layers in each block of a level."""

    @property
    def stride(self) -> int:
        return 2 ** (len(self.vae_channels) - 1)

    @property
    def latent_px(self) -> int:
        """Side of a latent: its square is how many tokens the first level's self-attention has."""
        return self.image_px // self.stride


ARCHITECTURES: dict[str, Architecture] = {
    # Sixteen channels rather than the usual four: things are two latents wide, and the VAE must not take their shapes.
    "8x8": Architecture(
        vae_channels=(16, 32, 64, 128), latent_channels=16, channels=(96, 192), heads=(3, 6), layers=(3, 1)
    ),
    # Four times the tokens, as many numbers in all: a thin level of 256 tokens on top of the same U-Net, which costs half as
    # much time again. The weights are as many (10.9 million).
    "16x16": Architecture(
        vae_channels=(16, 32, 64), latent_channels=4, channels=(48, 96, 192), heads=(3, 3, 6), layers=(1, 3, 1)
    ),
}
EMBEDDED = "8x8"
"""The row of the base that ships."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the caption grammar; other words are <unknown>. Captions are padded to TEXT_LENGTH."""
    vocabulary = {word: number for number, word in enumerate((PAD, BEGIN, END, UNKNOWN, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(name, vocabulary[name]) for name in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=TEXT_LENGTH,
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """A CLIP text transformer of two layers, trained together with the U-Net."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae(architecture: Architecture) -> AutoencoderKL:
    """It starts close to a linear network, which learns the first things many times as fast.

    Every residual branch begins at zero, and the posterior nearly without noise: at the usual deviation of 1, early steps
    would see little else. One group for each norm: with few channels, several groups normalise colour away.
    """
    levels = len(architecture.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=architecture.vae_channels,
        layers_per_block=1,
        latent_channels=architecture.latent_channels,
        norm_num_groups=1,
        sample_size=architecture.image_px,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.get_parameter("to_out.0.weight"))
        vae.quant_conv.bias[architecture.latent_channels :] = -6.0  # the log variances
    return vae


def make_unet(architecture: Architecture) -> UNet2DConditionModel:
    levels = len(architecture.channels)
    return UNet2DConditionModel(
        sample_size=architecture.latent_px,
        in_channels=architecture.latent_channels,
        out_channels=architecture.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=architecture.channels,
        layers_per_block=1,
        transformer_layers_per_block=architecture.layers,
        attention_head_dim=architecture.heads,  # diffusers takes the number of heads, whatever the name says
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 2.1's schedule: 1000 timesteps, v prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_base(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Writes a diffusers folder that StableDiffusionPipeline.from_pretrained loads, with weights in float16."""
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,  # type: ignore[arg-type]  # diffusers only calls it
        unet=unet.half(),
        scheduler=make_scheduler(),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers would load the text encoder in the dtype that it was saved in, diffusers the rest in float32
    config = folder / "text_encoder" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n"
    )
