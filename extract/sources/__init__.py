"""Where image-text pairs come from. A source plans units of work in the driver and reads them in the workers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class RawSample:
    """One image and its caption, before anything was done to it.

    key: `[A-Za-z0-9_-]+`, unique in the source and stable from run to run.
    image: the bytes of an image file, or uint8 RGB (H, W, 3).
    meta: the source's own fields (url, width, ...), JSON values; they go to the sample's json as they came.
    passed_over: where there is no caption: what looks like one and was not taken.
    """

    key: str
    image: bytes | np.ndarray
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """One input that gives no sample. `reason` is a slug of extract.reasons.REASONS, `message` says it in a sentence."""

    key: str
    stage: str
    reason: str
    message: str


@dataclass(frozen=True)
class InputFile:
    """A file that a unit is made from, as it was when the unit was planned."""

    name: str
    """As messages name it."""
    size: int = -1
    """In bytes; -1 if the file is not there, or its size is not known."""
    tag: str = ""
    """What tells two contents of one size apart, where that costs little: an object store's etag, a digest of both ends of
    the file. Never a time of change."""


@dataclass(frozen=True)
class Unit:
    """The inputs of one output shard: small and picklable. Only the source that made it knows what `items` are."""

    index: int
    items: Any
    files: tuple[InputFile, ...] = ()
    """The files that it is made from, in an order of the source's own; a unit is made again when one of them changes."""


class Source(Protocol):
    """A source of image-text pairs. Small and picklable itself: every worker gets a copy."""

    def describe(self) -> dict[str, Any]:
        """What identifies the source, as JSON; equal descriptions mean equal units.

        Under the names of extract.run.inputs.CONTENT stands what may change while the source stays the same.
        """
        ...

    def total(self) -> int | None:
        """How many inputs there are; None if only the end will tell."""
        ...

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        """Cuts the first `limit` inputs (None: all) into units of `shard_size`, lazily, in the same order every time."""
        ...

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        """Reads a unit in a worker: exactly one output for each of its inputs, in order."""
        ...
