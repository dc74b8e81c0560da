"""Walking a folder and reading single files from it, local or at any fsspec URL, whatever hostile things lie there."""

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from extract.sources import InputFile
from extract.sources.caption_names import CAPTION_SUFFIXES, CAPTION_TREE, IMAGE_TREE, LIKELY_SUFFIXES, NO_LETTERS
from shards.core.storage import Folder

IMAGE_SUFFIXES = frozenset(
    b"." + suffix
    for suffix in (
        *(b"jpg", b"jpeg", b"jpe", b"jfif", b"png", b"apng", b"webp", b"gif", b"bmp", b"dib", b"tif", b"tiff", b"avif"),
        *(b"heic", b"heif", b"jxl", b"jp2"),  # not read, but listed: nobody should wonder where his photographs are
    )
)
MAX_LABEL_BYTES = 1 << 20
_TABLES = (b".csv", b".tsv", b".jsonl", b".parquet")
_NAMED_TABLES = (b".json", b".txt")
"""Tables too, where they are called like one (captions.txt)."""
_TABLE_NAMES = re.compile(
    rb"(?i)(?:.*[_-])?(?:captions?|meta_cap|metadata|prompts?|descriptions?)(?:[_-].*|\d+)?\.([^.]+)"
)


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
    sizes: of the image, its caption file and its .json, in bytes; -1 where unknown or absent.
    text, json: the paths of the caption file and the .json beside it, or in a tree of their own, if there are any.
    others: suffixes of further files that are called like it, which may be captions.
    """

    path: bytes
    sizes: tuple[int, int, int] = (-1, -1, -1)
    text: bytes | None = None
    json: bytes | None = None
    problem: str = ""
    others: tuple[str, ...] = ()


class _Entry(NamedTuple):
    name: bytes
    is_folder: bool
    size: int


@dataclass
class Leftovers:
    """What a walk saw and gave to no image: files by sort with one of each, and all tables, by their paths."""

    files: Counter[str] = field(default_factory=Counter)
    elsewhere: Counter[str] = field(default_factory=Counter)
    """Of these files those that an image of another folder took."""
    examples: dict[str, bytes] = field(default_factory=dict)
    tables: list[bytes] = field(default_factory=list)


Lineage = tuple[tuple[bytes, tuple[bytes, ...]], ...]
"""For a folder and those above it: the path, and its subfolders with the name of a tree of captions."""


@dataclass(frozen=True)
class Walk:
    """How images find their captions. suffixes: of caption files, in order. leftovers: to note what belongs to no image."""

    folder: Folder
    suffixes: tuple[str, ...] = CAPTION_SUFFIXES
    leftovers: Leftovers | None = None

    def __iter__(self) -> Iterator[Found]:
        """Everything with the name of an image, in the order of the paths' bytes; lazily, one folder in memory at a time.

        Links to files count as files, wherever they lead; links to folders are not entered, so that nothing goes in circles.
        """
        stack = [self._inside(b"", ())]
        while stack:
            step = next(stack[-1], None)
            if step is None:
                stack.pop()
            elif isinstance(step, Found):
                yield step
            else:
                stack.append(self._inside(*step))

    def _inside(self, where: bytes, above: Lineage) -> Iterator[Found | tuple[bytes, Lineage]]:
        """What is directly in a subfolder (a path that ends in a slash, or b""): images, and subfolders as such paths."""
        try:
            entries = list_folder(self.folder, where)
        except OSError as error:
            words = error.strerror or str(error) or type(error).__name__
            yield Found(where, problem=f"this folder cannot be listed: {words}")
            return
        trees = tuple(
            sorted(entry.name for entry in entries if entry.is_folder and CAPTION_TREE.fullmatch(show(entry.name)))
        )
        lineage = (*above, (where, trees)) if trees else above
        here = _Beside(where, entries, self.suffixes)
        there: list[_Beside] | None = None  # listed for the first image without a caption
        steps: list[tuple[bytes, bool]] = []  # sorted by name, folders with their slash: the order of whole paths
        for entry in entries:
            if _is_image(entry.name):
                steps.append((entry.name, False))
            if entry.is_folder:
                steps.append((entry.name + b"/", True))
        for name, is_folder in sorted(steps):
            if is_folder:
                yield where + name, lineage
                continue
            text, json = here.text(name), here.json(name)
            if text is None and json is None and lineage:
                if there is None:
                    there = list(self._trees_of(where, lineage))
                text = next((found for beside in there if (found := beside.text(name))), None)
                json = None if text else next((found for beside in there if (found := beside.json(name))), None)
            sizes = (here.sizes[name], text[1] if text else -1, json[1] if json else -1)
            others = here.others(name, text[0] if text else None)
            yield Found(where + name, sizes, text[0] if text else None, json[0] if json else None, "", others)
        if self.leftovers is not None:
            here.note(self.leftovers)
            for beside in there or ():
                self.leftovers.elsewhere.update(beside.claimed_by_suffix())

    def _trees_of(self, where: bytes, lineage: Lineage) -> "Iterator[_Beside]":
        """The folders in which captions of this folder's images stand, where captions have a tree of their own."""
        for above, trees in reversed(lineage):
            first, _, rest = where[len(above) :].partition(b"/")
            for tree in sorted(trees, key=lambda name: (is_vague_tree(name), name)):
                if first == tree:
                    continue
                for inside in (rest, where[len(above) :]) if is_image_tree(first) else (where[len(above) :],):
                    path = above + tree + b"/" + inside
                    entries = _quietly_listed(self.folder, path)
                    if any(_is_image(entry.name) for entry in entries):
                        continue  # these are captions of other images
                    beside = _Beside(path, entries, self.suffixes)
                    if not is_vague_tree(tree) or self._has_words(beside):
                        yield beside

    def _has_words(self, beside: "_Beside") -> bool:
        """Whether the first text in a folder of labels has letters, and is not the boxes of a detector."""
        first = beside.first_text()
        if first is None:
            return False
        try:
            text = read(self.folder, first, MAX_LABEL_BYTES).decode("utf-8", "replace")
        except ReadProblem:
            return True
        return not NO_LETTERS.fullmatch(text)


