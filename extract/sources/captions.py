"""Captions and metadata of a folder's images: from .txt and .json beside them, or from the rows of one table."""

import csv
import itertools
import posixpath
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from extract.sources.files import ReadProblem
from extract.sources.values import arrow_rows, parse_json_object
from shards.core.errors import UsageError
from shards.core.storage import Folder
from shards.metadata import MAX_METADATA_BYTES, MetadataError

CAPTION_FIELDS = ("caption", "text", "prompt", "description", "title")  # in any mix of upper and lower case
FILE_FIELDS = ("file", "file_name", "filename", "file_path", "filepath", "path", "image", "image_path")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
csv.field_size_limit(max(csv.field_size_limit(), MAX_METADATA_BYTES))


class Row(NamedTuple):
    """One row of a table. path: the image's, normalised, relative to the folder; "" if the row has none that is usable.

    place: where the row stands ("row 12"). problem: why the row cannot be used, or "".
    """

    place: str
    path: str
    fields: dict[str, Any]
    problem: str = ""


# ---- text and json ---------------------------------------------------------------------------------------------------


def caption_of_bytes(data: bytes, limit: int) -> str:
    """The caption in a text file. Raises ReadProblem."""
    try:
        return checked_caption(data.decode("utf-8-sig"), limit)
    except UnicodeDecodeError as error:
        raise ReadProblem("caption_not_utf8", f"the caption file is not UTF-8 (byte {error.start})") from error


def checked_caption(text: str, limit: int) -> str:
    """A caption without the white space around it. Raises ReadProblem if it is too long, or is no proper text."""
    if "\0" in text:
        raise ReadProblem("caption_not_utf8", "the caption has NUL characters in it (is it UTF-16?)")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ReadProblem("caption_not_utf8", f"the caption is not UTF-8 (character {error.start})") from error
    if size > limit:
        raise ReadProblem("caption_too_long", f"the caption has {size} bytes; {limit} are allowed")
    return text.strip()


def json_object(data: str | bytes) -> dict[str, Any]:
    """A JSON object whose values JSON can hold again. Raises ReadProblem if it is broken, no object, or beyond the limits."""
    try:
        return parse_json_object(data)
    except MetadataError as error:
        raise ReadProblem("bad_metadata", f"the json cannot be used: {error}") from error


def caption_in(fields: Mapping[str, Any], field: str | None, limit: int) -> str:
    """The caption among metadata: in the field of this name, else in the first of CAPTION_FIELDS that is there.

    A list of captions gives its first. Raises ReadProblem if the value is no text.
    """
    if field is None:
        names = sorted(fields)
        field = next((name for usual in CAPTION_FIELDS for name in names if name.lower() == usual), None)
    value = fields.get(field) if field is not None else None
    if isinstance(value, list) and value:
        value = value[0]
    if value is None or value == []:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ReadProblem("bad_metadata", f"the caption {field!r} is a {type(value).__name__}, not text")
    return checked_caption(str(value), limit)


# ---- tables ----------------------------------------------------------------------------------------------------------


class Table:
    """A table of captions in a folder: csv or tsv with a header, jsonl, or parquet.

    file_column, caption_column: the columns; found by their usual names (FILE_FIELDS, CAPTION_FIELDS) if None.
    columns: all of them, by the first row.
    """

    def __init__(self, folder: Folder, name: str, file_column: str | None, caption_column: str | None) -> None:
        self.folder, self.name = folder, name
        with folder.open(name) as file:
            self.columns = self._columns(file)
        self.file_column = self._column(file_column, FILE_FIELDS, "file_column", "names the image files")
        self.caption_column = self._column(caption_column, CAPTION_FIELDS, "caption_column", "holds captions")

    def _columns(self, file: IO[bytes]) -> list[str]:
        """The columns of the first row that can be read."""
        return next((list(record) for _, record in self._records(file) if not isinstance(record, str)), [])

    def _column(self, given: str | None, usual: tuple[str, ...], setting: str, what: str) -> str:
        address, columns = self.folder.address(self.name), self.columns
        if given is not None:
            if given not in columns:
                raise UsageError(f"{address} has no column {given!r}; it has {', '.join(columns) or 'none'}")
            return given
        found = [name for name in columns if name.lower() in usual]
        if len(found) == 1:
            return found[0]
        problem = (
            f"has several columns that may be meant: {', '.join(found)}" if found else "has none with a usual name"
        )
        raise UsageError(
            f"{address} should have a column that {what}, but {problem} (its columns: {', '.join(columns) or 'none'}); "
            f"name it with source.{setting}, or set source.captions to 'beside' or 'none' if this is no table of captions"
        )

    def rows(self) -> Iterator[Row]:
        """All rows in their order, streamed."""
        with self.folder.open(self.name) as file:
            for place, record in self._records(file):
                if isinstance(record, str):
                    yield Row(place, "", {}, record)
                    continue
                value = record.get(self.file_column)
                if not isinstance(value, str) or not value.strip():
                    yield Row(place, "", {}, f"its {self.file_column!r} names no file")
                else:
                    yield Row(place, self._relative(value.strip()), record)

    def _relative(self, path: str) -> str:
        """A path as a table has it, relative to the folder: `./a.jpg` and the folder's own absolute path are understood."""
        root = self.folder.path.rstrip("/") + "/"
        return posixpath.normpath(path.removeprefix(root))

    def _records(self, file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """(place, fields) of every row, or (place, what is wrong with it)."""
        if self.name.endswith(".parquet"):
            return _parquet_records(file, self.folder.address(self.name))
        if self.name.endswith(".jsonl"):
            return _json_records(file)
        return _csv_records(file, "\t" if self.name.endswith(".tsv") else ",")


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


def _csv_records(file: IO[bytes], delimiter: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Rows of a csv with a header. Values stay strings, as they stand there; bytes that are not UTF-8 are kept for now."""
    lines = (line.decode("utf-8", "surrogateescape") for line in _lines(file))
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
        elif header is not None and len(values) == len(header):
            yield f"row {number}", dict(zip(header, values, strict=True))
        elif values:
            yield f"row {number}", f"it has {len(values)} values for {len(header or ())} columns"


def _parquet_records(file: IO[bytes], address: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        columns = [field.name for field in schema if not _is_binary(field.type)]
        number = 0
        for batch in table.iter_batches(batch_size=4096, columns=columns):
            for record in arrow_rows(batch):
                number += 1
                yield f"row {number}", record
    except (pa.ArrowException, ValueError) as error:
        raise UsageError(f"{address} cannot be read as parquet: {error}") from error


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
