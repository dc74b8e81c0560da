"""Trains the detector's close look (infer/evaluation/demo/crop_nets.py), the second part of `python -m train detector`.

It learns from the things of scenes and from each two of them: half of the time by their exact masks with frayed borders,
else by the masks under which the first look finds them, which are off in ways of their own.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, permutations
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW

from extract.world.vocabulary import COLOURS, SHAPES
from infer.evaluation.demo.crop_nets import PAIRS, THINGS, CloseNet, cut_out, cut_pair, save_close, window
from infer.evaluation.demo.detector import FirstLook
from infer.evaluation.demo.layout import RELATED
from infer.evaluation.demo.pixel_net import load_detector
from shards.core.errors import UserError
from shards.dataset import Dataset
from train.demo.loop import SmallLoop, run_loop
from train.demo.pixel_net import change_look
from train.demo.state import settings_of
from train.lock import only_one
from train.rates import cosine

MINE = 0.3
"""Share of the union from which on a mask of the first look is that of a thing."""


@dataclass(frozen=True, kw_only=True)
class CloseTraining:
    """The recipe. limit: scenes of the dataset that are used, the first ones. steps: by the network's name."""

    shards: str = "runs/truth"
    out: Path = Path("runs/detector")
    limit: int = 20_000
    seed: int = 8
    steps: dict[str, int] = field(default_factory=lambda: {"things": 12_000, "pairs": 8_000})
    batch: int = 64
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.02
    ema: float = 0.995
    save_every: int = 500


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """image uint8 (n, H, W, 3) and segmentation uint8 (n, H, W).

    things int (m, 4): scene, segment, shape, colour. pairs int (k, 4): scene, two segments, what the first is to the second;
    sorted by that. masks uint8 (q, H * W / 8), packed bits: those of the first look; owned: which are of a scene's segment.
    """

    image: np.ndarray
    segmentation: np.ndarray
    things: np.ndarray
    pairs: np.ndarray
    masks: np.ndarray
    owned: Mapping[tuple[int, int], Sequence[int]]

    def mask(self, scene: int, segment: int, rng: np.random.Generator) -> np.ndarray:
        """One of the masks of a thing, bool (H, W): the exact one, frayed, or as the first look has it."""
        rows = self.owned.get((scene, segment), ())
        if rows and rng.random() < 0.5:
            shape = self.segmentation.shape[1:]
            return np.unpackbits(self.masks[rows[int(rng.integers(len(rows)))]]).reshape(shape).astype(bool)
        return fray(self.segmentation[scene] == segment, rng)


def read_scenes(config: CloseTraining) -> Scenes:
    """The first config.limit scenes of a dataset of `python -m train scenes`, as the detector in config.out sees them.

    Raises UserError if there are none, or no first part of a detector.
    """
    dataset = Dataset.open(config.shards)
    samples = (sample for shard in dataset.shard_names() for sample in dataset.samples(shard))
    images, segmentations = list[np.ndarray](), list[np.ndarray]()
    things, pairs = list[tuple[int, ...]](), list[tuple[int, ...]]()
    for scene, sample in zip(range(config.limit), samples, strict=False):
        meta = sample.meta
        for one in meta["objects"]:
            things.append((scene, one["segment"], SHAPES.index(one["shape"]), list(COLOURS).index(one["colour"])))
        pairs += [(scene, *pair) for pair in pairs_of(meta)]
        images.append(sample.image())
        segmentations.append(sample.map("segmentation").values.astype(np.uint8))
    if not things:
        raise UserError(
            f"{config.shards} holds no scenes; make some with: python -m train scenes --out {config.shards}"
        )
    image, segmentation = np.stack(images), np.stack(segmentations)
    masks, owners = _masks(config.out, image, segmentation)
    owned: dict[tuple[int, int], list[int]] = {}
    for row, (scene, segment) in enumerate(owners.tolist()):
        owned.setdefault((scene, segment), []).append(row)
    sorted_pairs = np.array(sorted(pairs, key=lambda pair: pair[3])).reshape(-1, 4)
    return Scenes(image, segmentation, np.array(things), sorted_pairs, masks, owned)


def pairs_of(meta: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Of each two things of a scene's metadata, in both orders: their segments, and the number in RELATED of what the first
    is to the second."""
    segments = {one["thing"]: one["segment"] for one in meta["objects"]}
    names = {(stated["subject"], stated["object"]): stated["relation"] for stated in meta["relations"]}
    names |= {(b, a): "under" for (a, b), relation in names.items() if relation == "on top of"}
    return [
        (segments[a], segments[b], RELATED.index(name) if (name := names.get((a, b))) in RELATED else 0)
        for a, b in permutations(segments, 2)
    ]


def _masks(detector: Path, images: np.ndarray, segmentation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first look's masks of things, packed, and whose they are, int (q, 2): scene and segment. Kept in its folder."""
    net, path = load_detector(detector), detector / "masks.safetensors"
    weights = b"".join(tensor.numpy().tobytes() for tensor in net.state_dict().values())
    made_of = hashlib.sha256(weights + images.tobytes()).hexdigest()
    if path.exists():
        with safe_open(path, "np") as file:
            if file.metadata()["made_of"] == made_of:
                return file.get_tensor("masks"), file.get_tensor("owners")
    look, masks, owners = FirstLook(net), list[np.ndarray](), list[tuple[int, int]]()
    for start in track(range(0, len(images), look.batch), "the first look"):
        part = list(images[start : start + look.batch])
        for scene, found in enumerate(look.candidates(part, look(part)), start):
            for one in found:
                if (segment := whose(one.mask, segmentation[scene])) is not None:
                    masks.append(np.packbits(one.mask))
                    owners.append((scene, segment))
    tensors = {"masks": np.array(masks), "owners": np.array(owners)}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: torch.from_numpy(array) for name, array in tensors.items()}, temporary, {"made_of": made_of})
    temporary.replace(path)
    return tensors["masks"], tensors["owners"]


