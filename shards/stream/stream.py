"""Streams samples of a dataset in training order: range reads through the index, only the members asked for.

A Stream is map-style: `stream[position]`, for a torch DataLoader with `batch_sampler=Sampler(...)`; loader workers then
never change the order. Positions are those of shards.stream.order; starting at any of them reads nothing of what lies before.
"""

import contextlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from shards.core.cores import cores
from shards.core.errors import StoreAway, UsageError, UserError
from shards.dataset import Dataset
from shards.intrinsics import INTRINSICS, Empty, IntrinsicMap, MapError
from shards.marks import shard_name
from shards.sample import Sample
from shards.stream.buckets import Shape
from shards.stream.local_cache import LocalCache
from shards.stream.order import Mixture, Place
from shards.stream.patience import loader_worker
from shards.stream.reader import MemberReader
from shards.stream.view import Choice, View

READERS = 16
"""Range reads of an object store in flight at once, in one process."""
MAX_DECODERS = 4


@dataclass(frozen=True)
class Item:
    """One decoded sample.

    image: uint8 (H, W, 3), or None if it was not asked for. maps: those asked for. shape: (height, width) of its bucket,
    None without buckets. extras: further members that were asked for, as they are. skipped: the keys of corrupt samples
    that this position (and the following ones that stood in for it) should have given, with the reason.
    """

    key: str
    position: int
    image: np.ndarray | None
    caption: str
    maps: Mapping[str, IntrinsicMap]
    meta: Mapping[str, Any]
    skipped: tuple[str, ...] = ()
    shape: Shape | None = None
    extras: Mapping[str, bytes] = field(default_factory=dict)


