"""A torch DataLoader over a Stream: it knows where it is, and brings batches from its workers in one piece.

    loader = StreamLoader(stream, Sampler(batch=8, rank=rank, world=world), num_workers=4)
    for batch in loader:
        ...
        state = loader.state_dict()  # of the batches handed out, not of those that workers fetched ahead

torch sends every tensor of a batch in a shared memory of its own, and asks for each over a socket of its own: for the five
tensors of a sample that costs as much as decoding two of them. Here a batch is one block of shared memory, and a worker uses
a block again once its batch is gone: fresh pages cost ten times the copying.
"""

import math
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shards.core.errors import UserError
from shards.core.memory import keep_memory
from shards.intrinsics import Empty
from shards.stream.order import Sampler

_ALIGNED = 64  # bytes
_ROUNDED = 1 << 20  # bytes; batches of about one size then fit each other's blocks
_SPARE = 4  # blocks without a batch that a worker keeps


@dataclass
class Blocks:
    """The shared memory of one worker. The first byte of a block is 1 as long as its batch is on its way or in use."""

    mine: list["_Owned"] = field(default_factory=list)
    usual: int = 0
    """Bytes of the largest batch so far: what the next one is given at first."""

    def take(self, size: int) -> "Room":
        """A block of at least `size` bytes: one whose batch is gone, or a new one."""
        spare = [owned for owned in self.mine if owned.is_spare and len(owned.data) >= size]
        self.mine = [owned for owned in self.mine if not owned.is_spare] + spare[:_SPARE]
        if spare:
            chosen = spare[0]
        else:
            whole = size + -size % _ROUNDED
            chosen = _Owned(torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(whole)))
            self.mine.append(chosen)
        chosen.data[0] = 1
        room = Room(chosen.data)
        chosen.filled = weakref.ref(room.bytes)
        return room


@dataclass
class _Owned:
    """A block, and what its worker last filled it through: a transform may have kept an array that lies in it."""

    data: Tensor
    filled: weakref.ref[np.ndarray] | None = None

    @property
    def is_spare(self) -> bool:
        return not self.data[0] and (self.filled is None or self.filled() is None)


class Room:
    """A block that is being filled. Arrays made by `empty` lie in it from the start, and need no copying."""

    def __init__(self, data: Tensor, end: int = _ALIGNED) -> None:
        self.data, self.end, self._lock = data, end, threading.Lock()
        self.bytes = data.numpy()  # every array in the block refers to this one, for numpy shortens chains of views
        self._begin = _address(self.bytes)

    def reserve(self, size: int) -> tuple[int, int]:
        """Where the next `size` bytes go; beyond the block's end if they do not fit."""
        with self._lock:
            start = self.end
            self.end += size + -size % _ALIGNED
            return start, start + size

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """np.empty, in the block as long as there is room."""
        start, stop = self.reserve(math.prod(shape) * np.dtype(dtype).itemsize)
        return self.bytes[start:stop].view(dtype).reshape(shape) if stop <= len(self.bytes) else np.empty(shape, dtype)

    def place(self, values: np.ndarray) -> tuple[int, int] | None:
        """Where an array of bytes lies in the block, None if it does not."""
        start = _address(values) - self._begin
        return (start, start + len(values)) if start >= 0 and start + len(values) <= len(self.bytes) else None


def _address(values: np.ndarray) -> int:
    address: int = values.__array_interface__["data"][0]
    return address