def whose(mask: np.ndarray, segmentation: np.ndarray) -> int | None:
    """The segment whose mask this is, more or less: MINE of their union. None if it is that of no one."""
    inside = np.bincount(segmentation[mask])
    whole = np.bincount(segmentation.ravel(), minlength=len(inside))[: len(inside)]
    shared = inside / (whole + mask.sum() - inside)
    shared[0] = 0  # no segment
    best = int(shared.argmax())
    return best if shared[best] >= MINE else None


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


# ---- batches ---------------------------------------------------------------------------------------------------------


def make_batch(name: str, config: CloseTraining, scenes: Scenes, step: int) -> tuple[Tensor, Tensor]:
    """Cut-outs float32 (N, 4 or 5, S, S) of things or pairs, and their classes int64 (N, heads)."""
    rng = np.random.default_rng([config.seed, step])
    rows = scenes.things if name == "things" else scenes.pairs
    chosen = rows[_drawn(name, rows, config.batch, rng)]
    make = _thing if name == "things" else _pair
    cuts = []
    for row in chosen:
        cut = make(scenes, row, rng)
        cut[..., :3] = change_look((255 * cut[..., :3]).astype(np.uint8), rng)
        cuts.append(cut[:, ::-1] if rng.random() < 0.5 else cut)
    classes = chosen[:, 2:] if name == "things" else chosen[:, 3:]
    return torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2), torch.from_numpy(classes.astype(np.int64))


def _drawn(name: str, rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows by chance; of pairs, every relation that there is equally often: most pairs are nothing to each other."""
    if name == "things":
        return rng.integers(len(rows), size=count)
    begins, ends = (np.searchsorted(rows[:, 3], np.arange(len(RELATED)), side) for side in ("left", "right"))
    kinds = rng.choice(np.flatnonzero(ends > begins), size=count)
    return rng.integers(begins[kinds], ends[kinds])


def _thing(scenes: Scenes, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    scene, segment = int(row[0]), int(row[1])
    mask = scenes.mask(scene, segment, rng)
    return cut_out(scenes.image[scene], mask, _off(window(mask), rng), THINGS.side_px)


def _pair(scenes: Scenes, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    scene, first, second, _ = map(int, row)
    one, other = (scenes.mask(scene, segment, rng) for segment in (first, second))
    return cut_pair(scenes.image[scene], one, other, _off(window(one | other), rng), PAIRS.side_px)


def _off(where: tuple[float, float, float], rng: np.random.Generator) -> tuple[float, float, float]:
    """A window that is a little off."""
    x, y, side = where
    return x + side * rng.uniform(-0.04, 0.04), y + side * rng.uniform(-0.04, 0.04), side * rng.uniform(0.9, 1.15)


# ---- the loop --------------------------------------------------------------------------------------------------------


def train_close(name: str, config: CloseTraining) -> Path:
    """Trains the network `name` (things or pairs), and writes the checkpoint to config.out, where the detector's first part
    is; returns that folder. Resumes by itself."""
    with only_one(config.out):
        _train(name, config)
    return config.out


def _train(name: str, config: CloseTraining) -> None:
    torch.manual_seed(config.seed)
    net = CloseNet(THINGS if name == "things" else PAIRS)
    steps, scenes = config.steps[name], read_scenes(config)

    def batches(first: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (make_batch(name, config, scenes, step) for step in count(first))

    def terms_of(step: int, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        cuts, classes = batch
        heads = net(cuts.contiguous(memory_format=torch.channels_last))
        return {f"cross entropy {i + 1}": F.cross_entropy(head, classes[:, i]) for i, head in enumerate(heads)}

    loop = SmallLoop(
        title=f"the close look at {name}",
        state=config.out / f"{name}-training.safetensors",
        settings=settings_of(config, ("shards", "out", "save_every", "steps")) | {"steps": steps},
        steps=steps,
        rate=lambda step: config.learning_rate * min((step + 1) / config.warmup, cosine(step / steps)),
        ema=config.ema,
        save_every=config.save_every,
        clip=None,
        on_save=lambda shipped: save_close(cast(CloseNet, shipped), config.out),
    )
    optimiser = AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run_loop(net, optimiser, batches, terms_of, loop)
