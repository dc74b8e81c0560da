"""Tiny datasets with all four maps, for the tests of what looks at datasets."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shards.core.storage import Folder
from shards.dataset import add_counts, write_info
from shards.intrinsics import INTRINSICS, IntrinsicMap, encode_png
from shards.quality import quality_scores
from shards.sample import encode_meta, member_names
from shards.writer import ShardWriter

MEMBERS = member_names("png", tuple(INTRINSICS))
ESTIMATORS = {name: {"id": f"test@{name}", "name": "test"} for name in INTRINSICS}
INFO: dict[str, Any] = {
    "recipe": "test",
    "config": {},
    "members": MEMBERS,
    "image": "png",
    "depth_kind": "metric",
    "estimators": ESTIMATORS,
}
Change = Callable[[str, dict[str, bytes]], Mapping[str, bytes]]


def maps(height: int = 6, width: int = 8) -> dict[str, IntrinsicMap]:
    """A floor 4 m away under a sky (the top row), in two segments, with one line of density 1 / height."""
    depth = np.full((height, width), 4, np.float32)
    normal = np.zeros((height, width, 3), np.float32)
    ids = np.ones((height, width), np.uint16)
    line = np.zeros((height, width), np.float32)
    depth[0], normal[0], normal[1:, :, 1], ids[0], line[1] = np.inf, np.nan, 1, 2, 1
    segments = [{"id": 1, "area": (height - 1) * width, "score": 1.0, "label": "floor"},
                {"id": 2, "area": width, "score": 1.0, "label": "sky"}]  # fmt: skip
    return {
        "depth": IntrinsicMap(depth, {"kind": "metric", "focal_px": None}),
        "normal": IntrinsicMap(normal),
        "segmentation": IntrinsicMap(ids, {"segments": segments}),
        "line": IntrinsicMap(line),
    }


def members_of(caption: str = "a floor", **fields: Any) -> dict[str, bytes]:
    """The members of one sample, 8 x 6 pixels. fields: changes to json["intrinsics"]."""
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    made = {"png": encode_png(image), "txt": caption.encode()}
    described: dict[str, Any] = {"image": {"size": [8, 6]}, "quality": quality_scores(maps())}
    for name, item in maps().items():
        made[INTRINSICS[name].member], info = INTRINSICS[name].encode(item)
        described[name] = {**info, "by": ESTIMATORS[name]["id"]}
    described = {name: value | fields.get(name, {}) for name, value in described.items()}
    return {**made, "json": encode_meta({"intrinsics": described})}


def write_dataset(path: Path | str, *, shards: int = 2, per_shard: int = 2, change: Change | None = None) -> Folder:
    """Samples s0-0, s0-1, s1-0, ... and one failure in each shard. change: gives other members for a key."""
    folder = Folder(path)
    folder.make()
    marks = []
    for shard in range(shards):
        with ShardWriter(folder, shard, members=MEMBERS, made={"unit": shard}) as writer:
            for number in range(per_shard):
                key, made = f"s{shard}-{number}", members_of(f"a floor, {number}")
                writer.add(key, change(key, made) if change else made)
            writer.fail(f"bad-{shard}", "decode", "truncated", "the file ends early")
            marks.append(writer.commit({"unit_s": 1.5}))
    folder.remove(".writing")
    write_info(folder, INFO | {"shards": shards, "totals": add_counts(marks)})
    return folder
