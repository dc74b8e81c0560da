"""The order in which training sees samples: a pure function of seed, epoch and position, so that resuming is arithmetic.

An epoch permutes the shards, cuts them into windows of a few shards, and permutes the samples inside each window: well
mixed, while only a window's shards are ever needed at once. Positions run on over the epochs' ends without a gap, so
every rank always has an equal count, and nothing is dropped or repeated: position P of a stream of N samples is sample
P mod N of epoch P // N.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from shards.core.errors import UsageError, UserError


@dataclass(frozen=True)
class Place:
    """Where a position leads: the shard's number and the row in it (rows are numbered in the order of the sorted keys)."""

    shard: int
    row: int


class Order:
    """The order of one dataset.

    counts: samples in each shard. seed: any integer. window: how many shards are mixed. shuffle=False keeps the
    dataset's own order in every epoch.
    """

    def __init__(self, counts: Sequence[int], *, seed: int = 0, window: int = 16, shuffle: bool = True) -> None:
        if window < 1:
            raise UsageError(f"window = {window}; at least one shard must be in it")
        self.counts = np.asarray(counts, np.int64)
        self.size = int(self.counts.sum())
        self.seed, self.window, self.shuffle = seed, window, shuffle
        if not self.size:
            raise UserError("there is no sample to stream: every shard is empty")
        self._epoch = lru_cache(maxsize=2)(self._epoch)  # type: ignore[method-assign]
        self._permutation = lru_cache(maxsize=3)(self._permutation)  # type: ignore[method-assign]

    def __reduce__(self) -> tuple[Any, ...]:  # a copy in another process begins with empty caches
        return partial(Order, seed=self.seed, window=self.window, shuffle=self.shuffle), (self.counts,)

    def place(self, position: int) -> Place:
        """The sample at a position of the endless stream; constant time but for the first visit of a window."""
        epoch, index = divmod(position, self.size)
        shards, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts[:: self.window], index, side="right")) - 1
        first = window * self.window
        within = self._permutation(epoch, window)[index - starts[first]]
        slot = int(np.searchsorted(starts[first : first + self.window], within + starts[first], side="right")) - 1
        return Place(int(shards[first + slot]), int(within + starts[first] - starts[first + slot]))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, without empty ones, and the index at which each begins.

        Where a shard comes depends on no count: orders of several buckets of a dataset need the same shards at a time.
        """
        shards = np.arange(len(self.counts))
        if self.shuffle:
            shards = np.random.default_rng([self.seed, epoch]).permutation(shards)
        shards = shards[self.counts[shards] > 0]
        return shards, np.concatenate([[0], np.cumsum(self.counts[shards])[:-1]])

    def _permutation(self, epoch: int, window: int) -> np.ndarray:
        """The order of the samples inside a window."""
        shards, _ = self._epoch(epoch)
        size = int(self.counts[shards[window * self.window : (window + 1) * self.window]].sum())
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng([self.seed, epoch, window]).permutation(size)


class Mixture:
    """Interleaves datasets by weight. Each runs through its own epochs; the pattern repeats every PERIOD positions.

    weights: one positive number for each dataset; shares are exact to 1 / PERIOD.
    """

    PERIOD = 1000

    def __init__(self, weights: Sequence[float]) -> None:
        w = np.asarray(weights, np.float64)
        if not len(w) or not (w > 0).all():
            raise UsageError(f"weights {list(weights)} must be positive, one for each dataset")
        w = w / w.sum()
        taken, pattern = np.zeros(len(w)), []
        for step in range(1, self.PERIOD + 1):  # always the dataset that lags most behind its share
            chosen = int((w * step - taken).argmax())
            taken[chosen] += 1
            pattern.append(chosen)
        if not taken.all():
            raise UsageError(f"weights {list(weights)}: the smallest share is below 1 in {self.PERIOD}")
        self._pattern = np.array(pattern)
        self._before = np.stack([np.cumsum(self._pattern == i) - (self._pattern == i) for i in range(len(w))])
        self._per_period = taken.astype(np.int64)

    def place(self, position: int) -> tuple[int, int]:
        """(dataset, position in that dataset's own stream) for a position of the mixed stream."""
        period, step = divmod(position, self.PERIOD)
        dataset = int(self._pattern[step])
        return dataset, int(period * self._per_period[dataset] + self._before[dataset, step])


@dataclass
class Sampler:
    """The batches of positions of one rank, for a DataLoader's `batch_sampler`; endless, or `samples` in all.

    A global batch is world x batch consecutive positions; rank r takes every world-th of them, beginning with r. So the
    positions of all ranks together are the same whatever the number of ranks, if world x batch stays the same.

    consumed: positions that all ranks together have trained on. It moves on only when `advance` is called, after a
    step: batches that a loader fetched ahead do not count. state_dict / load_state_dict carry it.
    """

    batch: int
    rank: int = 0
    world: int = 1
    consumed: int = 0
    samples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world or self.batch < 1:
            raise UsageError(f"rank {self.rank} of {self.world} with batches of {self.batch} is impossible")

    def __iter__(self) -> "Batches":
        return Batches(self)

    def advance(self, steps: int = 1) -> None:
        """Counts `steps` global batches as trained on."""
        self.consumed += steps * self.batch * self.world

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = int(state["consumed"])


class Batches(Iterator[list[int]]):
    """The batches of a sampler from its `consumed` on. Knows how far it was read itself, as torchdata's loader wants it."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler, self._start = sampler, sampler.consumed

    def __next__(self) -> list[int]:
        sampler, start = self._sampler, self._start
        stop = start + sampler.batch * sampler.world
        self._start = stop
        if sampler.samples is not None:
            stop = min(stop, sampler.samples)
        if positions := list(range(start + sampler.rank, stop, sampler.world)):
            return positions
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = int(state["consumed"])
