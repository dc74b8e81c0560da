"""Aspect-ratio buckets: the sizes that images are trained at, and an order in which batches hold one size each.

Positions come in chunks of consecutive ones, and a chunk holds samples of one bucket. Every bucket runs through its own
samples again and again without a gap, so between two visits of a sample lies exactly one pass of its bucket. An epoch
hands out, of each bucket, all whole chunks; what is left of a bucket, less than a chunk, begins its share of the next
epoch. Nothing is dropped and nothing repeated, and where a position leads is a pure function of (seed, position).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from shards.core.errors import UsageError, UserError

Shape = tuple[int, int]
"""(height, width) in pixels."""


def bucket_shapes(size_px: int, *, step_px: int = 64, max_aspect: float = 2.0) -> tuple[Shape, ...]:
    """The sizes with about size_px x size_px pixels, never more, whose sides are multiples of step_px.

    For each height the widest width that fits, as long as longer side / shorter side <= max_aspect; from wide to tall.
    """
    if size_px < step_px or step_px < 1 or max_aspect < 1:
        raise UsageError(f"there are no buckets of {size_px} px in steps of {step_px} px up to aspect {max_aspect}")
    shapes, area = set[Shape](), size_px * size_px
    for side in range(step_px, int(size_px * math.sqrt(max_aspect)) + step_px, step_px):
        other = area // side // step_px * step_px
        if other and max(side, other) <= max_aspect * min(side, other):
            shapes |= {(side, other), (other, side)}
    return tuple(sorted(shapes or {(size_px // step_px * step_px,) * 2}))


def nearest_bucket(shapes: Sequence[Shape], width: int, height: int) -> int:
    """The number of the bucket whose aspect ratio is nearest to the image's: the one that crops least."""
    wanted = math.log(width / height)
    return min(range(len(shapes)), key=lambda i: (abs(math.log(shapes[i][1] / shapes[i][0]) - wanted), i))


@dataclass(frozen=True)
class Share:
    """Where a position of the whole leads: a bucket, and the position in the bucket's own endless stream."""

    bucket: int
    position: int


class BucketOrder:
    """Interleaves buckets chunk by chunk.

    sizes: samples in each bucket. chunk: how many consecutive positions are of one bucket; a multiple of the global
    batch (batch x ranks), so that every batch lies in one chunk. shuffle=False hands the buckets out one after another.
    """

    def __init__(self, sizes: Sequence[int], *, chunk: int, seed: int = 0, shuffle: bool = True) -> None:
        if chunk < 1:
            raise UsageError(f"chunk = {chunk}; it must be at least 1")
        self.sizes, self.chunk, self.seed, self.shuffle = [int(size) for size in sizes], chunk, seed, shuffle
        self.size = sum(self.sizes)
        if not self.size:
            raise UserError("there is no sample to stream: every bucket is empty")
        self._epoch = lru_cache(maxsize=2)(self._epoch)  # type: ignore[method-assign]

    def __reduce__(self) -> tuple[Any, ...]:  # a copy in another process begins with an empty cache
        return partial(BucketOrder, chunk=self.chunk, seed=self.seed, shuffle=self.shuffle), (self.sizes,)

    def place(self, position: int) -> Share:
        """The bucket of a position and the place in it; constant time but for the first visit of an epoch."""
        chunk, offset = divmod(position, self.chunk)
        epoch = position // self.size  # of whole chunks there are a few less: the epoch is this one or a later one
        while self._first(epoch + 1) <= chunk:
            epoch += 1
        buckets, ranks = self._epoch(epoch)
        index = chunk - self._first(epoch)
        bucket = int(buckets[index])
        own = self._before(bucket, epoch) + int(ranks[index])
        return Share(bucket, own * self.chunk + offset)

    def _before(self, bucket: int, epoch: int) -> int:
        """The whole chunks of a bucket in all epochs before this one."""
        return epoch * self.sizes[bucket] // self.chunk

    def _first(self, epoch: int) -> int:
        """The first chunk of an epoch."""
        return sum(self._before(bucket, epoch) for bucket in range(len(self.sizes)))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each of the epoch's chunks, and how many chunks of that bucket come before it in the epoch."""
        counts = [self._before(b, epoch + 1) - self._before(b, epoch) for b in range(len(self.sizes))]
        buckets = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch, 1]).shuffle(buckets)
        ranks = np.empty(len(buckets), np.int64)
        for bucket in range(len(counts)):
            mine = buckets == bucket
            ranks[mine] = np.arange(int(mine.sum()))
        return buckets, ranks
