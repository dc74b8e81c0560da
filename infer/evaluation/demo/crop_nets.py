"""The detector's close look: small networks on cut-outs, brought to one size. One names a thing, one says how two relate.

The detector's pixels say well where things are, but not which shape a thing of eight pixels has, nor which colour gives its
name to a pattern of two, nor whether what touches another one's top stands on it or behind it. A checkpoint is NAME.json and
NAME.safetensors in the detector's folder, for the names `things` and `pairs`; train/demo/crop_nets.py makes them.
"""

import dataclasses
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extract.estimators.nets.demo_net import Block
from extract.world.vocabulary import COLOURS, SHAPES
from infer.evaluation.demo.layout import RELATED
from infer.evaluation.demo.pixel_net import SHIPPED
from shards.core.config import load_config
from shards.core.errors import UserError

MARGIN = 1.3
"""Side of the cut-out over the longer side of the bounding box."""
HEADS = {"things": (len(SHAPES), len(COLOURS)), "pairs": (len(RELATED),)}
"""What each network chooses from: a shape and a colour; a relation."""
VOCABULARY = {"things": (*SHAPES, *COLOURS), "pairs": RELATED}


@dataclass(frozen=True)
class CloseConfig:
    """name: things (RGB and a mask: 4 channels) or pairs (RGB and two masks: 5). widths: channels at 1/2, 1/4, ... of the
    cut-out, whose side is side_px. outputs: the words that it learned."""

    name: str
    outputs: tuple[str, ...]
    side_px: int
    widths: tuple[int, ...] = (40, 72, 72)

    def __post_init__(self) -> None:
        if self.name not in HEADS:
            raise UserError(f"there is no close look {self.name!r}; there are {', '.join(HEADS)}")
        if self.outputs != VOCABULARY[self.name]:
            raise UserError("it learned another vocabulary than this version's; train it again")


THINGS = CloseConfig("things", VOCABULARY["things"], side_px=24)
PAIRS = CloseConfig("pairs", VOCABULARY["pairs"], side_px=32)


class CloseNet(nn.Module):
    """(N, 4 or 5, S, S): RGB and masks in [0, 1] -> logits, one tensor (N, K) for each of HEADS."""

    def __init__(self, config: CloseConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.stem = nn.Conv2d(4 if config.name == "things" else 5, widths[0], 4, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.encode = nn.ModuleList(Block(w) for w in widths)
        self.head = nn.Linear(widths[-1], sum(HEADS[config.name]))

    def forward(self, crops: Tensor) -> tuple[Tensor, ...]:
        x = self.encode[0](self.stem(crops * 4 - 2))
        for down, encode in zip(self.down, self.encode[1:], strict=True):
            x = encode(down(x))
        return self.head(x.mean(dim=(2, 3))).split(HEADS[self.config.name], dim=1)

    @torch.inference_mode()
    def ask(self, cuts: list[np.ndarray], batch: int) -> list[tuple[np.ndarray, ...]]:
        """cuts: (S, S, 4 or 5) each. The probabilities of each head, for each cut-out."""
        rows: list[tuple[np.ndarray, ...]] = []
        for start in range(0, len(cuts), batch):
            part = torch.from_numpy(np.stack(cuts[start : start + batch])).permute(0, 3, 1, 2)
            rows += zip(*(logits.softmax(1).numpy() for logits in self(part)), strict=True)
        return rows


def window(mask: np.ndarray) -> tuple[float, float, float]:
    """(x, y, side) in pixels: middle and side of the square that is cut out around a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return (left + right) / 2, (top + bottom) / 2, MARGIN * max(bottom - top, right - left)


def cut_out(image: np.ndarray, mask: np.ndarray, where: tuple[float, float, float], side_px: int) -> np.ndarray:
    """float32 (side_px, side_px, 4) in [0, 1]: image (H, W, 3) and mask (H, W) within the window; beyond it, the border."""
    return _cut(np.concatenate([image, 255 * mask[..., None].astype(np.uint8)], axis=2), where, side_px)


def cut_pair(
    image: np.ndarray, one: np.ndarray, other: np.ndarray, where: tuple[float, float, float], side_px: int
) -> np.ndarray:
    """The same with two masks: (side_px, side_px, 5)."""
    second = _cut(255 * other.astype(np.uint8), where, side_px)
    return np.concatenate([cut_out(image, one, where, side_px), second[..., None]], axis=2)


def _cut(layers: np.ndarray, where: tuple[float, float, float], side_px: int) -> np.ndarray:
    x, y, side = where
    scale = side / side_px
    matrix = np.array([[scale, 0, x - side / 2 + scale / 2 - 0.5], [0, scale, y - side / 2 + scale / 2 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cut = cv2.warpAffine(layers, matrix, (side_px, side_px), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cut, np.float32) / 255


def save_close(net: CloseNet, folder: Path) -> None:
    """Writes the checkpoint, weights in half precision; each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = (folder / f".{net.config.name}.{ending}.tmp" for ending in ("safetensors", "json"))
    save_file({name: tensor.detach().half().contiguous() for name, tensor in net.state_dict().items()}, weights)
    config.write_text(json.dumps(dataclasses.asdict(net.config), indent=1) + "\n")
    for path in (weights, config):
        path.chmod(0o644)  # safetensors makes files that only their owner reads
        path.replace(folder / path.name[1:].removesuffix(".tmp"))


def load_close(name: str, folder: Path = SHIPPED) -> CloseNet:
    """The network of a checkpoint folder, in float32 on the CPU, ready to predict. Raises UserError naming the file."""
    try:
        net = CloseNet(load_config(CloseConfig, json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))))
        net.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=True)
    except (OSError, SafetensorError, ValueError, RuntimeError, UserError) as error:
        message = str(error).splitlines()[0]
        raise UserError(
            f"the detector's {name} in {folder} cannot be loaded: {message}; reinstall the project"
        ) from error
    return net.float().eval()
