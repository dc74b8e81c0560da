"""Which shape and colour an object has, from a close look: a small network on its own cut-out, brought to one size.

The detector's pixels say well where things are, but not which shape a thing of eight pixels has, nor which colour gives its
name to a pattern of two. Its checkpoint is shapes.safetensors and shapes.json in the detector's folder; train/shapes.py
makes it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extract.estimators.demo_net import Block
from extract.estimators.table import find_set, load, tasks_of
from extract.world.vocabulary import COLOURS, SHAPES
from infer.evaluation.detector import SHIPPED, DetectorNet, Seen
from infer.evaluation.layout import Found, find_objects, find_segments
from shards.config import load_config
from shards.errors import UserError

CONFIG, WEIGHTS = "shapes.json", "shapes.safetensors"
MARGIN = 1.3
"""Side of the cut-out over the longer side of the object's bounding box."""


@dataclass(frozen=True)
class ShapeConfig:
    """widths: channels at 1/2, 1/4, ... of the cut-out, whose side is side_px."""

    widths: tuple[int, ...] = (40, 72, 72)
    side_px: int = 24
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)

    def __post_init__(self) -> None:
        if self.shapes != SHAPES or self.colours != tuple(COLOURS):
            raise UserError("it learned another vocabulary than this version's; train it again")


class ShapeNet(nn.Module):
    """(N, 4, S, S): RGB and mask in [0, 1] -> logits of shapes (N, 9) and colours (N, 12)."""

    def __init__(self, config: ShapeConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.stem = nn.Conv2d(4, widths[0], 4, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.encode = nn.ModuleList(Block(w) for w in widths)
        self.head = nn.Linear(widths[-1], len(config.shapes) + len(config.colours))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encode[0](self.stem(crops * 4 - 2))
        for down, encode in zip(self.down, self.encode[1:], strict=True):
            x = encode(down(x))
        shapes, colours = self.head(x.mean(dim=(2, 3))).split(
            [len(self.config.shapes), len(self.config.colours)], dim=1
        )
        return shapes, colours


def window(mask: np.ndarray) -> tuple[float, float, float]:
    """(x, y, side) in pixels: middle and side of the square that is cut out around a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return (left + right) / 2, (top + bottom) / 2, MARGIN * max(bottom - top, right - left)


def cut_out(image: np.ndarray, mask: np.ndarray, where: tuple[float, float, float], side_px: int) -> np.ndarray:
    """float32 (side_px, side_px, 4) in [0, 1]: image (H, W, 3) and mask (H, W) within the window; beyond it, the border."""
    x, y, side = where
    scale = side / side_px
    matrix = np.array([[scale, 0, x - side / 2 + scale / 2 - 0.5], [0, scale, y - side / 2 + scale / 2 - 0.5]])
    layers = np.concatenate([image, 255 * mask[..., None].astype(np.uint8)], axis=2)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cut = cv2.warpAffine(layers, matrix, (side_px, side_px), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cut, np.float32) / 255


SAME = 0.4
"""Two candidates that share more than this of their union, or of the smaller one twice this, are one object."""
SEGMENTS_PX = 128
"""Small pictures are enlarged to this side for the segments of the estimators, which know no smaller ones."""


class Detector:
    """Both looks: what is in pictures of any size, by pixels, and each object by its cut-out. In batches.

    Where an object may be is asked twice: connected regions of one colour, and the segments that the embedded estimator
    finds. The close look names them all, and of those that are one object the surest stays.
    """

    def __init__(self, net: DetectorNet, shapes: ShapeNet, batch: int = 64) -> None:
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.shapes, self.batch = shapes, batch
        task = tasks_of(find_set("demo"), ("segmentation",))[0]
        self._segments = load(task.row, "cpu")

    def __call__(self, images: Sequence[np.ndarray]) -> list[tuple[Seen, list[Found]]]:
        """images: uint8 RGB (H, W, 3) each. What is seen of each, and the objects in it, largest first."""
        small = [self._fit(image) for image in images]
        seen = self.look(small)
        candidates = [
            [*find_objects(one), *find_segments(one, ids)] for one, ids in zip(seen, self._ids(small), strict=True)
        ]
        return list(zip(seen, map(surest, self._named(small, candidates)), strict=True))

    def _ids(self, small: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The segments of pictures at the working size: int (h, w) each."""
        side = self.net.config.working_px
        large = [cv2.resize(image, (SEGMENTS_PX, SEGMENTS_PX), interpolation=cv2.INTER_CUBIC) for image in small]
        picks = ((np.arange(side) + 0.5) * SEGMENTS_PX / side).astype(np.int64)
        return [maps["segmentation"].values[picks[:, None], picks] for maps in self._segments(large)]

    @torch.inference_mode()
    def look(self, images: Sequence[np.ndarray]) -> list[Seen]:
        """The first look alone, at the working size."""
        found = []
        for start in range(0, len(images), self.batch):
            small = np.stack([self._fit(image) for image in images[start : start + self.batch]])
            x = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255
            seen = self.net(x.contiguous(memory_format=torch.channels_last))
            parts = (seen.shape.softmax(1), seen.colour.softmax(1), seen.log_depth.exp(), seen.features)
            found += [Seen(*row) for row in zip(*(part.numpy() for part in parts), strict=True)]
        return found

    @torch.inference_mode()
    def _named(self, small: Sequence[np.ndarray], found: Sequence[Sequence[Found]]) -> list[list[Found]]:
        """The candidates with the shape and the colour that they have when looked at closely."""
        cuts = [
            cut_out(image, one.mask, window(one.mask), self.shapes.config.side_px)
            for image, things in zip(small, found, strict=True)
            for one in things
        ]
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(cuts), self.batch):
            part = torch.from_numpy(np.stack(cuts[start : start + self.batch])).permute(0, 3, 1, 2)
            rows += zip(*(logits.softmax(1).numpy() for logits in self.shapes(part)), strict=True)
        likely = iter(rows)
        return [[_renamed(one, *next(likely)) for one in things] for things in found]

    def _fit(self, image: np.ndarray) -> np.ndarray:
        """An image at the working size, by area means."""
        side = self.net.config.working_px
        if image.shape[:2] == (side, side):
            return image
        shrink = min(image.shape[:2]) >= side
        how = cv2.INTER_AREA if shrink else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(image, (side, side), interpolation=how))

    def fingerprint(self) -> str:
        """A short digest of the weights."""
        total = hashlib.sha256()
        for net in (self.net, self.shapes):
            for name, tensor in sorted(net.state_dict().items()):
                total.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return total.hexdigest()[:8]