def walk(folder: Folder) -> Iterator[Found]:
    """Everything with the name of an image, each with its captions as they are found without any setting."""
    return iter(Walk(folder))


class _Beside:
    """The files of one folder that may be captions or json of images, found by the images' names."""

    def __init__(self, where: bytes, entries: list[_Entry], suffixes: tuple[str, ...]) -> None:
        self.where = where
        self.sizes = {entry.name: entry.size for entry in entries}
        self._folders = {entry.name for entry in entries if entry.is_folder}
        self._by_lower: dict[bytes, list[bytes]] = {}
        for entry in entries:
            if not _is_image(entry.name):
                self._by_lower.setdefault(entry.name.lower(), []).append(entry.name)
        # Only the suffixes that are there need be looked for.
        packed = [suffix for name in suffixes for suffix in (name, f"{name}.gz")]
        self._suffixes = self._present(packed)
        self._json = self._present(["json"])
        self._others = self._present([s for s in (*packed, *CAPTION_SUFFIXES, *LIKELY_SUFFIXES) if s not in ("json",)])
        self._claimed: set[bytes] = set()

    def _present(self, suffixes: Iterable[str]) -> list[bytes]:
        wanted = dict.fromkeys(b"." + suffix.encode().lower() for suffix in suffixes)
        tails = {lower[at:] for lower in self._by_lower for at in _dots(lower)}
        return [suffix for suffix in wanted if suffix in tails]

    def text(self, image: bytes) -> tuple[bytes, int] | None:
        """The caption file of an image, with its size: the first that is not empty; else the first, or a folder of its name."""
        found = sorted(
            self._called(image, self._suffixes), key=lambda name: (name in self._folders, not self.sizes[name])
        )
        return self._claim(found[0] if found else None)

    def json(self, image: bytes) -> tuple[bytes, int] | None:
        return self._claim(next(self._called(image, self._json), None))

    def first_text(self) -> bytes | None:
        """The first caption file that is not empty, by its name."""
        names = [
            name for same in self._by_lower.values() for name in same if self.sizes[name] and name not in self._folders
        ]
        ends = tuple(self._suffixes)
        return min((self.where + name for name in names if ends and name.lower().endswith(ends)), default=None)

    def others(self, image: bytes, taken: bytes | None) -> tuple[str, ...]:
        """The suffixes of further files that are called like the image and may be captions."""
        named = [name for name in self._called(image, self._others) if name not in self._folders]
        self._claimed.update(named)
        further = [name for name in named if self.where + name != taken and self.sizes[name]]
        stem = split_suffix(image)[0]
        return tuple(dict.fromkeys(show(name[len(stem) :].lower()) for name in further))

    def note(self, leftovers: Leftovers) -> None:
        """Notes the files here that belong to no image of this folder."""
        for names in self._by_lower.values():
            for name in names:
                suffix = split_suffix(name)[1].lower()
                if name in self._claimed or name in self._folders:
                    continue
                is_called_table = _TABLE_NAMES.fullmatch(name) is not None
                if suffix in _TABLES or (is_called_table and suffix in _NAMED_TABLES):
                    leftovers.tables.append(self.where + name)
                elif is_called_table or suffix[1:].decode("latin-1") in (*CAPTION_SUFFIXES, *LIKELY_SUFFIXES, "gz"):
                    sort = show(suffix)
                    leftovers.files[sort] += 1
                    leftovers.examples.setdefault(sort, self.where + name)

    def claimed_by_suffix(self) -> Counter[str]:
        return Counter(show(split_suffix(name)[1].lower()) for name in self._claimed)

    def _called(self, image: bytes, suffixes: list[bytes]) -> Iterator[bytes]:
        """The files called like an image (`a.txt`, `a.jpg.txt` of `a.jpg`), in the order of the suffixes."""
        stems = (split_suffix(image)[0], image)
        for suffix in suffixes:
            for stem in stems:
                names = self._by_lower.get((stem + suffix).lower(), ())
                yield from sorted((n for n in names if n.startswith(stem)), key=lambda n: (n != stem + suffix, n))

    def _claim(self, name: bytes | None) -> tuple[bytes, int] | None:
        if name is None:
            return None
        self._claimed.add(name)
        return self.where + name, self.sizes[name]


def _dots(name: bytes) -> list[int]:
    """Where suffixes of at most three parts begin."""
    return [at for at, byte in enumerate(name) if byte == ord(".")][-3:]


def _is_image(name: bytes) -> bool:
    return split_suffix(name)[1].lower() in IMAGE_SUFFIXES


def _quietly_listed(folder: Folder, where: bytes) -> list[_Entry]:
    """What is in a folder; nothing if it is not there."""
    try:
        return list_folder(folder, where)
    except OSError:
        return []


def is_vague_tree(name: bytes) -> bool:
    """Whether a folder of captions is called like one of labels, which may be anything."""
    match = CAPTION_TREE.fullmatch(show(name))
    return bool(match and match.lastindex)


def is_image_tree(name: bytes) -> bool:
    """Whether a folder is called like one of images that has its captions in another folder."""
    return bool(IMAGE_TREE.fullmatch(show(name)))


def list_folder(folder: Folder, where: bytes) -> list[_Entry]:
    """What is in a subfolder (a path that ends in a slash, or b""). Raises OSError."""
    return _list_local(folder, where) if folder.local_path is not None else _list_remote(folder, where)


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
