"""One dataset as a stream sees it: which of its samples take part, in which bucket, and in which order."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from shards.core.errors import UserError
from shards.dataset import Dataset
from shards.stream.buckets import BucketOrder, Shape, merged
from shards.stream.order import Order, Place
from shards.stream.select import DROPPED, Selection, select, shard_counts


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to stream of a dataset, and how.

    where: conditions of shards.stream.select on the samples' json, all of which must hold.
    buckets: sizes (height, width); each sample gets the one of the nearest aspect ratio. chunk: how many consecutive
    positions have the same bucket (without buckets: 1).
    keep: a folder where the answers to both are kept from run to run; None: every sample's json is read at the start.
    """

    where: tuple[str, ...] = ()
    buckets: tuple[Shape, ...] = ()
    chunk: int = 1
    keep: str | None = None
    seed: int = 0
    window: int = 16
    shuffle: bool = True


class View:
    """The order of one dataset's samples, as positions of an endless stream. Reads no sample once it is made.

    moved: samples of buckets smaller than a chunk that are in another bucket now. left_out: those for which none was near.
    """

    def __init__(self, dataset: Dataset, choice: Choice) -> None:
        self.selection: Selection | None = None
        counts: Sequence[Sequence[int]] | np.ndarray = [shard_counts(dataset)]
        if choice.where or choice.buckets:
            self.selection = select(dataset, choice.where, choice.buckets, keep=choice.keep)
            counts = self.selection.counts(max(1, len(choice.buckets)))
        self.moved = self.left_out = 0
        if choice.buckets and self.selection is not None:
            self._merge_small(choice, counts)
            counts = self.selection.counts(len(choice.buckets))
        if not np.sum(counts) and choice.where:
            raise UserError(
                f"no sample of {dataset.folder.url} passes {' and '.join(choice.where)}: "
                + _listed(self.selection.dropped if self.selection else {})
            )
        options: dict[str, Any] = {"seed": choice.seed, "window": choice.window, "shuffle": choice.shuffle}
        self._orders = {bucket: Order(own, **options) for bucket, own in enumerate(counts) if np.sum(own)}
        self.size = sum(order.size for order in self._orders.values())
        self._buckets: BucketOrder | None = None
        if choice.buckets:
            sizes = [int(np.sum(own)) for own in counts]
            self._buckets = BucketOrder(sizes, chunk=choice.chunk, seed=choice.seed, shuffle=choice.shuffle)
            self.size, self.left_out = self._buckets.size, self._buckets.left_out
        self._rows = lru_cache(maxsize=4 * choice.window)(self._rows)  # type: ignore[method-assign]

    def _merge_small(self, choice: Choice, counts: Sequence[Sequence[int]] | np.ndarray) -> None:
        """Gives the samples of buckets that are smaller than a chunk to buckets of like sizes."""
        assert self.selection is not None
        sizes = [int(np.sum(own)) for own in counts]
        target = merged(choice.buckets, sizes, choice.chunk)
        self.moved = sum(size for bucket, size in enumerate(sizes) if target[bucket] != bucket)
        if self.moved:
            table = np.arange(DROPPED + 1, dtype=np.uint8)
            table[: len(target)] = target
            self.selection = dataclasses.replace(self.selection, groups=table[self.selection.groups])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._rows = lru_cache(maxsize=64)(self._rows)  # type: ignore[method-assign]

    def place(self, position: int) -> tuple[int, Place]:
        """The bucket (0 without buckets) and the sample at a position."""
        bucket = 0
        if self._buckets is not None:
            share = self._buckets.place(position)
            bucket, position = share.bucket, share.position
        place = self._orders[bucket].place(position)
        if self.selection is not None:
            place = Place(place.shard, int(self._rows(place.shard, bucket)[place.row]))
        return bucket, place

    def _rows(self, shard: int, bucket: int) -> np.ndarray:
        assert self.selection is not None
        return self.selection.rows(shard, bucket)


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it has none"
