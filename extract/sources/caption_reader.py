"""The one reader of captions: which names hold them, and what text a value or a file gives. For every kind of source.

    caption_in({"Alt Text": ["", "a dog"]}, None, 65536)            -> "a dog", from the field 'Alt Text'
    caption_in({"caption": {"en": "a dog", "de": "ein Hund"}}, "caption.de", 65536)   -> "ein Hund"

A value is text, or bytes that are UTF-8; a list gives its first text that is not empty; an object that of the only entry
that is not empty, or the one that the user names (`caption.en`). A number is a caption only where the user named its
field; NaN, null and the words for them are none. Whatever looks like a caption and was not taken is told to the user.
"""

import codecs
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from extract.sources.caption_names import CAPTION_FIELDS, NOTHING, likely_fields, plain_name, usual_fields
from extract.sources.files import ReadProblem
from shards.core.errors import UsageError

_TEXT_IN_OBJECTS = ("caption", "text", "raw", "value", "sentence", "content")
"""Where objects of a list have their text: COCO's, Karpathy's splits, conversations."""
_MOST_NESTING = 8


@dataclass(frozen=True)
class Caption:
    """A caption and where it stood.

    field: the field, "" where no field gave it. passed_over: what looks like a caption, was not taken, and why.
    """

    text: str
    field: str = ""
    passed_over: tuple[str, ...] = ()


# ---- columns of tables ------------------------------------------------------------------------------------------------


def check_named(field: str, names: Sequence[str], where: str, setting: str = "caption_column") -> None:
    """Raises UsageError if a field that the user named (`caption`, or `caption.en` of an object) is not there."""
    if field not in names and field.partition(".")[0] not in names:
        raise UsageError(f"{where} has no column {field!r}; it has {', '.join(names) or 'none'} (source.{setting})")


def check_distinct(names: Sequence[str], where: str) -> None:
    """Raises UsageError if two columns have one name: of such values only one could be kept."""
    doubled = next((name for name in names if name and names.count(name) > 1), None)
    if doubled is not None:
        raise UsageError(
            f"{where} has {names.count(doubled)} columns called {doubled!r}, of which only one could be kept; "
            "rename one of them in the table's header"
        )


def check_type(kind: pa.DataType, field: str, named: bool, where: str, setting: str = "caption_column") -> None:
    """Raises UsageError if a column of this Arrow type cannot hold captions.

    field: the column, or `column.entry` of a struct. named: whether the user named it.
    """
    types = pa.types
    while _is_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        column, _, entry = field.partition(".")
        entries = [kind.field(number).name for number in range(kind.num_fields)]
        if entry in entries:
            check_type(kind.field(entry).type, column, named, where, setting)
        elif entry or (len(entries) > 1 and not set(map(plain_name, entries)) & set(_TEXT_IN_OBJECTS)):
            choices = " or ".join(repr(f"{column}.{name}") for name in entries[:8])
            raise UsageError(
                f"the column {column!r} of {where} is a struct of {', '.join(entries)}, not text; say which of them is "
                f"the caption with source.{setting} = {choices}"
            )
        return
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    if is_text or is_bytes or types.is_fixed_size_binary(kind) or types.is_null(kind):
        return
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if is_number and named:
        return
    hint = f"; if its numbers are captions, say so: source.{setting} = {field!r}" if is_number else ""
    raise UsageError(
        f"the column {field!r} of {where} holds values of the type {kind}, which are no captions{hint}; name another "
        f"with source.{setting}, or set source.captions to 'none'"
    )


def check_values(values: Sequence[Any], field: str, named: bool, where: str, setting: str = "caption_column") -> None:
    """Raises UsageError if the first rows of a field without a type are all of a kind that is no caption."""
    there = [value for value in values if not _is_empty(value)]
    if there and all(isinstance(value, bool) or is_number(value) or _is_choice(value) for value in there):
        try:
            kind = pa.array(there[:1]).type
        except (pa.ArrowException, OverflowError):
            kind = pa.float64()
        check_type(kind, field, named, where, setting)


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, float) and math.isnan(value))


