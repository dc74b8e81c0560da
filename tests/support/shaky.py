"""A store in memory that can be down, for tests of what waits for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from shards.stream import patience


class Shaky(MemoryFileSystem):
    """A store in memory that answers nothing while it is down."""

    protocol = "shaky"
    store: dict[str, Any] = {}  # noqa: RUF012 (of the class, as in the base)
    pseudo_dirs = [""]  # noqa: RUF012
    down = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("shaky://", "memory://"))
        return stripped

    def cat_file(self, path: str, **options: Any) -> bytes:
        if self.down.is_set():
            raise ConnectionResetError(104, "Connection reset by peer")
        data: bytes = super().cat_file(path, **options)
        return data


@contextmanager
def shaky(folder: str) -> Iterator[str]:
    """A copy of a folder in such a store; its address. Those who wait ask often."""
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    store = fsspec.filesystem("shaky")
    store.put(folder, "/data", recursive=True)
    try:
        with mock.patch.object(patience, "FIRST_PAUSE_S", 0.05):
            yield "shaky://data"
    finally:
        Shaky.down.clear()
        store.rm("/data", recursive=True)