def _renamed(one: Found, shapes: np.ndarray, colours: np.ndarray) -> Found:
    return dataclasses.replace(one, shapes=shapes, colours=colours)


def surest(candidates: Sequence[Found]) -> list[Found]:
    """The candidates without those that are another one, which is surer; largest first."""
    kept: list[Found] = []
    for one in sorted(candidates, key=lambda one: -one.sure):
        if not any(_same(one.mask, other.mask) for other in kept):
            kept.append(one)
    return sorted(kept, key=lambda one: -one.share)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    common = int((a & b).sum())
    return common > SAME * int((a | b).sum()) or common > 2 * SAME * min(int(a.sum()), int(b.sum()))


def save_shapes(net: ShapeNet, folder: Path) -> None:
    """Writes the checkpoint, weights in half precision; each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, folder / f".{WEIGHTS}.tmp")
    (folder / f".{CONFIG}.tmp").write_text(json.dumps(dataclasses.asdict(net.config), indent=1) + "\n")
    for name in (WEIGHTS, CONFIG):
        (folder / f".{name}.tmp").chmod(0o644)  # safetensors makes files that only their owner reads
        (folder / f".{name}.tmp").replace(folder / name)


def load_shapes(folder: Path = SHIPPED) -> ShapeNet:
    """The network of a checkpoint folder, in float32 on the CPU, ready to predict. Raises UserError naming the file."""
    try:
        net = ShapeNet(load_config(ShapeConfig, json.loads((folder / CONFIG).read_text(encoding="utf-8"))))
        net.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (OSError, SafetensorError, ValueError, RuntimeError, UserError) as error:
        message = str(error).splitlines()[0]
        raise UserError(
            f"the detector's shapes in {folder} cannot be loaded: {message}; reinstall the project"
        ) from error
    return net.float().eval()
