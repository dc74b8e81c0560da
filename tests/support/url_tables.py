"""Sources of URL tables that may ask the server on loopback, for the tests."""

from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from extract.sources import Failure, RawSample
from extract.sources.table import open_source
from extract.sources.urls import UrlSource


class Sources:
    """Makes such sources, by default with short waits; as a context manager it closes their connections in the end."""

    def __init__(self) -> None:
        self._made: list[UrlSource] = []

    def __call__(self, tables: Any, **settings: Any) -> UrlSource:
        quick = {
            "allow_hosts": ["127.0.0.1"],
            "idle_timeout_s": 0.3,
            "total_timeout_s": 0.6,
            "backoff_s": 0.01,
            "retries": 1,
            "max_bytes": 1 << 20,
        }
        tables = [str(table) for table in tables] if isinstance(tables, list) else str(tables)
        source = open_source({"kind": "urls", "tables": tables, "download": quick, **settings})
        assert isinstance(source, UrlSource)
        self._made.append(source)
        return source

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for source in self._made:
            source.close()


def parquet(path: Path, columns: dict[str, list], rows_per_group: int = 1000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def everything(source: UrlSource, shard_size: int = 1000, limit: int | None = None) -> list[RawSample | Failure]:
    return [output for unit in source.units(shard_size, limit) for output in source.read(unit)]


def outcome(output: RawSample | Failure) -> str:
    return output.reason if isinstance(output, Failure) else "ok"
