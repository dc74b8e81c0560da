"""Segmentation by SAM 2.1, SAM or EdgeTAM: segment everything, painted into one map of ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extract.estimators import Estimator
from extract.estimators.batching import IMAGENET_MEAN, IMAGENET_STD, uploaded
from extract.estimators.checkpoints import unreadable
from extract.estimators.mask_generator import Frame, MaskGenerator, Masks, MaskSettings, paint
from extract.estimators.nets.mask_decoder import GridDecoder, ImageFeatures
from extract.estimators.pretrained import load_pretrained
from shards.core.config import load_config
from shards.core.errors import UserError
from shards.intrinsics import IntrinsicMap, describe_segments, order_segments

CLASSES = {
    "sam": "SamModel",
    "sam2": "Sam2Model",
    "sam2_video": "Sam2Model",  # as SAM 2.1 is published: the model for videos, which holds the one for images
    "edgetam": "EdgeTamModel",
    "edgetam_video": "EdgeTamModel",
}
"""By model_type of a checkpoint's config.json."""


def load(*, device: str, dtype: str, weights: Path, **settings: Any) -> Estimator:
    """settings: fields of MaskSettings."""
    chosen = load_config(MaskSettings, settings, where="settings")
    model = load_pretrained(_class_of(weights), weights, device)
    # On a CPU images together gain nothing; one at a time, they take the least memory and never depend on each other.
    return SamEstimator(make_generator(model, chosen, device, dtype), 1 if torch.device(device).type == "cpu" else 0)


def make_generator(model: Any, settings: MaskSettings, device: str, dtype: str) -> MaskGenerator:
    """The mask generator of a SamModel, Sam2Model or EdgeTamModel, which is moved to the device and changed to dtype."""
    model = model.to(device)
    # Points are told apart by sines of their coordinates, too fine for half precision: the prompt encoder stays in float32.
    for part in (model.vision_encoder, model.mask_decoder):
        part.to(getattr(torch, dtype))
    if hasattr(model, "no_memory_embedding"):
        model.no_memory_embedding.data = model.no_memory_embedding.data.to(getattr(torch, dtype))
    neck: Any = getattr(model.vision_encoder, "neck", None)
    if hasattr(neck, "position_encoding"):
        neck.position_encoding = _NoPlaces()
    decoder = GridDecoder(model)
    return MaskGenerator(SquareEncoder(model, decoder), decoder, settings)


class _NoPlaces(nn.Module):
    """For the codes of places beside the encoder's maps, which only a memory for videos reads: as large as the maps and
    several times that while they are made."""

    def forward(self, *asked: Any) -> Tensor:
        return torch.zeros(1, 1, 1, 1)


def _class_of(folder: Path) -> str:
    """The class of transformers that reads the checkpoint. Raises UserError when it is none of SAM's."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise unreadable(folder, error) from error
    if kind not in CLASSES:
        raise UserError(
            f"the checkpoint {folder} is of the type {kind!r}; segment everything reads {', '.join(CLASSES)}"
        )
    return CLASSES[kind]


@dataclass
class SquareEncoder:
    """Images in the encoder's square: stretched to it for SAM 2 and EdgeTAM, scaled to fit and padded for SAM."""

    model: Any
    decoder: GridDecoder

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> tuple[ImageFeatures, list[Frame]]:
        frames = [self.frame(image) for image in images]
        pixels = torch.cat([self.pixels(image, frame) for image, frame in zip(images, frames, strict=True)])
        return self.features(pixels), frames

    def features(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, side, side), normalised -> what the decoder needs."""
        maps: Any = self.model.get_image_embeddings(pixels)
        return self.decoder.features([maps] if isinstance(maps, Tensor) else maps)

    def frame(self, image: np.ndarray) -> Frame:
        """Where an image (H, W, 3) comes to lie in the square."""
        (height, width), side = image.shape[:2], self.decoder.prompt_encoder.input_image_size
        if self.decoder.upscales_with_features:
            return Frame(height, width, side, side, side)
        scale = side / max(height, width)
        return Frame(height, width, side, int(height * scale + 0.5), int(width * scale + 0.5))

    def pixels(self, image: np.ndarray, frame: Frame) -> Tensor:
        """uint8 (H, W, 3) -> (1, 3, side, side), normalised, zeros in the padding."""
        place = self.decoder.place
        x = uploaded(image, place.device)[None]
        x = F.interpolate(x, (frame.rows, frame.columns), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = (x - mean) / std
        return F.pad(x, (0, frame.side - frame.columns, 0, frame.side - frame.rows)).to(place.dtype)


@dataclass
class SamEstimator:
    """together: images encoded and decoded at a time, 0 for all that are given."""

    generator: MaskGenerator
    together: int

    def networks(self) -> list[nn.Module]:
        """Those that can be compiled: the encoder."""
        encoder: Any = self.generator.encoder
        return [encoder.model.vision_encoder]

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        step = self.together or max(1, len(images))
        return [
            {"segmentation": segmentation(masks)}
            for start in range(0, len(images), step)
            for masks in self.generator(images[start : start + step])
        ]


def segmentation(masks: Masks) -> IntrinsicMap:
    """The id map of an image's masks. A pixel belongs to the smallest mask that holds it; score: its predicted quality."""
    painted = paint(masks.masks).cpu().numpy()
    ids = order_segments(painted)
    quality = masks.quality.cpu().numpy()
    numbers, first = np.unique(ids, return_index=True)
    origin = painted.ravel()[first]
    scores = {int(i): round(float(quality[o - 1]), 4) for i, o in zip(numbers, origin, strict=True) if i}
    return IntrinsicMap(ids, {"segments": describe_segments(ids, scores, {})})
