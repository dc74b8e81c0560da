"""Scaling: many workers with estimators that only sleep, so that what is seen is the machinery and not the cores.

    python -m benchmarks.scaling [--workers 16 64] [--units 4] [--images 20] [--image-s 1.0]
    python -m benchmarks.scaling --workers 4 --units 1000 --images 1 --image-s 0      (the driver's cost of a unit)

The same driver, workers, shards and commits as in an extraction; each worker makes `units` shards of `images` small images,
of which each takes `image-s` seconds of sleep. Efficiency is the sleep divided by the workers' time, from the moment when
every worker has made one shard. The driver's CPU time and memory are those of this process, Ray's threads included.

All workers share this machine's cores. What is no sleep (encoding, commits, Ray) takes about 4 ms a small image, so that 64
workers of one image a second need a quarter of a core; with much shorter sleeps the cores are measured, not the machinery.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from extract.estimators import Estimator, null
from extract.estimators.table import EstimatorRow, Task, fingerprint
from extract.images.prepare import ImageRules
from extract.run.make_shard import UnitWork
from extract.run.worker import Outcome, WorkerSetup
from extract.sources import Failure, RawSample, Unit
from shards.intrinsics import INTRINSICS, IntrinsicMap
from shards.marks import digest
from shards.sample import member_names

RULES = ImageRules(format="png", size_px=None)


@dataclass(frozen=True)
class Greys:
    """`count` plain grey images of 32 x 32 pixels."""

    count: int

    def describe(self) -> dict[str, Any]:
        return {"kind": "greys", "count": self.count}

    def total(self) -> int | None:
        return self.count

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        for index, first in enumerate(range(0, self.count, shard_size)):
            yield Unit(index, [first, min(first + shard_size, self.count)])

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        for number in range(*unit.items):
            yield RawSample(f"g{number:08d}", np.full((32, 32, 3), number % 256, np.uint8), f"number {number}", {})


def load_sleeping(*, device: str, dtype: str, weights: Path | None, image_s: float) -> Estimator:
    """An estimator that sleeps for each image, and makes empty maps."""

    def estimate(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        time.sleep(len(images) * image_s)
        return null.estimate(images)

    return estimate


def sleeping(image_s: float) -> Task:
    """The estimator's row. Not one of the table's: nobody needs it but these benchmarks."""
    row = EstimatorRow(
        name="sleeping",
        yields=tuple(INTRINSICS),
        what="sleeps",
        licence="Apache-2.0",
        load="benchmarks.scaling:load_sleeping",
        settings={"image_s": image_s},
        batch=4,
    )
    return Task(row, tuple(INTRINSICS))


# ---- the driver --------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Listens to the driver: its memory after a third of the units, and after all."""

    units: int
    done: int = 0
    memory: list[tuple[int, int]] = field(default_factory=list)  # units done, bytes

    def finished(self, unit: Unit, outcome: Outcome) -> None:
        self.done += 1
        if self.done in (self.units // 3, self.units):
            gc.collect()
            self.memory.append((self.done, resident_bytes()))

    def working(self, done: int, failed: int) -> None:
        pass

    def say(self, sentence: str) -> None:
        print(sentence)


def resident_bytes() -> int:
    """The memory of this process that is its own (not shared libraries, not Ray's object store)."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def measure(workers: int, units: int, images: int, image_s: float) -> dict[str, float]:
    """Runs workers x units units; what it took."""
    import ray

    from extract.workers import cluster

    task, count = sleeping(image_s), workers * units
    source = Greys((workers + count) * images)
    members = tuple(member_names(RULES.format, tuple(INTRINSICS)))
    work = UnitWork(source=source, image=RULES, members=members, threads=1, window=4)
    ids = dict.fromkeys(INTRINSICS, fingerprint(task.row)["id"])
    ray.init(
        address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20
    )
    try:
        with tempfile.TemporaryDirectory() as out:
            setup = WorkerSetup(out=out, work=work, tasks=(task,), device="cpu", dtype="float32")
            pool = cluster.Pool(setup, workers, cpus=1, gpus=0)
            while pool.idle < workers:
                pool.start(workers)
                pool.wait(1.0)
            jobs = (
                cluster.Job(unit, {"unit": digest({"items": unit.items}), "estimators": ids})
                for unit in source.units(images)
            )
            cluster.Dispatcher(pool, islice(jobs, workers - 1), Watch(workers)).work(next(jobs))
            watch = Watch(count)
            begin, cpu = time.monotonic(), time.process_time()
            cluster.Dispatcher(pool, jobs, watch).work(next(jobs))
            seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    finally:
        ray.shutdown()
    (before, low), (after, high) = watch.memory
    return {
        "workers": workers,
        "units": count,
        "seconds": seconds,
        "efficiency": units * images * image_s / seconds,
        "cpu_ms": cpu / count * 1e3,
        "bytes": (high - low) / (after - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--units", type=int, default=4, help="of each worker")
    parser.add_argument("--images", type=int, default=20, help="of each unit")
    parser.add_argument("--image-s", type=float, default=1.0, help="seconds of sleep for each")
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    title = f"{options.units} units of {options.images} images of {options.image_s:g} s for each worker, {os.cpu_count()} cores"
    table = Table(
        "workers", "units", "s", "efficiency", "driver's CPU, ms/unit", "driver's memory, bytes/unit", title=title
    )
    for workers in options.workers:
        found = measure(workers, options.units, options.images, options.image_s)
        table.add_row(
            *(f"{found[name]:.0f}" for name in ("workers", "units", "seconds")),
            *(f"{found['efficiency']:.3f}", f"{found['cpu_ms']:.2f}", f"{found['bytes']:.0f}"),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
