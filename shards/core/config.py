"""Typed configuration: frozen dataclasses filled from TOML tables and the command line, by this one piece of code."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from shards.core.errors import UsageError

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UsageError when it is missing or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def load_config(cls: type[T], *layers: Mapping[str, Any], where: str = "") -> T:
    """Fills the dataclass `cls` from mappings; later layers win, and None means "not given".

    A field that is itself a dataclass takes a nested mapping (a TOML table) of each layer.
    Raises UsageError, naming the key and its table, for an unknown key, a value of a wrong type or a missing key;
    checks across fields belong in `__post_init__` and raise UsageError themselves.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for layer in layers:
        for key in layer:
            if key not in fields:
                known = ", ".join(fields)
                raise UsageError(f"unknown setting {_name(where, key)!r}; known here: {known}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        given = [layer[name] for layer in layers if layer.get(name) is not None]
        if dataclasses.is_dataclass(hints[name]):
            for table in given:
                if not isinstance(table, Mapping):
                    raise UsageError(f"{_name(where, name)!r} must be a table of settings, not {table!r}")
            values[name] = load_config(typing.cast(type, hints[name]), *given, where=_name(where, name))
        elif given:
            values[name] = _convert(given[-1], hints[name], _name(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UsageError(f"the setting {_name(where, name)!r} is missing")
    return cls(**values)


def _name(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` says, without surprises: an int may stand for a float, a list for a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            if option is type(None):
                continue
            try:
                return _convert(value, option, where)
            except UsageError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise UsageError(f"{where} = {value!r} is not one of {', '.join(map(repr, arguments))}")
    elif origin is tuple and isinstance(value, list | tuple):
        items = arguments[:-1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            return tuple(_convert(item, kind, where) for item, kind in zip(value, items, strict=True))
    elif origin in (dict, Mapping) or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{where} = {value!r} is not of type {getattr(hint, '__name__', hint)}")
