"""Trains the demo world's detector (infer/evaluation/demo/pixel_net.py). The shipped weights are an
early checkpoint of this recipe.

    python -m train scenes --out runs/truth
    python -m train detector --shards runs/truth --out runs/detector

Steps are a pure function of (seed, step): a run that was stopped continues from its last checkpoint as if nothing had
happened.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from infer.evaluation.demo.pixel_net import (
    COLOUR_CLASSES,
    SHAPE_CLASSES,
    Detection,
    DetectorConfig,
    DetectorNet,
    save_detector,
)
from shards.core.errors import UserError
from shards.dataset import Dataset
from shards.sample import Sample
from train.demo.loop import SmallLoop, run_loop
from train.demo.state import STATE, settings_of
from train.lock import only_one
from train.rates import warmup_cosine

Scenes = dict[str, np.ndarray]
"""image uint8 (n, H, W, 3); shape, colour uint8 (n, H, W): classes; log_depth float16 (n, H, W), inf for sky."""


@dataclass(frozen=True, kw_only=True)
class DetectorTraining:
    """The recipe. limit: scenes of the dataset that are used, the first ones."""

    shards: str = "runs/truth"
    out: Path = Path("runs/detector")
    limit: int = 20_000
    seed: int = 7
    phases: tuple[tuple[int, int], ...] = ((32, 800), (8, 10_000))
    """(images of a step, steps): each phase warms up and cools down anew; many small steps in the end learn the shapes."""
    learning_rate: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.02
    ema: float = 0.99
    save_every: int = 100

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.phases)

    def phase(self, step: int) -> tuple[int, int, int]:
        """Of a step: the images, its number within its phase, and the phase's steps."""
        for batch, steps in self.phases:
            if step < steps:
                return batch, step, steps
            step -= steps
        raise ValueError(f"the recipe has {self.steps} steps")


# ---- data ------------------------------------------------------------------------------------------------------------


def read_scenes(url: str, limit: int) -> Scenes:
    """The first `limit` scenes of a dataset that `python -m train scenes` wrote. Raises UserError if it holds none."""
    dataset = Dataset.open(url)
    rows: list[Scenes] = []
    for shard in dataset.shard_names():
        for sample in dataset.samples(shard):
            if len(rows) == limit:
                break
            rows.append(labels(sample))
    if not rows:
        raise UserError(f"{url} holds no scenes; make some with: python -m train scenes --out {url}")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def labels(sample: Sample) -> Scenes:
    """One scene as the arrays of Scenes, without n."""
    segments, depth = sample.map("segmentation"), sample.map("depth").values
    segmentation = segments.values
    shape, colour = np.zeros(segmentation.shape, np.uint8), np.zeros(segmentation.shape, np.uint8)
    for segment in segments.info["segments"]:
        shape[segmentation == segment["id"]] = SHAPE_CLASSES.index(segment["label"])
    for thing in sample.meta["objects"]:
        colour[segmentation == thing["segment"]] = COLOUR_CLASSES.index(thing["colour"])
    log_depth = np.log(depth).astype(np.float16)
    return {"image": sample.image(), "shape": shape, "colour": colour, "log_depth": log_depth}


def make_batch(config: DetectorTraining, scenes: Scenes, step: int) -> dict[str, Tensor]:
    """One batch: image (N, 3, H, W) in [0, 1]; shape, colour int64 (N, H, W); log_depth float32 (N, H, W)."""
    rng = np.random.default_rng([config.seed, step])
    images, _, _ = config.phase(step)
    chosen = rng.integers(len(scenes["image"]), size=images)
    flips = rng.random(images) < 0.5
    cut = {
        name: np.stack([array[i, :, ::-1] if f else array[i] for i, f in zip(chosen, flips, strict=True)])
        for name, array in scenes.items()
    }
    image = np.stack([change_look(one, rng) for one in cut["image"]])
    return {
        "image": torch.from_numpy(image).permute(0, 3, 1, 2),
        "shape": torch.from_numpy(cut["shape"].astype(np.int64)),
        "colour": torch.from_numpy(cut["colour"].astype(np.int64)),
        "log_depth": torch.from_numpy(cut["log_depth"].astype(np.float32)),
    }


def change_look(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 in [0, 1]: the softness, noise and small shifts of colour that generated images have."""
    x: np.ndarray = image.astype(np.float32) / 255
    if rng.random() < 0.4:
        x = np.asarray(cv2.GaussianBlur(x, (0, 0), float(rng.uniform(0.3, 0.9))))
    if rng.random() < 0.5:
        x = (x - 0.5) * rng.uniform(0.92, 1.08) + 0.5 + rng.uniform(-0.04, 0.04, 3)
    if rng.random() < 0.4:
        x = x + rng.normal(scale=rng.uniform(0, 0.04), size=x.shape)
    return np.clip(x, 0, 1).astype(np.float32)


# ---- losses ----------------------------------------------------------------------------------------------------------


def losses(seen: Detection, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of the loss; pixels of objects count three times in the classes."""
    weight = 1 + 2 * (batch["colour"] > 0).float()
    known = torch.isfinite(batch["log_depth"])
    error = torch.where(known, seen.log_depth - torch.where(known, batch["log_depth"], 0), 0)
    total = weight.sum()
    return {
        "shape": (F.cross_entropy(seen.shape, batch["shape"], reduction="none") * weight).sum() / total,
        "colour": (F.cross_entropy(seen.colour, batch["colour"], reduction="none") * weight).sum() / total,
        "depth": 0.5 * error.abs().sum() / known.sum(),
    }


# ---- the loop --------------------------------------------------------------------------------------------------------


def train_detector(config: DetectorTraining) -> Path:
    """Trains, and writes the checkpoint to config.out; returns that folder. Resumes by itself."""
    with only_one(config.out):
        _train(config)
    return config.out


def _train(config: DetectorTraining) -> None:
    torch.manual_seed(config.seed)
    net = DetectorNet(DetectorConfig())
    print(f"reading scenes of {config.shards}")
    scenes = read_scenes(config.shards, config.limit)

    def batches(first: int) -> Iterator[dict[str, Tensor]]:
        return (make_batch(config, scenes, step) for step in count(first))

    def terms_of(step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return losses(net(batch["image"].contiguous(memory_format=torch.channels_last)), batch)

    def rate(step: int) -> float:
        """Each phase has a warm-up and a cosine of its own."""
        _, number, steps = config.phase(step)
        return config.learning_rate * warmup_cosine(number, steps, config.warmup)

    loop = SmallLoop(
        title="the detector",
        state=config.out / STATE,
        settings=settings_of(config, ("shards", "out", "save_every")),
        steps=config.steps,
        rate=rate,
        ema=config.ema,
        save_every=config.save_every,
        on_save=lambda shipped: save_detector(cast(DetectorNet, shipped), config.out),
    )
    optimiser = AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run_loop(net, optimiser, batches, terms_of, loop)