@dataclass(frozen=True)
class Block:
    """A batch on its way. heads: of each item its pickle without the arrays, and their places in data, uint8 (N,)."""

    heads: list[tuple[bytes, list[tuple[int, int]]]]
    data: Tensor

    @classmethod
    def of(cls, make: Callable[[Empty], Iterable[Any]], blocks: Blocks) -> "Block":
        """make: gives items of any structure that pickle knows, with numpy arrays and torch tensors (on the CPU) in it.

        What it makes by the `empty` it is given is in place. All else is copied as soon as it comes: made one by one, items
        are still in the processor's cache.
        """
        room, heads = blocks.take(max(blocks.usual, _ALIGNED)), []

        def empty(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
            return room.empty(shape, dtype)

        for item in make(empty):
            buffers: list[pickle.PickleBuffer] = []
            file, places, moved = BytesIO(), [], []
            _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(item)
            for buffer in buffers:
                values = np.frombuffer(buffer.raw(), np.uint8)
                place = room.place(values)
                if place is None:
                    place = room.reserve(len(values))
                    moved.append((place, values))
                places.append(place)
            if room.end > len(room.bytes):
                room = _larger(room, blocks)
            for (start, stop), values in moved:
                room.bytes[start:stop] = values
            heads.append((file.getvalue(), places))
        blocks.usual = max(blocks.usual, room.end)
        return cls(heads, room.data)

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrived, (self.heads, self.data)


def _larger(room: Room, blocks: Blocks) -> Room:
    """Another block with room for all that this one should hold and as much again; this one is given back."""
    other = blocks.take(2 * room.end)
    other.bytes[: len(room.bytes)] = room.bytes
    other.end, room.data[0] = room.end, 0
    return other


class Arrived:
    """A block in the process that asked for it. Its worker may use it again as soon as nothing refers to its bytes."""

    def __init__(self, heads: list[tuple[bytes, list[tuple[int, int]]]], data: Tensor) -> None:
        self._heads, self._bytes = heads, data.numpy()
        weakref.finalize(self._bytes, _release, data[:1].numpy(), os.getpid()).atexit = False

    def open(self) -> list[Any]:
        """The items. Their arrays and tensors are views of the block."""
        view = self._bytes.data
        return [
            pickle.loads(head, buffers=[view[start:stop] for start, stop in places]) for head, places in self._heads
        ]


def _release(in_use: np.ndarray, process: int) -> None:
    if os.getpid() == process:  # a fork of it has views of its own, and the block is not its to give back
        in_use[0] = 0


class _Pickler(pickle.Pickler):
    """Pickles tensors as numpy arrays, whose content it leaves out for the block."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad and value.is_contiguous():
            try:
                return torch.from_numpy, (value.numpy(),)
            except TypeError:  # a type that numpy lacks, such as bfloat16
                return NotImplemented
        return NotImplemented


class Items(Protocol):
    """What a StreamLoader reads: a Stream, or anything that is asked for positions as one is."""

    def iterate(self, positions: Sequence[int], empty: Empty = ...) -> Iterable[Any]: ...


class _Packed(Dataset[Block]):
    """Items that travel as blocks, each batch's. Every worker, forked or started, goes on with blocks of its own."""

    def __init__(self, items: Items, collate: Callable[[list[Any]], Any] | None) -> None:
        self._items, self._collate, self._blocks = items, collate, Blocks()

    def __getitems__(self, positions: Sequence[int]) -> "Block | _Raised":
        collate = self._collate
        try:
            if collate is None:
                return Block.of(partial(self._items.iterate, positions), self._blocks)
            return Block.of(lambda _: [collate(list(self._items.iterate(positions)))], self._blocks)
        except UserError as error:
            return _Raised(error)


@dataclass(frozen=True)
class _Raised:
    """In place of a batch: what a worker raised for the user. torch itself would put a traceback into the message."""

    error: UserError


class StreamLoader(DataLoader):
    """options: those of DataLoader, but for what decides the order (batch_size, sampler, shuffle, ...).

    collate_fn: makes a batch of the items of one; without it a batch is their list.
    """

    def __init__(self, stream: Items, sampler: Sampler, **options: Any) -> None:
        collate = options.pop("collate_fn", None)
        self._packs, self._collates = bool(options.get("num_workers")), collate is not None
        if self._packs:
            begin = partial(_begin_worker, options.pop("worker_init_fn", None))
            packed: Any = _Packed(stream, collate)
            super().__init__(packed, batch_sampler=sampler, collate_fn=_as_it_is, worker_init_fn=begin, **options)  # type: ignore[arg-type]
        else:
            super().__init__(stream, batch_sampler=sampler, collate_fn=collate or list, **options)  # type: ignore[arg-type]
        self._sampler = sampler
        self._running: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches from the sampler's `consumed` on. A batch counts as consumed as soon as it is handed out."""
        self._running = super().__iter__()
        for batch in self._running:
            if isinstance(batch, _Raised):
                raise batch.error
            self._sampler.advance()
            if not self._packs:
                yield batch
            else:
                yield batch.open()[0] if self._collates else batch.open()

    def kill_workers(self) -> None:
        """Ends the worker processes at once, whatever they wait for. No batch comes after that."""
        for worker in getattr(self._running, "_workers", ()):
            worker.kill()

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: after the last batch that was handed out."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; takes effect with the next `iter(loader)`."""
        self._sampler.load_state_dict(state)


def _as_it_is(block: Block | _Raised) -> Block | _Raised:
    return block


def _begin_worker(then: Callable[[int], None] | None, number: int) -> None:
    keep_memory()
    if then is not None:
        then(number)
