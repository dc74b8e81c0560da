"""Keeps byte ranges of remote files in a local folder of limited size, the least recently used going first.

One file for each range, so that nothing is fetched that was not asked for, and training never waits for a whole tar.
Files appear by a rename and carry a checksum of their content. Several processes may share the folder: whoever has written
enough measures and tidies it before it writes more, one at a time. The folder may be removed at any time.
"""

import contextlib
import fcntl
import hashlib
import os
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shards.core.errors import UsageError, UserError

_CHECK = 4  # bytes of the checksum at the end of each file
PROCESSES = 8
"""So many may write at once without going over the limit: each tidies after 1/128 of it, and keeps no larger range."""
_STEP, _HIGH, _LOW = 1 / 128, 7 / 8, 3 / 4  # shares of the limit: a step, when ranges are removed, until when


@dataclass
class LocalCache:
    """folder: where. limit_bytes: the most that it holds, for up to PROCESSES that write at once.

    A range is named by its ends and a `version` of its file that no other content has (a sha256): a dataset that is moved, or
    whose address is written in another way, finds what was kept of it.
    """

    folder: Path
    limit_bytes: int
    _written: int = field(default=1 << 62, repr=False)  # the first range of a process tidies, whatever was there before

    def __post_init__(self) -> None:
        if self.limit_bytes < 1 << 20:
            raise UsageError(f"a local cache of {self.limit_bytes} bytes is too small; give it at least 1 MiB")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the cache folder {self.folder}: {error.strerror}") from error

    def read(self, version: str, start: int, end: int, fetch: Callable[[], bytes]) -> bytes:
        """The bytes start..end: from the folder, or by fetch() and then kept. A full disk only means: not kept."""
        name = hashlib.sha256(f"{version}\0{start}\0{end}".encode()).hexdigest()
        path = self.folder / name[:2] / name
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            body = data[:-_CHECK]
            if len(body) == end - start and zlib.crc32(body).to_bytes(_CHECK, "big") == data[-_CHECK:]:
                os.utime(path)  # used now
                return body
        data = fetch()
        if len(data) == end - start <= self.limit_bytes * _STEP:
            self._put(path, data)
        return data

    def _put(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data + zlib.crc32(data).to_bytes(_CHECK, "big"))
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return
        self._written += len(data) + _CHECK
        if self._written > self.limit_bytes * _STEP:
            self._written = 0
            self.tidy()

    def tidy(self) -> None:
        """Removes the least recently used ranges, if the folder is near its limit, until it is well below.

        It waits while another one is at it: a writer that went on meanwhile could fill the disk.
        """
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found: list[tuple[float, int, str]] = []
            for inside in os.scandir(self.folder):
                if inside.is_dir():
                    with contextlib.suppress(OSError):
                        for entry in os.scandir(inside.path):
                            with contextlib.suppress(OSError):  # removed meanwhile
                                found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
            size = sum(item[1] for item in found)
            if size <= self.limit_bytes * _HIGH:
                return
            for _, bytes_, path in sorted(found):
                if size <= self.limit_bytes * _LOW:
                    break
                with contextlib.suppress(OSError):
                    Path(path).unlink()
                    size -= bytes_
