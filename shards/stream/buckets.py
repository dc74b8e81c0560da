"""Aspect-ratio buckets: the sizes that images are trained at, and an order in which batches hold one size each.

Positions come in chunks of consecutive ones, and a chunk holds samples of one bucket. Every bucket runs through its own
samples again and again without a gap, so between two visits of a sample lies exactly one pass of its bucket. An epoch
hands out, of each bucket, all whole chunks; what is left of a bucket, less than a chunk, begins its share of the next
epoch. Nothing is dropped and nothing repeated, and where a position leads is a pure function of (seed, position).

A bucket with fewer samples than a chunk would repeat each of them many times in a batch. Its samples go to a bucket of a like
size (`merged`); what has none is left out, and counted.
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


MOST_CROPPED = 2.0
"""By how much the aspect ratio of a small bucket may differ from that of the bucket which takes its samples: at 2 half of
such an image is cropped away."""


def merged(shapes: Sequence[Shape], sizes: Sequence[int], chunk: int) -> list[int]:
    """For each bucket the one that takes its samples: itself, or of a bucket smaller than a chunk the nearest.

    The longest images go first, for they have the fewest to go to; several small ones may make one that is large enough. A
    bucket stays small if none of the others is within MOST_CROPPED of it.
    """
    ratios = [math.log(width / height) for height, width in shapes]
    counts, members = [int(size) for size in sizes], [[bucket] for bucket in range(len(shapes))]

    def takers(small: int) -> list[int]:
        """The buckets that may take a small one with all that it has taken itself."""
        others = [other for other, count in enumerate(counts) if count and other != small]
        far = math.log(MOST_CROPPED) + 1e-9
        return [o for o in others if all(abs(ratios[m] - ratios[o]) <= far for m in members[small])]

    while True:
        small = [bucket for bucket, count in enumerate(counts) if 0 < count < chunk]
        small.sort(key=lambda bucket: (-round(abs(ratios[bucket]), 6), counts[bucket], bucket))
        pair = next(((bucket, near) for bucket in small if (near := takers(bucket))), None)
        if pair is None:
            break
        bucket, near = pair
        distance = {other: round(abs(ratios[other] - ratios[bucket]), 6) for other in near}
        into = min(near, key=lambda other: (distance[other], counts[other] >= chunk, -counts[other], other))
        counts[into], counts[bucket] = counts[into] + counts[bucket], 0
        members[into], members[bucket] = members[into] + members[bucket], []

    return [next(into for into, own in enumerate(members) if bucket in own) for bucket in range(len(shapes))]


@dataclass(frozen=True)
class BucketShare:
    """Where a position of the whole leads: a bucket, and the position in the bucket's own endless stream."""

    bucket: int
    position: int


class BucketOrder:
    """Interleaves buckets chunk by chunk.

    sizes: samples in each bucket. chunk: how many consecutive positions are of one bucket; a multiple of the global
    batch (batch x ranks), so that every batch lies in one chunk. shuffle=False hands the buckets out one after another.
    Buckets smaller than a chunk are left out (left_out: how many samples); of small ones only, the largest stays.
    """

    def __init__(self, sizes: Sequence[int], *, chunk: int, seed: int = 0, shuffle: bool = True) -> None:
        if chunk < 1:
            raise UsageError(f"chunk = {chunk}; it must be at least 1")
        given = [int(size) for size in sizes]
        smallest = min(chunk, max(given, default=0))
        largest = given.index(smallest) if smallest < chunk and given else -1
        self.sizes = [size if size >= chunk or bucket == largest else 0 for bucket, size in enumerate(given)]
        self.chunk, self.seed, self.shuffle = chunk, seed, shuffle
        self.size = sum(self.sizes)
        self.left_out = sum(given) - self.size
        if not self.size:
            raise UserError("there is no sample to stream: every bucket is empty")
        self._epoch = lru_cache(maxsize=2)(self._epoch)  # type: ignore[method-assign]

    def __reduce__(self) -> tuple[Any, ...]:  # a copy in another process begins with an empty cache
        return partial(BucketOrder, chunk=self.chunk, seed=self.seed, shuffle=self.shuffle), (self.sizes,)

    def place(self, position: int) -> BucketShare:
        """The bucket of a position and the place in it; constant time but for the first visit of an epoch."""
        chunk, offset = divmod(position, self.chunk)
        epoch = position // self.size  # of whole chunks there are a few less: the epoch is this one or a later one
        while self._first(epoch + 1) <= chunk:
            epoch += 1
        buckets, ranks = self._epoch(epoch)
        index = chunk - self._first(epoch)
        bucket = int(buckets[index])
        own = self._before(bucket, epoch) + int(ranks[index])
        return BucketShare(bucket, own * self.chunk + offset)

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
