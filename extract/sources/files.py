"""Walking a folder and reading single files from it, local or at any fsspec URL, whatever hostile things lie there."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from extract.sources import InputFile
from shards.core.storage import Folder

IMAGE_SUFFIXES = frozenset(
    b"." + suffix
    for suffix in (
        *(b"jpg", b"jpeg", b"jpe", b"jfif", b"png", b"apng", b"webp", b"gif", b"bmp", b"dib", b"tif", b"tiff", b"avif"),
        *(b"heic", b"heif", b"jxl", b"jp2"),  # not read, but listed: nobody should wonder where his photographs are
    )
)
TEXT_SUFFIXES, JSON_SUFFIXES = (b".txt", b".TXT"), (b".json", b".JSON")


_ENDS_BYTES = 1 << 16
_ETAGS = (
    "md5Hash",
    "ETag",
    "etag",
    "blob_id",
)  # of Google's store its etag changes with the metadata; its md5Hash does not


def input_file(address: str, *, ends: bool = False) -> InputFile:
    """A file by its address, with its size, and the etag that an object store keeps (not that of a web server, which is
    mostly a time of change); of a local file, with `ends`, a digest of its first and last 64 KiB."""
    fs, path = url_to_fs(address)
    name = address.rsplit("/", 1)[-1]
    try:
        info = fs.info(path)
        size = info.get("size")
        size = -1 if size is None or info.get("type") == "directory" else int(size)
        if isinstance(fs, LocalFileSystem):
            return InputFile(name, size, _ends(path, size) if ends and size > 0 else "")
    except OSError:
        return InputFile(name)
    of_the_web = "http" in (fs.protocol if isinstance(fs.protocol, str) else " ".join(fs.protocol))
    tag = "" if of_the_web else next((str(info[key]) for key in _ETAGS if info.get(key)), "")
    return InputFile(name, size, tag.strip('"'))


def place_of(*addresses: str) -> str:
    """A digest of absolute addresses, which tells a source that was moved from one that changed where it is."""
    absolute = [address if "://" in address else str(Path(address).absolute()) for address in addresses]
    return hashlib.sha256("\0".join(absolute).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _ends(path: str, size: int) -> str:
    with Path(path).open("rb") as file:
        digest = hashlib.sha256(file.read(_ENDS_BYTES))
        file.seek(max(_ENDS_BYTES, size - _ENDS_BYTES))
        digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()[:16]


class ReadProblem(Exception):
    """Why an input cannot be read: a slug of extract.reasons.REASONS, and a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class Found(NamedTuple):
    """One thing with the name of an image, or a subfolder that cannot be listed (then `problem` says why).

    path: relative to the folder, with slashes, as the bytes that the file system has (any bytes at all).
    sizes: of the image, its .txt and its .json, in bytes; -1 where unknown or absent.
    text, json: the paths of the .txt and .json beside it, if there are any.
    """

    path: bytes
    sizes: tuple[int, int, int] = (-1, -1, -1)
    text: bytes | None = None
    json: bytes | None = None
    problem: str = ""


class _Entry(NamedTuple):
    name: bytes
    is_folder: bool
    size: int


def walk(folder: Folder) -> Iterator[Found]:
    """Everything with the name of an image, in the order of the paths' bytes; lazily, one folder in memory at a time.

    Links to files count as files, wherever they lead; links to folders are not entered, so that nothing goes in circles.
    """
    stack = [_inside(folder, b"")]
    while stack:
        step = next(stack[-1], None)
        if step is None:
            stack.pop()
        elif isinstance(step, Found):
            yield step
        else:
            stack.append(_inside(folder, step))


