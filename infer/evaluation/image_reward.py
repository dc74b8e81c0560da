"""ImageReward (Xu et al., 2023) over transformers' BLIP: a picture and its prompt -> how much people would like it.

A BLIP text encoder reads the prompt while it looks at the picture (ViT-L); five linear layers make a number of its first
token, which is centred and scaled. The published folder (ImageReward.pt, med_config.json) is read as it is, with the
tokenizer of bert-base-uncased beside it. The weights are never unpickled: torch's weights_only reader.
"""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipImageProcessor, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from infer.content import of_model
from infer.evaluation.generate import Arrays
from shards.core.errors import UserError

WEIGHTS, TEXT_CONFIG = "ImageReward.pt", "med_config.json"
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the rewards, as published
LONGEST = 35  # tokens of a prompt
PIXEL_MEAN, PIXEL_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
HEAD_WIDTH = 64

_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
"""BLIP's names of the picture's encoder, and transformers'; the text encoder's are the same in both."""


@dataclass
class ImageRewardJudge:
    """The reward of each image for its prompt, under `image_reward`."""

    source: str
    vision: Any
    text: Any
    head: nn.Module
    tokenizer: Any
    processor: Any
    device: str
    name: str = "image_reward"
    title: str = "ImageReward"

    @classmethod
    def load(cls, source: str, device: str = "cpu") -> "ImageRewardJudge":
        """source: the folder with ImageReward.pt, med_config.json and the tokenizer. Raises UserError naming what is amiss."""
        folder = Path(source)
        try:
            weights = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
            config = json.loads((folder / TEXT_CONFIG).read_text(encoding="utf-8"))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            vision, text = _vision(_under(weights, "blip.visual_encoder.")), _under(weights, "blip.text_encoder.")
            reader = _text(text, config, vision.config.hidden_size)
            head = _head(_under(weights, "mlp.layers."))
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"cannot load ImageReward from {source}: {reason}; it needs {WEIGHTS}, {TEXT_CONFIG} and the "
                "tokenizer of bert-base-uncased in one folder"
            ) from error
        side = vision.config.image_size
        pixels: Any = BlipImageProcessor
        processor = pixels(size={"height": side, "width": side}, image_mean=PIXEL_MEAN, image_std=PIXEL_DEVIATION)
        for part in (vision, reader, head):
            part.eval().to(device)
        return cls(source, vision, reader, head, tokenizer, processor, device)

    def fingerprint(self) -> str:
        return f"{self.name}:{of_model(self.source)}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Arrays:
        squares = [_square(Image.fromarray(image)) for image in images]
        pixels = self.processor(images=squares, return_tensors="pt")["pixel_values"].to(self.device)
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=words["input_ids"].to(self.device),
            attention_mask=words["attention_mask"].to(self.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state[:, 0]
        rewards = (self.head(read.float())[:, 0] - MEAN) / DEVIATION
        return {self.name: rewards.cpu().numpy()}


def _square(image: Image.Image) -> Image.Image:
    """The middle square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _vision(weights: Mapping[str, Tensor]) -> BlipVisionModel:
    """The picture's encoder, its sizes read off the weights."""
    patch = weights["patch_embed.proj.weight"]
    width, patch_px = patch.shape[0], patch.shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((weights["pos_embed"].shape[1] - 1) ** 0.5) * patch_px,
        patch_size=patch_px,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    model.load_state_dict({_renamed(key): value for key, value in weights.items()})
    return model


def _renamed(key: str) -> str:
    for pattern, name in _VISION:
        key = re.sub(pattern, name, key)
    return key


def _text(weights: Mapping[str, Tensor], config: Mapping[str, Any], vision_width: int) -> BlipTextModel:
    """The text's encoder, which looks at the picture in every layer."""
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    chosen = {name: config[name] for name in (*wanted, "max_position_embeddings", "hidden_act")}
    vocabulary = weights["embeddings.word_embeddings.weight"].shape[0]
    model = BlipTextModel(
        BlipTextConfig(**chosen, vocab_size=vocabulary, encoder_hidden_size=vision_width, is_decoder=True),
        add_pooling_layer=False,
    )
    lacking, strange = model.load_state_dict(weights, strict=False)
    if lost := [key for key in (*lacking, *strange) if not key.endswith("position_ids")]:
        raise ValueError(f"its text encoder has no fitting {lost[0]}")
    return model


def _head(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """The linear layers one after another; upstream has dropout between them, which does nothing here."""
    order = sorted({int(key.split(".")[0]) for key in weights})
    layers = []
    for number in order:
        matrix, bias = weights[f"{number}.weight"], weights[f"{number}.bias"]
        layer = nn.Linear(matrix.shape[1], matrix.shape[0])
        layer.load_state_dict({"weight": matrix, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)
