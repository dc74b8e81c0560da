"""Tables of URLs of any size: parquet, csv, tsv and jsonl files, local or at any fsspec URL, read by ranges of rows.

Nothing here holds more than a batch of rows in memory. A row of a parquet file is found by its number; a row of a text
file by its number and the byte where the range that it belongs to starts, which planning notes on its one pass.
"""

import contextlib
import csv
import hashlib
import itertools
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from extract.sources import InputFile
from extract.sources.caption_reader import check_distinct, check_type, check_values, entry_of, raw_values
from extract.sources.encodings import HEAD_BYTES, checked_encoding, table_encoding
from extract.sources.filters import Column
from extract.sources.tars import expand_braces
from extract.sources.values import arrow_rows, json_value, parse_json_object, within_limits
from shards.core.errors import UsageError, UserError
from shards.metadata import MAX_METADATA_BYTES, MetadataError

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
_BATCH_ROWS = 4096
_BATCH_BYTES = 64 << 20
csv.field_size_limit(max(csv.field_size_limit(), MAX_METADATA_BYTES))
_HEAD_ROWS = 100
_STORE_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("httpx2", "HTTPError"),
    ("httpx", "HTTPError"),
    ("aiohttp", "ClientError"),
)


class Cut(NamedTuple):
    """Rows start..stop of a table. offset: the byte where row `start` begins; 0 in a parquet file, which needs none."""

    start: int
    stop: int
    offset: int


def read_errors() -> tuple[type[Exception], ...]:
    """What reading a table raises that is damaged, has gone away, or lies in a store that cannot be reached."""
    loaded = (
        (sys.modules.get(module), name) for module, name in _STORE_ERRORS
    )  # there only if such a store was opened
    return (OSError, EOFError, pa.ArrowException, *(getattr(module, name) for module, name in loaded if module))


