"""Reads members of samples by byte ranges, as few and as large as is sensible, for many samples of a batch at once.

On a local disk files stay open and are read in place. From an object store, ranges that lie close together are one request.
"""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from io import FileIO
from typing import Any

from shards.core.storage import Folder
from shards.sample import MAX_MEMBER_BYTES, Sample, SampleError
from shards.stream.local_cache import LocalCache
from shards.stream.patience import Patience
from shards.stream.signed import SignedReads
from shards.tar import BLOCK
from shards.writer import read_mark

MERGE_BYTES = 1 << 18
"""Members of an object store that lie closer together are fetched by one request: reading on is cheaper than asking again."""
OPEN_FILES = 64
_NAME_BYTES = 100
"""Of a member's name in the header of a tar."""


class MemberReader:
    """Reads samples of one dataset's folder. Threads may share it; processes must each have their own.

    wait_s: how long files that are away for a while (StoreAway) are waited for.
    """

    def __init__(self, url: str, cache: LocalCache | None = None, wait_s: float = 0.0) -> None:
        self.folder = Folder(url)
        self._cache, self._patience = cache, Patience(wait_s)
        self._signed = SignedReads(self.folder.fs) if SignedReads.serve(self.folder.url) else None
        self._files: OrderedDict[tuple[str, str], FileIO] = OrderedDict()

    @property
    def is_local(self) -> bool:
        return self.folder.local_path is not None

    def announce(self, mark: Mapping[str, Any], key: str, members: Iterable[str]) -> None:
        """Tells the operating system that a sample on a local disk will be read soon; returns at once."""
        places = [mark["index"][key][name] for name in members]
        start, end = min(offset for offset, _ in places), max(offset + size for offset, size in places)
        with contextlib.suppress(OSError):  # a hint only: reading will say what is wrong
            file = self._open(f"{mark['shard']}.tar", mark["tar"]["sha256"])
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def stop_waiting(self) -> None:
        """Files that are away are waited for no longer."""
        self._patience.stop()

    def mark(self, shard: str) -> dict[str, Any]:
        """The commit mark of a shard. Raises MarkError when it is damaged."""
        return self._patience.read(lambda: read_mark(self.folder, shard))

    def read(self, mark: Mapping[str, Any], key: str, members: Iterable[str]) -> Sample:
        """The members of one sample. Raises SampleError where the tar is not the one that its mark describes, or for a
        sample that is larger than a sample may be."""
        places = mark["index"][key]
        wanted = sorted((places[name][0], places[name][1], name) for name in members)
        if sum(size for _, size, _ in wanted) > MAX_MEMBER_BYTES:
            raise SampleError(f"sample {key} of shard {mark['shard']} is larger than {MAX_MEMBER_BYTES} bytes")
        found: dict[str, bytes] = {}
        for run in _runs(wanted, 0 if self.is_local else MERGE_BYTES):
            start, end = run[0][0], run[-1][0] + run[-1][1]
            data = self._patience.read(partial(self._range, mark, start - BLOCK, end))
            if len(data) != end - start + BLOCK:
                raise SampleError(
                    f"{mark['shard']}.tar is truncated: sample {key} is not whole; run `python -m shards verify`"
                )
            for offset, size, name in run:
                place = offset - start + BLOCK
                if data[place - BLOCK : place].partition(b"\0")[0] != f"{key}.{name}".encode()[:_NAME_BYTES]:
                    raise SampleError(
                        f"{mark['shard']}.tar is not the one that its mark describes: {key}.{name} is not in its place; was "
                        "it overwritten? run `python -m shards verify`"
                    )
                found[name] = data[place : place + size]
        return Sample(key, found)

    def _range(self, mark: Mapping[str, Any], start: int, end: int) -> bytes:
        name = f"{mark['shard']}.tar"
        if self.is_local:
            with self.folder.explained(name, "read"):
                version = mark["tar"]["sha256"]
                file = self._open(name, version)  # held by this name until its bytes are read
                try:
                    return os.pread(file.fileno(), end - start, start)
                except OSError:
                    self._files.pop((name, version), None)  # a network disk that comes back wants it opened again
                    raise
        if self._cache is None:
            return self._fetch(name, start, end)
        return self._cache.read(mark["tar"]["sha256"], start, end, lambda: self._fetch(name, start, end))

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        """A range from an object store."""
        data = self._signed.read(f"{self.folder.path}/{name}", start, end) if self._signed else None
        return self.folder.read(name, start, end) if data is None else data

    def _open(self, name: str, version: str) -> FileIO:
        """The open tar. A thread that reads from it holds it, so that it is closed only when nobody does any more."""
        file = self._files.get((name, version))
        if file is None:
            file = self._files[name, version] = FileIO(f"{self.folder.local_path}/{name}")
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file


def _runs(wanted: Sequence[tuple[int, int, str]], gap: int) -> list[list[tuple[int, int, str]]]:
    """Groups (offset, size, name), in order, whose distance is at most `gap` bytes beyond the tar's own headers."""
    runs: list[list[tuple[int, int, str]]] = []
    for place in wanted:
        if runs and place[0] - (runs[-1][-1][0] + runs[-1][-1][1]) <= gap + 1024:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
