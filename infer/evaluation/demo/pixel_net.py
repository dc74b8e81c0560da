"""The detector's first look at a picture: for each pixel which shape or place, which colour, how far; and its features.

It learned from renderings (train/demo/pixel_net.py makes its weights); shapes.py has the second look, and the two together. Its
pooled features are those of FID and CMMD. A checkpoint is an ordinary folder: config.json
and model.safetensors.
"""

import dataclasses
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extract.estimators.nets.demo_net import Block
from extract.world.vocabulary import COLOURS, SHAPES
from infer.embedded import EMBEDDED
from shards.core.config import load_config
from shards.core.errors import UserError

PLACES = ("floor", "wall", "sky")
SHAPE_CLASSES: tuple[str, ...] = (*PLACES, *SHAPES)
COLOUR_CLASSES: tuple[str, ...] = ("", *COLOURS)
"""What a pixel can be; the colour "" is that of places."""

SHIPPED = EMBEDDED / "detector"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class DetectorConfig:
    """widths: channels at 1/2, 1/4, ... of the resolution. blocks: residual blocks at each. heads: channels of the
    last layer but one, at 1/2 of the resolution. working_px: the side of the images that it learned from."""

    widths: tuple[int, ...] = (24, 48, 80, 112)
    blocks: tuple[int, ...] = (2, 2, 1, 1)
    heads: int = 48
    working_px: int = 64
    shapes: tuple[str, ...] = SHAPE_CLASSES
    colours: tuple[str, ...] = COLOUR_CLASSES

    def __post_init__(self) -> None:
        if self.shapes != SHAPE_CLASSES or self.colours != COLOUR_CLASSES:
            raise UserError("the detector learned another vocabulary than this version's; train it again")


@dataclass(frozen=True)
class Detection:
    """shape (N, 12, H, W) and colour (N, 13, H, W): logits; log_depth (N, H, W): log of metres; features (N, F)."""

    shape: Tensor
    colour: Tensor
    log_depth: Tensor
    features: Tensor


class DetectorNet(nn.Module):
    """(N, 3, H, W) RGB in [0, 1], sides multiples of 16 -> Detection at the same size."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.encode = nn.ModuleList(
            nn.Sequential(*(Block(w) for _ in range(n))) for w, n in zip(widths, config.blocks, strict=True)
        )
        self.scene = nn.Linear(widths[-1], widths[-1])  # what the whole image says, added everywhere
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.decode = nn.ModuleList(Block(w) for w in widths[:-1])
        self.last = nn.Conv2d(widths[0] + 12, config.heads, 3, padding=1)
        self.head = nn.Conv2d(config.heads, 4 * (len(config.shapes) + len(config.colours) + 1), 1)

    def forward(self, image: Tensor) -> Detection:
        x = self.stem(image * 4 - 2)
        skips = []
        for level, encode in enumerate(self.encode):
            x = encode(x if level == 0 else self.down[level - 1](x))
            skips.append(x)
        deepest = x.mean(dim=(2, 3))
        x = x + self.scene(deepest)[:, :, None, None]
        for level in reversed(range(len(self.up))):
            x = F.interpolate(self.up[level](x), scale_factor=2, mode="bilinear", align_corners=False)
            x = self.decode[level](x + skips[level])
        last = F.silu(self.last(torch.cat([x, F.pixel_unshuffle(image, 2)], dim=1)))
        out = F.pixel_shuffle(self.head(last), 2).float()
        shape, colour, depth = out.split([len(self.config.shapes), len(self.config.colours), 1], dim=1)
        features = torch.cat([deepest, last.mean(dim=(2, 3))], dim=1).float()
        return Detection(shape, colour, depth[:, 0] + 1.5, features)


@dataclass(frozen=True)
class Seen:
    """What the detector says of one image, at its working size.

    shape float32 (12, h, w), colour float32 (13, h, w): probabilities. depth_m float32 (h, w). features float32 (F,).
    """

    shape: np.ndarray
    colour: np.ndarray
    depth_m: np.ndarray
    features: np.ndarray


def save_detector(net: DetectorNet, folder: Path) -> None:
    """Writes the checkpoint, weights in half precision; each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, folder / f".{WEIGHTS}.tmp")
    (folder / f".{CONFIG}.tmp").write_text(json.dumps(dataclasses.asdict(net.config), indent=1) + "\n")
    for name in (WEIGHTS, CONFIG):
        (folder / f".{name}.tmp").chmod(0o644)  # safetensors makes files that only their owner reads
        (folder / f".{name}.tmp").replace(folder / name)


def load_detector(folder: Path = SHIPPED) -> DetectorNet:
    """The network of a checkpoint folder, in float32 on the CPU, ready to predict. Raises UserError naming the file."""
    try:
        net = DetectorNet(load_config(DetectorConfig, json.loads((folder / CONFIG).read_text(encoding="utf-8"))))
        net.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (OSError, SafetensorError, ValueError, RuntimeError, UserError) as error:
        message = str(error).splitlines()[0]
        raise UserError(f"the detector {folder} cannot be loaded: {message}; reinstall the project") from error
    return net.float().eval()
