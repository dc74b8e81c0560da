"""Captions and metadata of a folder's images in tables: csv, tsv, jsonl, parquet, and json such as COCO's annotations."""

import csv
import itertools
import json
import posixpath
from collections.abc import Container, Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from extract.sources.caption_names import CAPTION_FIELDS, likely_fields, plain_name, usual_fields
from extract.sources.caption_reader import (
    check_distinct,
    check_named,
    check_type,
    check_values,
    entry_of,
    raw_values,
    readable,
)
from extract.sources.caption_report import shortened
from extract.sources.encodings import HEAD_BYTES, table_encoding
from extract.sources.files import ReadProblem, is_image_tree, list_folder
from extract.sources.values import arrow_rows, json_fields, parse_json_object
from shards.core.errors import UsageError
from shards.core.storage import Folder
from shards.metadata import MAX_METADATA_BYTES, MetadataError

_CLEAR_FIELDS = ("caption", "text", "prompt", "description", "title")
"""Of two such columns either may be meant; others count only where none of these is there."""
FILE_FIELDS = ("file", "file_name", "filename", "file_path", "filepath", "path", "image", "image_path")
_MORE_FILE_FIELDS = (
    "image_file_name",
    "image_name",
    "image_file",
    "img",
    "img_path",
    "imagename",
    "img_name",
    "image_id",
)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
NAMED_SUFFIXES = (*TABLE_SUFFIXES, ".json", ".txt")
"""Of a table that the user names: a .txt is a csv by another name."""
MAX_JSON_BYTES = 1 << 30
_HEAD_ROWS = 100
_TRIED_ROWS, _TRIED_ROOTS = 8, 24
csv.field_size_limit(max(csv.field_size_limit(), MAX_METADATA_BYTES))


class CaptionRow(NamedTuple):
    """One row of a table. path: the image's, normalised, relative to the folder; "" if the row has none that is usable.

    place: where the row stands ("row 12"). problem: why the row cannot be used, or "".
    """

    place: str
    path: str
    fields: dict[str, Any]
    problem: str = ""


# ---- json ------------------------------------------------------------------------------------------------------------


def json_object(data: str | bytes) -> dict[str, Any]:
    """A JSON object whose values JSON can hold again. Raises ReadProblem if it is broken, no object, or beyond the limits."""
    try:
        return parse_json_object(data)
    except MetadataError as error:
        raise ReadProblem("bad_metadata", f"the json cannot be used: {error}") from error


# ---- tables ----------------------------------------------------------------------------------------------------------


