"""Reads tars that somebody else wrote: where each member's data lies, and what is wrong with the rest.

Nothing is unpacked to the disk and no member's name is ever used as a path. Headers are bounded in size. A damaged or
truncated tar gives the members before the damage. What follows the end of the archive is read on, if it is another
archive (`cat a.tar b.tar`), and else a problem of the tar. Links are resolved among the members of the same tar.
"""

import dataclasses
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

MAX_HEADER_BYTES = 1 << 20
"""A longer extended header (PAX, GNU long name) is an attack, not a name."""
MAX_LINKS = 40
"""More links in a row are taken for a circle, as Linux does."""
_DEEPEST_FOLDER = 64
"""Of deeper ones not all are noted: a name may have half a million slashes."""
_CHUNK = 1 << 20
_VOLUME_LABEL = b"V"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar, known by its headers."""

    name: str
    """As stored."""
    offset: int
    """Where its data begins in the tar."""
    size: int
    """In bytes, with the holes of a sparse file."""
    archive: int = 0
    """Which archive of the file it is in: 0, or more where several were put one after the other."""
    pieces: tuple[tuple[int, int], ...] | None = None
    """(offset, size) of what is not a hole, for a sparse file; stored one after the other."""
    is_folder: bool = False
    problem: tuple[str, str] | None = None
    """(reason, message) if there is no data to read: a device, a pipe, a link that leads to no member."""


@dataclass(frozen=True, slots=True)
class _Link:
    target: str
    is_hard: bool


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
    """The members of a seekable tar of `size` bytes, in order, and what is wrong ("" if nothing).

    Reads headers only. Members whose data is not whole are left out. The second value is a sentence's end such as "it is
    truncated at byte 1024".
    """
    members: list[Member] = []
    links: dict[int, _Link] = {}
    position: int | None = 0
    problem = ""
    archive = 0

    while position is not None and not problem:
        end, problem = _scan_archive(file, position, size, archive, members, links)
        position = None if problem else _next_archive(file, end)
        archive += 1

    return _Links(members, links).resolved(), problem


def read_member(file: IO[bytes], member: Member) -> bytes:
    """The data of a member that has no problem. Its size must have been checked: a sparse file takes as much memory."""
    file.seek(member.offset)
    if member.pieces is None:
        return file.read(member.size)

    data = bytearray(member.size)
    for offset, length in member.pieces:
        data[offset : offset + length] = file.read(length)
    return bytes(data)


# ---- one archive -----------------------------------------------------------------------------------------------------


def _scan_archive(
    file: IO[bytes], start: int, size: int, archive: int, members: list[Member], links: dict[int, _Link]
) -> tuple[int, str]:
    """Appends the members of the archive that begins at `start`; returns where its headers end, and what is wrong."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=_BoundedReads(file), mode="r:") as tar:  # type: ignore[call-overload]
            for info in _headers(tar):
                room = tar.offset - info.offset_data
                if room < 0 or info.size < 0:  # it would lead back to headers that were read already
                    return info.offset, f"it is damaged at byte {info.offset}"
                if info.offset_data + min(_stored_bytes(info), room) > size:
                    return size, f"it is truncated at byte {size}, inside {info.name!r}"
                if info.type == _VOLUME_LABEL:
                    continue
                if info.issym() or info.islnk():
                    links[len(members)] = _Link(info.linkname, info.islnk())
                members.append(_member(info, archive, room))
            end = tar.offset
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        return size, _unreadable(file, start, size, error)

    file.seek(end)
    last = file.read(tarfile.BLOCKSIZE)
    if last == bytes(tarfile.BLOCKSIZE):
        return end, ""
    if start and end == start:
        return end, f"what follows its end, at byte {start}, is no tar"
    return end, f"it is damaged at byte {end}" if len(last) == tarfile.BLOCKSIZE else f"it is truncated at byte {size}"


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers one by one, without the list that tarfile keeps of them."""
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        yield info


def _stored_bytes(info: tarfile.TarInfo) -> int:
    """The bytes that a member takes in the tar, beside its headers."""
    pieces = _pieces(info)
    return info.size if pieces is None else sum(length for _, length in pieces)


def _pieces(info: tarfile.TarInfo) -> tuple[tuple[int, int], ...] | None:
    """(offset, size) of what a sparse file holds; None for any other member."""
    pieces: Any = info.sparse  # a list of pairs, which the types of the standard library do not say
    return None if pieces is None else tuple((int(offset), int(length)) for offset, length in pieces)


def _member(info: tarfile.TarInfo, archive: int, room: int) -> Member:
    """A header, before the next one of which there are `room` bytes, as a member; links are resolved later."""
    problem = None
    pieces = _pieces(info)
    if pieces is not None:
        fits = all(offset >= 0 and length >= 0 and offset + length <= info.size for offset, length in pieces)
        if not fits or _stored_bytes(info) > room:
            problem = ("bad_tar", f"the map of the sparse file {info.name!r} is damaged")
    elif not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
        problem = ("not_a_file", f"{info.name!r} is {_kind(info)}, not a file")
    return Member(info.name, info.offset_data, info.size, archive, pieces, info.isdir(), problem)


def _kind(info: tarfile.TarInfo) -> str:
    if info.isfifo():
        return "a pipe"
    return "a device" if info.isdev() else f"an entry of the unknown type {info.type!r}"


def _unreadable(file: IO[bytes], start: int, size: int, error: Exception) -> str:
    if not size:
        return "it has no bytes"
    if start:
        return f"what follows its end, from byte {start} on, is damaged or no tar ({error})"
    file.seek(0)
    head = file.read(8)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return f"it is compressed ({name}), and cannot be read from the middle; decompress it first"
    return f"it is truncated or no plain tar ({error})"


def _next_archive(file: IO[bytes], end: int) -> int | None:
    """Where the zeros after an archive's end stop, to the block; None if nothing but zeros follows."""
    file.seek(end)
    position = end
    while chunk := file.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            first = position + len(chunk) - len(rest)
            return first - first % tarfile.BLOCKSIZE
        position += len(chunk)
    return None


