"""Foreign values become JSON, whatever they are; metadata beyond the limits is refused on the way in."""

import datetime
import decimal
import enum
import ipaddress
import json
import math
import pathlib
import tracemalloc
import uuid
from collections import OrderedDict, deque
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.sources.values import arrow_rows, column_values, json_fields, json_value, kept_fields, parse_json_object
from shards.metadata import MAX_METADATA_BYTES, MAX_METADATA_DEPTH, MetadataError, check_metadata

FAR = [0, 1 << 62, -(1 << 62), None]  # in any unit, beyond what Python's datetime can hold


def stored(value: Any) -> Any:
    """What a sample's json gives back. Raises for what JSON or UTF-8 cannot hold."""
    return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())


def nested(depth: int, inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


class _Colour(enum.Enum):
    RED = "red"


class _Hostile:
    """An object all of whose methods raise."""

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError("no")

    __str__ = __repr__ = __iter__ = __len__ = __eq__ = __float__ = __int__ = __bool__ = _refuse  # type: ignore[assignment]
    __hash__ = object.__hash__


class _Zone(datetime.tzinfo):
    """A time zone whose rules cannot be asked."""

    def utcoffset(self, _: Any) -> Any:
        raise ValueError("unknown")


_LOOP: list[Any] = []
_LOOP += [_LOOP, _LOOP]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (-math.inf, None),
        (np.float32("nan"), None),
        (decimal.Decimal("NaN"), None),
        (decimal.Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime.datetime(2024, 5, 6, 7, 8, 9), "2024-05-06T07:08:09"),
        (datetime.datetime(2024, 5, 6, tzinfo=_Zone()), "2024-05-06T00:00:00"),
        (datetime.timedelta(days=1, seconds=1), "1 day, 0:00:01"),
        (np.datetime64("200000-01-01"), "200000-01-01"),
        (np.datetime64("NaT"), None),
        (np.timedelta64(3, "s"), "3 seconds"),
        (pd.NaT, None),
        (pd.NA, None),
        (pd.Timestamp("2024-05-06 07:08:09.123456789"), "2024-05-06T07:08:09.123456789"),
        (b"\x00\xff", "00ff"),
        (bytearray(b"\x01"), "01"),
        (memoryview(b"\x02"), "02"),
        ("a \ud800 b", "a \ufffd b"),
        ("\ud83d\ude00", "\U0001f600"),  # two halves that belong together
        ({"k\udcff": {"\ud800": 1}}, {"k\ufffd": {"\ufffd": 1}}),
        (10**1000, hex(10**1000)),
        (10**300, 10**300),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.longdouble("1.5"), 1.5),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([1.0, np.inf]), [1.0, None]),
        (np.array(["2024-01-01", "NaT"], "M8[D]"), ["2024-01-01", None]),
        (np.array([None, b"\x01"], object), [None, "01"]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", "a"}), ["a", "b"]),
        (deque([1, (2, 3)]), [1, [2, 3]]),
        (MappingProxyType({1: "a", "1": "b", None: "c"}), {"1": "a", "1_": "b", "null": "c"}),
        (OrderedDict(z=1, a=2), {"z": 1, "a": 2}),
        (_Colour.RED, "red"),
        (pathlib.PurePosixPath("a/b.jpg"), "a/b.jpg"),
        (ipaddress.ip_address("::1"), "::1"),
        (1 + 2j, "(1+2j)"),
        (pa.scalar([1, None], pa.list_(pa.int8())), [1, None]),
        (pa.array([1.0, math.nan]), [1.0, None]),
        ({"bytes": b"\xff" * 9, "path": "a.wav"}, {"path": "a.wav"}),
        ({"array": np.zeros(2, np.float32), "sampling_rate": 8000}, {"array": [0.0, 0.0], "sampling_rate": 8000}),
        (object(), None),
        (iter([1]), None),
        (_Hostile(), None),
        ([1, _Hostile()], [1, None]),
        (_LOOP, None),
        (nested(MAX_METADATA_DEPTH), nested(MAX_METADATA_DEPTH)),
        (nested(MAX_METADATA_DEPTH + 1), None),
        (nested(100_000), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_value_has_a_form_that_json_can_hold(value: Any, expected: Any) -> None:
    found = json_value(value)
    assert stored(found) == expected
    assert type(found) is type(expected)


def test_arrays_of_arrow_keep_each_cell_that_python_can_hold_and_text_of_the_others() -> None:
    moments = pa.array(FAR, pa.int64())
    columns = {
        "us": moments.cast(pa.timestamp("us")),
        "zone": moments.cast(pa.timestamp("s", "Mars/Olympus")),
        "day": pa.array([0, 1 << 30, -(1 << 30), None], pa.int32()).cast(pa.date32()),
        "ms": moments.view(pa.date64()),
        "duration": moments.cast(pa.duration("s")),
        "list": pa.ListArray.from_arrays([0, 2, 3, 4, 4], moments.cast(pa.timestamp("us"))),
        "struct": pa.StructArray.from_arrays([moments.cast(pa.timestamp("us"))], ["when"]),
    }
    first, second, third, last = arrow_rows(pa.record_batch(list(columns.values()), list(columns)))
    assert first == {
        "us": "1970-01-01T00:00:00",
        "zone": "1970-01-01T00:00:00+00:00",
        "day": "1970-01-01",
        "ms": "1970-01-01",
        "duration": "0:00:00",
        "list": ["1970-01-01T00:00:00", str(np.datetime64(1 << 62, "us"))],
        "struct": {"when": "1970-01-01T00:00:00"},
    }
    assert isinstance(second, dict)
    assert second["us"] == str(np.datetime64(1 << 62, "us"))  # numpy counts as far as 64 bits reach
    assert second["zone"] == f"{np.datetime64(1 << 62, 's')}+00:00"
    assert second["day"] == str(np.datetime64(1 << 30, "D"))
    assert second["ms"] == str(np.datetime64(1 << 62, "ms"))
    assert second["duration"] == f"{1 << 62} seconds"
    assert second["struct"] == {"when": second["us"]}
    assert isinstance(third, dict) and third["day"].startswith("-")
    assert last == dict.fromkeys(columns) | {"list": [], "struct": {"when": None}}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([uuid.UUID(int=5).bytes, None], pa.uuid()), [str(uuid.UUID(int=5)), None]),
        (pa.array([decimal.Decimal("1.10"), None], pa.decimal256(40, 2)), ["1.10", None]),
        (pa.array([np.float16(1.5), np.float16("nan")], pa.float16()), [1.5, None]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.array([b"\x01", None], pa.binary_view()), ["01", None]),
        (pa.array([[1], None], pa.list_view(pa.int32())), [[1], None]),
        (pa.array([[1, 2], None], pa.list_(pa.int32(), 2)), [[1, 2], None]),
        (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int8())), [[["a", 1]], None]),
        (pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int16()), pa.array(["x", None])), ["x", None]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
        (pa.DictionaryArray.from_arrays([0, 1], pa.array([0, 1 << 62]).cast(pa.timestamp("us"))),
         ["1970-01-01T00:00:00", str(np.datetime64(1 << 62, "us"))]),
        (pa.array([1, 0, None], pa.bool8()), [True, False, None]),
        (pa.array([(1, 2, 3), None], pa.month_day_nano_interval()), [[1, 2, 3], None]),
        (pa.nulls(2), [None, None]),
        (pa.array([{"bytes": b"x", "path": "m.png"}, None]), [{"path": "m.png"}, None]),
        (pa.array([b"caf\xe9", b"ok", None]).view(pa.string()), ["caf\ufffd", "ok", None]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)  # fmt: skip
