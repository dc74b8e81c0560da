"""Trains the embedded estimators' network on the demo world, by the recipe of the shipped weights.

    python -m train estimator --out runs/estimator

Half of the scenes come from the plain world, half from a varied one; all are cropped, resized, flipped, re-coloured,
blurred, made noisy and compressed, so that a photograph gives something plausible. Steps are a pure function of
(seed, step): a run that was stopped continues from its last checkpoint as if nothing had happened.

The shipped weights saw an earlier draft of the demo world (its last changes were small: details of a few shapes), so a
rerun gives weights of the same kind, not the same bytes. `python -m benchmarks.accuracy` measures either on today's world.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from extract.estimators.nets.demo_net import DemoNet, DemoNetConfig, Prediction, save_demo_net
from train.demo.loop import SmallLoop, run_loop
from train.demo.scene_store import SceneStore, open_chunk
from train.demo.state import STATE, settings_of
from train.lock import only_one
from train.rates import warmup_cosine
from train.stop import Stop, Stopped

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class EstimatorTraining:
    """The recipe. shapes: (size_px, images) of a step, drawn at random; the world is rendered at `render_px`."""

    out: Path
    scenes: Path = Path("runs/scenes")
    chunks: int = 96
    render_px: int = 192
    seed: int = 100
    steps: int = 2200
    shapes: tuple[tuple[int, int], ...] = ((128, 24), (160, 16), (192, 12), (256, 6))
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.02
    ema: float = 0.998
    save_every: int = 100
    workers: int = 2

    def store(self) -> SceneStore:
        return SceneStore(folder=self.scenes, seed=self.seed, chunks=self.chunks, size_px=self.render_px)


# ---- data ------------------------------------------------------------------------------------------------------------


def batches(config: EstimatorTraining, first: int) -> Iterator[Batch]:
    """The batches of the steps from `first` on, made ahead by a thread."""
    chunks = [open_chunk(path) for path in config.store().ready()]
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(make_batch, config, chunks, step) for step in range(first, min(first + 3, config.steps))]
        for step in range(first, config.steps):
            batch = ahead.pop(0).result()
            if step + 3 < config.steps:
                ahead.append(pool.submit(make_batch, config, chunks, step + 3))
            yield batch


def make_batch(config: EstimatorTraining, chunks: list[dict[str, np.ndarray]], step: int) -> Batch:
    """One batch: image (N, 3, S, S) in [0, 1]; depth (N, S, S), inf for sky; normal (N, 3, S, S); boundary, line (N, S, S)."""
    rng = np.random.default_rng([config.seed, step])
    size, count = config.shapes[rng.integers(len(config.shapes))]
    samples = []
    for _ in range(count):
        chunk = chunks[rng.integers(len(chunks))]
        row = int(rng.integers(len(chunk["image"])))
        scene = {name: np.asarray(array[row]) for name, array in chunk.items()}
        samples.append(augment(scene, size, rng))
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def augment(scene: dict[str, np.ndarray], size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random crop of a scene at size x size, perhaps flipped, with a changed look."""
    side = scene["image"].shape[0]
    crop = int(side * (1 if rng.random() < 0.4 else rng.uniform(0.55, 1)))
    y, x = rng.integers(side - crop + 1, size=2)
    flip = rng.random() < 0.5
    cut = {k: v[y : y + crop, x : x + crop][:, :: -1 if flip else 1] for k, v in scene.items()}
    picks = ((np.arange(size) + 0.5) * crop / size).astype(np.int64)
    near = {k: cut[k][picks[:, None], picks] for k in ("depth", "normal", "segmentation")}
    shrink = cv2.INTER_AREA if crop > size else cv2.INTER_LINEAR
    normal = near["normal"].astype(np.float32) / 127
    if flip:
        normal[..., 0] *= -1
    ids = near["segmentation"]
    image = cv2.resize(np.ascontiguousarray(cut["image"]), (size, size), interpolation=shrink)
    line = cv2.resize(np.ascontiguousarray(cut["line"]), (size, size), interpolation=shrink)
    return {
        "image": change_look(image, rng).transpose(2, 0, 1),
        "depth": near["depth"].astype(np.float32),
        "normal": normal.transpose(2, 0, 1).copy(),
        "boundary": boundaries(ids).astype(np.float32),
        "line": line.astype(np.float32) / 255,
    }


def boundaries(ids: np.ndarray) -> np.ndarray:
    """bool (H, W): pixels on either side of a border between segments, a band two pixels wide."""
    edges = np.zeros(ids.shape, bool)
    across, down = ids[:, :-1] != ids[:, 1:], ids[:-1] != ids[1:]
    edges[:, :-1] |= across
    edges[:, 1:] |= across
    edges[:-1] |= down
    edges[1:] |= down
    return edges


