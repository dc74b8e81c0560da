"""From shards to tensors: which keys are trained on, in which order, and the batches of them.

Everything that is drawn at random for a sample depends on (seed, position) alone, so batches are the same whatever the
number of processes, loader workers and accumulation steps, and a resumed run goes on with the very next sample.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.core.errors import UsageError, UserError
from shards.dataset import Dataset
from shards.geometry import square
from shards.intrinsics import INTRINSICS, Empty, IntrinsicMap
from shards.packing import CHANNELS, SLICES, DepthRange, depth_range, pack, valid_mask
from shards.stream.loader import StreamLoader
from shards.stream.order import Sampler
from shards.stream.select import DROPPED, KEY_SHARE, image_size, select
from shards.stream.stream import Item, Stream
from train.cache.format import LATENTS, TEXT, LatentsSpec, TextSpec, cached_latents, cached_text
from train.conditions import Sizes, sizes_of
from train.config import DataConfig

CPU = torch.device("cpu")
AHEAD = 3
"""Batches that are made while the current one is trained on."""
READ_TOGETHER = 128

Draw = Callable[[Sequence[int]], Any]
"""What is drawn at random for the samples at these positions, whatever they are. Loader processes call it, too."""


@dataclass(frozen=True)
class Sample:
    """One sample as tensors.

    image: uint8 (3, S, S). packed: float16 (8, S, S) in [-1, 1] (shards.packing). valid: bool (4, S, S), by intrinsic.
    With caches these are empty, and cached has what `train cache` made: means and standard deviations of the latents
    ("image.mean", ...) and the text's embeddings.
    sizes: what SDXL and PixArt are told (train.conditions).
    """

    key: str
    position: int
    image: Tensor
    packed: Tensor
    valid: Tensor
    caption: str
    sizes: Sizes
    variant: tuple[int, bool] = (0, False)  # dataset and flip: with the key, what the tensors depend on
    skipped: tuple[str, ...] = ()
    cached: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Caches:
    """By what the caches in the shards must have been made (train.cache.format)."""

    latents: LatentsSpec
    text: TextSpec


@dataclass(frozen=True)
class Batch:
    """B samples. image: float32 (B, 3, S, S) in [-1, 1]; packed: float32 (B, 8, S, S); valid: bool (B, 4, S, S).

    drawn: what was drawn for them (Samples.batches).
    """

    samples: Sequence[Sample]
    drawn: Any = None

    @property
    def keys(self) -> list[str]:
        return [sample.key for sample in self.samples]

    def image(self, device: torch.device = CPU) -> Tensor:
        return torch.stack([sample.image for sample in self.samples]).to(device).float() / 127.5 - 1

    def packed(self, device: torch.device = CPU) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # it stacks no float16
            return torch.stack([sample.packed for sample in self.samples]).to(device).float()

    def valid(self) -> Tensor:
        return torch.stack([sample.valid for sample in self.samples])


@dataclass(frozen=True)
class HeldOutSample:
    """A held-out sample with the truth that it is measured against: its image uint8 (S, S, 3), maps, and depth range."""

    sample: Sample
    image: np.ndarray
    maps: dict[str, IntrinsicMap]
    depth: DepthRange


def generator_of(seed: int, position: int, purpose: int, device: torch.device = CPU) -> torch.Generator:
    """The generator of one sample of the stream; purposes are independent of each other.

    One of the CPU gives the same numbers whatever trains.
    """
    state = np.random.SeedSequence([seed, position, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def mirrored(caption: str) -> str:
    """The caption of the mirrored picture: left and right change places."""
    return re.sub(r"\b(left|right)\b", lambda found: _MIRROR[found[0].lower()], caption, flags=re.IGNORECASE)


_MIRROR = {"left": "right", "right": "left"}


def _to_tensors(
    item: Item, rng: np.random.Generator, config: DataConfig, dataset: int = 0
) -> tuple[Sample, HeldOutSample]:
    """Crop, flip, resize and pack one sample. The flip is drawn first, so that it is known without decoding."""
    assert item.image is not None
    flip = bool(rng.random() < config.flip)
    height, width = item.image.shape[:2]
    geometry = square(height, width, config.size_px, rng=rng if config.crop == "random" else None, flip=flip)
    image, maps = geometry.image(item.image), geometry.maps(item.maps)
    packed, _ = pack(maps)
    mask = valid_mask(maps)
    sample = Sample(
        key=item.key,
        position=item.position,
        image=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        packed=torch.from_numpy(packed).half(),
        valid=torch.from_numpy(mask[[where.start for where in SLICES.values()]]),
        caption=mirrored(item.caption) if flip and config.mirror_captions else item.caption,
        sizes=sizes_of(item.meta, (height, width), geometry),
        variant=(dataset, flip),
        skipped=item.skipped,
    )
    return sample, HeldOutSample(sample, image, maps, depth_range(maps["depth"]))


def _variants(item: Item, rng: np.random.Generator, configs: Sequence[DataConfig], samples: "Samples") -> list[Sample]:
    """One sample by several settings."""
    return [_to_tensors(item, rng, config, samples._dataset(item.position))[0] for config in configs]


def _nothing(positions: Sequence[int]) -> None:
    return None


def _from_caches(item: Item, rng: np.random.Generator, config: DataConfig, caches: Caches, dataset: int = 0) -> Sample:
    """A sample of which nothing has to be decoded."""
    flip, nothing = bool(rng.random() < config.flip), torch.empty(0)
    tensors = dict(cached_text(item, caches.text))
    for name, (mean, std) in cached_latents(item, caches.latents, flip).items():
        tensors |= {f"{name}.mean": mean, f"{name}.std": std}
    width, height = image_size(item.meta) or (config.size_px, config.size_px)
    geometry = square(height, width, config.size_px, flip=flip)
    return Sample(
        key=item.key,
        position=item.position,
        image=nothing,
        packed=nothing,
        valid=nothing,
        caption=item.caption,
        sizes=sizes_of(item.meta, (height, width), geometry),
        variant=(dataset, flip),
        skipped=item.skipped,
        cached=tensors,
    )


@dataclass
class Samples:
    """The training samples by position, and the held-out ones.

    keep: a folder for what was found out about the datasets (shards.stream.select). caches: read these instead of images and
    maps. A dataset that fits config.memory_gb is decoded once: in_memory says so.
    """

    urls: Sequence[str]
    config: DataConfig
    seed: int
    keep: str | None = None
    caches: Caches | None = None
    _kept: dict[tuple[int, bool, str], Sample] = field(default_factory=dict, repr=False)
    _is_read: bool = field(default=False, repr=False)
    _loader: StreamLoader | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        share = self.config.held_out
        if self.caches is not None and self.config.flip and self.config.mirror_captions:
            raise UsageError(
                "cached text is of the captions as they are: set data.mirror_captions = false, or data.flip = 0"
            )
        if self.caches is not None and self.config.crop != "center":
            raise UsageError("cached latents are of the square in the centre: set data.crop = center")
        if self.config.weights and len(self.config.weights) != len(self.urls):
            raise UsageError(f"data.weights has {len(self.config.weights)} numbers for {len(self.urls)} datasets")
        trained, held = f"{KEY_SHARE} >= {share}", f"{KEY_SHARE} < {share}"
        counts = [(self._count(url, trained), self._count(url, held)) for url in self.urls]
        for url, (training, held_out) in zip(self.urls, counts, strict=True):
            if held_out and not training:
                raise UserError(
                    f"all {held_out} samples of {url} are held out by data.held_out = {share}: set it to 0 to train on them"
                )
        everything = range(len(self.urls))
        self.stream = self._open(everything, trained, shuffle=True)
        self.stream.transform = self._prepare

        holding = [number for number, (_, held_out) in enumerate(counts) if held_out]
        self.holds_out = bool(holding)
        """Whether any sample is held out; else samples that are trained on are measured."""
        self._measured_urls = holding or list(everything)
        self._held_out = self._open(self._measured_urls, held if holding else trained, shuffle=False)

    def _count(self, url: str, split: str) -> int:
        """How many samples of a dataset are on a side of the split."""
        selection = select(Dataset.open(url), (*self.config.where, split), keep=self.keep)
        return int((selection.groups != DROPPED).sum())

    def _open(self, numbers: Sequence[int], split: str, shuffle: bool) -> Stream:
        """The stream of one side of the split; numbers: of those of self.urls that have samples there."""
        weights = [self.config.weights[number] for number in numbers] if self.config.weights else None
        return Stream(
            [self.urls[number] for number in numbers],
            weights,
            seed=self.seed,
            window=self.config.window,
            shuffle=shuffle,
            where=(*self.config.where, split),
            wait_s=self.config.store_wait_s,
            keep=self.keep,
            images=self.caches is None,
            intrinsics=tuple(INTRINSICS) if self.caches is None else (),
            extras=() if self.caches is None else (LATENTS, TEXT),
        )

    def contents(self) -> list[str]:
        """What the datasets hold, for a training's identity: it may go on when they were moved."""
        return [dataset.content_id() for dataset in self.stream.datasets]

    def __len__(self) -> int:
        """Training samples of an epoch."""
        return len(self.stream)

    @property
    def _flips(self) -> set[bool]:
        """Whether samples are seen as they are, mirrored, or both."""
        return {self.config.flip > 0, self.config.flip == 1}

    @property
    def in_memory(self) -> bool:
        size = self.config.size_px**2
        needed = len(self) * len(self._flips) * size * (3 + 2 * CHANNELS + len(INTRINSICS))
        return self.caches is None and self.config.crop == "center" and needed <= self.config.memory_gb * 2**30

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_loader": None}

    def _prepare(self, item: Item, rng: np.random.Generator) -> Sample:
        if self.caches is not None:
            return _from_caches(item, rng, self.config, self.caches, self._dataset(item.position))
        return _to_tensors(item, rng, self.config, self._dataset(item.position))[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Sample]:
        """The samples at these positions; a DataLoader calls this."""
        if not self.in_memory:
            return self.stream.__getitems__(positions)
        return self._remembered(positions, [self._name(position) for position in positions])

    def _remembered(self, positions: Sequence[int], names: Sequence[tuple[int, bool, str]]) -> list[Sample]:
        """The samples at these positions, which have these names; only what was not seen before is read."""
        found: dict[int, Sample] = {}
        for position, name in zip(positions, names, strict=True):
            if (known := self._kept.get(name)) is not None:
                found[position] = dataclasses.replace(known, position=position)
        missing = {position: name for position, name in zip(positions, names, strict=True) if position not in found}
        read = self.stream.__getitems__(list(missing)) if missing else []
        for (position, name), sample in zip(missing.items(), read, strict=True):
            found[position] = sample
            if name[2] == sample.key:  # else it stands in for a corrupt one
                self._kept[name] = sample
        return [found[position] for position in positions]

    def read_ahead(self, use: Callable[[Sequence[Sample]], None]) -> None:
        """Reads every sample in each of its variants, by config.workers processes, and hands them to `use`, a batch at a time.

        From then on these samples come without pixels: for a training that learns from latents which it keeps, and faster than
        one process decodes. One that could not be read is left out, and told when training meets it.
        """
        plain = [dataclasses.replace(self.config, flip=float(flip)) for flip in self._flips]
        stream = dataclasses.replace(
            self.stream, shuffle=False, transform=partial(_variants, configs=plain, samples=self)
        )
        loader = StreamLoader(stream, Sampler(batch=READ_TOGETHER, samples=len(self)), num_workers=self.config.workers)
        nothing = torch.empty(0)
        for read in loader:
            batch = [sample for variants in read for sample in variants if not sample.skipped]
            use(batch)
            for sample in batch:
                bare = dataclasses.replace(sample, image=nothing, packed=nothing, valid=nothing)
                dataset, flip = sample.variant
                self._kept[dataset, flip, sample.key] = bare
        self._is_read = True

    def iterate(self, positions: Sequence[int], empty: Empty = np.empty) -> Iterable[Sample]:
        """The same one by one, as they are made. `empty` is for maps that travel; here what is packed of them does."""
        return self.__getitems__(positions) if self.in_memory else self.stream.iterate(positions)

    def _name(self, position: int) -> tuple[int, bool, str]:
        flip = bool(np.random.default_rng([self.stream.seed, position]).random() < self.config.flip)
        return self._dataset(position), flip, self.stream.key(position)

    def _dataset(self, position: int) -> int:
        return self.stream.mixture.place(position // self.stream.chunk)[0]

    def held_out(self) -> list[HeldOutSample]:
        """At most config.validation samples that are never trained on (or, if none are held out, that are), never flipped, in a
        fixed order, with the truth."""
        return [held for _, held in self._measured(_to_tensors)]

    def held_out_samples(self) -> list[Sample]:
        """The same, as training sees them."""
        if self.caches is None:
            return [held.sample for held in self.held_out()]
        caches = self.caches
        return self._measured(lambda item, rng, plain, dataset: _from_caches(item, rng, plain, caches, dataset))

    def _measured(self, transform: Callable[[Item, np.random.Generator, DataConfig, int], Any]) -> list[Any]:
        plain = dataclasses.replace(self.config, flip=0.0, crop="center")
        stream = self._held_out

        def dataset(position: int) -> int:
            return self._measured_urls[stream.mixture.place(position // stream.chunk)[0]]

        stream.transform = lambda item, rng: transform(item, rng, plain, dataset(item.position))
        count = min(self.config.validation, len(self._held_out))
        return self._held_out.__getitems__(range(count))

    def stop_waiting(self) -> None:
        """No more batches are wanted: nothing waits any longer for files that are away."""
        self.stream.stop_waiting()
        if self._loader is not None:
            self._loader.kill_workers()

    def batches(self, sampler: Sampler, draw: Draw = _nothing) -> Iterator[Batch]:
        """The batches of one rank from sampler.consumed on, made ahead by a thread or by loader processes, with what `draw`
        draws for them. A GPU that learns from latents is faster than a process that draws: with what was read ahead, loader
        processes draw."""
        own = dataclasses.replace(sampler)  # a loader counts what it hands out, training what it has learned from
        options: dict[str, Any] = {"num_workers": self.config.workers, "prefetch_factor": AHEAD}
        if self.config.workers and self._is_read:
            self._loader = StreamLoader(_Planned(self, draw), own, **options)
            for [(positions, names, drawn)] in self._loader:
                yield Batch(self._remembered(positions, names), drawn)
        elif self.config.workers and not self.in_memory:
            self._loader = StreamLoader(self, own, **options)
            for samples in self._loader:
                yield Batch(samples, draw([sample.position for sample in samples]))
        else:
            with ThreadPoolExecutor(1) as pool:
                ahead = []
                for positions in sampler:
                    ahead.append(pool.submit(lambda at: Batch(self.__getitems__(at), draw(at)), positions))
                    if len(ahead) > AHEAD:
                        yield ahead.pop(0).result()
                for batch in ahead:
                    yield batch.result()


@dataclass(frozen=True)
class _Planned:
    """What of a batch can be had without its samples: one item, its positions, their names, and what is drawn for them."""

    samples: Samples
    draw: Draw

    def iterate(self, positions: Sequence[int], empty: Empty = np.empty) -> Iterator[Any]:
        yield positions, [self.samples._name(position) for position in positions], self.draw(positions)
