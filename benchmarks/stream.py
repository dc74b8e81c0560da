"""Streaming speed at 512 px with all members, in one run, beside its limit and a peer; from a disk and from S3.

    python -m benchmarks.stream [--samples 512] [--workers 1] [--cores 1] [--skip-s3]

Rows: `shards.stream` in its loader; plain webdataset in a DataLoader, with PIL for the image and a handler for the maps, once
with a handler that gives what we give (maps in their units, by the same decoders) and once with one that stops at the codes of
the PNGs; and the cost of decoding alone, from memory, in as many processes as there are workers, none of whose results go
anywhere. The peer gets whole tars in their order, from S3 by a pipe from curl; both hand batches of 8 to the main process as
tensors. Rates are of a stream under way: the first 512 samples of a row are not counted (processes, imports, connections); the
time to its first batch stands beside it. With --cores 1 the main process and one worker share a core, so that neither gains by
a further thread. The S3 server (benchmarks/slow_store.py) is a process of its own, with a delay before every answer. The last
line is the time to open a dataset of a million samples, and to find the key at the end of its first epoch. Ratios to ours are
what counts; CPU time, of all samples, says more on a machine that is busy.
"""

import argparse
import gc
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
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

from benchmarks.slow_store import BUCKET, slow_store
from shards.core.memory import keep_memory
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.intrinsics import INTRINSICS, IntrinsicMap, describe_segments, order_segments
from shards.sample import Sample, encode_meta, member_names
from shards.stream import Item, Stream
from shards.stream.loader import StreamLoader
from shards.stream.order import Order, Sampler
from shards.writer import ShardWriter

WARM_UP = 512
"""Samples of each row that come before its clock starts."""


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


def as_tensors(item: Item, rng: np.random.Generator) -> tuple:
    """Tensors, as a trainer wants them: they travel from loader workers through shared memory."""
    assert item.image is not None
    return item.key, torch.from_numpy(item.image), {n: torch.from_numpy(m.values) for n, m in item.maps.items()}


def ours(url: str, samples: int, workers: int) -> Iterable[Any]:
    sampler = Sampler(batch=8, samples=samples)
    return StreamLoader(Stream([url], transform=as_tensors), sampler, num_workers=workers)


def codes_of(key: str, data: bytes) -> np.ndarray | None:
    """webdataset's own decoder turns 16-bit PNGs into 8-bit RGB: maps need a handler that runs first."""
    if not key.endswith(("depth.png", "normal.png", "segmentation.png", "line.png")):
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def values_of(key: str, data: bytes) -> np.ndarray | None:
    """A handler that gives metres, unit normals, segment ids and lines in 0..1, by our own decoders."""
    for row in INTRINSICS.values():
        if key.endswith(row.member):
            return row.decode(data, {"kind": "metric"}).values
    return None


def tensors_of(sample: dict[str, Any]) -> tuple:
    maps = {name: torch.from_numpy(sample[row.member]) for name, row in INTRINSICS.items()}
    return sample["__key__"], torch.from_numpy(sample["jpg"].copy()), maps, sample["txt"], sample["json"]


def plain(tars: list[str], workers: int, handler: Callable[[str, bytes], np.ndarray | None]) -> Iterable[Any]:
    data = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).shuffle(64).decode(handler, "rgb8")
    batches = data.map(tensors_of).batched(8, collation_fn=list)
    return DataLoader(batches, batch_size=None, num_workers=workers)


def decode_all(held: list[Sample], samples: int) -> None:
    """Decodes every member of `samples` samples that lie in memory, in a process that lives for that alone."""
    keep_memory()
    for i in range(samples):
        sample = held[i % len(held)]
        sample.image()
        sample.maps()


