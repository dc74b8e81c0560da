"""A folder of images as a source, local or at any fsspec URL. docs/sources.md is its manual.

Every file with the name of an image counts, whatever it turns out to be; subfolders are searched, other files ignored.
Captions stand in files beside the images or in a tree of their own, in one table at the folder's top, or in tables
further down (metadata.csv of an imagefolder, COCO's captions_*.json).

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
from extract.sources.caption_names import CAPTION_SUFFIXES
from extract.sources.caption_reader import Caption, caption_in, caption_of_bytes, caption_of_value, entry_of
from extract.sources.caption_report import LOOKED_AT, CaptionReport, Glance, report_of
from extract.sources.captions import MAX_METADATA_BYTES, NAMED_SUFFIXES, TABLE_SUFFIXES, Table, json_object
from extract.sources.files import (
    IMAGE_SUFFIXES,
    Found,
    Leftovers,
    ReadProblem,
    Walk,
    place_of,
    read,
    show,
    split_suffix,
)
from extract.sources.filters import Filters
from extract.sources.values import with_kept_fields
from shards.core.errors import UsageError
from shards.core.storage import Folder

MAX_CAPTION_BYTES = 64 << 10
MAX_STEM = 63  # characters of a key before its digest: 80 in all
CAPTION_MODES = ("auto", "beside", "none")
_FURTHER_TABLES = re.compile(r"(?i)metadata\.(?:csv|tsv|jsonl|parquet)|captions?(?:[_-].*)?\.json|meta_cap\.json")
"""Tables that are taken wherever they stand in the folder: imagefolders', COCO's, kohya's."""


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

    captions: "beside" (caption files and .json next to the images, or in trees of their own), "none", the name of a table
        in the folder, or "auto": the one table at the folder's top if there is one, else the tables further down that are
        called like those of imagefolders and COCO, else "beside".
    file_column, caption_column: of the table, or the caption's field of the .json; found by usual names if not given.
    caption_suffix: of the files beside the images that hold captions, instead of the usual ones.
    encoding: of caption files, csv and tsv that are not UTF-8.
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
    caption_suffix: str | None = None
    encoding: str | None = None
    filters: Filters = field(default_factory=Filters)

    @property
    def _folder(self) -> Folder:
        return Folder(self.path)

    def describe(self) -> dict[str, Any]:
        """The number of inputs; digests of their paths, of the paths and sizes of all files that count and of the table's
        content, and of the folder's own address."""
        count, digest, names = self._listing
        filters = json.loads(json.dumps(dataclasses.asdict(self.filters)))
        captions = ", ".join(self._table_names) or self._captions
        described = {
            "kind": "folder",
            "captions": captions,
            "inputs": count,
            "listing": digest,
            "names": names,
            "place": place_of(self.path),
            "filters": filters,
        }
        columns = None if self.columns is None else list(self.columns)
        chosen = {"columns": columns, "caption_suffix": self.caption_suffix, "encoding": self.encoding}
        return described | {name: value for name, value in chosen.items() if value is not None}

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
        for name in self._table_names:
            with self._folder.open(name) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        for item in self._items():
            digest.update(b"%s\0%d %d %d\n" % (_unpack(item.path), *item.sizes))
            names.update(b"%s\0" % _unpack(item.path))
            count += 1
        return count, digest.hexdigest(), names.hexdigest()[:16]

    @cached_property
    def _table_names(self) -> tuple[str, ...]:
        """The tables of captions. Raises UsageError if it is not clear which."""
        folder = self._folder
        if folder.local_path is not None and not folder.local_path.is_dir():
            words = "is a file, not a folder" if folder.local_path.exists() else "does not exist"
            raise UsageError(f"the folder {self.path} {words}; give the path of a folder of images")
        if self.captions in CAPTION_MODES[1:]:
            return ()
        tables = [name for name in folder.list() if name.endswith(TABLE_SUFFIXES)]
        if self.captions != "auto":
            if not self.captions.lower().endswith(NAMED_SUFFIXES):
                raise UsageError(
                    f"source.captions = {self.captions!r} is neither {', '.join(map(repr, CAPTION_MODES))} "
                    f"nor the name of a table ({', '.join(NAMED_SUFFIXES)})"
                )
            if not folder.exists(self.captions):
                raise UsageError(f"{self.path} has no table {self.captions}; it has {', '.join(tables) or 'none'}")
            return (self.captions,)
        if len(tables) > 1:
            raise UsageError(
                f"{self.path} has {len(tables)} tables ({', '.join(tables)}); name the one that holds the captions with "
                "source.captions, or set it to 'beside' or 'none'"
            )
        if tables or self.caption_suffix is not None:
            return tuple(tables)
        further = (show(path) for path in sorted(self._survey.tables))
        return tuple(name for name in further if _FURTHER_TABLES.fullmatch(name.rpartition("/")[2]))

    @cached_property
    def _survey(self) -> Leftovers:
        """What lies in the folder that belongs to no image by its name."""
        leftovers = Leftovers()
        for _ in self._walk(leftovers):
            pass
        return leftovers

    def _walk(self, leftovers: Leftovers | None = None) -> Iterator[Found]:
        given = self.caption_suffix
        suffixes = CAPTION_SUFFIXES if given is None else (given.lower().lstrip("."),)
        return iter(Walk(self._folder, suffixes, leftovers))

    @property
    def _captions(self) -> str:
        return "beside" if self.captions == "auto" else self.captions

    def _items(self) -> Iterator[Item]:
        """All inputs in order."""
        tables = self._tables
        rows, spare = _rows_by_path(tables)
        columns = list(dict.fromkeys(column for table in tables for column in table.columns))
        if tables:
            self.filters.columns(columns, ", ".join(self._table_names))  # raises UsageError if one is not there
        blank = json.dumps(dict.fromkeys(columns))  # all samples get the same fields
        empty = not (rows or spare)
        for found in self._walk():
            empty = False
            path = _pack(found.path)
            if found.problem:
                yield Item(path, problem=("unreadable", found.problem))
            elif tables:
                if self.captions == "auto" and (found.text or found.json):
                    name = tables[0].name
                    raise UsageError(
                        f"{self.path} has captions in {name} and also beside its images "
                        f"({show(found.text or found.json or b'')}); choose with source.captions = {name!r} or 'beside'"
                    )
                row, column = _row_of(found.path, rows, tables)
                yield Item(path, sizes=found.sizes, row=row or blank, column=column)
            elif self._captions == "none":
                yield Item(path, sizes=found.sizes)
            else:
                text, fields = (_pack(beside) if beside else None for beside in (found.text, found.json))
                yield Item(path, text, fields, found.sizes, column=self.caption_column)
        for left in sorted(rows):
            content, column = rows[left]
            yield Item(_pack(left), row=content.decode(), column=column)
        yield from spare
        if empty:
            suffixes = " ".join(sorted(suffix.decode() for suffix in IMAGE_SUFFIXES))
            raise UsageError(f"there are no images in {self.path} or its subfolders (looked for {suffixes})")

    @cached_property
    def _tables(self) -> list[Table]:
        settings = self.file_column, self.caption_column, self.encoding
        return [Table(self._folder, name, *settings) for name in self._table_names]

    # ---- what is said of captions ------------------------------------------------------------------------------------

    def caption_report(self, limit: int | None = None) -> CaptionReport:
        """Where captions come from, by the names of all files and the content of the table or of the first files."""
        if self._captions == "none" and not self._table_names:
            return CaptionReport(inputs=0, filled=0, complete=True, wanted=False)
        folder = self._folder
        settings = {"file": "source.caption_suffix", "field": "source.caption_column"}
        report = report_of(
            self._glances(folder), limit=limit, settings=settings, notes=self._notes(), everything=bool(self._tables)
        )
        further = [
            f"{count:,} file{'s' * (count != 1)} {sort} with the name of no image, such as {show(self._survey.examples[sort])}"
            for sort, seen in self._survey.files.most_common(3)
            if (count := seen - self._survey.elsewhere[sort]) > 0
        ]
        taken = set(self._table_names)
        further += [
            f"the table {name} (--set source.captions={name} takes it)"
            for name in sorted(map(show, self._survey.tables))[:6]
            if name not in taken
        ]
        further += [
            f"the column {column!r} of {table.name} (--set source.caption_column={column} takes it)"
            for table in self._tables[:3]
            for column in table.passed_over[:6]
        ]
        return dataclasses.replace(report, passed_over=(*report.passed_over, *further))

    def _notes(self) -> tuple[str, ...]:
        return tuple(
            f"{table.name} is not UTF-8; it is read as {table.encoding}: if that is wrong, name another with source.encoding"
            for table in self._tables
            if self.encoding is None and table.encoding != "utf-8"
        )

    def _glances(self, folder: Folder) -> Iterator[Glance]:
        """What each image has for a caption. Once some were read, files are known by their names and sizes alone."""
        tables, rows = self._tables, ""
        if tables:
            rows = ", ".join(table.name for table in tables[:3]) + (", ..." if len(tables) > 3 else "")
        others = iter(()) if tables else (found.others for found in self._walk() if not found.problem)
        looked_up = 0
        for item in self._items():
            passed = tuple(f"file {suffix}" for suffix in next(others, ())) if not item.problem else ()
            if item.problem:
                continue
            if item.row is not None and item.sizes[0] < 0 and looked_up < LOOKED_AT:  # it may name no file: a failure
                looked_up += 1
                if _is_outside(_unpack(item.path)) or not folder.exists(show(_unpack(item.path))):
                    continue
            try:
                caption = self._caption(folder, item, self._meta(folder, item))
            except ReadProblem:
                continue  # a failure of its own
            if item.row is not None:
                origin = f"column {caption.field!r} of {rows}"
            elif caption.field:
                origin = f"field {caption.field!r} of the .json beside the images"
            else:
                origin = _origin_of(item)
            yield Glance(origin, caption.text, (*passed, *caption.passed_over))

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _read(self, folder: Folder, key: str, item: Item) -> RawSample:
        if item.problem:
            raise ReadProblem(*item.problem)
        path = _unpack(item.path)
        if item.row is not None and _is_outside(path):
            raise ReadProblem("missing_file", f"the table names {show(path)}, which is not inside the folder")
        image = None if self.filters.active else read(folder, path, self.max_bytes)
        meta = self._meta(folder, item)
        caption = self._caption(folder, item, meta)
        text = caption.text.strip()
        if dropped := self.filters.drop(meta, text):
            raise ReadProblem(*dropped)
        image = read(folder, path, self.max_bytes) if image is None else image
        checked = _checked({**meta, "file": show(path)})
        return RawSample(key, image, text, checked, passed_over=caption.passed_over)

    def _meta(self, folder: Folder, item: Item) -> dict[str, Any]:
        """The fields of the .json beside an image, or of its row."""
        if item.json is not None:
            return json_object(_read_beside(folder, _unpack(item.json), MAX_METADATA_BYTES, "bad_metadata"))
        row: dict[str, Any] = json.loads(item.row) if item.row is not None else {}
        return row

    def _caption(self, folder: Folder, item: Item, meta: dict[str, Any]) -> Caption:
        """The caption in the file beside an image, else that among its fields."""
        if item.text is not None:
            path = _unpack(item.text)
            limit = self.max_caption_bytes + 3  # a byte order mark does not count
            data = _read_beside(folder, path, limit, "caption_too_long")
            text = caption_of_bytes(data, self.max_caption_bytes, _suffixes_of(path), self.encoding)
            if text.strip() or not meta:
                return Caption(text)
        named = self.caption_column is not None
        if item.row is not None and item.column is not None:
            value = entry_of(meta, item.column)
            return Caption(caption_of_value(value, item.column, self.max_caption_bytes, named=named), item.column)
        return caption_in(meta, item.column, self.max_caption_bytes)


