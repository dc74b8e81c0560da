"""Tables of URLs and captions as a source (LAION, COYO, CC12M, DataComp, one's own). docs/urls.md is its manual.

A unit names ranges of rows; the worker reads those rows itself, filters them, downloads what is left, and gives one
output for every row, in the order of the table. Planning holds one bit for each row (to find repeated URLs) and the
names of the tables, whatever the number of rows.

A row's key is the number of its table and its own number in it, both counted from 0: "00012-000034567". Keys stay the
same as long as the list of tables does, or grows at its end.
"""

import dataclasses
import hashlib
import json
import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np

from extract.download.downloader import Batch, Downloaded, Downloader, DownloadSettings
from extract.download.responses import DownloadProblem
from extract.reasons import REASONS
from extract.sources import Failure, InputFile, RawSample, Unit
from extract.sources.caption_names import WEB_FIELDS, likely_fields, usual_fields
from extract.sources.caption_reader import caption_of_value, check_named, entry_of, raw_values, readable
from extract.sources.caption_report import CaptionReport, Glance, report_of
from extract.sources.files import ReadProblem, place_of
from extract.sources.filters import Column, Filters, listed
from extract.sources.url_tables import Cut, Table, find_tables, read_errors
from extract.sources.values import json_value, kept_fields
from shards.core.errors import UsageError, UserError
from shards.edit.duplicates import Repeats, find_repeats

URL_COLUMNS = ("url", "image_url", "img_url", "image_link")  # in any mix of upper and lower case
MAX_CAPTION_BYTES = 64 << 10
SCREENED_ROWS = 256  # filtered together
_OURS = ("intrinsics", "download")  # fields of a sample's json that a column must not hide
_KEY = re.compile(r"(\d{5,})-(\d{9,})")
_COUNTED_BYTES = 256 << 20
_UNREADABLE = re.compile("[\ud800-\udfff]")


class Range(NamedTuple):
    """Rows of one table. repeated: for each column of `distinct`, the rows (from cut.start) that repeat an earlier one.

    only: the rows (from cut.start) that are meant; None for all.
    """

    table: int
    address: str
    cut: Cut
    repeated: tuple[tuple[str, tuple[int, ...]], ...] = ()
    only: tuple[int, ...] | None = None


class Columns(NamedTuple):
    """Where a table has what we need. values: for the filters; hashes: (sha256 or md5, column).

    caption: the column, or `column.entry`; "" if there are no captions. caption_root: the column itself.
    """

    url: str
    caption: str
    caption_root: str
    values: dict[str, str]
    hashes: tuple[tuple[str, str], ...]

    @property
    def raw(self) -> frozenset[str]:
        """The columns whose text is looked at before it becomes JSON."""
        return frozenset((self.url, self.caption_root)) - {""}


class UrlRow(NamedTuple):
    """A row that is to be downloaded."""

    key: str
    url: str
    caption: str
    fields: dict[str, Any]
    hashes: dict[str, str]


