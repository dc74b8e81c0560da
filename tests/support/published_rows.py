"""A checkpoint for every row of the table in its published format: the real file names and keys, random weights.

Small networks where the format leaves their size open (tests/support/tiny_estimators.py,
tests/support/random_sam.py). Metric3D v2 and MoGe-2
have the published sizes: their tensors are cut from a few shared draws, so that even giant2's 5.5 GB of weights are a
file of a few dozen megabytes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extract.estimators.table import ROWS, EstimatorRow
from tests.support.random_sam import edgetam_small, sam2_small, sam_small
from tests.support.seeded import METRIC3D_GAINS, MOGE_FOCAL, MOGE_GAINS, like_a_camera, read_fixture, unfold_names
from tests.support.tiny_estimators import ROWS as TINY

WITHOUT = {"demo-net", "null"}
"""Rows that need no checkpoint: the embedded network, and the rule."""
SAME = {
    **dict.fromkeys(("depth-anything-v2-base", "depth-anything-v2-large"), "depth-anything-v2-small"),
    "depth-anything-v2-metric-outdoor-small": "depth-anything-v2-metric-indoor-small",
    **dict.fromkeys(("sam2-1-base-plus", "sam2-1-small", "sam2-1-tiny", "sam2-1-tiny-16"), "sam2-1-large"),
}
"""Rows that differ from another in the size of their network, or the images that it saw, but not in their format."""
LARGER = {"moge-2-base", "moge-2-large", "metric3d-v2-large", "metric3d-v2-giant"}
"""Rows whose format fixes a size beyond what a CPU does quickly; a smaller one of the same code is there."""
MASKS = {"points_per_side": 4, "quality": -10.0, "stability": 0.3, "nms": 1.0}
Writer = Callable[[Path], None]


def published_row(name: str, folder: Path) -> EstimatorRow:
    """The row with a checkpoint of its own in `folder`, and settings for its size."""
    if name in WITHOUT:
        return ROWS[name]
    write, settings = WRITERS[SAME.get(name, name)]
    write(folder)
    return dataclasses.replace(ROWS[name], weights=folder, settings={**ROWS[name].settings, **settings})


# ---- depth and normals -----------------------------------------------------------------------------------------------


def metric_depth_anything(folder: Path) -> None:
    from transformers import AutoConfig

    TINY["depth-anything-v2-small"][0](folder)
    config = AutoConfig.from_pretrained(folder)
    config.depth_estimation_type, config.max_depth = "metric", 20
    config.save_pretrained(folder)


def metric3d(size: str) -> Writer:
    def write(folder: Path) -> None:
        shapes = unfold_names(read_fixture("metric3d_names.json")[size])
        weights = cut_from_few(shapes, METRIC3D_GAINS)
        torch.save({"model_state_dict": weights}, _made(folder) / f"metric_depth_vit_{size}_800k.pth")

    return write


def moge(size: str) -> Writer:
    def write(folder: Path) -> None:
        names = read_fixture("moge_names.json")[size]
        weights = cut_from_few(unfold_names(names), MOGE_GAINS)
        for name in ("weight", "bias"):  # which it changes in place, where others share the draw
            last = f"points_head.output_blocks.4.{name}"
            weights[last] = weights[last].clone()
        like_a_camera(weights, MOGE_FOCAL)
        torch.save({"model_config": names["config"], "model": weights}, _made(folder) / "model.pt")

    return write


def cut_from_few(shapes: Mapping[str, tuple[int, ...]], gains: Mapping[str, float]) -> dict[str, Tensor]:
    """Random weights as tests.support.seeded.seeded_weights has them, but tensors of one deviation and mean share one draw."""
    kinds: dict[str, tuple[float, float]] = {}
    longest: dict[tuple[float, float], int] = {}
    for name, shape in shapes.items():
        kinds[name] = kind = _mean_and_deviation(name, shape, gains)
        longest[kind] = max(longest.get(kind, 0), math.prod(shape))
    random = torch.Generator().manual_seed(0)
    draws = {kind: torch.randn(count, generator=random) * kind[1] + kind[0] for kind, count in longest.items()}
    return {name: draws[kinds[name]][: math.prod(shape)].view(shape) for name, shape in shapes.items()}


def _mean_and_deviation(name: str, shape: tuple[int, ...], gains: Mapping[str, float]) -> tuple[float, float]:
    found = [pattern for pattern in gains if re.search(pattern, name)]
    gain = gains[max(found, key=len)] if found else 1.0
    if name.endswith(("image_mean", "image_std")):
        return (0.5 if name.endswith("mean") else 0.25), 0.0
    if name.endswith("bias"):
        return 0.0, 0.1 * gain
    if name.endswith("gamma"):
        return 0.3, 0.09
    if len(shape) == 1:
        return 1.0, 0.2
    return 0.0, gain / math.sqrt(math.prod(shape[1:])) if name.endswith("weight") else 0.5


# ---- segment everything ----------------------------------------------------------------------------------------------


def sam2_video(folder: Path) -> None:
    """As SAM 2.1 is published: the network for videos, which holds the one for images."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    image = sam2_small()
    parts = {
        key: getattr(image.config, key) for key in ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    }
    width = image.config.mask_decoder_config.hidden_size
    config = Sam2VideoConfig(
        **{key: part.to_dict() for key, part in parts.items()},
        image_size=128,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=16,
        mask_downsampler_embed_dim=width,
        memory_fuser_num_layers=1,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=64,
    )
    video = Sam2VideoModel(config)
    report = video.load_state_dict(image.state_dict(), strict=False)
    assert not report.unexpected_keys, report.unexpected_keys
    video.save_pretrained(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


METRIC3D_SMALL = {"canvas": [56, 84]}
WRITERS: dict[str, tuple[Writer, dict[str, Any]]] = {
    **TINY,
    "depth-anything-v2-metric-indoor-small": (metric_depth_anything, TINY["depth-anything-v2-small"][1]),
    **{
        f"metric3d-v2-{row}": (metric3d(size), METRIC3D_SMALL)
        for row, size in (("small", "small"), ("large", "large"), ("giant", "giant2"))
    },
    **{f"moge-2-{row}": (moge(row[0]), {"tokens": 40}) for row in ("small", "base", "large")},
    "sam2-1-large": (sam2_video, MASKS),
    "sam-base": (lambda folder: sam_small().save_pretrained(folder), MASKS),
    "edgetam": (lambda folder: edgetam_small().save_pretrained(folder), MASKS),
}