class Table:
    """A table of captions in a folder: csv or tsv with a header, jsonl, parquet, or json.

    file_column, caption_column: the columns; found by their usual names if None.
    encoding: of a csv or tsv, as the user named it. columns: all of them, by the first row.
    root: the folder that the paths are relative to, "" or with a slash at its end; where its own is not, the one in which
    the first rows' files are.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        file_column: str | None,
        caption_column: str | None,
        encoding: str | None = None,
    ) -> None:
        self.folder, self.name = folder, name
        self._wanted = (file_column, caption_column)
        self.encoding = self._encoding(encoding)
        with folder.open(name) as file:
            head = list(itertools.islice((row for _, row in self._records(file) if isinstance(row, dict)), _HEAD_ROWS))
        self.columns = list(head[0]) if head else []
        check_distinct(self.columns, folder.address(name))
        self.file_column = self._file_column(file_column)
        self.caption_column = self._caption_column(caption_column)
        self._check_captions(head, named=caption_column is not None)
        self.passed_over = [
            column for column in likely_fields(self.columns) if column not in (self.caption_column, self.file_column)
        ]
        paths = [str(row.get(self.file_column) or "") for row in head]
        self._has_backslashes = any("\\" in path for path in paths) and not any(
            "\\" in path and folder.exists(path) for path in paths[:_TRIED_ROWS]
        )
        self.root = self._root([self._slashed(path) for path in paths])

    def _encoding(self, named: str | None) -> str:
        if not self.name.lower().endswith((".csv", ".tsv", ".txt")):
            return "utf-8"
        with self.folder.open(self.name) as file:
            return table_encoding(file.read(HEAD_BYTES), named, self.folder.address(self.name))

    def _file_column(self, given: str | None) -> str:
        if given is not None:
            return self._given(given)
        found = [name for name in self.columns if name.lower() in FILE_FIELDS]
        found = found or [name for name in self.columns if name.lower() in _MORE_FILE_FIELDS][:1]
        return self._only(found, "file_column", "names the image files")

    def _caption_column(self, given: str | None) -> str:
        if given is not None:
            check_named(given, self.columns, self.folder.address(self.name))
            return given
        found = [name for name in self.columns if name.lower() in _CLEAR_FIELDS]
        found = found or usual_fields([name for name in self.columns if name != self.file_column])[:1]
        return self._only(found, "caption_column", "holds captions")

    def _given(self, name: str) -> str:
        if name not in self.columns:
            columns = ", ".join(self.columns) or "none"
            raise UsageError(f"{self.folder.address(self.name)} has no column {name!r}; it has {columns}")
        return name

    def _only(self, found: list[str], setting: str, what: str) -> str:
        if len(found) == 1:
            return found[0]
        problem = (
            f"has several columns that may be meant: {', '.join(found)}" if found else "has none with a usual name"
        )
        raise UsageError(
            f"{self.folder.address(self.name)} should have a column that {what}, but {problem} (its columns: "
            f"{', '.join(self.columns) or 'none'}{self._first_line()}); name it with source.{setting}, or set "
            "source.captions to 'beside' or 'none' if this is no table of captions"
        )

    def _first_line(self) -> str:
        """The line of a csv that should be its header, for a message: what separates its columns is not told otherwise."""
        if len(self.columns) > 1 or not self.name.lower().endswith((".csv", ".tsv", ".txt")):
            return ""
        with self.folder.open(self.name) as file:
            line = file.readline(200).decode(self.encoding, "replace")
        separator = "tabs" if self.name.lower().endswith(".tsv") else "commas"
        return f"; its first line is {shortened(line)}, and {separator} should separate its columns"

    def _check_captions(self, head: list[dict[str, Any]], *, named: bool) -> None:
        """Raises UsageError if no row could have a caption, by the column's type."""
        where, field = self.folder.address(self.name), self.caption_column
        if self.name.lower().endswith(".parquet"):
            with self.folder.open(self.name) as file:
                schema = pq.ParquetFile(file).schema_arrow
            column = field if field in schema.names else field.partition(".")[0]
            check_type(schema.field(column).type, field, named, where)
        else:
            check_values([entry_of(row, field) for row in head], field, named, where)

    def _root(self, paths: list[str]) -> str:
        """The folder in which the files of these rows are: that of the table, or else the first with most of them."""
        own = self.name.rpartition("/")[0]
        own = f"{own}/" if own else ""
        tried = [path for path in map(self._inside_root, paths[:_TRIED_ROWS]) if path]
        if not tried or any(self.folder.exists(own + path) for path in tried):
            return own
        roots = list(dict.fromkeys([own, "", *_subfolders(self.folder, own), *_subfolders(self.folder, "")]))
        stem = self.name.rpartition("/")[2].partition(".")[0].lower()
        roots.sort(key=lambda root: root.rstrip("/").rpartition("/")[2].lower() not in stem)  # captions_train: train/
        hits = {root: sum(self.folder.exists(root + path) for path in tried) for root in roots[:_TRIED_ROOTS]}
        best = max(hits, key=lambda root: hits[root])
        return best if hits[best] else own

    def rows(self) -> Iterator[CaptionRow]:
        """All rows in their order, streamed."""
        with self.folder.open(self.name) as file:
            for place, record in self._records(file):
                if isinstance(record, str):
                    yield CaptionRow(place, "", {}, record)
                    continue
                value = record.get(self.file_column)
                if not isinstance(value, str) or not value.strip():
                    yield CaptionRow(place, "", {}, f"its {self.file_column!r} names no file")
                else:
                    yield CaptionRow(place, self._relative(value.strip()), record)

    def _relative(self, path: str) -> str:
        """A path as a table has it, relative to the folder: `./a.jpg`, `x\\a.jpg` and the folder's own absolute path are
        understood."""
        path = self._slashed(path)
        inside = path.removeprefix(self.folder.path.rstrip("/") + "/")
        if inside != path or path.startswith("/"):
            return posixpath.normpath(inside)
        return posixpath.normpath(self.root + path)

    def _slashed(self, path: str) -> str:
        """A path with slashes, where the table was written under Windows."""
        return path.replace("\\", "/") if self._has_backslashes else path

    def _inside_root(self, path: str) -> str:
        """A path that a root may be put before; "" for others."""
        plain = posixpath.normpath(path.strip() or "/")
        return "" if plain.startswith(("/", "..")) or "\0" in plain or plain == "." else plain

    def _records(self, file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """(place, fields) of every row, or (place, what is wrong with it)."""
        name, address = self.name.lower(), self.folder.address(self.name)
        if name.endswith(".parquet"):
            return _parquet_records(file, address, self._wanted)
        if name.endswith(".jsonl"):
            return _json_records(file)
        if name.endswith(".json"):
            return json_table(file.read(MAX_JSON_BYTES), address)
        return _csv_records(file, "\t" if name.endswith(".tsv") else ",", self.encoding, address)


def _subfolders(folder: Folder, where: str) -> list[str]:
    """The subfolders of a folder, those with the name of a tree of images first; each with a slash at its end."""
    try:
        entries = list_folder(folder, where.encode())
    except OSError:
        return []
    names = sorted(entry.name.decode("utf-8", "replace") for entry in entries if entry.is_folder)
    return [f"{where}{name}/" for name in sorted(names, key=lambda name: not is_image_tree(name.encode()))]


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of at most MAX_METADATA_BYTES; a longer one comes in pieces, none of which can be read as a row."""
    return iter(lambda: file.readline(MAX_METADATA_BYTES), b"")


def _json_records(file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                yield f"row {number}", json_object(line)
            except ReadProblem as problem:
                yield f"row {number}", problem.message


def _csv_records(
    file: IO[bytes], delimiter: str, encoding: str, address: str
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Rows of a csv with a header. Values stay strings, as they stand there; bytes that are no text are kept for now."""
    lines = (line.decode(encoding, "surrogateescape") for line in _lines(file))
    first = next(lines, "").removeprefix("\ufeff")  # before a quote, a byte order mark would become part of the name
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
    header: list[str] | None = None
    number = 0
    while True:
        number += 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"row {number}", f"it cannot be read: {error}"
            continue
        if header is None and values:
            header = [name.strip() for name in values]
            check_distinct(header, address)
        elif header is not None and len(values) == len(header):
            yield f"row {number}", dict(zip(header, values, strict=True))
        elif values:
            yield f"row {number}", f"it has {len(values)} values for {len(header or ())} columns"


def _parquet_records(
    file: IO[bytes], address: str, wanted: Container[str | None]
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Rows of a parquet file. Its binary columns are left out, but for those that are called like captions or wanted."""
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        check_distinct(schema.names, address)
        kept = [
            item.name for item in schema if not _is_binary(item.type) or item.name in wanted or _may_caption(item.name)
        ]
        texts = [item.name for item in schema if item.name in kept and (_is_text(item.type) or _is_binary(item.type))]
        number = 0
        for batch in table.iter_batches(batch_size=4096, columns=kept):
            raw = {name: list(map(readable, raw_values(batch.column(name)))) for name in texts}
            for place, record in enumerate(arrow_rows(batch, raw)):
                number += 1
                bad = next((name for name in texts if isinstance(raw[name][place], bytes)), None)
                yield f"row {number}", record if bad is None else f"its {bad!r} is not UTF-8"
    except (pa.ArrowException, ValueError) as error:
        raise UsageError(f"{address} cannot be read as parquet: {error}") from error


def _may_caption(name: str) -> bool:
    return plain_name(name) in CAPTION_FIELDS


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def json_table(data: bytes, address: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The rows of a json file that captions many images. Raises UsageError if it is none.

    COCO's annotations (`images` and `annotations`: a row for each image, with a list of its captions), a list of objects,
    or an object with an entry for each image (kohya's meta_cap.json): its text, its texts, or its fields.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{address} cannot be read as a table of captions: {error}") from error
    if isinstance(value, dict) and isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        value = _coco_rows(value)
    elif isinstance(value, dict):
        value = [
            {"file_name": name, **(item if isinstance(item, dict) else {"caption": item})}
            for name, item in value.items()
        ]
    if not isinstance(value, list):
        raise UsageError(f"{address} is no table of captions: a list, an object by image, or COCO's annotations")
    for number, row in enumerate(value, 1):
        try:
            yield f"row {number}", json_fields(row) if isinstance(row, dict) else "it is no object"
        except MetadataError as error:
            yield f"row {number}", str(error)


def _coco_rows(coco: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each image of COCO's annotations, with all of its captions."""
    captions: dict[Any, list[Any]] = {}
    for annotation in coco["annotations"]:
        if isinstance(annotation, dict):
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
    images = [image for image in coco["images"] if isinstance(image, dict)]
    return [{**image, "captions": captions.get(str(image.get("id")), [])} for image in images]
