"""Plain tar files with deterministic bytes, and their index: where in the file each member's data lies.

Any tar tool reads them: POSIX ustar, one regular file `KEY.MEMBER` for each member, mode 0644, owner 0, mtime 0.
"""

import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO

from shards.core.errors import UserError
from shards.sample import MAX_MEMBER_BYTES, SampleError, check_key

BLOCK = 512
Index = dict[str, dict[str, list[int]]]
"""key -> member -> [offset, size] of the data in the tar."""


class TarError(UserError):
    """A tar that is not as we write it: truncated, damaged, or holding anything but regular files."""


class TarWriter:
    """Writes samples one after the other into an open file; the same samples always give the same bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.index: Index = {}
        self.size = 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends the members of one sample, adjacent, in the given order. Raises SampleError for a doubled key."""
        if check_key(key) in self.index:
            raise SampleError(f"the key {key} is there twice")
        places: dict[str, list[int]] = {}
        for member, data in members.items():
            info = tarfile.TarInfo(f"{key}.{member}")
            info.size, info.mode = len(data), 0o644
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            places[member] = [self.size, len(data)]
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))
        self.index[key] = places

    def finish(self) -> str:
        """Writes the end of the archive; returns the sha256 of all bytes, in hex."""
        self._write(bytes(2 * BLOCK))
        return self._sha256.hexdigest()


def read_members(file: IO[bytes], name: str) -> Iterator[tuple[str, str, int, bytes]]:
    """Streams (key, member, offset, data) from a tar that TarWriter wrote, checking its form to the last byte.

    Never seeks, never holds more than one member. Raises TarError, naming the tar and the place, for a damaged header, a
    truncated or over-long file, padding that is not zero, links, devices, folders, and members above MAX_MEMBER_BYTES.
    """
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        data = file.read(count)
        if len(data) != count:
            raise TarError(f"{name} is truncated: it ends at byte {position + len(data)}")
        position += count
        return data

    while True:
        header = take(BLOCK)
        if header == bytes(BLOCK):
            if take(BLOCK) != bytes(BLOCK) or file.read(1):
                raise TarError(f"{name} does not end as it should, at byte {position}")
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise TarError(f"{name} is damaged at byte {position - BLOCK}: {error}") from error
        key, _, member = info.name.partition(".")
        if info.type != tarfile.REGTYPE or not member:
            raise TarError(f"{name} holds {info.name!r} at byte {position - BLOCK}, which is no member of a sample")
        if info.size > MAX_MEMBER_BYTES:
            raise TarError(f"{name} holds {info.name!r} of {info.size} bytes, above the limit of {MAX_MEMBER_BYTES}")
        written = tarfile.TarInfo(info.name)
        written.size, written.mode = info.size, 0o644
        if written.tobuf(tarfile.USTAR_FORMAT) != header:
            raise TarError(f"{name} has a header at byte {position - BLOCK} that we did not write")
        offset = position
        data = take(info.size)
        if any(take(-info.size % BLOCK)):
            raise TarError(f"{name} is damaged at byte {position - BLOCK}: padding that is not zero")
        yield key, member, offset, data


def read_samples(file: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Streams whole samples (key, members) from a tar that TarWriter wrote, one at a time in memory. Raises TarError."""
    key, members = "", dict[str, bytes]()
    for found, member, _, data in read_members(file, name):
        if found != key and members:
            yield key, members
            members = {}
        key = found
        members[member] = data
    if members:
        yield key, members
