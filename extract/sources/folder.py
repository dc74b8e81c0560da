"""A folder of images as a source, local or at any fsspec URL. docs/sources.md is its manual.

Every file with the name of an image counts, whatever it turns out to be; subfolders are searched, other files ignored.
Captions stand in .txt or .json beside the images, or in one table (csv, tsv, jsonl, parquet) at the folder's top.

Memory: planning holds one folder's names, and of a table (csv, tsv, jsonl, parquet) its rows as compact JSON, about
200 bytes a row plus its text; only the driver does. A unit holds paths, and the rows that belong to them.
"""

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from extract.images.prepare import MAX_BYTES
from extract.sources import Failure, InputFile, RawSample, Unit
from extract.sources.captions import (
    MAX_METADATA_BYTES,
    TABLE_SUFFIXES,
    Table,
    caption_in,
    caption_of_bytes,
    json_object,
)
from extract.sources.files import IMAGE_SUFFIXES, ReadProblem, place_of, read, show, split_suffix, walk
from extract.sources.filters import Filters
from extract.sources.values import with_kept_fields
from shards.core.errors import UsageError
from shards.core.storage import Folder

MAX_CAPTION_BYTES = 64 << 10
MAX_STEM = 63  # characters of a key before its digest: 80 in all
CAPTION_MODES = ("auto", "beside", "none")


class Item(NamedTuple):
    """One input: what a worker needs to read it, as values that JSON can hold.

    path: relative to the folder, each byte of it as one character. text, json: the files beside it, likewise.
    sizes: of these three files, so that units differ when files do. row: its row of the table as JSON, column: where in it
    the caption stands. problem: (reason, message) if planning found already that there is nothing to read.
    """

    path: str
    text: str | None = None
    json: str | None = None
    sizes: tuple[int, int, int] = (-1, -1, -1)
    row: str | None = None
    column: str | None = None
    problem: tuple[str, str] | None = None


def _files(item: Item) -> Iterator[InputFile]:
    """The files of an input that are there: the image, its text, its json."""
    for path, size in zip((item.path, item.text, item.json), item.sizes, strict=True):
        if path is not None and size >= 0:
            yield InputFile(show(_unpack(path)), size)


def _pack(path: bytes) -> str:
    return path.decode("latin-1")


def _unpack(path: str) -> bytes:
    return path.encode("latin-1")