def find_tables(patterns: str | Sequence[str]) -> list[str]:
    """The addresses of all tables that are meant: files, folders (the tables directly inside), globs and braces.

    Sorted within each pattern; with the protocol in front if there is one. Raises UserError if there are none.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for plain in expand_braces(pattern):
            found += _matches(plain)
    if not found:
        raise UserError(
            f"no table fits {patterns if isinstance(patterns, str) else ', '.join(patterns)}; name files or folders of "
            f"{', '.join(SUFFIXES)} with source.tables"
        )
    doubled = next((address for address, group in itertools.groupby(sorted(found)) if len(list(group)) > 1), None)
    if doubled:
        raise UsageError(f"the table {doubled} is named twice in source.tables")
    return found


def _matches(pattern: str) -> list[str]:
    try:
        fs, path = url_to_fs(pattern)
        if any(letter in pattern for letter in "*?["):
            paths = [str(match) for match in fs.glob(path)]
        elif fs.isdir(path):
            paths = [str(name) for name in fs.ls(path, detail=False)]
        else:
            if not pattern.endswith(SUFFIXES):
                raise UsageError(f"{pattern} is not a table; the names of tables end in {', '.join(SUFFIXES)}")
            if not fs.exists(path):
                raise UserError(f"there is no table {pattern}; check source.tables")
            return [pattern]
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {pattern}: {error}") from error
    except read_errors() as error:
        hint = (
            "; check the connection, or set source.tables to a folder of downloaded tables" if "://" in pattern else ""
        )
        raise UserError(
            f"cannot look for tables in {pattern}: {getattr(error, 'strerror', None) or error}{hint}"
        ) from error
    kept = sorted(path for path in paths if path.endswith(SUFFIXES) and not Path(path).name.startswith((".", "_")))
    return [path if "://" not in pattern else str(fs.unstrip_protocol(path)) for path in kept]


@dataclass(frozen=True)
class Table:
    """One table. header: the names of its columns if the file has none of its own (csv, tsv).

    encoding: of a text table, as the user named it; None: UTF-8, or found out.
    """

    address: str
    header: tuple[str, ...] = ()
    encoding: str | None = None

    @property
    def is_parquet(self) -> bool:
        return self.address.endswith(".parquet")

    def _open(self) -> Any:
        return fsspec.open(self.address, "rb")

    @cached_property
    def columns(self) -> list[str]:
        """The names of the columns; of a jsonl file those of its first rows.

        Raises UserError if it cannot be read, UsageError if two columns have one name.
        """
        if self.is_parquet:
            names = list(self._schema.names)
        elif self.address.endswith(".jsonl"):
            names = list(dict.fromkeys(name for row in self._head for name in row))
        else:
            with self._reading() as file:
                names = list(self.header) or self._own_header(_Lines(file))
        check_distinct(names, self.address)
        return names

    @cached_property
    def _schema(self) -> pa.Schema:
        """The columns of a parquet file."""
        with self._reading() as file:
            return pq.ParquetFile(file).schema_arrow

    @cached_property
    def _head(self) -> list[dict[str, Any]]:
        """The first rows of a jsonl file."""
        with self._reading() as file:
            rows = itertools.islice(self._json_rows(_Lines(file)), _HEAD_ROWS)
            return [row for row in rows if isinstance(row, dict)]

    @cached_property
    def text_encoding(self) -> str:
        """The encoding of a text table. Raises UsageError if the user must name it."""
        if self.address.endswith(".jsonl"):
            return checked_encoding(self.encoding) if self.encoding else "utf-8"
        with self._reading() as file:
            return table_encoding(file.read(HEAD_BYTES), self.encoding, self.address)

    @cached_property
    def has_quoted_fields(self) -> bool:
        """Whether the first rows of a tsv look as if a writer of csv had put quotes around fields, and doubled those inside."""
        if not self.address.endswith(".tsv"):
            return False
        with self._reading() as file:
            rows = itertools.islice(self._reader(_Lines(file)), _HEAD_ROWS)
            fields = [field for row in rows if isinstance(row, list) for field in row if field.startswith('"')]
        return any('""' in field[1:-1] or field.count('"') % 2 for field in fields)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[IO[bytes]]:
        """The file, opened; what goes wrong with it is a UserError."""
        try:
            with self._open() as file:
                yield file
        except read_errors() as error:
            raise UserError(f"cannot read the table {self.address}: {error}") from error

    def check_captions(self, field: str, named: bool) -> None:
        """Raises UsageError if this column (or `column.entry`) cannot hold captions."""
        column = field if field in self.columns else field.partition(".")[0]
        if self.is_parquet:
            check_type(self._schema.field(column).type, field, named, self.address)
            return
        if self.address.endswith(".jsonl"):
            check_values([entry_of(row, field) for row in self._head], field, named, self.address)

    def _own_header(self, lines: "_Lines") -> list[str]:
        return next((fields for fields in self._reader(lines) if isinstance(fields, list)), [])

    @cached_property
    def file(self) -> InputFile:
        """The table as an input: its size, and a digest of its last 64 KiB."""
        size, digest = self.size_and_digest
        return InputFile(self.address.rsplit("/", 1)[-1], size, digest[:16])

    @cached_property
    def size_and_digest(self) -> tuple[int, str]:
        """The file's size, and the sha256 of its last 64 KiB."""
        size, tail = self.size_and_tail()
        return size, hashlib.sha256(tail).hexdigest()

    def size_and_tail(self) -> tuple[int, bytes]:
        """The file's size (-1 if unknown) and its last 64 KiB: of a parquet file its footer, which describes the rest."""
        try:
            fs, path = url_to_fs(self.address)
            size = fs.info(path).get("size")
            return (-1, b"") if size is None else (size, fs.cat_file(path, start=max(0, size - 65536), end=size))
        except read_errors() as error:
            raise UserError(f"cannot read the table {self.address}: {error}") from error

    def count(self) -> int:
        """How many rows there are; a look at the footer of a parquet file, a pass over any other."""
        return sum(cut.stop - cut.start for cut in self.cuts(1 << 60, 1 << 60))

    def cuts(self, first: int, step: int) -> Iterator[Cut]:
        """All rows in order, in one range of `first` rows and then ranges of `step`; lazy."""
        try:
            with self._open() as file:
                starts = self._parquet_starts(file) if self.is_parquet else self._text_starts(file)
                yield from _cut(starts, first, step)
        except read_errors() as error:
            raise UserError(f"cannot read the table {self.address}: {error}") from error

    def _parquet_starts(self, file: IO[bytes]) -> int:
        return int(pq.ParquetFile(file).metadata.num_rows)

    def _text_starts(self, file: IO[bytes]) -> Iterator[int]:
        """The byte where each row starts; the end of the file at last."""
        lines = _Lines(file)
        if not self.header and not self.address.endswith(".jsonl"):
            self._own_header(lines)
        rows = _json_lines(lines) if self.address.endswith(".jsonl") else self._reader(lines)
        offset = lines.position
        for _ in rows:
            yield offset
            offset = lines.position
        yield offset

    def rows(
        self, cut: Cut, columns: Sequence[str] | None = None, raw: Container[str] = ()
    ) -> Iterator[dict[str, Any] | str]:
        """The rows of a range as JSON values, or what is wrong with a row. Raises one of read_errors().

        columns: of a parquet file, those that are needed; others are not read. raw: columns whose values stay as they are:
        text that is not Unicode as bytes, or with surrogates.
        """
        if cut.start >= cut.stop:
            return
        with self._open() as file:
            if self.is_parquet:
                needed = None if columns is None else list(columns)
                for batch in _parquet_batches(pq.ParquetFile(file), needed, cut.start, cut.stop):
                    known = {name: list(raw_values(batch.column(name))) for name in batch.schema.names if name in raw}
                    yield from arrow_rows(batch, known)
            else:
                file.seek(cut.offset)
                yield from itertools.islice(self._text_rows(_Lines(file), raw), cut.stop - cut.start)

    def batches(self, names: Sequence[str], stop: int) -> Iterator[Mapping[str, Column]]:
        """The columns `names` of the first `stop` rows, in batches, as rows(raw=names) has them.

        Raises UserError if it cannot be read.
        """
        try:
            with self._open() as file:
                if self.is_parquet:
                    for batch in _parquet_batches(pq.ParquetFile(file), list(names), 0, stop):
                        yield {name: batch.column(name) for name in names}
                    return
                lines = _Lines(file)
                if not self.header and not self.address.endswith(".jsonl"):
                    self._own_header(lines)
                rows = itertools.islice(self._text_rows(lines, names), stop)
                while group := list(itertools.islice(rows, _BATCH_ROWS)):
                    yield {name: [row.get(name) if isinstance(row, dict) else None for row in group] for name in names}
        except read_errors() as error:
            raise UserError(f"cannot read the table {self.address}: {error}") from error

    # ---- text --------------------------------------------------------------------------------------------------------

    def _reader(self, lines: "_Lines") -> Iterator[list[str] | str]:
        """The fields of each row, or what is wrong with it; blank lines are no rows.

        csv is read with double quotes, as Excel and pandas write it; in tsv a quote is a character like any other.
        """
        texts = (line.decode(self.text_encoding, "surrogateescape") for line in lines)
        if self.address.endswith(".tsv"):
            yield from (text.rstrip("\r\n").split("\t") for text in texts if text.strip("\r\n"))
            return
        reader = csv.reader(texts)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield str(error)
                continue
            if fields:
                yield fields

    def _text_rows(self, lines: "_Lines", raw: Container[str]) -> Iterator[dict[str, Any] | str]:
        if self.address.endswith(".jsonl"):
            yield from self._json_rows(lines)
            return
        columns = self.columns
        position = lines.position
        for fields in self._reader(lines):
            size, position = lines.position - position, lines.position
            if isinstance(fields, str):
                yield f"it is not csv: {fields}"
            elif len(fields) != len(columns):
                yield f"it has {len(fields)} fields; the table has {len(columns)} columns"
            else:
                row = {
                    name: text if text.isascii() or name in raw else json_value(text)
                    for name, text in zip(columns, fields, strict=True)
                }
                yield within_limits(row, size)

    def _json_rows(self, lines: "_Lines") -> Iterator[dict[str, Any] | str]:
        """The rows of a jsonl file, or what is wrong with a row."""
        encoding = self.text_encoding
        for line in _json_lines(lines):
            try:
                yield parse_json_object(line if encoding == "utf-8" else line.decode(encoding))
            except UnicodeDecodeError as error:
                yield f"it is not {encoding}: {error}"
            except MetadataError as error:
                yield str(error)


