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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from shards.order import Sampler
from shards.stream import Stream

_ALIGNED = 64  # bytes
_ROUNDED = 1 << 20  # bytes; batches of about one size then fit each other's blocks
_SPARE = 4  # blocks without a batch that a worker keeps


@dataclass
class Blocks:
    """The shared memory of one worker. The first byte of a block is 1 as long as its batch is on its way or in use."""

    mine: list[Tensor] = field(default_factory=list)

    def take(self, size: int) -> Tensor:
        """A block of at least `size` bytes, uint8 (N,): one whose batch is gone, or a new one."""
        spare = [block for block in self.mine if not block[0]]
        chosen = next((block for block in spare if len(block) >= size), None)
        surplus = {id(block) for block in spare[:-_SPARE] if block is not chosen}
        self.mine = [block for block in self.mine if id(block) not in surplus]
        if chosen is None:
            whole = size + -size % _ROUNDED
            chosen = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(whole))
            self.mine.append(chosen)
        chosen[0] = 1
        return chosen


@dataclass(frozen=True)
class Block:
    """A batch on its way. head: its pickle without the arrays. places: of each array in data, uint8 (N,)."""

    head: bytes
    places: list[tuple[int, int]]
    data: Tensor

    @classmethod
    def of(cls, batch: Any, blocks: Blocks) -> "Block":
        """Any structure that pickle knows, with numpy arrays and torch tensors (on the CPU) in it."""
        buffers: list[pickle.PickleBuffer] = []
        file = BytesIO()
        _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(batch)
        places, end = [], _ALIGNED
        for buffer in buffers:
            size = buffer.raw().nbytes
            places.append((end, end + size))
            end += size + -size % _ALIGNED
        data = blocks.take(end)
        view = data.numpy()
        for (start, stop), buffer in zip(places, buffers, strict=True):
            view[start:stop] = np.frombuffer(buffer.raw(), np.uint8)
        return cls(file.getvalue(), places, data)

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrived, (self.head, self.places, self.data)


class Arrived:
    """A block in the process that asked for it. Its worker may use it again as soon as nothing refers to its bytes."""

    def __init__(self, head: bytes, places: list[tuple[int, int]], data: Tensor) -> None:
        self._head, self._places, self._bytes = head, places, data.numpy()
        weakref.finalize(self._bytes, _release, data[:1].numpy(), os.getpid()).atexit = False

    def open(self) -> Any:
        """The batch. Its arrays and tensors are views of the block."""
        view = self._bytes.data
        return pickle.loads(self._head, buffers=[view[start:stop] for start, stop in self._places])


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


@dataclass(frozen=True)
class _Packed:
    """A collate function whose result travels as a block."""

    collate: Callable[[list[Any]], Any]
    blocks: Blocks = field(default_factory=Blocks)  # each worker, forked or started, goes on with its own copy

    def __call__(self, items: list[Any]) -> Block:
        return Block.of(self.collate(items), self.blocks)


class StreamLoader(DataLoader):
    """options: those of DataLoader, but for what decides the order (batch_size, sampler, shuffle, ...).

    stream: a Stream, or anything that is asked for positions as one is. collate_fn: makes a batch of the items of one;
    without it a batch is their list.
    """

    def __init__(self, stream: Stream | Any, sampler: Sampler, **options: Any) -> None:
        collate = options.pop("collate_fn", None) or list
        self._packs = bool(options.get("num_workers"))
        options["collate_fn"] = _Packed(collate) if self._packs else collate
        super().__init__(stream, batch_sampler=sampler, **options)  # type: ignore[arg-type]
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches from the sampler's `consumed` on. A batch counts as consumed as soon as it is handed out."""
        for batch in super().__iter__():
            self._sampler.advance()
            yield batch.open() if self._packs else batch

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: after the last batch that was handed out."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; takes effect with the next `iter(loader)`."""
        self._sampler.load_state_dict(state)