@dataclass
class Stream:
    """The endless stream of one dataset, or of a mixture.

    urls: datasets; weights: their shares (by their sizes if None). images: whether to decode images. intrinsics: which maps.
    extras: further members to hand out undecoded. transform: applied to each Item, with a generator that depends on (seed,
    position) alone. where, keep: which samples take part (shards.stream.select). buckets: sizes (height, width) to sort images
    by; then `chunk` consecutive positions share a bucket, and the global batch (batch x ranks) must divide it.
    cache: keeps what is fetched from an object store on a local disk. wait_s: how long a store, or a network disk, that
    cannot be reached is waited for; then StoreAway is raised.
    A sample that is corrupt, or whose file is missing, is skipped: the next position's sample stands in for it, and
    Item.skipped names it. (With buckets: the next one of its chunk.)
    """

    urls: Sequence[str]
    weights: Sequence[float] | None = None
    images: bool = True
    intrinsics: Sequence[str] = tuple(INTRINSICS)
    extras: Sequence[str] = ()
    seed: int = 0
    window: int = 16
    shuffle: bool = True
    transform: Callable[[Item, np.random.Generator], Any] | None = None
    max_skips: int = 100
    where: Sequence[str] = ()
    buckets: Sequence[Shape] = ()
    chunk: int = 64
    keep: str | None = None
    cache: LocalCache | None = None
    wait_s: float = 600.0
    _process: "_Process | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.urls:
            raise UsageError("name at least one dataset to stream")
        self.datasets = [Dataset.open(url) for url in self.urls]
        wanted = {INTRINSICS[name].member for name in self.intrinsics} | set(self.extras)
        for dataset in self.datasets:
            if not dataset.complete:
                raise UserError(
                    f"{dataset.folder.url} is unfinished; run its `python -m extract` command to the end first"
                )
            if lacking := wanted - set(dataset.members):
                raise UserError(
                    f"{dataset.folder.url} has no {', '.join(sorted(lacking))}; extract them with --only first"
                    + (" (caches: `python -m train cache`)" if lacking & set(self.extras) else "")
                )
        if not self.buckets:
            self.chunk = 1
        self.views = [View(dataset, self._choice(i)) for i, dataset in enumerate(self.datasets)]
        self.mixture = Mixture(self.weights or [view.size for view in self.views])
        for dataset, view in zip(self.datasets, self.views, strict=True):
            if view.moved or view.left_out:
                warnings.warn(_about_small_buckets(dataset.folder.url, self.chunk, view), stacklevel=2)

    def _choice(self, dataset: int) -> Choice:
        return Choice(
            where=tuple(self.where),
            buckets=tuple(self.buckets),
            chunk=self.chunk,
            keep=self.keep,
            seed=self.seed + dataset,
            window=self.window,
            shuffle=self.shuffle,
        )

    def __len__(self) -> int:
        """The samples of all datasets together that take part: an epoch, if the weights follow the sizes."""
        return sum(view.size for view in self.views)

    def __getstate__(self) -> dict[str, Any]:  # loader workers begin with files, threads and caches of their own
        return self.__dict__ | {"_process": None}

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """The items of one batch; a DataLoader calls this."""
        return list(self.iterate(positions))

    def iterate(self, positions: Sequence[int], empty: Empty = np.empty) -> Iterator[Any]:
        """The items of one batch one by one, read at once and decoded side by side, into `empty` (any thread may call it)."""
        if self.buckets and len({position // self.chunk for position in positions}) > 1:
            raise UsageError(
                f"a batch reaches over chunks of {self.chunk} positions, so it would mix buckets; make the stream's chunk "
                "a multiple of the global batch (batch x ranks)"
            )
        here = self._here
        here.read_ahead(positions, self._read, self._announce)
        make = partial(self._item, empty=empty)
        yield from here.decoders.map(make, positions) if here.decoders else map(make, positions)

    def stop_waiting(self) -> None:
        """Files that are away are waited for no longer by this process: it wants no more samples."""
        if self._process is not None:
            for reader in self._process.readers:
                reader.stop_waiting()

    def key(self, position: int) -> str:
        """The key at a position, by the index alone."""
        dataset, _, place = self._place(position)
        return self._keys(dataset, place.shard)[1][place.row]

    def _place(self, position: int) -> tuple[int, int, Place]:
        """(dataset, bucket, place) of a position: mixtures interleave whole chunks."""
        chunk, offset = divmod(position, self.chunk)
        dataset, own = self.mixture.place(chunk)
        return dataset, *self.views[dataset].place(own * self.chunk + offset)

    def _stand_ins(self, position: int) -> list[int]:
        """The positions whose samples may stand for this one, itself first."""
        if not self.buckets:
            return list(range(position, position + self.max_skips))
        chunk, offset = divmod(position, self.chunk)
        return [chunk * self.chunk + (offset + i) % self.chunk for i in range(min(self.chunk, self.max_skips))]

    @property
    def _here(self) -> "_Process":
        """This process's own files and threads: a forked loader worker must not use those of its parent."""
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Process(self.urls, self.cache, self.wait_s)
        return self._process

    def _keys(self, dataset: int, shard: int) -> tuple[dict[str, Any], list[str]]:
        """A shard's mark and its keys, kept for as many shards as two windows hold."""
        marks, name = self._here.marks, (dataset, shard)
        found = marks.get(name)
        if found is None:
            mark = self._here.readers[dataset].mark(shard_name(shard))
            found = marks[name] = mark, sorted(mark["index"])
            while len(marks) > 2 * self.window * len(self.urls):
                marks.popitem(last=False)
        return found

    def _read(self, position: int) -> Sample:
        """The members of the sample at a position, as stored. Raises SampleError."""
        dataset, _, place = self._place(position)
        mark, keys = self._keys(dataset, place.shard)
        return self._here.readers[dataset].read(mark, keys[place.row], self._members(dataset))

    def _announce(self, position: int) -> None:
        """That the sample at a position, on a local disk, will be read soon."""
        dataset, _, place = self._place(position)
        with contextlib.suppress(UserError):  # a damaged mark is an error for whom it concerns
            mark, keys = self._keys(dataset, place.shard)
            self._here.readers[dataset].announce(mark, keys[place.row], self._members(dataset))

    def _item(self, position: int, empty: Empty) -> Any:
        skipped: list[str] = []
        for candidate in self._stand_ins(position):
            dataset, bucket, place = self._place(candidate)
            try:
                sample = self._here.take(candidate, self._read)
                shape = tuple(self.buckets[bucket]) if self.buckets else None
                item = self._decode(sample, position, tuple(skipped), shape, empty)
            except StoreAway:
                raise
            except (UserError, MapError) as error:  # a sample or its file: all that is left out is said
                skipped.append(f"{self.urls[dataset]}/{shard_name(place.shard)}.tar {self._name(candidate)}: {error}")
                continue
            return (
                item if self.transform is None else self.transform(item, np.random.default_rng([self.seed, position]))
            )
        raise UserError(f"{len(skipped)} samples in a row cannot be read, beginning with {skipped[0]}")

    def _name(self, position: int) -> str:
        """The key at a position, or which row it is where the shard's mark cannot be read either."""
        try:
            return self.key(position)
        except UserError:
            return f"row {self._place(position)[2].row}"

    def _members(self, dataset: int) -> list[str]:
        wanted = {"txt", "json", *self.extras, *(INTRINSICS[name].member for name in self.intrinsics)}
        if self.images:
            wanted.add(self.datasets[dataset].info["image"])
        return [name for name in self.datasets[dataset].members if name in wanted]

    def _decode(self, sample: Sample, position: int, skipped: tuple[str, ...], shape: Any, empty: Empty) -> Item:
        image = sample.image(empty) if self.images else None
        meta = sample.meta
        described = meta.get("intrinsics", {})
        maps = {}
        for name in self.intrinsics:
            row = INTRINSICS[name]
            maps[name] = row.decode(sample.members[row.member], described.get(name) or {}, empty)
        extras = {name: sample.members[name] for name in self.extras}
        return Item(sample.key, position, image, sample.caption, maps, meta, skipped, shape, extras)


def _about_small_buckets(url: str, chunk: int, view: View) -> str:
    parts = []
    if view.moved:
        parts.append(f"{view.moved} samples are cropped to a size near theirs")
    if view.left_out:
        parts.append(f"{view.left_out} samples are left out, for no size is near theirs")
    return f"{url}: sizes with fewer samples than a chunk ({chunk}) are no buckets of their own: {', '.join(parts)}"


class _Process:
    """What belongs to one process: open files, the marks it knows, its threads, and reads that are on their way."""

    def __init__(self, urls: Sequence[str], cache: LocalCache | None, wait_s: float) -> None:
        self.pid = os.getpid()
        self.readers = [MemberReader(url, cache, wait_s) for url in urls]
        self.marks: OrderedDict[tuple[int, int], tuple[dict[str, Any], list[str]]] = OrderedDict()
        threads = _decoders()
        self.decoders = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self._remote = not all(reader.is_local for reader in self.readers)
        self._fetchers = ThreadPoolExecutor(READERS, "fetch") if self._remote else None
        self._coming: dict[int, Future[Sample]] = {}
        self._last: list[int] = []

    def read_ahead(
        self, positions: Sequence[int], read: Callable[[int], Sample], announce: Callable[[int], None]
    ) -> None:
        """Prepares for the batch that will follow if batches go on as they did (a loader's worker gets every n-th).

        From an object store, this batch and that one are asked for at once, as far as they are not on their way already;
        on a disk, the operating system is told. A wrong guess costs its reads, nothing else.
        """
        step = positions[0] - self._last[0] if len(self._last) == len(positions) and positions else 0
        following = [position + step for position in positions] if step > 0 else []
        self._last = list(positions)
        if self._fetchers is None:
            for position in following:
                announce(position)
            return
        wanted = [*positions, *following]
        for position in set(self._coming) - set(wanted):
            self._coming.pop(position).cancel()
        for position in wanted:
            if position not in self._coming:
                self._coming[position] = self._fetchers.submit(read, position)

    def take(self, position: int, read: Callable[[int], Sample]) -> Sample:
        coming = self._coming.pop(position, None)
        return read(position) if coming is None else coming.result()


def _decoders() -> int:
    """Threads that decode: the cores of this machine, shared among a DataLoader's workers."""
    _, workers = loader_worker()
    return max(1, min(MAX_DECODERS, cores() // workers))