def _inside(folder: Folder, where: bytes) -> Iterator[Found | bytes]:
    """What is directly in a subfolder (a path that ends in a slash, or b""): images, and subfolders as such paths."""
    try:
        entries = _list_local(folder, where) if folder.local_path is not None else _list_remote(folder, where)
    except OSError as error:
        words = error.strerror or str(error) or type(error).__name__
        yield Found(where, problem=f"this folder cannot be listed: {words}")
        return
    sizes = {entry.name: entry.size for entry in entries}
    steps: list[tuple[bytes, bool]] = []  # sorted by name, folders with their slash: the order of whole paths
    for entry in entries:
        if split_suffix(entry.name)[1].lower() in IMAGE_SUFFIXES:
            steps.append((entry.name, False))
        if entry.is_folder:
            steps.append((entry.name + b"/", True))
    for name, is_folder in sorted(steps):
        if is_folder:
            yield where + name
            continue
        stem = split_suffix(name)[0]
        text, json = (
            next((stem + suffix for suffix in suffixes if stem + suffix in sizes), None)
            for suffixes in (TEXT_SUFFIXES, JSON_SUFFIXES)
        )
        found_sizes = (sizes[name], sizes[text] if text else -1, sizes[json] if json else -1)
        yield Found(where + name, found_sizes, where + text if text else None, where + json if json else None)


def _list_local(folder: Folder, where: bytes) -> list[_Entry]:
    with os.scandir(_local(folder, where)) as found:
        return [_Entry(os.fsencode(e.name), e.is_dir(follow_symlinks=False), _local_size(e)) for e in found]


def _local(folder: Folder, path: bytes) -> Path:
    return Path(folder.path, os.fsdecode(path))


def _local_size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size if entry.is_file() else -1
    except OSError:
        return -1


def _list_remote(folder: Folder, where: bytes) -> list[_Entry]:
    path = f"{folder.path}/{where.decode()}".rstrip("/")
    found = []
    for info in folder.fs.ls(path, detail=True):
        name = info["name"].rstrip("/").rsplit("/", 1)[-1]
        if info["name"].strip("/") != path.strip("/"):  # some stores list a folder in itself
            size = info.get("size")
            found.append(_Entry(name.encode(), info["type"] == "directory", -1 if size is None else int(size)))
    return found


def read(folder: Folder, path: bytes, limit: int) -> bytes:
    """The bytes of an ordinary file of at most `limit` bytes. Raises ReadProblem; never waits for a pipe or a device."""
    try:
        if folder.local_path is not None:
            return _read_local(_local(folder, path), show(path), limit)
        return _read_remote(folder, path.decode(), limit)
    except FileNotFoundError as error:
        raise ReadProblem("missing_file", f"there is no file {show(path)}") from error
    except OSError as error:
        words = error.strerror or str(error) or type(error).__name__
        raise ReadProblem("unreadable", f"{show(path)} cannot be read: {words}") from error


def _read_local(path: Path, name: str, limit: int) -> bytes:
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            raise ReadProblem("broken_link", f"{name} is a link that leads to no file") from error
        raise
    if not stat.S_ISREG(status.st_mode):
        raise ReadProblem("not_a_file", f"{name} is a {_sort_of(status.st_mode)}, not a file")
    # Should a pipe have taken the file's place in this moment, O_NONBLOCK keeps us from waiting for its writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ReadProblem("too_many_bytes", f"{name} has {size} bytes; {limit} are allowed")
        return file.read(size)


def _read_remote(folder: Folder, path: str, limit: int) -> bytes:
    address = f"{folder.path}/{path}"
    info = folder.fs.info(address)
    if info["type"] != "file":
        raise ReadProblem("not_a_file", f"{path} is a {info['type']}, not a file")
    if (info.get("size") or 0) > limit:
        raise ReadProblem("too_many_bytes", f"{path} has {info['size']} bytes; {limit} are allowed")
    return bytes(folder.fs.cat_file(address, start=0, end=limit))


def _sort_of(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    return next((words for test, words in kinds if test(mode)), "device")


def split_suffix(path: bytes) -> tuple[bytes, bytes]:
    """A path without its suffix, and the suffix from its last dot on (b"" if there is none)."""
    name = path[path.rfind(b"/") + 1 :]
    dot = name.rfind(b".")
    return (path, b"") if dot < 0 else (path[: len(path) - len(name) + dot], name[dot:])


def show(path: bytes) -> str:
    """A path as text that is always legal UTF-8: bytes that are none are written as \\xff."""
    return path.decode("utf-8", "backslashreplace")
