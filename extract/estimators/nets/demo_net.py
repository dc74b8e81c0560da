"""The embedded network: one small U-Net gives depth, sky, normals, segment boundaries and outlines of an image.

It learned from the demo world alone (train/demo/estimator.py makes its weights). A checkpoint is an ordinary folder:
config.json and model.safetensors.
"""

import dataclasses
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shards.core.config import load_config
from shards.core.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class DemoNetConfig:
    """widths: channels at 1/2, 1/4, ... of the resolution. blocks: residual blocks at each. heads: channels before the
    output, at full resolution."""

    widths: tuple[int, ...] = (24, 48, 80, 128, 176)
    blocks: int = 2
    heads: int = 16

    @property
    def stride(self) -> int:
        """Sides must be multiples of this."""
        return 2 ** len(self.widths)


@dataclass(frozen=True)
class Prediction:
    """log_depth (N, H, W): log of metres; sky, boundary, line (N, H, W): logits; normal (N, 3, H, W): unit vectors."""

    log_depth: Tensor
    sky: Tensor
    normal: Tensor
    boundary: Tensor
    line: Tensor


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class DemoNet(nn.Module):
    """(N, 3, H, W) RGB in [0, 1], sides multiples of `config.stride` -> Prediction at the same size."""

    def __init__(self, config: DemoNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.encode = nn.ModuleList(nn.Sequential(*(Block(w) for _ in range(config.blocks))) for w in widths)
        self.scene = nn.Linear(widths[-1], widths[-1])  # what the whole image says, added everywhere
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.decode = nn.ModuleList(Block(w) for w in widths[:-1])
        self.full = nn.Conv2d(widths[0] + 3, config.heads, 3, padding=1)
        self.head = nn.Conv2d(config.heads, 7, 3, padding=1)

    def forward(self, image: Tensor) -> Prediction:
        x = self.stem(image * 4 - 2)
        skips = []
        for level, encode in enumerate(self.encode):
            x = encode(x if level == 0 else self.down[level - 1](x))
            skips.append(x)
        x = x + self.scene(x.mean(dim=(2, 3)))[:, :, None, None]
        for level in reversed(range(len(self.up))):
            x = F.interpolate(self.up[level](x), scale_factor=2, mode="bilinear", align_corners=False)
            x = self.decode[level](x + skips[level])
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        out = self.head(F.silu(self.full(torch.cat([x, image], dim=1)))).float()
        normal = F.normalize(out[:, 2:5], dim=1, eps=1e-4)
        return Prediction(out[:, 0] + 1.5, out[:, 1], normal, out[:, 5], out[:, 6])


def save_demo_net(net: DemoNet, folder: Path) -> None:
    """Writes the checkpoint, weights in half precision; each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, folder / f".{WEIGHTS}.tmp")
    (folder / f".{CONFIG}.tmp").write_text(json.dumps(dataclasses.asdict(net.config), indent=1) + "\n")
    for name in (WEIGHTS, CONFIG):
        (folder / f".{name}.tmp").chmod(0o644)  # safetensors makes files that only their owner reads
        (folder / f".{name}.tmp").replace(folder / name)


def load_demo_net(folder: Path) -> DemoNet:
    """The network of a checkpoint folder, in float32 on the CPU, ready to predict. Raises UserError naming the file."""
    try:
        net = DemoNet(load_config(DemoNetConfig, json.loads((folder / CONFIG).read_text(encoding="utf-8"))))
        net.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (OSError, SafetensorError, ValueError, RuntimeError, UserError) as error:
        message = str(error).splitlines()[0]
        raise UserError(
            f"the estimator checkpoint {folder} cannot be loaded: {message}; reinstall the project"
        ) from error
    return net.float().eval()