# ---- links -----------------------------------------------------------------------------------------------------------


class _Links:
    """The links of a tar, followed to the members that hold the data, whether those stand before or after them."""

    def __init__(self, members: list[Member], links: dict[int, _Link]) -> None:
        self._members, self._links = members, links
        self._by_path: dict[tuple[int, str], int] = {}
        self._folders: set[tuple[int, str]] = set()
        if links:
            self._index()

    def _index(self) -> None:
        for index, member in enumerate(self._members):
            path = posixpath.normpath(member.name)
            self._by_path.setdefault((member.archive, path), index)
            if member.is_folder:
                self._folders.add((member.archive, path))
            for _ in range(_DEEPEST_FOLDER):
                path = posixpath.dirname(path)
                if path in ("", "/") or (member.archive, path) in self._folders:
                    break
                self._folders.add((member.archive, path))

    def resolved(self) -> list[Member]:
        """The members, each link replaced by what it leads to under its own name, or given the reason why not."""
        resolved = list(self._members)
        for index in self._links:
            resolved[index] = self._follow(index)
        return resolved

    def _follow(self, start: int) -> Member:
        link = self._members[start]

        def broken(reason: str, words: str) -> Member:
            return dataclasses.replace(link, problem=(reason, f"{link.name!r} is a link {words}"))

        index = start
        for _ in range(MAX_LINKS):
            if index not in self._links:
                found = self._members[index]
                if found.problem:
                    return broken("broken_link", f"to {found.name!r}, which cannot be read")
                return dataclasses.replace(found, name=link.name, archive=link.archive)
            path = self._path(index)
            if path is None:
                return broken("outside", f"to {self._links[index].target!r}, outside of the tar")
            following = self._by_path.get((link.archive, path))
            if following is None:
                if (link.archive, path) in self._folders:
                    return dataclasses.replace(link, is_folder=True)
                return broken("broken_link", f"to {self._links[index].target!r}, which is not in the tar")
            index = following
        return broken("broken_link", "that leads in a circle")

    def _path(self, index: int) -> str | None:
        """Where a link leads, as a path from the top of the tar; None if that is outside of it."""
        link, member = self._links[index], self._members[index]
        if link.is_hard and (member.archive, posixpath.normpath(link.target)) in self._by_path:
            return posixpath.normpath(link.target)
        path = link.target if link.is_hard else posixpath.join(posixpath.dirname(member.name), link.target)
        if link.target.startswith("/"):
            return None

        path = posixpath.normpath(path)
        for _ in range(MAX_LINKS):
            if path.startswith("../") or path == "..":
                return None
            if (member.archive, path) in self._by_path:
                return path
            shorter = self._through_folder(member.archive, path)
            if shorter is None:
                return path
            path = shorter
        return path

    def _through_folder(self, archive: int, path: str) -> str | None:
        """The path with its first folder that is a link replaced by where that leads; None if there is no such folder."""
        at = path.find("/")
        while at > 0:
            index = self._by_path.get((archive, path[:at]))
            link = None if index is None else self._links.get(index)
            if link is not None and not link.target.startswith("/"):
                folder = posixpath.join(posixpath.dirname(path[:at]), link.target)
                return posixpath.normpath(posixpath.join(folder, path[at + 1 :]))
            at = path.find("/", at + 1)
        return None
