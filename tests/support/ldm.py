"""A Stable Diffusion 1.x base as one .safetensors file, in the names of its first release."""

import re
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def save_single_file(pipeline: Any, path: Path) -> Path:
    """U-Net, VAE and text encoder of a pipeline, without configuration or tokenizer, as people publish them."""
    unet, vae = pipeline.unet, pipeline.vae
    tensors = {
        f"model.diffusion_model.{_unet_name(key, unet.config)}": value for key, value in unet.state_dict().items()
    }
    for key, value in vae.state_dict().items():
        name = _vae_name(key, len(vae.config.block_out_channels))
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if _is_projection(name, value) else value
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def _is_projection(name: str, value: Tensor) -> bool:
    return ".attn_1." in name and value.ndim == 2


def _unet_name(key: str, config: Any) -> str:
    blocks, layers = len(config.block_out_channels), config.layers_per_block
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
        block, kind, layer, rest = int(found[1]), found[2], int(found[3]), found[4]
        return f"input_blocks.{1 + block * (layers + 1) + layer}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{found[2]}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{_inner(found[1], found[3])}"
    if found := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
        block, kind, layer, rest = int(found[1]), found[2], int(found[3]), found[4]
        return f"output_blocks.{block * (layers + 1) + layer}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    found = re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(conv\..*)", key)
    assert found is not None and int(found[1]) < blocks, key
    has_attention = "Attn" in config.up_block_types[int(found[1])]
    return f"output_blocks.{int(found[1]) * (layers + 1) + layers}.{2 if has_attention else 1}.{found[2]}"


def _inner(kind: str, rest: str) -> str:
    part, _, tail = rest.partition(".")
    return f"{_RESNET[part]}.{tail}" if kind == "resnets" else rest


def _vae_name(key: str, blocks: int) -> str:
    key = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", key)
    key = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
    for kind, name in (("resnets", "block"), ("upsamplers", "upsample")):
        if found := re.match(rf"decoder\.up_blocks\.(\d+)\.{kind}\.(\d+)\.(.*)", key):
            number = f".{found[2]}" if name == "block" else ""
            key = f"decoder.up.{blocks - 1 - int(found[1])}.{name}{number}.{found[3]}"
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    for ours, theirs in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key
