"""Streaming speed at 512 px with all members, in one run, beside its limit and a peer.

    python -m benchmarks.stream [--samples 512] [--workers 1]

Rows: `shards.stream` in a DataLoader; plain webdataset with PIL for the image and a handler for the maps, in the same
DataLoader; and the cost of decoding alone, from memory. The last line is the time to find a position at the end of a
million samples. Ratios to ours are what counts.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from shards.dataset import Dataset, add_counts, write_info
from shards.intrinsics import INTRINSICS, IntrinsicMap, describe_segments, order_segments
from shards.order import Order, Sampler
from shards.sample import encode_meta, member_names
from shards.storage import Folder
from shards.stream import Stream
from shards.writer import ShardWriter


def smooth(rng: np.random.Generator, channels: int, size_px: int) -> np.ndarray:
    """Noise with the correlation of real maps, so that compression works as hard as on real ones."""
    coarse = rng.normal(size=(size_px // 16, size_px // 16, channels)).astype(np.float32)
    return cv2.resize(coarse, (size_px, size_px), interpolation=cv2.INTER_CUBIC)


def make_dataset(path: Path, samples: int, size_px: int) -> str:
    """A dataset of plausible maps: 8 different samples, repeated."""
    rng, stored = np.random.default_rng(0), []
    for _ in range(8):
        n = smooth(rng, 3, size_px) + np.array([0, 0, 2], np.float32)
        ids = order_segments((smooth(rng, 1, size_px).squeeze() * 8).astype(np.int32) + 40)
        maps = {
            "depth": IntrinsicMap(np.exp(smooth(rng, 1, size_px).squeeze()), {"kind": "metric"}),
            "normal": IntrinsicMap(n / np.linalg.norm(n, axis=2, keepdims=True)),
            "segmentation": IntrinsicMap(ids, {"segments": describe_segments(ids, {}, {})}),
            "line": IntrinsicMap((smooth(rng, 1, size_px).squeeze() > 1).astype(np.float32)),
        }
        file = io.BytesIO()
        texture = np.clip(smooth(rng, 3, size_px) * 40 + 128 + rng.normal(size=(size_px, size_px, 1)) * 8, 0, 255)
        Image.fromarray(texture.astype(np.uint8)).save(file, "JPEG", quality=95, subsampling=0)
        members, described = {"jpg": file.getvalue(), "txt": b"a picture"}, {}
        for name, item in maps.items():
            members[INTRINSICS[name].member], described[name] = INTRINSICS[name].encode(item)
        stored.append(members | {"json": encode_meta({"intrinsics": described})})
    folder, names = Folder(path), member_names("jpg", tuple(INTRINSICS))
    for shard in range(-(-samples // 64)):
        with ShardWriter(folder, shard, members=names, made={}) as writer:
            for i in range(shard * 64, min((shard + 1) * 64, samples)):
                writer.add(f"{i:06d}", stored[i % len(stored)])
            writer.commit({})
    write_info(folder, {"members": names, "image": "jpg", "totals": add_counts(Dataset(folder, {}).marks())})
    return folder.url


def as_tensors(item: Any, rng: np.random.Generator) -> tuple:
    """Tensors, as a trainer wants them: they travel from loader workers through shared memory."""
    maps = {name: torch.from_numpy(item.maps[name].values) for name in item.maps}
    return item.key, torch.from_numpy(item.image.copy()), maps


def ours(url: str, samples: int, workers: int) -> Iterable[Any]:
    sampler = Sampler(batch=8, samples=samples)
    stream = Stream([url], transform=as_tensors)
    return DataLoader(stream, batch_sampler=sampler, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]


def decode_map(key: str, data: bytes) -> np.ndarray | None:
    """webdataset's own decoder turns 16-bit PNGs into 8-bit RGB: maps need a handler that runs first."""
    if not key.endswith(("depth.png", "normal.png", "segmentation.png", "line.png")):
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def plain(url: str, samples: int, workers: int) -> Iterable[Any]:
    tars = sorted(map(str, Path(url).glob("*.tar")))
    data = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).shuffle(64).decode(decode_map, "rgb8")
    return DataLoader(data.batched(8, collation_fn=list), batch_size=None, num_workers=workers)


def decoding_alone(url: str, samples: int) -> float:
    """Seconds to decode every member of `samples` samples that lie in memory, in one thread."""
    dataset = Dataset.open(url)
    held = [sample for _, sample in zip(range(32), dataset.samples("000000"), strict=False)]
    begin = time.perf_counter()
    for i in range(samples):
        sample = held[i % len(held)]
        sample.image()
        sample.maps()
    return time.perf_counter() - begin


def seconds(run: Callable[[], Iterable[Any]]) -> float:
    begin = time.perf_counter()
    for _ in run():
        pass
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        url = make_dataset(Path(folder), given.samples, given.size)
        times: dict[str, list[float]] = {"shards.stream": [], "plain webdataset": [], "decoding alone, 1 thread": []}
        for _ in range(given.repeat):  # in turn, so that a drift of the machine hits all alike
            times["shards.stream"].append(seconds(lambda: ours(url, given.samples, given.workers)))
            times["plain webdataset"].append(seconds(lambda: plain(url, given.samples, given.workers)))
            times["decoding alone, 1 thread"].append(decoding_alone(url, given.samples))
    table = Table(title=f"{given.samples} samples at {given.size} px, all members, {given.workers} loader workers")
    for column in ("", "samples/s", "shards.stream / this"):
        table.add_column(column, justify="left" if not column else "right")
    best = {name: given.samples / sorted(measured)[len(measured) // 2] for name, measured in times.items()}
    for name, rate in best.items():
        table.add_row(name, f"{rate:.1f}", f"{best['shards.stream'] / rate:.2f}")
    Console().print(table)
    begin = time.perf_counter()
    Order([1000] * 1000, seed=1).place(999_999)
    print(f"finding the last of 1,000,000 samples: {time.perf_counter() - begin:.4f} s")


if __name__ == "__main__":
    main()