def change_look(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 in [0, 1]: compression, blur, light, colour and noise of other cameras."""
    if rng.random() < 0.3:
        coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 95))])[1]
        image = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
    x = np.asarray(image, np.float32) / 255
    if rng.random() < 0.3:
        x = np.asarray(cv2.GaussianBlur(x, (0, 0), float(rng.uniform(0.3, 1.3))))
    if rng.random() < 0.8:
        grey = x.mean(axis=2, keepdims=True)
        x = grey + (x - grey) * rng.uniform(0.2, 1.4)  # saturation
        x = np.clip(x, 0, 1) ** rng.uniform(0.6, 1.6)  # gamma
        x = (x - 0.5) * rng.uniform(0.6, 1.3) + 0.5 + rng.uniform(-0.15, 0.15)  # contrast, brightness
        x = x * rng.uniform(0.85, 1.15, 3)  # white balance
    if rng.random() < 0.1:
        x = np.repeat(x.mean(axis=2, keepdims=True), 3, axis=2)
    if rng.random() < 0.4:
        x = x + rng.normal(scale=rng.uniform(0, 0.06), size=x.shape)
    return np.clip(x, 0, 1).astype(np.float32)


# ---- losses ----------------------------------------------------------------------------------------------------------


def losses(predicted: Prediction, batch: Batch) -> dict[str, Tensor]:
    """The terms of the loss, each a mean over the pixels where it is defined."""
    sky = torch.isinf(batch["depth"])
    known = ~sky
    error = torch.where(known, predicted.log_depth - torch.where(known, batch["depth"], 1).log(), 0)
    count = known.sum(dim=(1, 2)).clamp(min=1)
    shift = error.sum(dim=(1, 2)) / count  # the scale that a single picture does not tell
    centred = torch.where(known, error - shift[:, None, None], 0)
    solid = batch["normal"].square().sum(dim=1) > 0.5
    cosine = (predicted.normal * batch["normal"]).sum(dim=1)
    return {
        "depth": (centred.abs().sum(dim=(1, 2)) / count).mean(),
        "scale": 0.1 * shift.abs().mean(),
        "edges": 0.5 * sum((_gradient(centred, known, step) for step in (1, 2, 4)), start=torch.zeros(())),
        "sky": 0.3 * F.binary_cross_entropy_with_logits(predicted.sky, sky.float()),
        "normal": ((1 - cosine) * solid).sum() / solid.sum().clamp(min=1),
        "boundary": 0.5 * _edge_loss(predicted.boundary, batch["boundary"]),
        "line": 0.5 * _edge_loss(predicted.line, batch["line"]),
    }


def _gradient(error: Tensor, known: Tensor, step: int) -> Tensor:
    """Mean |difference of the error| between pixels `step` apart: sharp borders, flat planes."""
    total = torch.zeros(())
    for dim in (1, 2):
        size = error.shape[dim]
        both = known.narrow(dim, step, size - step) & known.narrow(dim, 0, size - step)
        change = error.narrow(dim, step, size - step) - error.narrow(dim, 0, size - step)
        total = total + (change.abs() * both).sum() / both.sum().clamp(min=1)
    return total


def _edge_loss(logit: Tensor, target: Tensor) -> Tensor:
    """Cross entropy in which edges count three times, and a Dice term against their rarity."""
    cross = F.binary_cross_entropy_with_logits(logit, target, weight=1 + 2 * target)
    p = logit.sigmoid()
    return cross + 0.3 * (1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1))


# ---- the loop --------------------------------------------------------------------------------------------------------


def train_estimator(config: EstimatorTraining) -> Path:
    """Renders the scenes, trains, and writes the checkpoint to config.out; returns that folder. Resumes by itself."""
    with only_one(config.out):
        _render(config)
        _train(config)
    return config.out


def _render(config: EstimatorTraining) -> None:
    """Renders the scenes that are not there yet."""
    store = config.store()
    if len(ready := store.ready()) == config.chunks:
        return
    with Progress() as progress, Stop() as stop:
        task = progress.add_task("rendering scenes", total=config.chunks, completed=len(ready))
        for _ in store.render_missing(config.workers):
            progress.advance(task)
            if stop.asked():
                raise Stopped("stopped while scenes were rendered; the same command continues")


def _train(config: EstimatorTraining) -> None:
    torch.manual_seed(config.seed)
    net = DemoNet(DemoNetConfig())

    def terms_of(step: int, batch: Batch) -> dict[str, Tensor]:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = net(image)
        return losses(predicted, batch)

    loop = SmallLoop(
        title="the estimator",
        state=config.out / STATE,
        settings=settings_of(config, ("out", "scenes", "save_every", "workers")),
        steps=config.steps,
        rate=lambda step: config.learning_rate * warmup_cosine(step, config.steps, config.warmup),
        ema=config.ema,
        save_every=config.save_every,
        on_save=lambda shipped: save_demo_net(cast(DemoNet, shipped), config.out),
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run_loop(net, optimiser, lambda first: batches(config, first), terms_of, loop)
