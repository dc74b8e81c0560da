"""What a step of stage 2 costs the training process before the network runs: finding its samples, and drawing for them.

    python -m train scenes --named --out runs/few --count 2000
    python -m benchmarks.draws runs/few [--batch 256] [--workers 2]

A GPU that learns from latents which it keeps has nothing else to wait for. Rows: as `train lora` does it with what was read
ahead (loader processes draw), and with everything drawn in the training process itself. CPU time is that of the training
process's main thread, which is what the GPU waits for; wall time is that of batches nobody learns from.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from shards.stream.order import Sampler
from train.config import load_train_config
from train.data import Batch, Draw, Samples
from train.lora import draw

WARM_UP, BATCHES = 10, 60
LATENT = 16, 8, 8  # of the embedded base


def in_this_process(samples: Samples, sampler: Sampler, drawing: Draw) -> Iterator[Batch]:
    for positions in sampler:
        yield Batch(samples.__getitems__(positions), drawing(positions))


def measured(batches: Iterator[Batch]) -> tuple[float, float]:
    """(CPU time of this thread, wall time) of a batch, in ms."""
    for _ in range(WARM_UP):
        next(batches)
    cpu, wall = time.thread_time(), time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    return (time.thread_time() - cpu) / BATCHES * 1e3, (time.perf_counter() - wall) / BATCHES * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shards")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = [f"data.workers={given.workers}", "lora.independent_timesteps=0.5"]
    config = load_train_config("demo", base="demo", shards=[given.shards], out="none", start="", settings=settings)
    samples = Samples(config.shards, config.data, config.seed)
    samples.read_ahead(lambda batch: None)
    drawing = partial(draw, config=config.lora, seed=config.seed, shape=LATENT, levels=1000)
    sampler = Sampler(batch=given.batch)
    table = Table(title=f"before a step of {given.batch} samples")
    for column in ("drawn by", "main thread's CPU, ms", "wall, ms"):
        table.add_column(column, justify="right")
    ways = {
        f"{given.workers} loader processes": samples.batches(sampler, drawing),
        "the training process": in_this_process(samples, sampler, drawing),
    }
    for name, batches in ways.items():
        table.add_row(name, *(f"{value:.1f}" for value in measured(iter(batches))))
    Console().print(table)


if __name__ == "__main__":
    main()
