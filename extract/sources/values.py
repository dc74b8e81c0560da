"""Foreign values as JSON: whatever stands in a cell of a table, a field of a json, or a row of a dataset.

json_value() never raises. What JSON knows stays as it is; NaN and infinities become null; times, durations, decimals,
UUIDs and paths become text; bytes hex digits; arrays and sets lists. What has no form at all becomes null.

Columns of a table are converted as a whole. Where that fails, each cell has a way out of its own, so that a date in the
year 200000 or a time zone that nobody knows costs nothing but its own cell.
"""

import dataclasses
import datetime
import decimal
import enum
import fractions
import ipaddress
import json
import math
import pathlib
import re
import uuid
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from extract.sources import Failure, RawSample
from shards.metadata import MAX_METADATA_BYTES, MAX_METADATA_DEPTH, MetadataError, check_metadata

MAX_INT_BITS = 2048
"""A larger integer becomes hex digits: Python can be told to refuse integers of more than 640 decimal digits."""
_MAX_INT = 1 << MAX_INT_BITS
_GROWTH = 8
"""What is shorter than a limit by this factor cannot exceed it as JSON (a control character takes 6 bytes for 1)."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXT_LIKE = (
    *(uuid.UUID, pathlib.PurePath, fractions.Fraction, complex, range),
    *(ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network),
)
_MEDIA = {"bytes", "path"}


# ---- single values ---------------------------------------------------------------------------------------------------


def json_value(value: Any) -> Any:
    """A value as JSON can hold it. Never raises; null for what has no form, is too large or nested too deep."""
    try:
        return _convert(value, MAX_METADATA_DEPTH, [MAX_METADATA_BYTES])
    except Exception:  # whatever the methods of a foreign object raise
        return None


def json_fields(fields: Mapping[Any, Any], size: int | None = None) -> dict[str, Any]:
    """Metadata as a JSON object within the limits. Raises MetadataError, and nothing else.

    size: about how many bytes they are; where that is known and far below the limit, they are not counted again.
    """
    try:
        converted: dict[str, Any] = _convert(fields, MAX_METADATA_DEPTH, [MAX_METADATA_BYTES])
    except RecursionError as error:
        raise MetadataError(f"it is nested more than {MAX_METADATA_DEPTH} deep") from error
    if size is None or size > MAX_METADATA_BYTES // _GROWTH:
        check_metadata(converted)
    return converted


def within_limits(row: dict[str, Any], size: int) -> dict[str, Any] | str:
    """The row, or what is wrong with it. size: about how many bytes it has; far below the limit they are not counted."""
    if size <= MAX_METADATA_BYTES // _GROWTH:
        return row
    try:
        json_fields(row)
    except MetadataError as error:
        return str(error)
    return row


def parse_json_object(data: str | bytes) -> dict[str, Any]:
    """A JSON object of a foreign file, its values as JSON can hold them again. Raises MetadataError, saying what is wrong."""
    try:
        value = json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise MetadataError(f"it is a JSON {type(value).__name__}, not an object")
    return json_fields(value, len(data))


def _convert(value: Any, depth: int, room: list[int]) -> Any:
    """depth: how many levels may follow. room: how many values may follow, over all of a call (a list that holds itself
    twice would have 2^depth). Raises MetadataError where one of them is used up."""
    convert = _SCALARS.get(type(value))
    if convert is not None:
        return convert(value)

    if isinstance(value, pa.Scalar):  # some of them are mappings, too
        return _scalar(value, depth, room)
    if isinstance(value, Mapping):
        _enter(len(value), depth, room)
        return _object(value, depth, room)
    if isinstance(value, list | tuple | deque):
        _enter(len(value), depth, room)
        return [_convert(item, depth - 1, room) for item in value]
    if isinstance(value, AbstractSet):
        _enter(len(value), depth, room)
        return sorted((_convert(item, depth - 1, room) for item in value), key=json.dumps)
    if isinstance(value, enum.Enum):
        return _convert(value.value, depth - 1, room)
    return _odd(value, depth, room)


def _enter(length: int, depth: int, room: list[int]) -> None:
    if depth <= 0:
        raise MetadataError(f"it is nested more than {MAX_METADATA_DEPTH} deep")
    room[0] -= length
    if room[0] < 0:
        raise MetadataError(f"it has more than {MAX_METADATA_BYTES:,} bytes, which is the limit")


def _object(value: Mapping[Any, Any], depth: int, room: list[int]) -> dict[str, Any]:
    if len(value) == len(_MEDIA) and value.keys() == _MEDIA and isinstance(value["bytes"], bytes | None):
        # An image or sound as Hugging Face stores it: its bytes are no metadata.
        return {"path": _convert(value["path"], depth - 1, room)}

    fields: dict[str, Any] = {}
    for key, item in value.items():
        name = key if type(key) is str and key.isascii() else _convert(key, depth, room)
        name = name if isinstance(name, str) else json.dumps(name)
        while name in fields:  # 1 and "1" are two keys in Python
            name += "_"
        convert = _SCALARS.get(type(item))
        fields[name] = convert(item) if convert is not None else _convert(item, depth - 1, room)
    return fields


def _odd(value: Any, depth: int, room: list[int]) -> Any:
    """Everything that is not of JSON's own kinds, nor a collection of Python's."""
    if isinstance(value, np.generic) and not isinstance(value, np.character):
        return _of_numpy(value, depth, room)
    for kind, convert in _SUBCLASSES:
        if isinstance(value, kind):
            return convert(value)
    if isinstance(value, _TEXT_LIKE):
        return _text(str(value))
    if isinstance(value, np.ndarray):
        _enter(value.size, depth, room)
        items = value.tolist() if value.dtype.kind in "biufSU" or value.ndim == 0 else list(value)
        return _convert(items, depth, room)
    if isinstance(value, pa.Array | pa.ChunkedArray):
        _enter(len(value), depth, room)
        return [_scalar(item, depth - 1, room) for item in value]
    return None


def _of_numpy(value: Any, depth: int, room: list[int]) -> Any:
    if isinstance(value, np.datetime64 | np.timedelta64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, np.complexfloating):
        return str(value)
    if isinstance(value, np.floating):
        return _number(float(value))
    plain = value.item()
    return None if isinstance(plain, np.generic) else _convert(plain, depth, room)


def _same(value: Any) -> Any:
    return value


def _text(value: str) -> str:
    """Text that UTF-8 can hold: halves of a surrogate pair that stand alone become U+FFFD."""
    if value.isascii() or not _SURROGATE.search(value):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _integer(value: int) -> int | str:
    return value if -_MAX_INT < value < _MAX_INT else hex(value)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _decimal(value: decimal.Decimal) -> str | None:
    return str(value) if value.is_finite() else None


def _hex(value: Any) -> str:
    if len(value) > MAX_METADATA_BYTES:
        raise MetadataError(f"it has more than {MAX_METADATA_BYTES:,} bytes, which is the limit")
    return bytes(value).hex()


def _time(value: Any) -> str | None:
    """ISO 8601; pandas has a time that is none. A time zone whose rules cannot be asked is left out."""
    if value != value:
        return None
    try:
        return str(value.isoformat())
    except Exception:  # whatever a foreign time zone raises
        return str(value.replace(tzinfo=None).isoformat())


def _duration(value: datetime.timedelta) -> str | None:
    return None if value != value else str(value)


_SCALARS: dict[type, Callable[[Any], Any]] = {
    str: _text,
    int: _integer,
    float: _number,
    bool: _same,
    type(None): _same,
    bytes: _hex,
    decimal.Decimal: _decimal,
    datetime.datetime: _time,
    datetime.date: _time,
    datetime.time: _time,
    datetime.timedelta: _duration,
}
_SUBCLASSES: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (str, lambda value: _text(str.__str__(value))),
    (int, lambda value: _integer(int(value))),
    (float, lambda value: _number(float(value))),
    (bytes | bytearray | memoryview, _hex),
    (decimal.Decimal, _decimal),
    (datetime.date | datetime.time, _time),
    (datetime.timedelta, _duration),
)


# ---- columns of tables -----------------------------------------------------------------------------------------------


def arrow_rows(
    batch: pa.RecordBatch, known: Mapping[str, Sequence[Any]] = MappingProxyType({})
) -> list[dict[str, Any] | str]:
    """The rows as JSON objects, or what is wrong with a row. Never raises; a cell above the limit is never copied.

    known: the values of columns that the caller has converted already, in its own way.
    """
    names, faults = batch.schema.names, dict[int, str]()
    sizes = np.zeros(batch.num_rows, np.int64)
    columns = []
    for name, column in zip(names, batch.columns, strict=True):
        if _is_media(column.type):
            columns.append(known.get(name) or _paths(column))
            continue
        lengths = _lengths(column)
        too_long = np.flatnonzero(lengths > MAX_METADATA_BYTES).tolist()
        for row in too_long:
            faults.setdefault(
                row,
                f"its {name!r} has {int(lengths[row]):,} bytes; {MAX_METADATA_BYTES:,} are allowed "
                "(source.columns can leave a column out)",
            )
        columns.append(known.get(name) or _values(column, faults, name, frozenset(too_long)))
        sizes += lengths

    rows: list[dict[str, Any]] = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    rows = rows or [{} for _ in range(batch.num_rows)]  # there are no columns
    checked: list[dict[str, Any] | str] = [*rows]
    for row in np.flatnonzero(sizes > MAX_METADATA_BYTES // _GROWTH).tolist():
        checked[row] = within_limits(rows[row], int(sizes[row]))
    for row, fault in faults.items():
        checked[row] = fault
    return checked


def column_values(column: pa.Array) -> list[Any]:
    """The cells of a column as JSON values. Never raises; null for a cell that is beyond the limits of metadata."""
    too_long = np.flatnonzero(_lengths(column) > MAX_METADATA_BYTES).tolist()
    return _values(column, {}, "", frozenset(too_long))


def _is_media(kind: pa.DataType) -> bool:
    """Whether a column holds images or sounds as Hugging Face stores them."""
    return pa.types.is_struct(kind) and {field.name for field in kind} == _MEDIA


def _paths(column: pa.StructArray) -> list[Any]:
    """Of images and sounds what _object() keeps; their bytes are not touched."""
    paths = _values(pc.struct_field(column, "path"), {}, "path", frozenset())
    return [{"path": path} if there else None for path, there in zip(paths, column.is_valid().to_pylist(), strict=True)]


def _values(column: pa.Array, faults: dict[int, str], name: str, leave_out: frozenset[int]) -> list[Any]:
    """faults: gets a sentence for each row whose cell is beyond the limits."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _of_dictionary(column, faults, name)
    if not leave_out:
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
            return list(column.to_pylist())
        if pa.types.is_floating(kind):
            return [None if value is None else _number(value) for value in column.to_pylist()]
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return _strings(column)

    cells: Iterator[Any] | list[Any]
    try:
        cells = column if leave_out else column.to_pylist()
    except Exception:  # one cell that Python cannot hold is enough: a far date, a time zone, text that is no UTF-8
        cells = column
    values = []
    for row, cell in enumerate(cells):
        try:
            values.append(None if row in leave_out else _convert(cell, MAX_METADATA_DEPTH - 1, [MAX_METADATA_BYTES]))
        except MetadataError as error:
            faults.setdefault(row, f"its {name!r} cannot be kept: {error}")
            values.append(None)
        except Exception:  # as in json_value
            values.append(None)
    return values


