"""Streams samples of a dataset in training order: range reads through the index, only the members asked for.

A Stream is map-style: `stream[position]`, for a torch DataLoader with `batch_sampler=Sampler(...)`; loader workers then
never change the order. Positions are those of shards.order; starting at any of them reads nothing of what lies before.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shards.dataset import Dataset
from shards.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS, IntrinsicMap, MapError
from shards.marks import shard_name
from shards.order import Mixture, Order, Place
from shards.sample import Sample, SampleError

READERS = 8
"""Range reads in flight for one batch."""


@dataclass(frozen=True)
class Item:
    """One decoded sample.

    image: uint8 (H, W, 3), or None if it was not asked for. maps: those asked for. skipped: the keys of corrupt samples
    that this position (and the following ones that stood in for it) should have given, with the reason.
    """

    key: str
    position: int
    image: np.ndarray | None
    caption: str
    maps: Mapping[str, IntrinsicMap]
    meta: Mapping[str, Any]
    skipped: tuple[str, ...] = ()


@dataclass
class Stream:
    """The endless stream of one dataset, or of a mixture.

    urls: datasets; weights: their shares (equal if None). images: whether to decode images. intrinsics: which maps.
    transform: applied to each Item, with a generator that depends on (seed, position) alone.
    A corrupt sample is skipped: the next position's sample stands in for it, and Item.skipped names it.
    """

    urls: Sequence[str]
    weights: Sequence[float] | None = None
    images: bool = True
    intrinsics: Sequence[str] = tuple(INTRINSICS)
    seed: int = 0
    window: int = 16
    shuffle: bool = True
    transform: Callable[[Item, np.random.Generator], Any] | None = None
    max_skips: int = 100
    _marks: OrderedDict = field(default_factory=OrderedDict, repr=False)
    _threads: tuple[int, ThreadPoolExecutor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.urls:
            raise UsageError("name at least one dataset to stream")
        self.datasets = [Dataset.open(url) for url in self.urls]
        for dataset in self.datasets:
            if not dataset.complete:
                raise UserError(
                    f"{dataset.folder.url} is unfinished; run its `python -m extract` command to the end first"
                )
            lacking = {INTRINSICS[name].member for name in self.intrinsics} - set(dataset.members)
            if lacking:
                raise UserError(
                    f"{dataset.folder.url} has no {', '.join(sorted(lacking))}; extract them with --only first"
                )
        self.orders = [
            Order(_counts(dataset), seed=self.seed + i, window=self.window, shuffle=self.shuffle)
            for i, dataset in enumerate(self.datasets)
        ]
        self.mixture = Mixture(self.weights or [order.size for order in self.orders])

    def __len__(self) -> int:
        """The samples of all datasets together: an epoch, if the weights follow the sizes."""
        return sum(order.size for order in self.orders)

    def __getstate__(self) -> dict[str, Any]:  # loader workers begin with an empty cache and threads of their own
        return self.__dict__ | {"_marks": OrderedDict(), "_threads": None}

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """This process's threads: a forked loader worker must not wait for those of its parent."""
        if self._threads is None or self._threads[0] != os.getpid():
            self._threads = os.getpid(), ThreadPoolExecutor(READERS, "stream")
        return self._threads[1]

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """The items of one batch, read at once and decoded side by side; a DataLoader calls this."""
        return list(self._pool.map(self._item, positions))

    def key(self, position: int) -> str:
        """The key at a position, by the index alone."""
        dataset, place = self._place(position)
        return self._keys(dataset, place.shard)[1][place.row]

    def _place(self, position: int) -> tuple[int, Place]:
        dataset, own = self.mixture.place(position)
        return dataset, self.orders[dataset].place(own)

    def _keys(self, dataset: int, shard: int) -> tuple[dict[str, Any], list[str]]:
        """A shard's mark and its keys, kept for as many shards as two windows hold."""
        name = (dataset, shard)
        if name not in self._marks:
            mark = self.datasets[dataset].mark(shard_name(shard))
            self._marks[name] = mark, sorted(mark["index"])
            while len(self._marks) > 2 * self.window * len(self.urls):
                self._marks.popitem(last=False)
        return self._marks[name]

    def _item(self, position: int) -> Any:
        skipped: list[str] = []
        for candidate in range(position, position + self.max_skips):
            dataset, place = self._place(candidate)
            mark, keys = self._keys(dataset, place.shard)
            key = keys[place.row]
            try:
                sample = self.datasets[dataset].read_at(mark, key, self._members(dataset))
                item = self._decode(sample, position, tuple(skipped))
            except (SampleError, MapError) as error:
                skipped.append(f"{self.urls[dataset]}/{shard_name(place.shard)}.tar {key}: {error}")
                continue
            return (
                item if self.transform is None else self.transform(item, np.random.default_rng([self.seed, position]))
            )
        raise UserError(f"{self.max_skips} samples in a row are corrupt, beginning with {skipped[0]}")

    def _members(self, dataset: int) -> list[str]:
        wanted = {"txt", "json", *(INTRINSICS[name].member for name in self.intrinsics)}
        if self.images:
            wanted.add(self.datasets[dataset].info["image"])
        return [name for name in self.datasets[dataset].members if name in wanted]

    def _decode(self, sample: Sample, position: int, skipped: tuple[str, ...]) -> Item:
        image = sample.image() if self.images else None
        meta = sample.meta
        described = meta.get("intrinsics", {})
        maps = {}
        for name in self.intrinsics:
            row = INTRINSICS[name]
            maps[name] = row.decode(sample.members[row.member], described.get(name) or {})
        return Item(sample.key, position, image, sample.caption, maps, meta, skipped)


def _counts(dataset: Dataset) -> list[int]:
    """Samples in each shard, by number: from dataset.json, so that no mark has to be read."""
    counts = dataset.info["totals"].get("shards")
    if not isinstance(counts, list):
        raise UserError(
            f"{dataset.folder.address('dataset.json')} lists no counts of its shards; extract the dataset again"
        )
    return counts