def _suffixes_of(path: bytes) -> str:
    """The suffix of a caption file, as one of CAPTION_SUFFIXES may be."""
    name = show(path.rpartition(b"/")[2]).lower()
    packed = ".gz" if name.endswith(".gz") else ""
    stem = name.removesuffix(".gz")
    return stem.rpartition(".")[2] + packed


def _origin_of(item: Item) -> str:
    """Where the caption file of an item stands, for a person."""
    if item.text is None:
        return ""
    text, image = _unpack(item.text), _unpack(item.path)
    suffix = show(split_suffix(text)[1].lower())
    folder = text.rpartition(b"/")[0]
    return f"{suffix} beside the images" if folder == image.rpartition(b"/")[0] else f"{suffix} in a tree of captions"


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


def _rows_by_path(tables: list[Table]) -> tuple[dict[bytes, tuple[bytes, str]], list[Item]]:
    """The rows as JSON, and their caption's column, by the path of their image; and items for rows that cannot be used."""
    rows: dict[bytes, tuple[bytes, str]] = {}
    spare: list[Item] = []
    for table, row in ((origin, row) for origin in tables for row in origin.rows()):
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
            rows[path] = json.dumps(row.fields, separators=(",", ":")).encode(), table.caption_column
    return rows, spare


def _row_of(path: bytes, rows: dict[bytes, tuple[bytes, str]], tables: list[Table]) -> tuple[str | None, str]:
    """Takes an image's row, and its caption's column, out of the rows; names on the disk may be in the table's encoding."""
    row = rows.pop(path, None)
    for encoding in {table.encoding for table in tables} - {"utf-8"}:
        if row is None:
            row = rows.pop(path.decode(encoding, "replace").encode("utf-8", "replace"), None)
    return (None, tables[0].caption_column) if row is None else (row[0].decode(), row[1])


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