@dataclass(frozen=True)
class FolderSource:
    """path: the folder, local or an fsspec URL.

    captions: "beside" (.txt and .json next to the images), "none", the name of a table in the folder, or "auto": the
        one table at the folder's top if there is one, else "beside".
    file_column, caption_column: of the table, or the caption's field of the .json; found by usual names if not given.
    max_bytes, max_caption_bytes: larger images and longer captions are failures.
    columns: the fields of the table or of the .json that are kept; None for all.
    filters: on the fields of the table or of the .json, and on the caption; applied before an image is read.
    """

    path: str
    captions: str = "auto"
    file_column: str | None = None
    caption_column: str | None = None
    max_bytes: int = MAX_BYTES
    max_caption_bytes: int = MAX_CAPTION_BYTES
    columns: tuple[str, ...] | None = None
    filters: Filters = field(default_factory=Filters)

    @property
    def _folder(self) -> Folder:
        return Folder(self.path)

    def describe(self) -> dict[str, Any]:
        """The number of inputs; digests of their paths, of the paths and sizes of all files that count and of the table's
        content, and of the folder's own address."""
        count, digest, names = self._listing
        filters = json.loads(json.dumps(dataclasses.asdict(self.filters)))
        captions = self._table_name or self._captions
        described = {
            "kind": "folder",
            "captions": captions,
            "inputs": count,
            "listing": digest,
            "names": names,
            "place": place_of(self.path),
            "filters": filters,
        }
        return described if self.columns is None else {**described, "columns": list(self.columns)}

    def total(self) -> int:
        return self._listing[0]

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        """Images in the order of their paths' bytes; then the table's rows that belong to none of them."""
        items = islice(self._items(), limit)
        index = 0
        while batch := tuple(islice(items, shard_size)):
            yield Unit(index, batch, tuple(file for item in batch for file in _files(item)))
            index += 1

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        """One sample or failure for each item of the unit, in order."""
        folder = self._folder
        for item in unit.items:
            key = key_of(_unpack(item.path))
            try:
                yield with_kept_fields(self._read(folder, key, item), self.columns, always=("file",))
            except ReadProblem as problem:
                yield Failure(key, "read", problem.reason, problem.message)

    # ---- planning ----------------------------------------------------------------------------------------------------

    @cached_property
    def _listing(self) -> tuple[int, str, str]:
        """How many items there are, the digest of all that identifies them, and that of their paths alone."""
        digest, names, count = hashlib.sha256(), hashlib.sha256(), 0
        if self._table_name:
            with self._folder.open(self._table_name) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        for item in self._items():
            digest.update(b"%s\0%d %d %d\n" % (_unpack(item.path), *item.sizes))
            names.update(b"%s\0" % _unpack(item.path))
            count += 1
        return count, digest.hexdigest(), names.hexdigest()[:16]

    @cached_property
    def _table_name(self) -> str | None:
        """The table of captions, or None if there is none. Raises UsageError if it is not clear which."""
        folder = self._folder
        if folder.local_path is not None and not folder.local_path.is_dir():
            words = "is a file, not a folder" if folder.local_path.exists() else "does not exist"
            raise UsageError(f"the folder {self.path} {words}; give the path of a folder of images")
        if self.captions in CAPTION_MODES[1:]:
            return None
        tables = [name for name in folder.list() if name.endswith(TABLE_SUFFIXES)]
        if self.captions != "auto":
            if not self.captions.endswith(TABLE_SUFFIXES):
                raise UsageError(
                    f"source.captions = {self.captions!r} is neither {', '.join(map(repr, CAPTION_MODES))} "
                    f"nor the name of a table ({', '.join(TABLE_SUFFIXES)})"
                )
            if not folder.exists(self.captions):
                raise UsageError(f"{self.path} has no table {self.captions}; it has {', '.join(tables) or 'none'}")
            return self.captions
        if len(tables) > 1:
            raise UsageError(
                f"{self.path} has {len(tables)} tables ({', '.join(tables)}); name the one that holds the captions with "
                "source.captions, or set it to 'beside' or 'none'"
            )
        return tables[0] if tables else None

    @property
    def _captions(self) -> str:
        return "beside" if self.captions == "auto" else self.captions

    def _items(self) -> Iterator[Item]:
        """All inputs in order."""
        folder, name = self._folder, self._table_name
        table = Table(folder, name, self.file_column, self.caption_column) if name else None
        rows, spare = _rows_by_path(table) if table else ({}, [])
        column = table.caption_column if table else self.caption_column
        if table:
            self.filters.columns(table.columns, folder.address(table.name))  # raises UsageError if one is not there
        blank = json.dumps(dict.fromkeys(table.columns)) if table else None  # all samples get the same fields
        empty = not (rows or spare)
        for found in walk(folder):
            empty = False
            path = _pack(found.path)
            if found.problem:
                yield Item(path, problem=("unreadable", found.problem))
            elif table:
                if self.captions == "auto" and (found.text or found.json):
                    raise UsageError(
                        f"{self.path} has captions in {name} and also beside its images "
                        f"({show(found.text or found.json or b'')}); choose with source.captions = {name!r} or 'beside'"
                    )
                row = rows.pop(found.path, None)
                yield Item(path, sizes=found.sizes, row=row.decode() if row else blank, column=column)
            elif self._captions == "none":
                yield Item(path, sizes=found.sizes)
            else:
                text, fields = (_pack(beside) if beside else None for beside in (found.text, found.json))
                yield Item(path, text, fields, found.sizes, column=column)
        for left in sorted(rows):
            yield Item(_pack(left), row=rows[left].decode(), column=column)
        yield from spare
        if empty:
            suffixes = " ".join(sorted(suffix.decode() for suffix in IMAGE_SUFFIXES))
            raise UsageError(f"there are no images in {self.path} or its subfolders (looked for {suffixes})")

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _read(self, folder: Folder, key: str, item: Item) -> RawSample:
        if item.problem:
            raise ReadProblem(*item.problem)
        path = _unpack(item.path)
        if item.row is not None and _is_outside(path):
            raise ReadProblem("missing_file", f"the table names {show(path)}, which is not inside the folder")
        image = None if self.filters.active else read(folder, path, self.max_bytes)
        meta: dict[str, Any] = {}
        caption = ""
        if item.json is not None:
            meta = json_object(_read_beside(folder, _unpack(item.json), MAX_METADATA_BYTES, "bad_metadata"))
        elif item.row is not None:
            meta = json.loads(item.row)
        if item.text is not None:
            limit = self.max_caption_bytes + 3  # a byte order mark does not count
            data = _read_beside(folder, _unpack(item.text), limit, "caption_too_long")
            caption = caption_of_bytes(data, self.max_caption_bytes)
        else:
            caption = caption_in(meta, item.column, self.max_caption_bytes)
        if dropped := self.filters.drop(meta, caption):
            raise ReadProblem(*dropped)
        image = read(folder, path, self.max_bytes) if image is None else image
        return RawSample(key, image, caption, _checked({**meta, "file": show(path)}))


