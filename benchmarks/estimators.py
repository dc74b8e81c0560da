"""Estimators by batch size: images a second at 1, 4 and 16 at a time, and how near that is to the bare forward passes.

    python -m benchmarks.estimators [--rows depth-anything-v2-small,lineart] [--device cuda] [--dtype bfloat16] [--size 512]

Rows run with their real weights where these are on this machine (python -m extract --fetch), else with the small random
networks of the tests, marked "tiny". The bare forward pass is the same network on images that are already on the device at
its resolution; of segment everything, the encoder and the decoder for all points. What is missing from its share is what
bringing images there costs, and choosing, bringing back and describing maps. Without --rows, each network of the table once.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skimage import data as photographs

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator, to_network
from extract.estimators.demo import DemoEstimator
from extract.estimators.sam import SamEstimator, SquareEncoder
from extract.estimators.table import ROWS, EstimatorRow, folder_of, load
from shards.core.errors import UserError
from tests.support.published_rows import LARGER, SAME, published_row

BATCHES = (1, 4, 16)
EACH_NETWORK = [name for name in ROWS if name not in {"null", *LARGER, *SAME}]


def prepared(name: str, folder: Path) -> tuple[EstimatorRow, str]:
    """The row, with its own weights ("real") or with a small checkpoint of the tests ("tiny")."""
    try:
        folder_of(ROWS[name])
        return ROWS[name], "real"
    except UserError:
        return published_row(name, folder / name), "tiny"


def seconds(work: Callable[[], object], device: str, least_s: float) -> float:
    """The shortest of several runs, at least `least_s` in all, the first not counted."""
    runs: list[float] = []
    while len(runs) < 3 or sum(runs) < least_s:
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        runs.append(time.perf_counter() - begin)
    return min(runs[1:])


def batched(estimator: Estimator) -> Estimator:
    """Lets an estimator work on its images together also on a CPU: what batches would bring there."""
    if isinstance(estimator, NetworkEstimator):
        estimator.alone = False
    if isinstance(estimator, SamEstimator):
        estimator.together = 0
    return estimator


# ---- the bare forward pass over images (H, W, 3) of one size ---------------------------------------------------------


def forward_pass(estimator: Estimator, images: list[np.ndarray]) -> Callable[[], object]:
    if isinstance(estimator, NetworkEstimator):
        return of_network(estimator, images)
    if isinstance(estimator, SamEstimator):
        return of_sam(estimator, images)
    assert isinstance(estimator, DemoEstimator)
    return of_demo(estimator, images)


def of_network(estimator: NetworkEstimator, images: list[np.ndarray]) -> Callable[[], object]:
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    prepare = estimator.prepare or to_network
    x = torch.stack([prepare(image, estimator.resolution(sizes[0]), estimator.device) for image in images])
    x = x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward() -> None:
        with torch.autocast(estimator.device.type, estimator.dtype, enabled=estimator.dtype != torch.float32):
            estimator.network.predict(x, sizes)

    return forward


@torch.inference_mode()
def of_sam(estimator: SamEstimator, images: list[np.ndarray]) -> Callable[[], object]:
    generator = estimator.generator
    encoder = generator.encoder
    assert isinstance(encoder, SquareEncoder)
    frames = [encoder.frame(image) for image in images]
    pixels = torch.cat([encoder.pixels(image, frame) for image, frame in zip(images, frames, strict=True)])

    @torch.inference_mode()
    def forward() -> None:
        for _ in generator.decoded(encoder.features(pixels), frames):
            pass

    return forward


def of_demo(estimator: DemoEstimator, images: list[np.ndarray]) -> Callable[[], object]:
    x = estimator.input(np.stack([estimator.shrink(image) for image in images]))

    @torch.inference_mode()
    def forward() -> None:
        with torch.autocast(x.device.type, estimator.dtype, enabled=estimator.dtype != torch.float32):
            estimator.net(x)

    return forward


# ---- the table -------------------------------------------------------------------------------------------------------


def measured(name: str, given: argparse.Namespace, folder: Path) -> list[str]:
    """A row of the table: images a second at each batch size, of the estimator and of the bare passes."""
    row, kind = prepared(name, folder)
    side = given.size or (96 if kind == "tiny" else 512)
    image = np.ascontiguousarray(photographs.astronaut()[:side, :side])
    estimator = batched(load(row, given.device, given.dtype))
    rates, bare = [], []
    for count in BATCHES:
        images = [image] * count
        rates.append(count / seconds(partial(estimator, images), given.device, given.seconds))
        bare.append(count / seconds(forward_pass(estimator, images), given.device, given.seconds))
    return [name, kind, *(f"{rate:.1f}" for rate in (*rates, *bare)), f"{max(rates) / max(bare):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(EACH_NETWORK), help="rows of the table, separated by commas")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=0, help="sides of the images (0: 512, for tiny networks 96)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each figure is measured, at least")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    table = Table(title=f"images a second, {given.device}, {given.dtype}", title_justify="left", box=None)
    columns = (*(f"{n} at a time" for n in BATCHES), *(f"bare, {n}" for n in BATCHES), "best / best bare")
    for column in ("row", "weights", *columns):
        table.add_column(column, justify="left" if column in ("row", "weights") else "right")
    for name in given.rows.split(","):
        with tempfile.TemporaryDirectory() as place:
            table.add_row(*measured(name, given, Path(place)))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