def _is_choice(value: Any) -> bool:
    """Whether it is an object of several entries that are not empty."""
    return isinstance(value, Mapping) and sum(not _is_empty(item) for item in value.values()) > 1


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def raw_values(column: Sequence[Any] | pa.Array) -> Sequence[Any]:
    """The values as Python's own; text that is no UTF-8 as bytes, so that nobody takes it for text."""
    if not isinstance(column, pa.Array):
        return column
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_text_or_bytes(cell) for cell in _as_bytes(column).to_pylist()]
    return values


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text, or lists of text, as bytes."""
    if _is_list(column.type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column.cast(pa.large_binary())


def _text_or_bytes(cell: Any) -> Any:
    if isinstance(cell, list):
        return [_text_or_bytes(item) for item in cell]
    try:
        return cell.decode() if isinstance(cell, bytes) else cell
    except UnicodeDecodeError:
        return cell


def readable(value: Any) -> Any:
    """A raw value with its bytes as text, where they are UTF-8."""
    if isinstance(value, list):
        return [readable(item) for item in value]
    return _text_or_bytes(value)


# ---- text ------------------------------------------------------------------------------------------------------------


def checked_caption(text: str, limit: int) -> str:
    """The caption itself, "" for a word that stands for none. Raises ReadProblem if it is too long, or is no proper text."""
    if text.strip() in NOTHING:
        return ""
    if "\0" in text:
        raise ReadProblem("caption_not_utf8", "the caption has NUL characters in it (is it UTF-16?)")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ReadProblem("caption_not_utf8", f"the caption is not UTF-8 (character {error.start})") from error
    if size > limit:
        raise ReadProblem("caption_too_long", f"the caption has {size} bytes; {limit} are allowed")
    return text


def caption_of_bytes(data: bytes, limit: int, suffix: str = "txt", encoding: str | None = None) -> str:
    """The caption in a file or member with this suffix (one of CAPTION_SUFFIXES, or any). Raises ReadProblem.

    `.gz` is unpacked, up to the limit, if it is packed; `.json` may hold a string, a list or an object of captions. The
    text is UTF-8, or UTF-16 with its mark, unless `encoding` says otherwise.
    """
    suffix = suffix.lower().lstrip(".")
    if suffix.endswith("gz") and data[:2] == b"\x1f\x8b":
        data = _unpacked(data, limit)
    text = _decoded(data, encoding)
    stem = suffix.removesuffix(".gz")
    if not stem.endswith("json") or not text.lstrip().startswith(("{", "[", '"')):
        return checked_caption(text, limit)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReadProblem("bad_metadata", f"the caption file cannot be read as JSON: {error}") from error
    if isinstance(value, dict):
        found = caption_in(value, None, limit)
        if found.text.strip() or not value:
            return found.text
    return caption_of_value(value, f".{suffix}", limit, named=True)


def _unpacked(data: bytes, limit: int) -> bytes:
    packed = zlib.decompressobj(wbits=31)
    try:
        text = packed.decompress(data, limit + 4)
    except zlib.error as error:
        raise ReadProblem("caption_unreadable", f"the caption's gzip file is damaged: {error}") from error
    if packed.unconsumed_tail:
        raise ReadProblem("caption_too_long", f"the caption has more than the {limit} bytes that are allowed")
    if not packed.eof:
        raise ReadProblem("caption_unreadable", "the caption's gzip file is not whole")
    return text


def _decoded(data: bytes, encoding: str | None) -> str:
    if encoding is None and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        return data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        words = "the caption is not UTF-8" if encoding is None else f"the caption is not {encoding}"
        hint = "; name its encoding with source.encoding" if encoding is None else ""
        raise ReadProblem("caption_not_utf8", f"{words} (byte {error.start}){hint}") from error


# ---- values ----------------------------------------------------------------------------------------------------------


def caption_in(
    fields: Mapping[str, Any], field: str | None, limit: int, order: Sequence[str] = CAPTION_FIELDS
) -> Caption:
    """The caption among fields: of the one that the user named, else of the first usual one that has text.

    Raises ReadProblem if the value has no text (an object of several entries, text that is not UTF-8).
    """
    if field is not None:
        return Caption(caption_of_value(entry_of(fields, field), field, limit, named=True), field)
    passed: list[str] = []
    for name in usual_fields(sorted(fields), order):
        value = fields[name]
        if is_number(value) or isinstance(value, bool):
            passed.append(f"field {name!r} ({'a boolean' if isinstance(value, bool) else 'a number'})")
            continue
        text = caption_of_value(value, name, limit, named=False)
        if text.strip():
            return Caption(text, name)
    others = [
        name for name in likely_fields(fields) if plain_name(name) not in CAPTION_FIELDS and _has_text(fields[name])
    ]
    for name, value in fields.items():
        if isinstance(value, Mapping):
            others += [f"{name}.{entry}" for entry in usual_fields(map(str, value)) if _has_text(value.get(entry))]
    return Caption("", "", (*passed, *(f"field {name!r}" for name in others)))


def entry_of(fields: Mapping[str, Any], field: str) -> Any:
    """The value of a field, or of `field.entry` where the field is an object; None if it is not there."""
    if field in fields or "." not in field:
        return fields.get(field)
    name, _, rest = field.partition(".")
    value = fields.get(name)
    if isinstance(value, list | tuple):
        return [entry_of(item, rest) for item in value if isinstance(item, Mapping)]
    return entry_of(value, rest) if isinstance(value, Mapping) else None


def caption_of_value(value: Any, field: str, limit: int, *, named: bool) -> str:
    """The caption that a value of a field gives, "" if it is empty. Raises ReadProblem if it is none.

    named: whether the user named the field; numbers are captions only then.
    """
    return checked_caption(_text_of(value, field, named, _MOST_NESTING), limit)


def is_number(value: Any) -> bool:
    """Whether it is a number, and neither a boolean nor NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (isinstance(value, float) and math.isnan(value))


