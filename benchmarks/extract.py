"""Extraction against its limit: the estimators' bare forward passes over decoded images; and where the time goes.

    python -m benchmarks.extract [--images 200] [--workers 2]

Two tables. First the set `demo` at 256 px: whole runs beside as many processes that do nothing but estimate. Then null
estimators (constant maps) at 512 px: what decoding, encoding and writing cost. Both read a folder of JPEGs, already of
the right size, so that nothing is rendered or resized meanwhile; start-up (Ray, imports, weights) is shown apart.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from extract.config import ExtractConfig, RunConfig
from extract.estimators.table import ROWS, load
from extract.images.prepare import ImageRules
from extract.run.run import Summary, run
from extract.world import compose, render


def make_images(folder: Path, count: int, size_px: int) -> None:
    """JPEGs of demo scenes; a few scenes, repeated."""
    folder.mkdir()
    pictures = [render(compose(5, i), size_px).image for i in range(min(count, 20))]
    for i in range(count):
        Image.fromarray(pictures[i % len(pictures)]).save(folder / f"{i:05d}.jpg", quality=95, subsampling=0)


def extraction(images: Path, out: Path, estimators: str, size_px: int, workers: int) -> Summary:
    config = ExtractConfig(
        name="benchmark",
        out=str(out),
        source={"kind": "folder", "path": str(images), "captions": "none"},
        image=ImageRules(size_px=size_px),
        run=RunConfig(estimators=estimators, shard_size=200, workers=workers),
    )
    return run(config)


def bare_passes(images: list[np.ndarray], row: str) -> float:
    """Seconds of one process for estimating all images, batched as in extraction, loading not counted."""
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    estimator, batch = load(ROWS[row], "cpu"), ROWS[row].batch
    estimator(images[:1])
    begin = time.perf_counter()
    for start in range(0, len(images), batch):
        estimator(images[start : start + batch])
    return time.perf_counter() - begin


def against_the_limit(console: Console, folder: Path, count: int, workers: int) -> None:
    make_images(folder / "small", count, 256)
    paths = sorted((folder / "small").iterdir())
    decoded = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        parts = [decoded[i::workers] for i in range(workers)]
        bare = count / max(pool.map(bare_passes, parts, ["demo-net"] * workers))
    summary = extraction(folder / "small", folder / "demo", "demo", 256, workers)
    steady = count * workers / summary.stages["unit_s"]
    table = Table(title=f"set demo, {count} images at 256 px, {workers} workers")
    for column in ("", "images/s", "share of bare passes"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("bare forward passes", f"{bare:.2f}", "1.00")
    table.add_row("extraction, at work", f"{steady:.2f}", f"{steady / bare:.2f}")
    table.add_row(
        "extraction, start-up included", f"{count / summary.seconds:.2f}", f"{count / summary.seconds / bare:.2f}"
    )
    console.print(table)


def where_time_goes(console: Console, folder: Path, count: int, workers: int) -> None:
    make_images(folder / "large", count, 512)
    summary = extraction(folder / "large", folder / "null", "null", 512, workers)
    stages = dict(summary.stages)
    whole = stages.pop("unit_s")
    table = Table(title=f"null estimators, {count} images at 512 px, {workers} workers")
    for column in ("of a worker's time", "ms an image", "share"):
        table.add_column(column, justify="left" if column.startswith("of") else "right")
    for name, seconds in sorted(stages.items(), key=lambda stage: -stage[1]):
        table.add_row(name.removesuffix("_s"), f"{1000 * seconds / count:.1f}", f"{seconds / whole:.0%}")
    table.add_row("whole (stages overlap)", f"{1000 * whole / count:.1f}", "100%")
    console.print(table)
    console.print(f"{count / whole:.1f} samples/s per worker of one core each (goal: >= 30)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Extraction against the estimators' bare forward passes.")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        where_time_goes(console, Path(name), given.images, given.workers)
        against_the_limit(console, Path(name), given.images, given.workers)


if __name__ == "__main__":
    main()
