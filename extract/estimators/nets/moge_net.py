"""MoGe-2 (arXiv 2507.02546): points, normals, a mask and the metric scale of one image, in one pass.

DINOv2 tokens on a grid of about the image's proportions become features; a neck brings them step by step to 16 times that
grid, and each head does so once more with the neck's features at every step (section 3 of MoGe, arXiv 2410.19115, and
appendix A of MoGe-2). At every step the network is told where on the view plane a pixel lies. The shape of the network comes
from `model_config` in its checkpoint, and submodules have the checkpoint's names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from extract.estimators.nets.dinov2 import PATCH_PX, DinoV2, from_dinov2
from shards.core.errors import UserError

LEVELS = 5  # 1, 2, 4, 8 and 16 times the grid of tokens
BACKBONES = {
    f"dinov2_vit{letter}14": f"vit_{name}_patch14_dinov2"
    for letter, name in zip("sbl", ("small", "base", "large"), strict=True)
}
REMAPS = ("linear", "exp")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """intermediate_layers: the blocks whose tokens are summed, or how many of the last ones. dim_out: channels of the sum."""

    backbone: str
    intermediate_layers: Sequence[int] | int
    dim_out: int


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A neck or a head: for each of the five levels, coarse to fine, channels in, within and out (None: as they are)."""

    dim_in: Sequence[int | None]
    dim_res_blocks: Sequence[int]
    dim_out: Sequence[int | None] | int | None
    resamplers: Sequence[str] | str
    num_res_blocks: Sequence[int] | int = 1
    dim_times_res_block_hidden: int = 1
    res_block_in_norm: str = "layer_norm"
    res_block_hidden_norm: str = "group_norm"
    activation: str = "relu"


@dataclass(frozen=True, kw_only=True)
class MoGeConfig:
    encoder: EncoderConfig
    neck: StackConfig
    points_head: StackConfig
    normal_head: StackConfig
    mask_head: StackConfig
    scale_head: Sequence[int]
    remap_output: str = "linear"

    @staticmethod
    def from_checkpoint(config: Mapping[str, Any]) -> "MoGeConfig":
        """From `model_config` of a checkpoint. Raises UserError for a network that lacks a head or is of another kind."""
        stacks = ("neck", "points_head", "normal_head", "mask_head")
        for name in ("encoder", *stacks, "scale_head"):
            if not isinstance(config.get(name), Mapping):
                raise UserError(
                    f"model_config of the MoGe-2 checkpoint has no {name}; it must be one with normals and scale"
                )
        made = MoGeConfig(
            encoder=_section(EncoderConfig, config["encoder"], "encoder", others=True),
            **{name: _section(StackConfig, config[name], name) for name in stacks},
            scale_head=tuple(config["scale_head"].get("dims", ())),
            remap_output=config.get("remap_output", "linear"),
        )
        if made.encoder.backbone not in BACKBONES or made.remap_output not in REMAPS:
            raise UserError(
                f"model_config of the MoGe-2 checkpoint has the backbone {made.encoder.backbone!r} and remap_output "
                f"{made.remap_output!r}; supported are {', '.join(BACKBONES)}, and {', '.join(REMAPS)}"
            )
        return made


def _section(kind: type, given: Mapping[str, Any], name: str, others: bool = False) -> Any:
    """A part of model_config. others: whether more keys than ours are fine (old checkpoints have some that nothing reads)."""
    known = {field.name for field in fields(kind)}
    try:
        return kind(**{key: value for key, value in given.items() if key in known or not others})
    except TypeError as error:
        raise UserError(f"model_config of the MoGe-2 checkpoint, {name}: {error}") from error


class RawMaps(NamedTuple):
    """Before remapping, at 16 times the grid of tokens: points (B, 3, h, w), normal (B, 3, h, w), mask (B, 1, h, w) as a
    logit; log_scale (B,). All float32."""

    points: Tensor
    normal: Tensor
    mask: Tensor
    log_scale: Tensor


class MoGeNet(nn.Module):
    def __init__(self, config: MoGeConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config.encoder)
        self.neck = ConvStack(config.neck)
        self.points_head = ConvStack(config.points_head)
        self.normal_head = ConvStack(config.normal_head)
        self.mask_head = ConvStack(config.mask_head)
        dims = config.scale_head
        layers = [nn.Linear(a, b) for a, b in pairwise(dims)]
        self.scale_head = nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])

    def forward(self, images: Tensor, aspects: Tensor) -> RawMaps:
        """images (B, 3, 14 h, 14 w) in [0, 1]; aspects (B,): width / height of the images before they were resized."""
        x, whole = self.encoder(images)
        height, width = x.shape[-2:]
        planes = [view_plane(height << level, width << level, aspects).permute(0, 3, 1, 2) for level in range(LEVELS)]
        features = self.neck([torch.cat([x, planes[0].to(x.dtype)], dim=1), *planes[1:]])
        points, normal, mask = (
            head(features)[-1].float() for head in (self.points_head, self.normal_head, self.mask_head)
        )
        return RawMaps(points, normal, mask, self.scale_head(whole).float()[:, 0])