def test_a_column_of_any_type_is_converted(column: pa.Array, expected: list[Any]) -> None:
    assert column_values(column) == expected
    assert arrow_rows(pa.record_batch([column], ["x"])) == [{"x": value} for value in expected]
    assert column_values(column.slice(1)) == expected[1:]


# ---- any value at all ------------------------------------------------------------------------------------------------

_ANY_TEXT = st.text() | st.text(st.characters(categories=["Cs", "Cc", "L"]))  # halves of surrogate pairs, too
_SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), _ANY_TEXT, st.decimals(), st.uuids()),
    *(st.dates(), st.times(), st.datetimes(), st.timedeltas(), st.complex_numbers(), st.fractions()),
    st.integers(0, 4000).map(lambda bits: -(1 << bits)),
    st.integers(-(2**63) + 1, 2**63 - 1).map(lambda count: np.datetime64(count, "us")),
    st.floats(width=32).map(np.float32),
    st.builds(object),
)
_KEYS = st.none() | st.booleans() | st.integers() | st.floats() | _ANY_TEXT | st.binary()
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(_KEYS, inner, max_size=4)
        | st.tuples(inner)
        | st.sets(st.integers() | _ANY_TEXT, max_size=4)
        | inner.map(lambda value: nested(40, value))
    ),
    max_leaves=12,
)


