"""Estimators by batch size: images a second at 1, 4 and 16 at a time, and how near that is to the bare forward passes.

    python -m benchmarks.estimators [--rows depth-anything-v2-small,lineart] [--device cuda] [--dtype bfloat16] [--size 512]

Rows run with their real weights where these are on this machine (python -m extract --fetch), else with the small random
networks of the tests, marked "tiny". The bare forward pass is the same network on images that are already on the device at
its resolution; its share says what bringing images there and maps back costs.
"""

import argparse
import dataclasses
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

from extract.estimators.batching import NetworkEstimator, to_network
from extract.estimators.table import ROWS, Row, folder_of, load
from shards.errors import UserError
from tests.tiny_estimators import ROWS as TINY

BATCHES = (1, 4, 16)


def prepared(name: str, folder: Path) -> tuple[Row, str]:
    """The row, with its own weights ("real") or with a small checkpoint of the tests ("tiny")."""
    row = ROWS[name]
    try:
        folder_of(row)
        return row, "real"
    except UserError:
        write, settings = TINY[name]
        write(folder / name)
        return dataclasses.replace(row, weights=folder / name, settings={**row.settings, **settings}), "tiny"


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


def forward_pass(estimator: NetworkEstimator, images: list[np.ndarray]) -> Callable[[], object]:
    """The bare forward pass over images of one size."""
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    prepare = estimator.prepare or to_network
    x = torch.stack([prepare(image, estimator.resolution(sizes[0]), estimator.device) for image in images])
    x = x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward() -> None:
        with torch.autocast(estimator.device.type, estimator.dtype, enabled=estimator.dtype != torch.float32):
            estimator.network.predict(x, sizes)

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(TINY), help="rows of the table, separated by commas")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=0, help="sides of the images (0: 512, for tiny networks 96)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each figure is measured, at least")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    table = Table(title=f"images a second, {given.device}, {given.dtype}", title_justify="left", box=None)
    for column in ("row", "weights", *(f"{n} at a time" for n in BATCHES), f"bare, {BATCHES[-1]}", "share of bare"):
        table.add_column(column, justify="left" if column in ("row", "weights") else "right")
    with tempfile.TemporaryDirectory() as place:
        for name in given.rows.split(","):
            row, kind = prepared(name, Path(place))
            side = given.size or (96 if kind == "tiny" else 512)
            image = np.ascontiguousarray(np.resize(photographs.astronaut(), (512, 512, 3))[:side, :side])
            estimator = load(row, given.device, given.dtype)
            assert isinstance(estimator, NetworkEstimator), f"{name} is measured by a benchmark of its own"
            estimator.alone = False  # also on a CPU: what batches would bring there
            rates = [n / seconds(partial(estimator, [image] * n), given.device, given.seconds) for n in BATCHES]
            forward = forward_pass(estimator, [image] * BATCHES[-1])
            limit = BATCHES[-1] / seconds(forward, given.device, given.seconds)
            table.add_row(name, kind, *(f"{rate:.1f}" for rate in rates), f"{limit:.1f}", f"{max(rates) / limit:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