@dataclass(frozen=True)
class UrlSource:
    """tables: files, folders, globs or braces, local or fsspec, of parquet, csv, tsv or jsonl; one or a list.

    url_column, caption_column: found by usual names if not given (`caption.en` is an entry of a struct).
    captions: "auto", or "none": there are none (so does caption_column = "").
    encoding: of csv and tsv files that are not UTF-8.
    header: the columns' names, for csv and tsv files that have none.
    distinct: what must not be the same in two rows; the first row that passes the filters is kept. "url"; "content":
        the downloaded bytes, within one shard; or the name of a column, such as a hash that the table states.
    verify_hash: refuse images that have not the md5 or sha256 that a column of this name (or sha256_column, md5_column)
        states.
    columns: those that are kept in the samples' json; None for all. Others are not read where nothing else needs them.
    """

    tables: str | tuple[str, ...]
    url_column: str | None = None
    caption_column: str | None = None
    header: tuple[str, ...] = ()
    distinct: tuple[str, ...] = ("url",)
    verify_hash: bool = True
    sha256_column: str | None = None
    md5_column: str | None = None
    columns: tuple[str, ...] | None = None
    captions: Literal["auto", "none"] = "auto"
    encoding: str | None = None
    filters: Filters = field(default_factory=Filters)
    download: DownloadSettings = field(default_factory=DownloadSettings)

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: open connections stay where they are."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # ---- planning ----------------------------------------------------------------------------------------------------

    @cached_property
    def _tables(self) -> list[Table]:
        return [Table(address, self.header, self.encoding) for address in find_tables(self.tables)]

    def describe(self) -> dict[str, Any]:
        """The names, sizes and last 64 KiB of all tables as one digest, and the settings that choose rows."""
        digest, size = hashlib.sha256(), 0
        with ThreadPoolExecutor(16) as pool:
            known = pool.map(lambda table: table.size_and_digest, self._tables)
            for table, (table_size, tail) in zip(self._tables, known, strict=True):
                name = table.address.rsplit("/", 1)[-1]
                digest.update(f"{name}\0{table_size}\0{tail}\n".encode())
                size += max(0, table_size)
        settings = json.loads(json.dumps(dataclasses.asdict(self)))  # with lists, as dataset.json gives them back
        del settings["tables"], settings["download"]
        for name, default in (("columns", None), ("captions", "auto"), ("encoding", None)):
            if settings[name] == default:
                del settings[name]  # as in datasets from before there was this setting
        names = "\0".join(table.address.rsplit("/", 1)[-1] for table in self._tables)
        return {
            "kind": "urls",
            "tables": len(self._tables),
            "bytes": size,
            "listing": digest.hexdigest(),
            "names": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16],
            "place": place_of(*(table.address for table in self._tables)),
            **settings,
        }

    def total(self) -> int | None:
        """The number of rows; None if text tables of more than 256 MiB would have to be read to know it."""
        texts = [table for table in self._tables if not table.is_parquet]
        if texts and sum(table.size_and_tail()[0] for table in texts) > _COUNTED_BYTES:
            return None
        with ThreadPoolExecutor(16) as pool:
            return sum(pool.map(Table.count, self._tables))

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        """Units of `shard_size` rows in the order of the tables; the last one has what is left."""
        self._columns(self._tables[0])  # wrong settings are told before any work
        repeats = self._repeats(limit)
        ranges: list[Range] = []
        index, room, before, left = 0, shard_size, 0, limit
        for number, table in enumerate(self._tables):
            rows = 0
            for cut in table.cuts(room, shard_size):
                rows = cut.stop
                if left is not None:
                    cut = cut._replace(stop=min(cut.stop, cut.start + left))
                    left -= cut.stop - cut.start
                if cut.stop > cut.start:
                    first, last = before + cut.start, before + cut.stop
                    repeated = tuple((name, tuple(found.within(first, last))) for name, found in repeats.items())
                    ranges.append(Range(number, table.address, cut, repeated))
                    room -= cut.stop - cut.start
                if ranges and (room == 0 or left == 0):
                    yield Unit(index, tuple(ranges), self._files(ranges))
                    index, room, ranges = index + 1, shard_size, []
                if left == 0:
                    return
            before += rows
        if ranges:
            yield Unit(index, tuple(ranges), self._files(ranges))

    def again(self, keys: Iterable[str], shard_size: int, first_index: int) -> Iterator[Unit]:
        """Units of these rows alone, in the order of the tables, for another attempt at what failed. Raises UsageError."""
        numbers = array("q")  # table and row of each key, in turn: 16 bytes, as there may be millions
        for key in keys:
            match = _KEY.fullmatch(key)
            if not match or int(match[1]) >= len(self._tables):
                raise UsageError(
                    f"{key!r} is not the key of a row of these tables; were they changed since the first run?"
                )
            numbers.extend((int(match[1]), int(match[2])))
        rows = np.array(numbers, np.int64).reshape(-1, 2)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        position = -1
        cuts: Iterator[Cut] = iter(())
        cut = Cut(0, 0, 0)
        for index, begin in enumerate(range(0, len(rows), shard_size), first_index):
            ranges = []
            for number, group in groupby(rows[begin : begin + shard_size].tolist(), key=lambda row: row[0]):
                table, wanted = self._tables[number], [row for _, row in group]
                if number != position:
                    position, cuts, cut = number, table.cuts(shard_size, shard_size), Cut(0, 0, 0)
                while cut.stop <= wanted[0]:  # a text table is read on from the start of the range that the row is in
                    following = next(cuts, None)
                    if following is None:
                        raise UsageError(f"{table.address} has no row {wanted[0]}; was it changed since the first run?")
                    cut = following
                only = tuple(row - cut.start for row in wanted)
                ranges.append(Range(number, table.address, cut._replace(stop=wanted[-1] + 1), (), only))
            yield Unit(index, tuple(ranges), self._files(ranges))

    def _files(self, ranges: Iterable[Range]) -> tuple[InputFile, ...]:
        return tuple(self._tables[number].file for number in dict.fromkeys(part.table for part in ranges))

    def _repeats(self, limit: int | None) -> dict[str, Repeats]:
        """For each column of `distinct`, which of the first `limit` rows repeat an earlier one that passes the filters."""
        known: dict[int | None, dict[str, Repeats]] = self._known_repeats
        if limit not in known:
            found: dict[str, Repeats] = {}
            for name in self.distinct:
                if name != "content":
                    found[name] = find_repeats(self._texts(name, list(found.values()), limit))
            known[limit] = found
        return known[limit]

    @cached_property
    def _known_repeats(self) -> dict[int | None, dict[str, Repeats]]:
        return {}

    def _texts(self, name: str, earlier: Sequence[Repeats], limit: int | None) -> Iterator[list[str | None]]:
        """What must be distinct, row by row; None where a row is dropped anyway."""
        row = 0
        for table in self._tables:
            columns = self._columns(table)
            column = columns.url if name == "url" else name
            if column and column not in table.columns:
                raise UsageError(
                    f"source.distinct names {name!r}, but {table.address} has only {', '.join(table.columns)}"
                )
            needed = {column, columns.url, *columns.values.values()}
            if columns.caption:
                needed.add(columns.caption_root)
            stop = (1 << 60) if limit is None else limit - row
            for batch in table.batches(sorted(needed), stop):
                texts = listed(batch[column])
                captions, bad = self._captions_of(columns, batch, len(texts))
                values = {quantity: batch[name] for quantity, name in columns.values.items()}
                counts = self.filters.passing(values, captions)
                counts[list(bad)] = False  # a failure; it must not take the rows after it along
                addresses = [_is_url(readable(url)) for url in raw_values(batch[columns.url])]
                counts &= np.array(addresses, bool)
                for found in earlier:
                    counts[found.within(row, row + len(texts))] = False
                kept = zip(texts, counts.tolist(), strict=True)
                if column == columns.url:
                    yield [
                        text.strip() or None if counted and isinstance(text, str) else None for text, counted in kept
                    ]
                else:
                    yield [
                        str(text).strip() or None if counted and text is not None else None for text, counted in kept
                    ]
                row += len(texts)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        """One sample or failure for each row of the unit, in order; downloads run ahead of what is taken."""
        ahead = max(256, 4 * self.download.concurrency)
        waiting: deque[Failure | tuple[UrlRow, int]] = deque()
        contents: dict[str, str] = {}  # sha256 -> key
        with self._downloader.batch() as batch:
            for item in (item for part in unit.items for item in self._rows(part)):
                waiting.append(item if isinstance(item, Failure) else (item, batch.submit(item.url, item.key)))
                if len(waiting) > ahead:
                    yield self._output(waiting.popleft(), batch, contents)
            while waiting:
                yield self._output(waiting.popleft(), batch, contents)

    @cached_property
    def _downloader(self) -> Downloader:
        return Downloader(self.download)

    def close(self) -> None:
        """Closes the connections, if there are any. The source can be used again."""
        if downloader := self.__dict__.pop("_downloader", None):
            downloader.close()

    def _rows(self, part: Range) -> Iterator[UrlRow | Failure]:
        """The rows of a range: what is to be downloaded, and a failure for every other."""
        table = Table(part.address, self.header, self.encoding)
        wanted = iter(range(part.cut.stop - part.cut.start) if part.only is None else part.only)
        following = next(wanted, None)
        group: list[tuple[int, dict[str, Any] | str]] = []
        try:
            columns = self._columns(table)
            for number, row in enumerate(table.rows(part.cut, self._needed(table, columns), columns.raw)):
                if number == following:
                    group.append((number, row))
                    following = next(wanted, None)
                if len(group) == SCREENED_ROWS:
                    yield from self._screen(part, columns, group)
                    group = []
            yield from self._screen(part, columns, group)
            group = []
            problem = "it has fewer rows than before"
        except UsageError:
            raise
        except UserError as error:
            problem = str(error)
        except read_errors() as error:
            problem = str(error)
        missing = [number for number, _ in group] + ([] if following is None else [following, *wanted])
        for number in missing:
            yield Failure(self._key(part, number), "read", "table_unreadable", f"{table.address}: {problem}")

    @staticmethod
    def _key(part: Range, number: int) -> str:
        return f"{part.table:05d}-{part.cut.start + number:09d}"

    def _screen(
        self, part: Range, columns: Columns, group: Sequence[tuple[int, dict[str, Any] | str]]
    ) -> Iterator[UrlRow | Failure]:
        """Filters rows that were read together."""
        good = [row if isinstance(row, dict) else {} for _, row in group]
        names = [columns.url, columns.caption_root, *columns.values.values()]
        batch = {name: [row.get(name) for row in good] for name in names}
        captions, bad = self._captions_of(columns, batch, len(good))
        values = {quantity: batch[name] for quantity, name in columns.values.items()}
        drops = self.filters.drops(values, captions)
        repeated = [(name, frozenset(numbers)) for name, numbers in part.repeated]
        for place, ((number, row), drop) in enumerate(zip(group, drops, strict=True)):
            key = self._key(part, number)
            try:
                if isinstance(row, str):
                    raise ReadProblem("bad_row", f"row {part.cut.start + number} of {part.address} is bad: {row}")
                if problem := bad.get(place):
                    raise problem
                if drop:
                    raise ReadProblem(*drop)
                repeats = [name for name, numbers in repeated if number in numbers]
                yield self._row(key, row, captions[place], columns, repeats)
            except ReadProblem as problem:
                yield Failure(key, REASONS[problem.reason].stage, problem.reason, problem.message)

    def _row(self, key: str, row: dict[str, Any], caption: str, columns: Columns, repeats: Sequence[str]) -> UrlRow:
        if not _is_url(readable(row.get(columns.url))):
            raise ReadProblem("bad_row", f"its {columns.url!r} is not a URL")
        row = {name: json_value(readable(value)) if name in columns.raw else value for name, value in row.items()}
        url = str(row[columns.url])
        for name in repeats:
            if name == "url":
                raise ReadProblem("filtered_repeated_url", "an earlier row has the same URL")
            raise ReadProblem(
                "filtered_repeated_hash", f"an earlier row has the same {name} {str(row.get(name))[:80]!r}"
            )
        hashes = {kind: str(row[name]).strip().lower() for kind, name in columns.hashes if row.get(name)}
        return UrlRow(key, url.strip(), caption, row, hashes)

    def _output(
        self, item: Failure | tuple[UrlRow, int], batch: Batch, contents: dict[str, str]
    ) -> RawSample | Failure:
        if isinstance(item, Failure):
            return item
        row, place = item
        outcome = batch.result(place)
        try:
            if isinstance(outcome, DownloadProblem):
                raise ReadProblem(outcome.reason, outcome.message)
            return self._sample(row, outcome, contents)
        except ReadProblem as problem:
            return Failure(row.key, REASONS[problem.reason].stage, problem.reason, problem.message)

    def _sample(self, row: UrlRow, downloaded: Downloaded, contents: dict[str, str]) -> RawSample:
        digest = hashlib.sha256(downloaded.data).hexdigest()
        for kind, stated in row.hashes.items():
            found = digest if kind == "sha256" else hashlib.md5(downloaded.data, usedforsecurity=False).hexdigest()
            if found != stated:
                raise ReadProblem("hash_mismatch", f"its {kind} is {found}; the table states {stated[:80]!r}")
        if "content" in self.distinct and contents.setdefault(digest, row.key) != row.key:
            raise ReadProblem("filtered_repeated_content", f"its bytes are the same as those of {contents[digest]}")
        meta = kept_fields(row.fields, self.columns, _OURS, "_of_table")
        if not {"url", "URL"} & meta.keys():
            meta["url"] = row.url
        meta.setdefault("sha256", digest)
        return RawSample(row.key, downloaded.data, row.caption, {**meta, "download": downloaded.record})

    # ---- columns -----------------------------------------------------------------------------------------------------

    def _columns(self, table: Table) -> Columns:
        """Where this table has what the settings ask for. Raises UsageError if it lacks something."""
        names = table.columns
        if not names and not table.is_parquet:  # an empty file; or no line can be read, and each will be a bad row
            return Columns("", "", "", dict.fromkeys(self.filters.needs, ""), ())
        url = _column(table, self.url_column, URL_COLUMNS, "url_column", "the URLs")
        caption, root = self._caption_column(table)
        hashes = []
        if self.verify_hash:
            for kind, given in (("sha256", self.sha256_column), ("md5", self.md5_column)):
                if given is not None:
                    hashes.append((kind, _column(table, given, (), f"{kind}_column", f"the {kind}")))
                else:
                    hashes += [(kind, name) for name in names if name.lower() == kind]
        for name in self.columns or ():
            if name not in names:
                raise UsageError(f"source.columns names {name!r}, but {table.address} has only {', '.join(names)}")
        return Columns(url, caption, root, self.filters.columns(names, table.address), tuple(hashes))

    def _needed(self, table: Table, columns: Columns) -> list[str] | None:
        """The columns to read, in the table's order; None for all."""
        if self.columns is None:
            return None
        needed = {columns.url, columns.caption_root, *columns.values.values(), *self.columns, *self.distinct}
        needed.update(name for _, name in columns.hashes)
        return [name for name in table.columns if name in needed]

    def _caption_column(self, table: Table) -> tuple[str, str]:
        """The field of the captions (`caption`, `caption.en`), and its column; "" twice without captions.

        Raises UsageError if there is none, or it cannot hold captions.
        """
        if self.captions == "none" or self.caption_column == "":
            return "", ""
        if (field := self.caption_column) is not None:
            check_named(field, table.columns, table.address)
        else:
            usual = usual_fields(table.columns, WEB_FIELDS)
            if not usual:
                likely = "".join(f"; {name!r} looks like it" for name in likely_fields(table.columns)[:1])
                raise UsageError(
                    f"none of the columns of {table.address} has a usual name for the captions (they are: "
                    f"{', '.join(table.columns) or 'none'}){likely}; name it with source.caption_column, or set "
                    "source.captions to 'none' if it has no captions"
                )
            field = usual[0]
        table.check_captions(field, named=self.caption_column is not None)
        return field, field if field in table.columns else field.partition(".")[0]

    def _captions_of(
        self, columns: Columns, batch: Mapping[str, Column], count: int
    ) -> tuple[list[str], dict[int, ReadProblem]]:
        """The captions of `count` rows, given as columns, and of those that have none to use what is wrong; by their places.

        The same in planning and in work: so a row that fails never takes a later one with the same URL along.
        """
        if not columns.caption:
            return [""] * count, {}
        named = self.caption_column is not None
        captions: list[str] = []
        bad: dict[int, ReadProblem] = {}
        for place, value in enumerate(raw_values(batch[columns.caption_root])):
            caption = ""
            if columns.caption != columns.caption_root:
                value = entry_of({columns.caption_root: value}, columns.caption)
            try:
                caption = caption_of_value(value, columns.caption, MAX_CAPTION_BYTES, named=named).strip()
            except ReadProblem as problem:
                bad[place] = problem
            captions.append(caption)
        return captions, bad

    # ---- what is said of captions ------------------------------------------------------------------------------------

    def caption_report(self, limit: int | None = None) -> CaptionReport:
        """Where captions come from, by the columns and the first rows."""
        if self.captions == "none" or self.caption_column == "":
            return CaptionReport(inputs=0, filled=0, complete=True, wanted=False)
        report = report_of(self._glances(), limit=limit, notes=tuple(self._notes()))
        first = self._tables[0]
        taken = self._columns(first)
        further = [
            f"the column {name!r} (--set source.caption_column={name} takes it)"
            for name in likely_fields(first.columns)
            if name not in (taken.caption_root, taken.url)
        ]
        return dataclasses.replace(report, passed_over=(*report.passed_over, *further))

    def _glances(self) -> Iterator[Glance]:
        for table in self._tables:
            columns = self._columns(table)
            if not columns.caption:
                continue
            origin = f"column {columns.caption!r}"
            try:
                for batch in table.batches([columns.caption_root], 1 << 60):
                    captions, bad = self._captions_of(columns, batch, len(batch[columns.caption_root]))
                    yield from (Glance(origin, text) for place, text in enumerate(captions) if place not in bad)
            except UsageError:
                raise
            except UserError:
                return  # its rows are failures of their own

    def _notes(self) -> Iterator[str]:
        """Tables whose encoding was found out, and those whose quotes are taken for text."""
        found = [table for table in self._tables if not table.is_parquet and table.text_encoding != "utf-8"]
        if found and self.encoding is None:
            names = ", ".join(table.address.rsplit("/", 1)[-1] for table in found[:3])
            yield (
                f"{names}{', ...' if len(found) > 3 else ''}: not UTF-8, read as {found[0].text_encoding}; if that is wrong, "
                "name another with source.encoding"
            )
        quoted = [table for table in self._tables if table.has_quoted_fields]
        if quoted:
            name = quoted[0].address.rsplit("/", 1)[-1]
            yield (
                f"{name}: fields in quotes keep them, as a tsv has no quotes of its own; where a csv was meant, call it .csv "
                "and separate by commas"
            )


def _column(table: Table, given: str | None, usual: Sequence[str], setting: str, what: str) -> str:
    available = ", ".join(table.columns) or "none"
    if given is not None:
        if given not in table.columns:
            raise UsageError(f"{table.address} has no column {given!r}; its columns: {available}")
        return given
    by_name = {name.lower(): name for name in reversed(table.columns)}
    found = next((by_name[name] for name in usual if name in by_name), None)
    if found is None:
        raise UsageError(
            f"none of the columns of {table.address} has a usual name for {what} (they are: {available}); name it with "
            f"source.{setting}"
        )
    return found


def _is_url(value: Any) -> TypeGuard[str]:
    """Whether a cell may be one; what it leads to is seen later."""
    return isinstance(value, str) and bool(value.strip()) and _UNREADABLE.search(value) is None
