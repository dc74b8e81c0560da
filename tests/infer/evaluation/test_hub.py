"""The hub's judges on tiny checkpoints: ImageReward in its published names, CLIP's features, files that are no weights."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from infer.evaluation.hub_metrics import ClipJudge
from infer.evaluation.image_reward import DEVIATION, MEAN, ImageRewardJudge
from shards.core.errors import UserError

WIDTH, TEXT, WORDS = 64, 16, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "on", "mat"]
RNG = np.random.default_rng(3)
IMAGES = [RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8) for _ in range(2)]


def published_names(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights in the names and shapes of ImageReward.pt: one block of the picture's encoder, one of the text's."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 5, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 8, 8),
        "patch_embed.proj.bias": (WIDTH,),
        "blocks.0.attn.qkv.weight": (3 * WIDTH, WIDTH),
        "blocks.0.attn.qkv.bias": (3 * WIDTH,),
        "blocks.0.attn.proj.weight": (WIDTH, WIDTH),
        "blocks.0.attn.proj.bias": (WIDTH,),
        "blocks.0.mlp.fc1.weight": (32, WIDTH),
        "blocks.0.mlp.fc1.bias": (32,),
        "blocks.0.mlp.fc2.weight": (WIDTH, 32),
        "blocks.0.mlp.fc2.bias": (WIDTH,),
    }
    for norm in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    shapes = {f"blip.visual_encoder.{key}": shape for key, shape in shapes.items()}
    text: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(WORDS), TEXT),
        "embeddings.position_embeddings.weight": (40, TEXT),
    }
    layer = "encoder.layer.0"
    linear = {f"{layer}.intermediate.dense": (24, TEXT), f"{layer}.output.dense": (TEXT, 24)}
    for attention, width in (("attention", TEXT), ("crossattention", WIDTH)):
        linear |= {f"{layer}.{attention}.self.query": (TEXT, TEXT), f"{layer}.{attention}.output.dense": (TEXT, TEXT)}
        linear |= {f"{layer}.{attention}.self.{name}": (TEXT, width) for name in ("key", "value")}
    for name, shape in linear.items():
        text |= {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}
    norms = ("embeddings", f"{layer}.attention.output", f"{layer}.crossattention.output", f"{layer}.output")
    for norm in norms:
        text |= {f"{norm}.LayerNorm.weight": (TEXT,), f"{norm}.LayerNorm.bias": (TEXT,)}
    shapes |= {f"blip.text_encoder.{key}": shape for key, shape in text.items()}
    for number, (out, into) in {0: (8, TEXT), 2: (4, 8), 4: (1, 4)}.items():
        shapes |= {f"mlp.layers.{number}.weight": (out, into), f"mlp.layers.{number}.bias": (out,)}
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture
def reward(tmp_path):
    config = {"hidden_size": TEXT, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"layer_norm_eps": 1e-12, "max_position_embeddings": 40, "hidden_act": "gelu"}
    (tmp_path / "med_config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.save(published_names(torch.Generator().manual_seed(0)), tmp_path / "ImageReward.pt")
    return tmp_path


def test_image_reward_reads_its_published_names_and_judges_picture_and_prompt(reward):
    judge = ImageRewardJudge.load(str(reward))
    made = judge(IMAGES, ["a dog", "a dog"])["image_reward"]
    assert made.shape == (2,) and made[0] != pytest.approx(made[1])
    other = judge(IMAGES, ["a dog", "a cat on a mat"])["image_reward"]
    assert other[0] == pytest.approx(made[0], abs=1e-5) and other[1] != pytest.approx(made[1])


def test_image_reward_centres_and_scales_what_its_linear_layers_give(reward):
    weights = torch.load(reward / "ImageReward.pt", weights_only=True)
    weights["mlp.layers.4.weight"].zero_()
    weights["mlp.layers.4.bias"].fill_(0.7)
    torch.save(weights, reward / "ImageReward.pt")
    made = ImageRewardJudge.load(str(reward))(IMAGES, ["a dog", "a cat"])["image_reward"]
    assert made == pytest.approx(np.full(2, (0.7 - MEAN) / DEVIATION), abs=1e-5)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/image-reward-was-unpickled",)


def test_a_pickle_that_would_run_code_is_refused(reward):
    torch.save({"mlp.layers.0.weight": Evil()}, reward / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward\.pt"):
        ImageRewardJudge.load(str(reward))
    assert not Path("/tmp/image-reward-was-unpickled").exists()


def test_weights_that_lack_a_part_are_named(reward):
    weights = torch.load(reward / "ImageReward.pt", weights_only=True)
    del weights["blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"]
    torch.save(weights, reward / "ImageReward.pt")
    with pytest.raises(UserError, match=r"crossattention\.self\.key"):
        ImageRewardJudge.load(str(reward))


def test_a_folder_that_is_no_clip_model_is_named(tmp_path):
    with pytest.raises(UserError, match="CLIP score"):
        ClipJudge.load("clip", "CLIP score", str(tmp_path))