@given(_VALUES)
@settings(max_examples=100, deadline=None)
def test_any_value_survives_the_way_through_a_json_file(value: Any) -> None:
    found = json_value(value)
    assert stored(found) == found
    try:
        fields = json_fields({"value": value})
    except MetadataError:
        assert found is None or depth_of(found) > MAX_METADATA_DEPTH - 1
    else:
        assert stored(fields) == fields
        check_metadata(fields)
        assert json_fields(fields) == fields, "what was converted once stays as it is"


def depth_of(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(depth_of, items), default=0)


_ARROW_TYPES = st.recursive(
    st.sampled_from(
        [
            *(
                pa.int8(),
                pa.uint64(),
                pa.float16(),
                pa.float64(),
                pa.bool_(),
                pa.string(),
                pa.large_string(),
                pa.binary(),
            ),
            *(pa.date32(), pa.date64(), pa.time64("ns"), pa.timestamp("ns"), pa.timestamp("us", "Mars/Olympus")),
            *(pa.duration("ns"), pa.decimal128(38, 3), pa.uuid(), pa.null(), pa.binary(3), pa.string_view()),
        ]
    ),
    lambda inner: (
        inner.map(pa.list_)
        | inner.map(lambda kind: pa.struct([("a", kind), ("b", pa.string())]))
        | inner.map(lambda kind: pa.map_(pa.string(), kind))
    ),
    max_leaves=4,
)


