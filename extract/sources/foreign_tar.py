"""Reads tars that somebody else wrote: where each regular member's data lies, and what is wrong with the rest.

Nothing is unpacked to the disk and no member's name is ever used as a path. Links, devices, folders and sparse members
are not data; headers are bounded in size; a damaged or truncated tar gives the members before the damage.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

MAX_HEADER_BYTES = 1 << 20
"""A longer extended header (PAX, GNU long name) is an attack, not a name."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name as stored, and where its data lies."""

    name: str
    offset: int
    size: int


class _BoundedReads:
    """The file as tarfile sees it: it may seek, and read no more than a header at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, above the limit of {MAX_HEADER_BYTES}")
        return self._file.read(size)


def scan(file: IO[bytes], size: int) -> tuple[list[Member], str]:
    """The regular members of a seekable tar of `size` bytes whose data is whole, in order, and what is wrong ("" if nothing).

    Reads headers only. The second value is a sentence's end such as "it is truncated at byte 1024".
    """
    members: list[Member] = []
    problem = ""
    try:
        with tarfile.open(fileobj=_BoundedReads(file), mode="r:") as tar:  # type: ignore[call-overload]
            for info in _headers(tar):
                if info.offset_data + info.size > size and not info.sparse:
                    return members, f"it is truncated at byte {size}, inside {info.name!r}"
                if info.isreg() and not info.sparse:
                    members.append(Member(info.name, info.offset_data, info.size))
            end = tar.offset
        file.seek(end)
        last = file.read(tarfile.BLOCKSIZE)
        if last != bytes(tarfile.BLOCKSIZE):
            problem = (
                f"it is damaged at byte {end}" if len(last) == tarfile.BLOCKSIZE else f"it is truncated at byte {size}"
            )
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        problem = f"it is truncated or no plain tar ({error})" if size else "it has no bytes"
    return members, problem


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers one by one, without the list that tarfile keeps of them."""
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        yield info
