"""Hugging Face datasets as a source: a folder written by `save_to_disk`, an imagefolder, or a dataset of the hub.

A saved folder is read by ranges of rows; everything else by `load_dataset`. With `streaming` (the default for the hub)
nothing is downloaded beforehand, and one unit is one file of the dataset; without it, units are ranges of rows.
No code of a dataset is run: `datasets` reads data files only.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from extract.sources import Failure, InputFile, RawSample, Unit
from extract.sources.caption_names import HUB_FIELDS, likely_fields, usual_fields
from extract.sources.caption_reader import caption_of_value, check_named, check_type, entry_of, raw_values, readable
from extract.sources.caption_report import CaptionReport, Glance, report_of
from extract.sources.files import ReadProblem, input_file
from extract.sources.filters import Filters
from extract.sources.values import OURS, arrow_rows, json_value, kept_fields
from shards.core.errors import UsageError, UserError
from shards.marks import digest

_NAMED_FILES = 64
MAX_CAPTION_BYTES = 1 << 20


@dataclass(frozen=True)
class HuggingFaceSource:
    """dataset: a local folder or a hub id. config, split, revision: as `load_dataset` takes them.

    image, caption: the columns; found by their type and by usual names when not given (`caption.en`: an entry of a struct).
    captions: "auto", or "none": they are left out.
    columns: those that are kept in the samples' json; None for all that are no images, sounds or the like.
    filters: on the other columns, and on the caption; applied before an image is decoded.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    image: str | None = None
    caption: str | None = None
    streaming: bool | None = None
    columns: tuple[str, ...] | None = None
    captions: Literal["auto", "none"] = "auto"
    filters: Filters = field(default_factory=Filters)

    @property
    def _streams(self) -> bool:
        return not Path(self.dataset).exists() if self.streaming is None else self.streaming

    @cached_property
    def _data(self) -> Any:
        """The datasets.Dataset or IterableDataset, its image column left undecoded."""
        import datasets

        path = Path(self.dataset)
        try:
            if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(self.dataset)
            elif path.is_dir() and not any(path.rglob("*.parquet")):
                loaded = datasets.load_dataset("imagefolder", data_dir=self.dataset, split=self.split)
            else:
                loaded = datasets.load_dataset(
                    self.dataset, self.config, split=self.split, revision=self.revision, streaming=self._streams
                )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"the Hugging Face dataset {self.dataset!r} cannot be loaded: {error}") from error
        if isinstance(loaded, datasets.DatasetDict):
            if self.split not in loaded:
                raise UsageError(f"{self.dataset!r} has no split {self.split!r}; it has {', '.join(loaded)}")
            loaded = loaded[self.split]
        return loaded.cast_column(self._image_column(loaded), datasets.Image(decode=False))

    def _image_column(self, data: Any) -> str:
        import datasets

        found = [name for name, kind in (data.features or {}).items() if isinstance(kind, datasets.Image)]
        if self.image:
            if self.image not in (data.features or {self.image}):
                raise UsageError(f"{self.dataset!r} has no column {self.image!r}; it has {', '.join(data.features)}")
            return self.image
        if len(found) != 1:
            columns = ", ".join(data.features or ())
            raise UsageError(f"name the image column of {self.dataset!r} with source.image; its columns are {columns}")
        return found[0]

    def _caption_column(self) -> str | None:
        """The column, or `column.entry`. Raises UsageError if it is not there, or cannot hold captions."""
        if self.captions == "none" or self.caption == "":
            return None
        features, columns = self._data.features or {}, self._columns
        if self.caption is not None:
            check_named(self.caption, columns, repr(self.dataset), "caption")
        inside = [f"json.{name}" for name in usual_fields(_entries(features.get("json")), HUB_FIELDS)]
        field = self.caption or next(iter((*usual_fields(columns, HUB_FIELDS), *inside)), None)
        if field is not None and features and self._label(field) is None:
            column = field if field in columns else field.partition(".")[0]
            kind = self._data.features.arrow_schema.field(column).type
            check_type(kind, field, self.caption is not None, f"the dataset {self.dataset!r}", "caption")
        return field

    @cached_property
    def _columns(self) -> list[str]:
        """The names of the columns; of a stream that does not know them, those of its first row."""
        return list(self._data.features or next(iter(self._data.take(1)), {}))

    def _label(self, field: str) -> Any:
        """The ClassLabel of a column, whose numbers have names, or of its list; None for any other."""
        import datasets

        feature = (self._data.features or {}).get(field)
        if isinstance(feature, list) and feature:
            feature = feature[0]
        feature = getattr(feature, "feature", feature)
        return feature if isinstance(feature, datasets.ClassLabel) else None

    def _caption(self, row: dict[str, Any], field: str | None) -> str:
        """The caption of a row. Raises ReadProblem."""
        if field is None:
            return ""
        value = entry_of(row, field)
        if (label := self._label(field)) is not None:
            value = _named(value, label)
        return caption_of_value(value, field, MAX_CAPTION_BYTES, named=self.caption is not None)

    def caption_report(self, limit: int | None = None) -> CaptionReport:
        """Where captions come from, by the columns and the first rows."""
        if self.captions == "none" or self.caption == "":
            return CaptionReport(inputs=0, filled=0, complete=True, wanted=False)
        column, image = self._caption_column(), self._image_column(self._data)
        report = report_of(self._glances(column), limit=limit)
        others = likely_fields(name for name in self._columns if name not in (column, image))
        further = tuple(f"the column {name!r} (--set source.caption={name} takes it)" for name in others)
        return dataclasses.replace(report, passed_over=further)

    def _glances(self, column: str | None) -> Iterator[Glance]:
        names = [column.partition(".")[0] if column not in (self._data.features or {}) else column] if column else []
        rows = self._data.select_columns(names) if names and self._data.features else self._data
        rows = rows.with_format("arrow")
        if not names:
            yield from (Glance("", "") for _ in range(self.total() or 1))
            return
        for row in rows:
            try:
                cells = {name: raw_values(row.column(name).combine_chunks())[0] for name in names}
                yield Glance(f"column {column!r}", self._caption(cells, column))
            except ReadProblem:
                continue  # a failure of its own

    def describe(self) -> dict[str, Any]:
        fingerprint = getattr(self._data, "_fingerprint", None) if not self._is_stream() else None
        return {
            "kind": "huggingface",
            "names": digest({"names": [file.name for file in self._files]})[:16],
            "dataset": self.dataset,
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "image": self.image,
            "caption": self.caption,
            "filters": json.loads(json.dumps(dataclasses.asdict(self.filters))),
            "fingerprint": fingerprint,
            **({} if self.columns is None else {"columns": list(self.columns)}),
            **({} if self.captions == "auto" else {"captions": self.captions}),
        }

    @cached_property
    def _files(self) -> list[InputFile]:
        """The files of the dataset, as they are now; many small ones (images of an imagefolder) as one."""
        import datasets

        if self._is_saved and (cached := self._data.cache_files):
            tag = str(self._data._fingerprint)  # set when the dataset was saved
            return [dataclasses.replace(input_file(file["filename"]), tag=tag) for file in cached]
        as_folder = Path(self.dataset).is_dir() and not any(Path(self.dataset).rglob("*.parquet"))
        arguments: dict[str, Any] = {"data_dir": self.dataset} if as_folder else {"revision": self.revision}
        path, config = ("imagefolder", None) if as_folder else (self.dataset, self.config)
        try:
            builder = datasets.load_dataset_builder(path, config, **arguments)
            addresses = list((builder.config.data_files or {}).get(self.split) or ())
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"the files of the dataset {self.dataset!r} cannot be listed: {error}") from error
        with ThreadPoolExecutor(16) as pool:
            files = list(pool.map(input_file, map(str, addresses)))
        if len(files) <= _NAMED_FILES:
            return files
        content = digest({"files": [dataclasses.astuple(file) for file in files]})[:16]
        return [
            InputFile(f"the {len(files)} files of {self.dataset}", sum(max(0, file.size) for file in files), content)
        ]

    @property
    def _is_saved(self) -> bool:
        path = Path(self.dataset)
        return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()

    def _files_of(self, index: int) -> tuple[InputFile, ...]:
        """The file of one part of a stream, where parts are files; else all."""
        return (self._files[index],) if len(self._files) == self._data.num_shards else tuple(self._files)

    def _is_stream(self) -> bool:
        import datasets

        return isinstance(self._data, datasets.IterableDataset)

    def total(self) -> int | None:
        return None if self._is_stream() else len(self._data)

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        """Ranges of rows; of a stream its own files, of which the last that `limit` reaches is cut."""
        if not self._is_stream():
            rows = len(self._data) if limit is None else min(limit, len(self._data))
            for index in range(math.ceil(rows / shard_size)):
                part = {"start": index * shard_size, "stop": min((index + 1) * shard_size, rows)}
                yield Unit(index, part, tuple(self._files))
        elif limit is None:
            for index in range(self._data.num_shards):
                yield Unit(index, {"file": index, "first": None}, self._files_of(index))
        else:
            left = limit
            for index in range(self._data.num_shards):
                if left <= 0:
                    return
                count = sum(row.num_rows for row in self._file(index).take(left))
                yield Unit(index, {"file": index, "first": count}, self._files_of(index))
                left -= count

    @cached_property
    def _rows(self) -> Any:
        """The data as arrow tables of one row: Python cannot hold every value that a dataset can."""
        return self._data.with_format("arrow")

    def _file(self, index: int) -> Any:
        return self._rows.shard(num_shards=self._data.num_shards, index=index)

    def _metadata_columns(self) -> set[str] | None:
        """The columns that are kept, if the dataset says which it has. Raises UsageError for one that is not there."""
        features = self._data.features
        for name in (self.columns or ()) if features else ():
            if name not in features:
                raise UsageError(f"source.columns names {name!r}, but {self.dataset!r} has only {', '.join(features)}")
        if self.columns is not None:
            return set(self.columns)
        return {name for name, kind in features.items() if not hasattr(kind, "decode_example")} if features else None

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        image, caption = self._image_column(self._data), self._caption_column()
        if self._data.features:
            self.filters.columns(
                list(self._data.features), self.dataset
            )  # raises if a filter needs one that is not there
        if "file" in unit.items:
            rows = self._file(unit.items["file"])
            rows = rows if unit.items["first"] is None else rows.take(unit.items["first"])
            keys = (f"{unit.items['file']:06d}-{number:08d}" for number in range(1 << 62))
        else:
            start, stop = unit.items["start"], unit.items["stop"]
            rows = (self._rows[row] for row in range(start, stop))
            keys = (f"{row:09d}" for row in range(start, stop))
        kept = self._metadata_columns()
        for key, row in zip(keys, rows, strict=False):
            yield self._output(key, row, image, caption, kept)

    def _output(
        self, key: str, row: pa.Table, image: str, caption: str | None, kept: set[str] | None
    ) -> RawSample | Failure:
        cell = row.column(image)[0].as_py()
        root = self._root(caption)
        wanted = set(row.column_names) if kept is None or self.filters.active else {*kept, root}
        needed = [name for name in row.column_names if name != image and name in wanted]
        batch = row.select(needed).combine_chunks().to_batches()[0]
        raw: dict[str, list[Any]] = {}
        if root is not None and root in needed:
            raw[root] = list(raw_values(batch.column(root)))
        known = {name: list(map(json_value, map(readable, cells))) for name, cells in raw.items()}
        fields = arrow_rows(batch, known)[0]
        if isinstance(fields, str):
            return Failure(key, "read", "bad_row", f"the row cannot be used: {fields}")
        try:
            text = self._caption({name: cells[0] for name, cells in raw.items()}, caption)
        except ReadProblem as problem:
            return Failure(key, "read", problem.reason, problem.message)
        if root is not None and not isinstance(fields.get(root), list | dict):
            fields.pop(root, None)  # of several captions those that were not taken stay
        if dropped := self.filters.drop(fields, text):
            return Failure(key, "read", *dropped)
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, None)
        if data is None and path:
            # A row can name any file of this machine; only those of the dataset's own folder are read.
            if not Path(path).resolve().is_relative_to(Path(self.dataset).resolve()):
                return Failure(key, "read", "outside", f"its image {path} lies outside the dataset {self.dataset}")
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                return Failure(key, "read", "missing_file", f"its image {path} cannot be read: {error.strerror}")
        if data is None:
            return Failure(key, "read", "no_image", f"the column {image!r} is empty")
        return RawSample(key, data, text, kept_fields(fields, kept, OURS))

    def _root(self, caption: str | None) -> str | None:
        """The column of a caption that may be an entry of it."""
        if caption is None or caption in self._columns:
            return caption
        return caption.partition(".")[0]


def _entries(feature: Any) -> list[str]:
    """The entries of a struct: a webdataset's `json` is one."""
    return list(feature) if isinstance(feature, dict) else []


def _named(value: Any, label: Any) -> Any:
    """Numbers of a ClassLabel as their names; a number that has none is no caption."""
    if isinstance(value, list):
        return [_named(item, label) for item in value]
    if isinstance(value, int) and 0 <= value < label.num_classes:
        return label.int2str(value)
    return None if value in (None, -1) else value