@given(_ARROW_TYPES, st.randoms(use_true_random=False), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_any_arrow_column_becomes_one_json_value_a_cell(kind: pa.DataType, random: Any, count: int) -> None:
    column = random_column(kind, random, count)
    found = column_values(column)
    assert len(found) == count and stored(found) == found
    there = column.is_valid().to_pylist()
    assert not any(value is not None for value, is_there in zip(found, there, strict=True) if not is_there)
    if not pa.types.is_nested(kind) and not pa.types.is_floating(kind):
        assert all(value is not None for value, is_there in zip(found, there, strict=True) if is_there)
    rows = arrow_rows(pa.record_batch([column, column], ["a", "b"]))
    assert rows == [{"a": value, "b": value} for value in found]


def random_column(kind: pa.DataType, random: Any, count: int) -> pa.Array:
    """Random bits as cells of this type: what a foreign file may hold, not what arrow's builders let pass."""
    valid = pa.array([random.random() < 0.8 for _ in range(count)], pa.bool_()).buffers()[1] if count else None
    if isinstance(kind, pa.BaseExtensionType):
        return kind.wrap_array(random_column(kind.storage_type, random, count))
    if pa.types.is_null(kind):
        return pa.nulls(count)
    if pa.types.is_map(kind) or pa.types.is_list(kind):
        ends = [0]
        for _ in range(count):
            ends.append(ends[-1] + random.randrange(3))
        offsets = pa.array(ends, pa.int32())
        if pa.types.is_map(kind):
            keys = pa.array([f"k{i}" for i in range(ends[-1])], pa.string())
            return pa.MapArray.from_arrays(offsets, keys, random_column(kind.item_type, random, ends[-1]))
        return pa.ListArray.from_arrays(offsets, random_column(kind.value_type, random, ends[-1]))
    if pa.types.is_struct(kind):
        children = [random_column(field.type, random, count) for field in kind]
        return pa.StructArray.from_buffers(kind, count, [valid], children=children)
    if pa.types.is_string_view(kind):
        return pa.array([chr(random.randrange(32, 0xD800)) for _ in range(count)], kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        cells = [bytes(random.randrange(256) for _ in range(random.randrange(4))) for _ in range(count)]
        return pa.array(cells, pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()).view(kind)
    width = math.ceil(kind.bit_width * count / 8)
    return pa.Array.from_buffers(kind, count, [valid, pa.py_buffer(random.randbytes(width + 64))])


# ---- limits ----------------------------------------------------------------------------------------------------------


def fields_of(size: int) -> dict[str, Any]:
    """Metadata that has exactly this many bytes as compact JSON."""
    return {"x": "y" * (size - len('{"x":""}'))}


def test_metadata_is_refused_one_byte_and_one_level_beyond_the_limits() -> None:
    whole = fields_of(MAX_METADATA_BYTES)
    assert json_fields(whole) == parse_json_object(json.dumps(whole)) == whole
    with pytest.raises(MetadataError, match="1,048,577 bytes; 1,048,576 are allowed"):
        json_fields(fields_of(MAX_METADATA_BYTES + 1))
    deep = {"x": nested(MAX_METADATA_DEPTH - 1)}
    assert parse_json_object(json.dumps(deep)) == deep
    for depth in (MAX_METADATA_DEPTH, 200, 980, 5000):
        with pytest.raises(MetadataError, match=r"nested more than 64 deep|not JSON"):
            parse_json_object('{"x":' + "[" * depth + "]" * depth + "}")
    for size, fields in ((100, {"x": nested(970)}), (10, fields_of(MAX_METADATA_BYTES + 9))):
        with pytest.raises(MetadataError):
            check_metadata(fields)
        assert size


@pytest.mark.parametrize(
    "text",
    [
        "[" + ",".join(["1e15"] * 209_000) + "]",  # 1 MB of text; four times as much when it is written again
        json.dumps("\0" * 170_000),
        '"' + "\\ud800" * 170_000 + '"',
        json.dumps(["\x7f\u2028"] * 60_000),
    ],
)
def test_what_is_read_can_be_written_and_read_again(text: str) -> None:
    data = f'{{"x":{text}}}'.encode()
    assert len(data) <= MAX_METADATA_BYTES
    try:
        fields = parse_json_object(data)
    except MetadataError as error:
        assert "are allowed" in str(error)
    else:
        again = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(again) <= MAX_METADATA_BYTES and parse_json_object(again) == fields


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"null", b"\xff{}", b'{"x": ' + b"9" * 5000 + b"}", b"{" * 50_000, b'{"a":1}{"b":2}']
)
def test_what_is_no_json_object_is_said(data: bytes) -> None:
    with pytest.raises(MetadataError, match=r"^it is "):
        parse_json_object(data)


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_string(), pa.list_(pa.string())])
def test_a_huge_cell_costs_its_row_and_is_not_copied(kind: pa.DataType) -> None:
    size = 64 << 20
    huge = pa.py_buffer(bytes(size + 2))
    offsets = pa.array([0, 1, 1 + size, 2 + size], pa.int64())
    binary = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 3, [None, offsets.buffers()[1], huge])
    if pa.types.is_list(kind):
        binary = binary.view(pa.large_string()).cast(pa.string())
        column = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), binary)
    else:
        column = binary.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()).view(kind)
    batch = pa.record_batch([column, pa.array([1, 2, 3])], ["html", "n"])

    before, (_, _) = pa.total_allocated_bytes(), (tracemalloc.start(), tracemalloc.clear_traces())
    rows = arrow_rows(batch)
    assert column_values(column)[1] is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(rows[0], dict) and isinstance(rows[2], dict) and rows[2]["n"] == 3
    assert isinstance(rows[1], str) and "'html' has 67,108,8" in rows[1] and "1,048,576 are allowed" in rows[1]
    assert peak < 8 << 20 and pa.total_allocated_bytes() - before < 8 << 20


def test_a_row_of_many_cells_is_counted_as_a_whole() -> None:
    text = "t" * (MAX_METADATA_BYTES // 3)
    batch = pa.record_batch(
        [pa.array([text, "a"]), pa.array([text, "a"]), pa.array(["\0" * 70_000, "a"])], ["a", "b", "c"]
    )
    first, second = arrow_rows(batch)
    assert isinstance(first, str) and "are allowed" in first
    assert second == {"a": "a", "b": "a", "c": "a"}


def test_columns_that_are_chosen_stay_and_names_of_ours_hide_nothing() -> None:
    fields = {"intrinsics": {"fx": 1}, "intrinsics_of_source": 2, "a": 3}
    assert kept_fields(fields, None, {"intrinsics"}) == {
        "intrinsics_of_source_": {"fx": 1},
        "intrinsics_of_source": 2,
        "a": 3,
    }
    assert kept_fields(fields, {"a", "intrinsics"}, {"intrinsics"}) == {"intrinsics_of_source_": {"fx": 1}, "a": 3}
    assert kept_fields(fields, (), {"intrinsics"}) == {}