def decoding_alone(url: str, samples: int, workers: int) -> tuple[float, float]:
    """Samples a second of `workers` processes together; no batch is handed out."""
    dataset = Dataset.open(url)
    held = [sample for _, sample in zip(range(32), dataset.samples("000000"), strict=False)]
    shares = [samples // workers + (i < samples % workers) for i in range(workers)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=decode_all, args=(held, share)) for share in shares]
    begin = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return samples / (time.perf_counter() - begin), 0.0


def rate(run: Callable[[], Iterable[Any]], samples: int) -> tuple[float, float]:
    """Samples a second once WARM_UP samples were there, and the seconds to the first batch."""
    begin, seen, first, warm_up = time.perf_counter(), 0, 0.0, min(WARM_UP, samples // 4)
    counted = begin
    for batch in run():
        seen += len(batch)
        first = first or time.perf_counter() - begin
        if seen <= warm_up:
            counted = time.perf_counter()
    assert seen == samples, f"{seen} samples instead of {samples}"
    return (samples - warm_up) / (time.perf_counter() - counted), first


def cpu_seconds() -> float:
    """Of this process and of all its children that have ended."""
    return sum(os.times()[:4])


# ---- the table -------------------------------------------------------------------------------------------------------


def measure(title: str, runs: dict[str, Callable[[], tuple[float, float]]], samples: int, repeat: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    cpu = dict.fromkeys(runs, 0.0)
    for _ in range(repeat):  # in turn, so that a drift of the machine hits all alike
        for name, run in runs.items():
            before = cpu_seconds()
            found[name].append(run())
            gc.collect()  # the loader's workers have ended now
            cpu[name] += cpu_seconds() - before
    medians = {name: sorted(one)[len(one) // 2] for name, one in found.items()}
    ours_rate = next(iter(medians.values()))[0]
    table = Table(title=title, title_justify="left")
    for column in ("", "samples/s", "shards.stream / this", "first batch, s", "CPU ms a sample"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (under_way, first) in medians.items():
        row = f"{under_way:.1f}", f"{ours_rate / under_way:.2f}", f"{first:.2f}" if first else ""
        table.add_row(name, *row, f"{cpu[name] / repeat / samples * 1000:.1f}")
    Console().print(table)


def runs_of(url: str, tars: list[str], samples: int, workers: int) -> dict[str, Callable[[], tuple[float, float]]]:
    return {
        "shards.stream": lambda: rate(lambda: ours(url, samples, workers), samples),
        "webdataset, maps as values": lambda: rate(lambda: plain(tars, workers, values_of), samples),
        "webdataset, maps as codes": lambda: rate(lambda: plain(tars, workers, codes_of), samples),
    }


def time_to_resume(folder: Path) -> float:
    """Seconds to open a dataset of 1000 shards of 1000 samples, and to name the last sample of the first epoch."""
    names = member_names("jpg", tuple(INTRINSICS))
    shard = Order([1000] * 1000, seed=1).place(999_999).shard
    with ShardWriter(Folder(folder), shard, members=names, made={}) as writer:
        for i in range(1000):
            writer.add(f"{i:09d}", dict.fromkeys(names, b""))
        writer.commit({})
    totals = {"in": 1_000_000, "ok": 1_000_000, "failed": {}, "shards": [1000] * 1000}
    write_info(Folder(folder), {"members": names, "image": "jpg", "totals": totals})
    begin = time.perf_counter()
    Stream([str(folder)], seed=1).key(999_999)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cores", type=int, help="use so many cores only (the S3 server has all)")
    parser.add_argument("--delay-ms", type=float, default=30, help="of every answer of the S3 server")
    parser.add_argument("--skip-s3", action="store_true")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        folder.mkdir()
        url = make_dataset(folder, given.samples, given.size)
        title = f"{given.samples} samples at {given.size} px, all members, {given.workers} loader workers"
        everything = os.sched_getaffinity(0)
        with nullcontext() if given.skip_s3 else slow_store(folder, given.delay_ms / 1000) as endpoint:
            os.sched_setaffinity(0, sorted(everything)[: given.cores])
            tars = sorted(folder.glob("*.tar"))
            runs = runs_of(url, list(map(str, tars)), given.samples, given.workers)
            runs["decoding alone"] = alone = lambda: decoding_alone(url, given.samples, given.workers)
            measure(f"{title}, from a disk", runs, given.samples, given.repeat)
            if endpoint is not None:
                urls = [f"pipe:curl -s -f {endpoint}/{BUCKET}/{path.name}" for path in tars]
                runs = runs_of(f"s3://{BUCKET}", urls, given.samples, given.workers) | {"decoding alone": alone}
                measure(f"{title}, from S3 with {given.delay_ms:g} ms", runs, given.samples, given.repeat)
        print(f"opening 1,000,000 samples and finding the last one: {time_to_resume(Path(scratch) / 'million'):.3f} s")


if __name__ == "__main__":
    main()