class _Lines:
    """The lines of a file from where it stands, and the byte where the next one starts.

    A line above MAX_METADATA_BYTES comes in pieces, none of which is likely to be a row.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.position = file.tell()
        if self.position == 0 and file.read(3) == b"\xef\xbb\xbf":
            self.position = 3
        file.seek(self.position)

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(MAX_METADATA_BYTES):
            self.position += len(line)
            yield line


def _json_lines(lines: _Lines) -> Iterator[bytes]:
    return (line for line in lines if line.strip())


def _cut(rows: int | Iterable[int], first: int, step: int) -> Iterator[Cut]:
    """Ranges of rows, of their number, or of the bytes where they start (with the end of the file as the last)."""
    if isinstance(rows, int):
        start, size = 0, first
        while start < rows:
            stop = min(start + size, rows)
            yield Cut(start, stop, 0)
            start, size = stop, step
        return
    start, size, offset, number = 0, first, 0, 0
    for number, position in enumerate(rows):
        if number == start:
            offset = position
        if number == start + size:
            yield Cut(start, number, offset)
            start, size, offset = number, step, position
    if number > start:
        yield Cut(start, number, offset)


def _parquet_batches(
    file: pq.ParquetFile, columns: list[str] | None, start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    """The rows start..stop; row groups without any of them are not read, and of others only a batch at a time is held."""
    first = 0
    for group in range(file.num_row_groups):
        last = first + file.metadata.row_group(group).num_rows
        if last > start and first < stop:
            position = first
            rows = _rows_at_once(file.metadata.row_group(group))
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                low, high = max(start - position, 0), min(stop - position, batch.num_rows)
                if low < high:
                    yield batch.slice(low, high - low)
                position += batch.num_rows
                if position >= stop:
                    return
        first = last


def _rows_at_once(group: pq.RowGroupMetaData) -> int:
    """Fewer where rows are large, so that a batch is not."""
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