def _text_of(value: Any, field: str, named: bool, depth: int) -> str:
    """The first text in a value that is not empty, "" if there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return _text_of_bytes(bytes(value), field)
    if depth and isinstance(value, list | tuple):
        texts = (_text_of(item, field, named, depth - 1) for item in value)
        return next((text for text in texts if _says_something(text)), "")
    if depth and isinstance(value, Mapping):
        return _text_of_object(value, field, named, depth)
    if is_number(value) and named:
        return str(value)
    raise ReadProblem("bad_metadata", f"the caption {field!r} is a {type(value).__name__}, not text")


def _says_something(text: str) -> bool:
    return bool(text.strip()) and text.strip() not in NOTHING


def _text_of_bytes(data: bytes, field: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReadProblem("caption_not_utf8", f"the caption {field!r} is not UTF-8 (byte {error.start})") from error


def _text_of_object(value: Mapping[str, Any], field: str, named: bool, depth: int) -> str:
    """The text of an object's only entry that is not empty, or of the entry in which objects usually have it."""
    for usual in _TEXT_IN_OBJECTS:
        name = next((name for name in value if plain_name(str(name)) == usual), None)
        if name is not None and (text := _text_of(value[name], field, named, depth - 1)).strip():
            return text
    filled = [name for name, item in value.items() if not _is_empty(item)]
    if not filled:
        return ""
    if len(filled) > 1:
        names = ", ".join(map(str, filled[:8]))
        raise ReadProblem(
            "bad_metadata",
            f"the caption {field!r} has several entries ({names}); say which with source.caption_column = "
            f"{f'{field}.{filled[0]}'!r}",
        )
    return _text_of(value[filled[0]], field, named, depth - 1)


def _has_text(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_text(item) for item in value)
    return isinstance(value, str | bytes) and bool(value.strip())
