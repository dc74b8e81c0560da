"""A torch DataLoader over a Stream: it knows where it is, and brings batches from its workers in one piece.

    loader = StreamLoader(stream, Sampler(batch=8, rank=rank, world=world), num_workers=4)
    for batch in loader:
        ...
        state = loader.state_dict()  # of the batches handed out, not of those that workers fetched ahead

torch sends every tensor of a batch in a shared memory of its own, and asks for each over a socket of its own: for the five
tensors of a sample that costs as much as decoding two of them. Here a batch is one block of shared memory, and a worker uses
a block again once its batch is gone: fresh pages cost ten times the copying.
"""

import os
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shards.order import Sampler

_ALIGNED = 64  # bytes
_ROUNDED = 1 << 20  # bytes; batches of about one size then fit each other's blocks
_SPARE = 4  # blocks without a batch that a worker keeps


@dataclass
class Blocks:
    """The shared memory of one worker. The first byte of a block is 1 as long as its batch is on its way or in use."""

    mine: list[Tensor] = field(default_factory=list)
    usual: int = 0
    """Bytes of the largest batch so far: what the next one is given at first."""

    def take(self, size: int) -> Tensor:
        """A block of at least `size` bytes, uint8 (N,): one whose batch is gone, or a new one."""
        spare = [block for block in self.mine if not block[0] and len(block) >= size]
        self.mine = [block for block in self.mine if block[0]] + spare[:_SPARE]
        if spare:
            chosen = spare[0]
        else:
            whole = size + -size % _ROUNDED
            chosen = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(whole))
            self.mine.append(chosen)
        chosen[0] = 1
        return chosen

    def larger(self, block: Tensor, used: int, size: int) -> Tensor:
        """Another block of at least `size` bytes that begins with the first `used` of this one, which is given back."""
        other = self.take(max(size, 2 * len(block)))
        other.numpy()[:used] = block.numpy()[:used]
        block[0] = 0
        return other


@dataclass(frozen=True)
class Block:
    """A batch on its way. heads: of each item its pickle without the arrays, and their places in data, uint8 (N,)."""

    heads: list[tuple[bytes, list[tuple[int, int]]]]
    data: Tensor

    @classmethod
    def of(cls, items: Iterable[Any], blocks: Blocks) -> "Block":
        """Items of any structure that pickle knows, with numpy arrays and torch tensors (on the CPU) in it.

        Each is copied as soon as it comes: made one by one, they are still in the processor's cache.
        """
        heads, end, data = [], _ALIGNED, blocks.take(max(blocks.usual, _ALIGNED))
        for item in items:
            buffers: list[pickle.PickleBuffer] = []
            file, places, used = BytesIO(), [], end
            _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(item)
            for buffer in buffers:
                size = buffer.raw().nbytes
                places.append((end, end + size))
                end += size + -size % _ALIGNED
            if end > len(data):
                data = blocks.larger(data, used, end)
            view = data.numpy()
            for (start, stop), buffer in zip(places, buffers, strict=True):
                view[start:stop] = np.frombuffer(buffer.raw(), np.uint8)
            heads.append((file.getvalue(), places))
        blocks.usual = max(blocks.usual, end)
        return cls(heads, data)

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrived, (self.heads, self.data)


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

    def iterate(self, positions: Sequence[int]) -> Iterable[Any]: ...


class _Packed(Dataset[Block]):
    """Items that travel as blocks, each batch's. Every worker, forked or started, goes on with blocks of its own."""

    def __init__(self, items: Items, collate: Callable[[list[Any]], Any] | None) -> None:
        self._items, self._collate, self._blocks = items, collate, Blocks()

    def __getitems__(self, positions: Sequence[int]) -> Block:
        found = self._items.iterate(positions)
        return Block.of(found if self._collate is None else [self._collate(list(found))], self._blocks)


class StreamLoader(DataLoader):
    """options: those of DataLoader, but for what decides the order (batch_size, sampler, shuffle, ...).

    collate_fn: makes a batch of the items of one; without it a batch is their list.
    """

    def __init__(self, stream: Items, sampler: Sampler, **options: Any) -> None:
        collate = options.pop("collate_fn", None)
        self._packs, self._collates = bool(options.get("num_workers")), collate is not None
        if self._packs:
            super().__init__(_Packed(stream, collate), batch_sampler=sampler, collate_fn=_as_it_is, **options)  # type: ignore[arg-type]
        else:
            super().__init__(stream, batch_sampler=sampler, collate_fn=collate or list, **options)  # type: ignore[arg-type]
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches from the sampler's `consumed` on. A batch counts as consumed as soon as it is handed out."""
        for batch in super().__iter__():
            self._sampler.advance()
            if not self._packs:
                yield batch
            else:
                yield batch.open()[0] if self._collates else batch.open()

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: after the last batch that was handed out."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; takes effect with the next `iter(loader)`."""
        self._sampler.load_state_dict(state)


def _as_it_is(block: Block) -> Block:
    return block