def _of_dictionary(column: pa.DictionaryArray, faults: dict[int, str], name: str) -> list[Any]:
    """Each value of the dictionary is converted once, however many rows have it."""
    too_long = np.flatnonzero(_lengths(column.dictionary) > MAX_METADATA_BYTES).tolist()
    bad = dict[int, str]()
    known = _values(column.dictionary, bad, name, frozenset(too_long))
    indices = column.indices.to_pylist()
    for row, index in enumerate(indices if bad else ()):
        if index in bad:
            faults.setdefault(row, bad[index])
    return [None if index is None else known[index] for index in indices]


def _strings(column: pa.Array) -> list[Any]:
    """A parquet file may hold text that is no UTF-8: its bad bytes become U+FFFD."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        cells = column.cast(pa.large_binary()).to_pylist()
        return [None if cell is None else cell.decode("utf-8", "replace") for cell in cells]


def _lengths(column: pa.Array) -> np.ndarray:
    """About how many bytes each cell has, int64; never less than an eighth of its JSON."""
    kind, count = column.type, len(column)
    if isinstance(kind, pa.BaseExtensionType):
        return _lengths(column.storage)
    if pa.types.is_primitive(kind) or pa.types.is_null(kind):
        return np.full(count, 8, np.int64)
    if pa.types.is_dictionary(kind):
        lengths = np.append(_lengths(column.dictionary), 0)
        return lengths[column.indices.fill_null(len(lengths) - 1).to_numpy(zero_copy_only=False)]
    try:
        lengths = pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return _nested_lengths(column)
    return np.asarray(lengths, np.int64)


def _nested_lengths(column: pa.Array) -> np.ndarray:
    """Of lists, structs and the like. All of a column that is small as a whole is small; else each cell is asked, and counted
    so high that its JSON is measured."""
    measured = MAX_METADATA_BYTES // _GROWTH + 1
    try:
        if column.nbytes <= MAX_METADATA_BYTES:
            return np.full(len(column), measured, np.int64)
        found = [max(column.slice(row, 1).nbytes, measured) for row in range(len(column))]
        return np.array(found, np.int64)
    except pa.ArrowException:
        return np.full(len(column), measured, np.int64)


def _scalar(value: pa.Scalar, depth: int, room: list[int]) -> Any:
    """One cell of an arrow column."""
    try:
        return _convert(value.as_py(), depth, room)
    except MetadataError:
        raise
    except UnicodeDecodeError:
        text = isinstance(value, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar)
        return value.as_buffer().to_pybytes().decode("utf-8", "replace") if text else None
    except Exception:  # arrow's conversion of one cell raises all kinds of errors
        return _odd_scalar(value, depth, room)


def _odd_scalar(value: pa.Scalar, depth: int, room: list[int]) -> Any:
    """What arrow holds and Python does not: by its parts, and times by what arrow has stored."""
    kind = value.type
    if not value.is_valid:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        return _scalar(value.value, depth, room)
    if pa.types.is_struct(kind):
        _enter(len(kind), depth, room)
        return {kind.field(i).name: _scalar(value[i], depth - 1, room) for i in range(kind.num_fields)}
    if hasattr(value, "values") and isinstance(value.values, pa.Array):
        _enter(len(value.values), depth, room)
        return [_scalar(item, depth - 1, room) for item in value.values]
    if pa.types.is_dictionary(kind):
        return _scalar(value.dictionary[value.index.as_py()], depth, room)
    return _odd_time(value)


def _odd_time(value: pa.Scalar) -> str | None:
    kind = value.type
    if pa.types.is_timestamp(kind):
        moment = str(np.datetime64(value.value, kind.unit))
        return moment if kind.tz is None else f"{moment}+00:00"  # arrow keeps moments of a zone in UTC
    if pa.types.is_date(kind):
        return str(np.datetime64(value.value, "D" if pa.types.is_date32(kind) else "ms"))
    if pa.types.is_duration(kind):
        return str(np.timedelta64(value.value, kind.unit))
    if pa.types.is_time(kind):
        return str(np.datetime64(value.value, kind.unit)).partition("T")[2]
    return None


# ---- what is kept ----------------------------------------------------------------------------------------------------


OURS = frozenset({"intrinsics"})
"""Fields of a sample's json that belong to us in every dataset."""


def kept_fields(
    fields: Mapping[str, Any], columns: Container[str] | None, ours: Container[str], suffix: str = "_of_source"
) -> dict[str, Any]:
    """The fields that `source.columns` keeps (None: all). One that has a name of ours gets the suffix, and hides nothing."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if columns is not None and name not in columns:
            continue
        free = name
        if name in ours:
            free = name + suffix
            while free in fields or free in kept:
                free += "_"
        kept[free] = value
    return kept


def with_kept_fields(
    output: RawSample | Failure, columns: Collection[str] | None, always: tuple[str, ...] = ()
) -> RawSample | Failure:
    """A sample of a foreign source with the fields that are kept. always: those that we have added."""
    if isinstance(output, Failure):
        return output
    kept = None if columns is None else {*columns, *always}
    if kept is None and not OURS & output.meta.keys():
        return output
    return dataclasses.replace(output, meta=kept_fields(output.meta, kept, OURS))
