"""Trains the detector's close look at shapes (infer/evaluation/shapes.py), the second part of `python -m train detector`.

It learns shapes and colours from the exact masks of things, cut out a little off, with holes and frayed borders as a
detector's masks have.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor
from torch.optim import AdamW

from extract.world.vocabulary import COLOURS, SHAPES
from infer.evaluation.shapes import ShapeConfig, ShapeNet, cut_out, save_shapes, window
from shards.dataset import Dataset
from shards.errors import UserError
from train.detector import change_look
from train.state import averaged, follow, load_state, save_state


@dataclass(frozen=True, kw_only=True)
class ShapeTraining:
    """The recipe. limit: scenes of the dataset that are used, the first ones."""

    shards: str = "runs/truth"
    out: Path = Path("runs/detector")
    limit: int = 20_000
    seed: int = 8
    steps: int = 10_000
    batch: int = 64
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.02
    ema: float = 0.995
    save_every: int = 500


@dataclass(frozen=True)
class Things:
    """image uint8 (n, H, W, 3) and segmentation uint8 (n, H, W) of scenes; thing int (m, 4): scene, segment, shape, colour."""

    image: np.ndarray
    segmentation: np.ndarray
    thing: np.ndarray


def read_things(url: str, limit: int) -> Things:
    """The things of the first `limit` scenes of a dataset of `python -m train scenes`. Raises UserError if it holds none."""
    dataset = Dataset.open(url)
    images, segmentations = list[np.ndarray](), list[np.ndarray]()
    things: list[tuple[int, int, int, int]] = []
    for shard in dataset.shard_names():
        if len(images) == limit:
            break
        for sample in dataset.samples(shard):
            if len(images) == limit:
                break
            for one in sample.meta["objects"]:
                shape, colour = SHAPES.index(one["shape"]), list(COLOURS).index(one["colour"])
                things.append((len(images), one["segment"], shape, colour))
            images.append(sample.image())
            segmentations.append(sample.map("segmentation").values.astype(np.uint8))
    if not things:
        raise UserError(f"{url} holds no scenes; make some with: python -m train scenes --out {url}")
    return Things(np.stack(images), np.stack(segmentations), np.array(things))


def make_batch(config: ShapeTraining, things: Things, side_px: int, step: int) -> tuple[Tensor, Tensor]:
    """Cut-outs float32 (N, 4, S, S); shapes and colours int64 (N, 2)."""
    rng = np.random.default_rng([config.seed, step])
    chosen = things.thing[rng.integers(len(things.thing), size=config.batch)]
    cuts = []
    for scene, segment, _, _ in chosen:
        mask = fray(things.segmentation[scene] == segment, rng)
        x, y, side = window(mask)
        where = (
            x + side * rng.uniform(-0.04, 0.04),
            y + side * rng.uniform(-0.04, 0.04),
            side * rng.uniform(0.9, 1.15),
        )
        cut = cut_out(things.image[scene], mask, where, side_px)
        cut[..., :3] = change_look((255 * cut[..., :3]).astype(np.uint8), rng)
        cuts.append(cut[:, ::-1] if rng.random() < 0.5 else cut)
    return torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2), torch.from_numpy(chosen[:, 2:].astype(np.int64))


def fray(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask (H, W) as a detector may give it: a pixel more or less around, or without a corner. Never empty."""
    kind = rng.random()
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    changed = mask
    if kind < 0.25:
        changed = cv2.dilate(mask.astype(np.uint8), cross) > 0
    elif kind < 0.4:
        changed = cv2.erode(mask.astype(np.uint8), cross) > 0
    elif kind < 0.55:
        changed = mask & (cv2.resize(rng.random((6, 6)).astype(np.float32), mask.shape[::-1]) > 0.2)
    return changed if changed.sum() >= 8 else mask


def train_shapes(config: ShapeTraining) -> Path:
    """Trains, and writes the checkpoint to config.out; returns that folder. Resumes by itself."""
    torch.manual_seed(config.seed)
    net = ShapeNet(ShapeConfig()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = averaged(net)
    optimiser = AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    first = load_state(config.out / STATE, net, average, optimiser)
    with Progress() as progress:
        progress.print(f"reading things of {config.shards}")
        things = read_things(config.shards, config.limit)
        task = progress.add_task("shapes", total=config.steps, completed=first)
        for step in range(first, config.steps):
            rate = min((step + 1) / config.warmup, 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / config.steps)))
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * rate
            cuts, names = make_batch(config, things, net.config.side_px, step)
            shapes, colours = net(cuts.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(shapes, names[:, 0]) + F.cross_entropy(colours, names[:, 1])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            follow(average, net, config.ema, step)
            progress.advance(task)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                progress.print(f"step {step + 1}: cross entropy {loss.item():.3f}")
                save_state(config.out / STATE, step + 1, net, average, optimiser)
                shipped = ShapeNet(net.config)
                shipped.load_state_dict(average)
                save_shapes(shipped, config.out)
    return config.out


STATE = "shapes-training.safetensors"