class Encoder(nn.Module):
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.backbone = DinoV2(BACKBONES[config.backbone])
        layers, depth = config.intermediate_layers, len(self.backbone.vit.blocks)
        self.blocks = list(range(depth - layers, depth)) if isinstance(layers, int) else list(layers)
        self.output_projections = nn.ModuleList(nn.Conv2d(self.backbone.width, config.dim_out, 1) for _ in self.blocks)
        self.register_buffer("image_mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("image_std", torch.ones(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The summed features (B, C, h, w), and the last class token (B, C')."""
        grid = [side // PATCH_PX for side in images.shape[-2:]]
        taken = self.backbone((images - self.image_mean) / self.image_std, self.blocks, normed=True)
        patches = (tokens[:, self.backbone.prefix_tokens :].transpose(1, 2).unflatten(2, grid) for tokens in taken)
        total: Tensor = sum(project(x) for project, x in zip(self.output_projections, patches, strict=True))
        return total, taken[-1][:, 0]


def view_plane(height: int, width: int, aspects: Tensor) -> Tensor:
    """(B, height, width, 2): x and y of pixel centres, right and down from the centre, in half diagonals of the image.

    aspects (B,): width / height of the images, which need not be that of the grid.
    """
    diagonal = (1 + aspects.square()).sqrt()
    x = (torch.arange(width, device=aspects.device, dtype=aspects.dtype) * 2 + 1 - width) / width
    y = (torch.arange(height, device=aspects.device, dtype=aspects.dtype) * 2 + 1 - height) / height
    x = (x * (aspects / diagonal)[:, None])[:, None, :].expand(-1, height, -1)
    y = (y * (1 / diagonal)[:, None])[:, :, None].expand(-1, -1, width)
    return torch.stack([x, y], dim=-1)


class ConvStack(nn.Module):
    """From level to level: add what comes in there, convolve, give out, go to twice the resolution."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        within, levels = config.dim_res_blocks, range(len(config.dim_res_blocks))
        into, out = (_each(dims, len(levels)) for dims in (config.dim_in, config.dim_out))
        kinds, counts = _each(config.resamplers, len(levels) - 1), _each(config.num_res_blocks, len(levels))
        self.input_blocks = nn.ModuleList(_project(into[i], within[i]) for i in levels)
        self.resamplers = nn.ModuleList(_doubling(kinds[i], within[i], within[i + 1]) for i in levels[:-1])
        self.res_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(within[i], config) for _ in range(counts[i]))) for i in levels
        )
        self.output_blocks = nn.ModuleList(
            nn.Identity() if out[i] is None else _project(within[i], out[i]) for i in levels
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        x, out = self.input_blocks[0](features[0]), []
        for i, (convolve, leave) in enumerate(zip(self.res_blocks, self.output_blocks, strict=True)):
            if i > 0:
                x = self.resamplers[i - 1](x) + self.input_blocks[i](features[i])
            x = convolve(x)
            out.append(leave(x))
        return out


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, config: StackConfig) -> None:
        super().__init__()
        hidden = config.dim_times_res_block_hidden * channels
        self.layers = nn.Sequential(
            _norm(config.res_block_in_norm, channels),
            _activation(config.activation),
            _conv3(channels, hidden),
            _norm(config.res_block_hidden_norm, hidden),
            _activation(config.activation),
            _conv3(hidden, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.layers(x)
        return x + changed


def _each(value: Any, count: int) -> list[Any]:
    return [value] * count if value is None or isinstance(value, int | str) else list(value)


def _project(channels: int | None, out: int) -> nn.Module:
    return nn.Identity() if channels is None else nn.Conv2d(channels, out, 1)


def _doubling(kind: str, channels: int, out: int) -> nn.Module:
    if kind == "conv_transpose":
        return nn.Sequential(nn.ConvTranspose2d(channels, out, 2, stride=2), _conv3(out, out))
    if kind == "pixel_shuffle":
        return nn.Sequential(_conv3(channels, 4 * out), nn.PixelShuffle(2), _conv3(out, out))
    if kind in ("bilinear", "nearest"):
        return nn.Sequential(nn.Upsample(scale_factor=2, mode=kind), _conv3(channels, out))
    raise UserError(f"model_config of the MoGe-2 checkpoint has a resampler {kind!r}, which is not supported")


def _norm(kind: str, channels: int) -> nn.Module:
    if kind not in ("none", "group_norm", "layer_norm"):
        raise UserError(f"model_config of the MoGe-2 checkpoint has a norm {kind!r}, which is not supported")
    return nn.Identity() if kind == "none" else nn.GroupNorm(channels // 32 if kind == "group_norm" else 1, channels)


def _activation(kind: str) -> nn.Module:
    kinds: dict[str, nn.Module] = {
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(0.2),
        "silu": nn.SiLU(),
        "elu": nn.ELU(),
    }
    if kind not in kinds:
        raise UserError(f"model_config of the MoGe-2 checkpoint has an activation {kind!r}, which is not supported")
    return kinds[kind]


def _conv3(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, padding_mode="replicate")


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under the names of MoGeNet: only the backbone has others."""
    prefix = "encoder.backbone."
    backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return {prefix + key: value for key, value in from_dinov2(backbone).items()} | rest