def _read_beside(folder: Folder, path: bytes, limit: int, too_long: str) -> bytes:
    """The bytes of a caption or json file; what is wrong with it is told apart from what is wrong with an image."""
    try:
        return read(folder, path, limit)
    except ReadProblem as problem:
        reason = too_long if problem.reason == "too_many_bytes" else "caption_unreadable"
        raise ReadProblem(reason, problem.message) from problem


def _checked(meta: dict[str, Any]) -> dict[str, Any]:
    """Metadata that can be written as UTF-8 (a csv may hold other bytes)."""
    try:
        json.dumps(meta, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ReadProblem("bad_metadata", f"the row has a value that is not UTF-8 (character {error.start})") from error
    return meta


def _rows_by_path(table: Table) -> tuple[dict[bytes, bytes], list[Item]]:
    """The rows as JSON by the path of their image; and items for the rows that cannot be used."""
    rows: dict[bytes, bytes] = {}
    spare: list[Item] = []
    for row in table.rows():
        path = row.path.encode("utf-8", "surrogateescape")
        where = f"{row.path or table.name}#{row.place}".encode("utf-8", "surrogateescape")
        if row.problem:
            spare.append(
                Item(_pack(where), problem=("bad_row", f"{row.place} of {table.name} cannot be used: {row.problem}"))
            )
        elif path in rows:
            message = f"{row.place} of {table.name} is a second one for {show(path)}; the first one counts"
            spare.append(Item(_pack(where), problem=("duplicate_row", message)))
        else:
            rows[path] = json.dumps(row.fields, separators=(",", ":")).encode()
    return rows, spare


def _is_outside(path: bytes) -> bool:
    return path.startswith((b"/", b"../")) or path in (b"..", b".") or b"\0" in path


def key_of(path: bytes) -> str:
    """The key of a path: its readable part and a digest, `[A-Za-z0-9_-]{1,80}`; it depends on nothing but the path.

    Slashes become underscores, accents are dropped, everything else that a key cannot hold becomes one underscore.
    8 hex digits of the path's sha256 follow, or 16 if the readable part lost more than slashes (or its beginning, to
    length): many files may then share it, as with names in Chinese, and 8 digits would not keep a million apart.
    """
    stem = split_suffix(path)[0].decode("utf-8", "replace").replace("/", "_")
    plain = "".join(c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c))
    clean = re.sub(r"[^A-Za-z0-9_-]+", "_", plain).strip("_-")[-MAX_STEM:] or "image"
    digits = 8 if clean == stem else 16
    return f"{clean}-{hashlib.sha256(path).hexdigest()[:digits]}"
