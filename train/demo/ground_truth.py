"""Shards of demo-world scenes with their exact maps: what the embedded models learn from, and what training is measured on.

    write_truth("runs/truth", TruthSettings(count=20000), workers=2)

The same layout as any extracted dataset, so everything that reads those reads this. Estimators are named "truth@WORLD".
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from time import perf_counter
from typing import Any

import numpy as np

from extract.sources.demo import WORLD_VERSION, metadata
from extract.world import Rendering, Scene, compose, render
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.intrinsics import INTRINSICS, IntrinsicMap, describe_segments, encode_png
from shards.marks import DATASET, digest, shard_name
from shards.quality import quality_scores
from shards.sample import encode_meta, member_names
from shards.writer import ShardWriter, recover

IMAGE = "png"
MAKER = {"id": f"truth@{WORLD_VERSION}", "name": "truth", "weights": "", "settings": {}, "version": WORLD_VERSION}


@dataclass(frozen=True, kw_only=True)
class TruthSettings:
    """Scenes first .. first + count - 1 of a seed, rendered at size_px x size_px.

    named: only those whose captions name all that is there, about half of them.
    """

    seed: int = 1
    first: int = 0
    count: int = 20_000
    named: bool = False
    size_px: int = 64
    shard_size: int = 500

    def __post_init__(self) -> None:
        if min(self.count, self.shard_size) < 1 or self.first < 0:
            raise UsageError(f"count {self.count}, shard_size {self.shard_size}, first {self.first}: too small")


def write_truth(url: str, settings: TruthSettings, workers: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Renders what is not there yet and writes it as the dataset at `url`; returns its totals.

    progress: called with the number of scenes that are done. Raises UserError if the folder holds another dataset.
    """
    folder = Folder(url)
    folder.make()
    info = {
        "recipe": "truth",
        "config": asdict(settings) | {"world": WORLD_VERSION},
        "members": member_names(IMAGE, tuple(INTRINSICS)),
        "image": IMAGE,
        "depth_kind": "metric",
        "estimators": dict.fromkeys(INTRINSICS, MAKER),
        "shards": None,
        "totals": None,
    }
    if folder.exists(DATASET):
        if Dataset.open(url).info["config"] != info["config"]:
            raise UserError(f"{url} holds a dataset of other settings; choose another --out")
    else:
        write_info(folder, info)
    todo = []
    for index, start in enumerate(range(0, settings.count, settings.shard_size)):
        recover(folder, shard_name(index))
        if folder.exists(f"{shard_name(index)}.json"):
            progress(min(settings.shard_size, settings.count - start))
        else:
            todo.append(index)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for task in as_completed([pool.submit(partial(write_shard, url, settings), index) for index in todo]):
            progress(task.result())
    totals = add_counts(Dataset.open(url).marks())
    write_info(folder, info | {"shards": len(totals["shards"]), "totals": totals})
    folder.sweep()
    return totals


def write_shard(url: str, settings: TruthSettings, index: int) -> int:
    """Renders and commits one shard; returns how many scenes it was made of."""
    started, start = perf_counter(), index * settings.shard_size
    scenes = range(settings.first + start, settings.first + min(start + settings.shard_size, settings.count))
    made = {"config": digest(asdict(settings)), "first": scenes[0], "last": scenes[-1]}
    with ShardWriter(Folder(url), index, members=member_names(IMAGE, tuple(INTRINSICS)), made=made) as writer:
        for number in scenes:
            scene = compose(settings.seed, number)
            if not settings.named or len(scene.mentioned) == len(scene.things):
                writer.add(f"truth-{settings.seed}-{number:07d}", _members(settings, scene))
        writer.commit({"total_s": perf_counter() - started})
    return len(scenes)


def fully_named(url: str, shard: str) -> list[tuple[np.ndarray, str]]:
    """Image, uint8 (H, W, 3), and caption of a shard's scenes whose captions name all that is there."""
    samples = Dataset.open(url).samples(shard)
    return [(s.image(), s.caption) for s in samples if all(thing["mentioned"] for thing in s.meta["objects"])]


def exact_maps(rendering: Rendering) -> dict[str, IntrinsicMap]:
    """The intrinsics of a rendered scene, as they are and not as estimators see them."""
    labels = dict(enumerate(rendering.segments, 1))
    focal = {"focal_px": rendering.focal_px, "focal_from": "exact"}
    return {
        "depth": IntrinsicMap(rendering.depth_m, {"kind": "metric", **focal}),
        "normal": IntrinsicMap(rendering.normal),
        "segmentation": IntrinsicMap(
            rendering.segmentation, {"segments": describe_segments(rendering.segmentation, {}, labels)}
        ),
        "line": IntrinsicMap(rendering.line),
    }


def _members(settings: TruthSettings, scene: Scene) -> dict[str, bytes]:
    rendering = render(scene, settings.size_px)
    maps = exact_maps(rendering)
    members = {IMAGE: encode_png(rendering.image), "txt": rendering.caption.encode()}
    described: dict[str, Any] = {}
    for name, row in INTRINSICS.items():
        members[row.member], about = row.encode(maps[name])
        described[name] = about | {"by": MAKER["id"]}
    described["quality"] = quality_scores(maps)
    members["json"] = encode_meta({**metadata(scene, rendering), "intrinsics": described})
    return members
