"""DINOv2, the backbone of Metric3D v2 and MoGe-2, on timm's blocks, under the names and with the arithmetic of its authors.

Papers: DINOv2 (arXiv 2304.07193), registers (arXiv 2309.16588). timm has the blocks; the tokens before them are made here,
because timm resamples position embeddings otherwise than both networks were trained with: that alone turns Metric3D's
normals by 0.5 to 5 degrees.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_PX = 14
_OFFSET = 0.1
"""The authors' slip that the weights have learned: the grid of n patches is resampled as if it had n + 0.1."""


class DinoV2(nn.Module):
    """timm's network `name`, with or without registers: images to the tokens of chosen blocks.

    Position embeddings are kept for the patches only; those of the class token are part of the class token.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        vit: Any = timm.create_model(name, pretrained=False, num_classes=0, no_embed_class=True)
        self.vit = vit
        self.width: int = vit.embed_dim
        self.prefix_tokens: int = vit.num_prefix_tokens
        """The class token and the registers, which come before the patches."""

    def forward(self, images: Tensor, blocks: Sequence[int], normed: bool) -> list[Tensor]:
        """Normalised images (B, 3, 14 h, 14 w) to tokens (B, prefix + h w, C) behind each of `blocks`, counted from 0.

        normed: whether the final LayerNorm is applied to them.
        """
        patches: Tensor = self.vit.patch_embed.proj(images)
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2) + self.positions(height, width)
        prefix = [self.vit.cls_token] if self.vit.reg_token is None else [self.vit.cls_token, self.vit.reg_token]
        tokens = torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), tokens], dim=1)
        taken = []
        for i, block in enumerate(self.vit.blocks[: max(blocks) + 1]):
            tokens = block(tokens)
            if i in blocks:
                taken.append(self.vit.norm(tokens) if normed else tokens)
        return taken

    def positions(self, height: int, width: int) -> Tensor:
        """(1, height width, C): the square grid of learned position embeddings, resampled to (height, width) patches."""
        learned: Tensor = self.vit.pos_embed
        side = round(learned.shape[1] ** 0.5)
        if (height, width) == (side, side):
            return learned
        grid = learned.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((height + _OFFSET) / side, (width + _OFFSET) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
        return grid.flatten(2).transpose(1, 2)


def from_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint under the authors' names, chunked (blocks.0.N) or not, under the names of DinoV2 (vit. ...).

    The position of the class token goes into that token, the mask token (training only) is dropped. Other names pass as
    they are, so that a strict load names them.
    """
    chunked = any(key.startswith("blocks.0.0.") for key in state)
    renamed = {}
    for key, value in state.items():
        if key == "mask_token":
            continue
        if chunked and key.startswith("blocks.0."):
            key = "blocks." + key.removeprefix("blocks.0.")
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        renamed["reg_token" if key == "register_tokens" else key] = value
    if "pos_embed" in renamed and "cls_token" in renamed:
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:]
    return {f"vit.{key}": value for key, value in renamed.items()}
