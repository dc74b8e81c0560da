"""Weights and pictures made by a rule, the same on every machine, for comparing networks with their authors' code.

Only names and shapes are needed, so that a fixture of expected values can stand in for the authors' code.
"""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).parents[1] / "fixtures"
METRIC3D_GAINS = {
    r"conv[12]\.": 1.4,
    r"depth_regressor\.2\.": 8.0,  # depth of all kinds, and little of it at the ends of its range
    r"flow_head\.conv2d": 0.03,
    r"mask\.2": 4.0,
    r"normal_predictor": 2.0,
}
MOGE_GAINS = {r"scale_head": 0.5, r"points_head\.output_blocks": 0.5, r"(neck|points_head)\.input_blocks\.4": 2.0}
MOGE_FOCAL = 1.2


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of mean 0 and deviation 1 that depend on the name alone (numpy's frozen generator)."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)
    return ((draws - 0.5) * np.sqrt(12)).astype(np.float32)


def seeded_weights(shapes: Mapping[str, tuple[int, ...]], gains: Mapping[str, float]) -> dict[str, Tensor]:
    """Weights for a checkpoint's names and shapes.

    Matrices and kernels have deviation gain / sqrt(fan-in), the gain being that of the longest pattern (a regular
    expression) of `gains` found in the name; norms are near 1, biases near 0. Names of one tensor get the same values.
    """
    weights = {}
    for name, shape in shapes.items():
        values = uniform(name.replace(".norm3.", ".downsample.1."), shape)
        found = [pattern for pattern in gains if re.search(pattern, name)]
        gain = gains[max(found, key=len)] if found else 1.0
        if name.endswith(("image_mean", "image_std")):
            values = np.full(shape, 0.5 if name.endswith("mean") else 0.25)
        elif name.endswith("bias"):
            values *= 0.1 * gain
        elif name.endswith("gamma"):
            values = np.float32(0.3) * (1 + np.float32(0.3) * values)
        elif len(shape) == 1:
            values = 1 + np.float32(0.2) * values
        elif name.endswith("weight"):
            values *= gain / np.sqrt(np.prod(shape[1:]))
        else:  # tokens and positions
            values *= 0.5
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def like_a_camera(weights: dict[str, Tensor], focal: float) -> None:
    """Changes the last layer of MoGe-2's points, so that points fall near their pixels for a focal length in half diagonals.

    Without it random points fit no camera, and the best focal length and shift are not well determined. What the network is
    told of the view plane goes straight through three 1x1 layers at the finest level.
    """
    neck, head = (weights[f"{name}.input_blocks.4.weight"][:, :, 0, 0].double() for name in ("neck", "points_head"))
    last = weights["points_head.output_blocks.4.weight"]
    last[:2, :, 0, 0] = (torch.linalg.pinv(head @ neck) / focal + 0.02 * last[:2, :, 0, 0]).float()
    weights["points_head.output_blocks.4.bias"][:2] = 0


def seeded_picture(height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): smooth colours with some grain."""
    coarse = uniform("picture", (5, 6, 3))
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 50 * smooth + 10 * uniform("grain", (height, width, 3)), 0, 255).astype(np.uint8)


def on_grid(x: Tensor) -> np.ndarray:
    """float32 (C, 16, 16) of (C, H, W)."""
    rows, columns = ((torch.arange(16) * 2 + 1) * side // 32 for side in x.shape[1:])
    return x[:, rows[:, None], columns].numpy().astype(np.float32)


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between unit vectors along the first axis."""
    return (a - b).double().norm(dim=0).div(2).clamp(max=1).asin().mul(2).rad2deg()


def fold_names(shapes: Mapping[str, tuple[int, ...]], block: str) -> dict[str, Any]:
    """The names and shapes of a checkpoint with the repeated block `prefix.N.` listed once, for a small fixture."""
    pattern = re.compile(re.escape(block) + r"\.(\d+)\.")
    folded: dict[str, list[int]] = {}
    count = 0
    for name, shape in shapes.items():
        match = pattern.search(name)
        if match:
            count = max(count, int(match[1]) + 1)
            name = pattern.sub(f"{block}.*.", name)
        folded[name] = list(shape)
    return {"blocks": count, "shapes": folded}


def unfold_names(folded: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in folded["shapes"].items():
        for i in range(folded["blocks"] if "*" in name else 1):
            shapes[name.replace("*", str(i))] = tuple(shape)
    return shapes


def read_fixture(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text())
