"""Segment everything: every mask that a grid of points finds in an image.

A chunk of prompts is decoded and filtered at the resolution of its logits (256 x 256) before the next one is: by predicted
quality, then, with some slack, by stability, the IoU of the masks cut at mask_threshold + and - stability_offset. What is
left is measured at the image's size a few at a time: stability again, and the boxes, by which
non-maximum suppression goes in the order of quality. Only its survivors are ever all there at the image's size.
Nothing passes through run-length codes, and of a chunk only two counts ever wait for the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from extract.estimators.nets.mask_decoder import GridDecoder, ImageFeatures
from shards.core.errors import UsageError

LOGIT_LIMIT = 1e4  # what half precision holds with ease; much lower, a cut would move the edges of upsampled masks
STABILITY_SLACK = 0.05
"""How far below the threshold a mask may be as the decoder draws it: it is measured again at the image's size, where the
edges of ragged masks are smoother."""
UPSAMPLED_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How masks are asked for and chosen; the defaults are those of sam2's own automatic mask generator.

    points_per_side: the grid is square, a point in the middle of each cell. quality: smallest predicted IoU (exclusive).
    stability, stability_offset: smallest IoU of the mask cut at mask_threshold + offset with the one cut at - offset.
    nms: of two masks whose boxes have a larger IoU the one of lower quality goes. prompts_at_once: decoded together, over
    all images of a batch; 0 for a number that suits the device.
    """

    points_per_side: int = 32
    quality: float = 0.8
    stability: float = 0.95
    stability_offset: float = 1.0
    mask_threshold: float = 0.0
    nms: float = 0.7
    prompts_at_once: int = 0

    def __post_init__(self) -> None:
        if self.points_per_side < 1:
            raise UsageError(f"points_per_side is {self.points_per_side}; it must be 1 or more")
        if self.prompts_at_once < 0:
            raise UsageError(f"prompts_at_once is {self.prompts_at_once}; it must be 0 (automatic) or more")
        for name in ("stability", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it is an IoU, between 0 and 1")
        if self.stability_offset < 0:
            raise UsageError(f"stability_offset is {self.stability_offset}; it must be 0 or more")


@dataclass(frozen=True)
class Frame:
    """Where an image (height, width) lies in the encoder's square of `side` pixels: its first rows and columns."""

    height: int
    width: int
    side: int
    rows: int
    columns: int

    def of_mask(self, mask_side: int) -> tuple[int, int]:
        """Rows and columns of a mask's logits (S, S) that show the image."""
        return -(-self.rows * mask_side // self.side), -(-self.columns * mask_side // self.side)


@dataclass(frozen=True)
class Candidates:
    """Masks of enough quality that may be stable enough, in the order of the grid.

    quality float32 (N,); logits float16 (N, S, S); owner int64 (N,): the image in its batch.
    """

    quality: Tensor
    logits: Tensor
    owner: Tensor

    def __getitem__(self, index: Tensor) -> "Candidates":
        return Candidates(self.quality[index], self.logits[index], self.owner[index])


@dataclass(frozen=True)
class Masks:
    """The masks of one image, larger first (ties: the first pixel in row-major order, then the grid's order).

    masks bool (M, H, W); quality, stability float32 (M,).
    """

    masks: Tensor
    quality: Tensor
    stability: Tensor


class Encoder(Protocol):
    """Turns uint8 RGB images into the decoder's features, and says where each lies in the square."""

    def __call__(self, images: Sequence[np.ndarray]) -> tuple[ImageFeatures, list[Frame]]: ...


class MaskGenerator:
    def __init__(self, encoder: Encoder, decoder: GridDecoder, settings: MaskSettings) -> None:
        self.encoder, self.decoder, self.settings = encoder, decoder, settings

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> Iterator[Masks]:
        """The masks of uint8 RGB images (H, W, 3), encoded and decoded together; those of one image at a time."""
        features, frames = self.encoder(images)
        found = self._candidates(features, frames)
        for i, frame in enumerate(frames):
            yield self._survivors(found[torch.nonzero(found.owner == i).flatten()], frame)

    def decoded(self, features: ImageFeatures, frames: Sequence[Frame]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The whole grid, a chunk of prompts at a time: of those with a mask of enough quality the image (N,), the quality
        (N, 3) and the logits (N, 3, S, S)."""
        device = features.positions.device
        grid = point_grid(self.settings.points_per_side).to(device)
        extent = torch.tensor([[f.columns, f.rows] for f in frames], dtype=torch.float32).to(device)
        tokens = self.decoder.tokens(grid[None] * extent[:, None])  # (B, P, n, C)
        step = max(1, (self.settings.prompts_at_once or _prompts_for(device)) // len(frames))
        for chunk in tokens.split(step, dim=1):
            chosen, quality, logits = self.decoder.decode(features, chunk, self.settings.quality)
            yield chosen // chunk.shape[1], quality, logits

    def _candidates(self, features: ImageFeatures, frames: Sequence[Frame]) -> Candidates:
        settings = self.settings
        shown = _shown(frames, self.decoder.mask_side).to(features.positions.device)
        padded = any(frame.rows < frame.side or frame.columns < frame.side for frame in frames)
        found = []
        for owner, quality, logits in self.decoded(features, frames):
            stability = stability_of(
                logits, settings.mask_threshold, settings.stability_offset, shown[owner, None] if padded else None
            )
            keep = (quality > settings.quality) & (stability >= settings.stability - STABILITY_SLACK)
            prompt, which = torch.nonzero(keep, as_tuple=True)
            found.append(
                Candidates(
                    quality[prompt, which],
                    logits[prompt, which].clamp_(-LOGIT_LIMIT, LOGIT_LIMIT).half(),
                    owner[prompt],
                )
            )
        return Candidates(*(torch.cat([getattr(c, field.name) for c in found]) for field in fields(Candidates)))

    def _survivors(self, found: Candidates, frame: Frame) -> Masks:
        settings = self.settings
        found = found[torch.argsort(found.quality, descending=True, stable=True)]
        stability, boxes = measure(found.logits, frame, settings)
        stable = torch.nonzero(stability >= settings.stability).flatten()
        kept = stable[torch.nonzero(survivors_of_nms(boxes[stable], settings.nms)).flatten()]
        masks = torch.zeros(len(kept), frame.height, frame.width, dtype=torch.bool, device=kept.device)
        for start in range(0, len(kept), UPSAMPLED_AT_ONCE):
            part = slice(start, start + UPSAMPLED_AT_ONCE)
            masks[part] = upsample(found.logits[kept[part]], frame) > settings.mask_threshold
        flat = masks.flatten(1)
        areas, first = flat.sum(1), flat.to(torch.uint8).argmax(1)
        by_position = torch.argsort(first, stable=True)
        order = by_position[torch.argsort(areas[by_position], descending=True, stable=True)]
        order = order[areas[order] > 0]
        return Masks(masks[order], found.quality[kept[order]], stability[kept[order]])


def point_grid(per_side: int) -> Tensor:
    """float32 (per_side ** 2, 2): x and y in 0..1 of the middles of a square grid's cells, row by row."""
    middles = (torch.arange(per_side, dtype=torch.float64) + 0.5) / per_side
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2).float()


def _prompts_for(device: torch.device) -> int:
    """On a CPU as few as keep its caches warm (a position map takes 4 MiB); on a GPU as many as a quarter of what is free
    holds, at about 40 MiB each."""
    if device.type != "cuda":
        return 2 * torch.get_num_threads()
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(2048, max(32, free // 4 // (40 << 20))))


def _shown(frames: Sequence[Frame], mask_side: int) -> Tensor:
    """bool (B, S, S): the logits that show the image, not its padding."""
    shown = torch.zeros(len(frames), mask_side, mask_side, dtype=torch.bool)
    for i, frame in enumerate(frames):
        rows, columns = frame.of_mask(mask_side)
        shown[i, :rows, :columns] = True
    return shown


def stability_of(logits: Tensor, threshold: float, offset: float, shown: Tensor | None = None) -> Tensor:
    """(..., S, S) -> float32 (...): area cut at threshold + offset over area cut at threshold - offset; 0 if empty.

    shown: bool, the logits that count; all if None.
    """
    inner, outer = logits > threshold + offset, logits > threshold - offset
    if shown is not None:
        inner, outer = inner & shown, outer & shown
    return inner.sum((-2, -1)) / outer.sum((-2, -1)).clamp(min=1)


def upsample(logits: Tensor, frame: Frame) -> Tensor:
    """(N, S, S) -> float32 (N, H, W), bilinear; the padding of a padded image is cut off at the encoder's resolution."""
    x = logits[:, None].float()
    if (frame.rows, frame.columns) != (frame.side, frame.side):
        x = F.interpolate(x, (frame.side, frame.side), mode="bilinear")[..., : frame.rows, : frame.columns]
    return F.interpolate(x, (frame.height, frame.width), mode="bilinear")[:, 0]


def measure(logits: Tensor, frame: Frame, settings: MaskSettings) -> tuple[Tensor, Tensor]:
    """The stability, float32 (N,), and the boxes, float32 (N, 4), of masks (N, S, S) at the image's size.

    A box is x0, y0, x1, y1 of the first and last pixels; zeros for an empty mask. The upsampled masks are not kept.
    """
    stability, boxes = [logits.new_zeros(0, dtype=torch.float32)], [logits.new_zeros(0, 4, dtype=torch.float32)]
    for part in logits.split(UPSAMPLED_AT_ONCE):
        x = upsample(part, frame)
        stability.append(stability_of(x, settings.mask_threshold, settings.stability_offset))
        mask = x > settings.mask_threshold
        (x0, x1), (y0, y1) = _ends(mask.any(1)), _ends(mask.any(2))
        boxes.append(torch.stack([x0, y0, x1, y1], dim=1).float())
    return torch.cat(stability), torch.cat(boxes)


def _ends(inside: Tensor) -> tuple[Tensor, Tensor]:
    """bool (N, L) -> the first and the last true index, both 0 where there is none."""
    ones = inside.to(torch.uint8)
    first, last = ones.argmax(1), inside.shape[1] - 1 - ones.flip(1).argmax(1)
    return first, torch.where(inside.any(1), last, 0)


def survivors_of_nms(boxes: Tensor, limit: float) -> Tensor:
    """bool (N,): what greedy non-maximum suppression leaves of boxes (N, 4) in falling order of their worth.

    A box goes if a better one that stays overlaps it by an IoU above `limit`. All boxes are decided at once, again
    until nothing changes: every round settles at least the next box in order, and a few rounds settle all.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    sides = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.maximum(
        boxes[:, None, :2], boxes[None, :, :2]
    )
    shared = sides.clamp_(min=0).prod(2)
    better = torch.ones_like(shared, dtype=torch.bool).tril(-1)
    covers = ((shared > limit * (area[:, None] + area - shared)) & better).float()  # [i, j]: j would remove i
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        settled = (covers @ keep.float()) == 0
        if torch.equal(settled, keep):
            return keep
        keep = settled


def paint(masks: Tensor) -> Tensor:
    """bool (M, H, W), larger first -> int64 (H, W): 1..M, each pixel the last mask that holds it, so the smallest; 0 none."""
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    for start in range(0, len(masks), UPSAMPLED_AT_ONCE):
        part = masks[start : start + UPSAMPLED_AT_ONCE]
        number = torch.arange(start + 1, start + len(part) + 1, device=masks.device)
        ids = torch.maximum(ids, (part * number[:, None, None]).amax(0))
    return ids
