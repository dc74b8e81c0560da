"""Tables of URLs as a source: planning, reading, settings."""

import dataclasses
import datetime
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extract.config import load_extract_config
from extract.download.downloader import DownloadSettings
from extract.sources import RawSample
from extract.sources.filters import Filters
from extract.sources.table import open_source
from extract.sources.url_tables import Cut, Table
from extract.sources.urls import UrlSource
from extract.sources.values import json_value
from shards.core.errors import UsageError, UserError
from tests.support.url_tables import Sources, everything, outcome, parquet
from tests.support.web import Web


def columns_of(count: int, start: int = 0) -> dict[str, list]:
    numbers = range(start, start + count)
    return {"url": [f"http://host.example/{n}.jpg" for n in numbers], "caption": [f"number {n}" for n in numbers]}


def write(path: Path, columns: dict[str, list]) -> Path:
    """A table in the form that its name says."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        return parquet(path, columns, rows_per_group=7)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".tsv":
        path.write_text(
            "".join("\t".join(map(str, row)) + "\n" for row in [list(columns), *(r.values() for r in rows)])
        )
    else:
        path.write_text(
            "".join(",".join(map(str, row)) + "\r\n" for row in [list(columns), *(r.values() for r in rows)])
        )
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_units_cut_any_table_anywhere_and_cover_every_row_once(make: Sources, tmp_path: Path, suffix: str) -> None:
    sizes = (23, 1, 0, 40)
    for number, size in enumerate(sizes):
        write(tmp_path / f"{number}{suffix}", columns_of(size, number * 100))
    source = make(tmp_path)
    assert source.total() == 64
    for shard_size in (1, 7, 24, 1000):
        units = list(source.units(shard_size))
        assert [unit.index for unit in units] == list(range(len(units)))
        counts = [sum(part.cut.stop - part.cut.start for part in unit.items) for unit in units]
        assert counts[:-1] == [shard_size] * (len(units) - 1) and sum(counts) == 64
        rows = [
            row["caption"]
            for unit in units
            for part in unit.items
            for row in Table(part.address).rows(part.cut)
            if isinstance(row, dict)
        ]
        assert rows == [f"number {number * 100 + row}" for number, size in enumerate(sizes) for row in range(size)]
    for limit in (0, 1, 23, 24, 63, 64, 500):
        units = list(source.units(10, limit))
        assert sum(part.cut.stop - part.cut.start for unit in units for part in unit.items) == min(limit, 64)


def test_csv_fields_may_hold_line_breaks_quotes_and_commas(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfurl,caption\r\nu1,"two\r\nlines, and ""quotes"""\r\n\r\nu2,plain\r\nu3\r\nu4,caf\xe9\r\n'
    )
    table = Table(str(path))
    cuts = list(table.cuts(1, 1))
    assert [(cut.start, cut.stop) for cut in cuts] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    rows = [row for cut in cuts for row in table.rows(cut)]
    assert rows[0] == {"url": "u1", "caption": 'two\r\nlines, and "quotes"'}
    assert rows[1] == {"url": "u2", "caption": "plain"}
    assert isinstance(rows[2], str) and "1 fields" in rows[2]
    assert isinstance(rows[3], dict) and rows[3]["url"] == "u4"
    assert rows == list(table.rows(Cut(0, 4, cuts[0].offset)))


def test_tsv_quotes_are_ordinary_and_a_header_can_be_given(make: Sources, web: Web, tmp_path: Path) -> None:
    path = tmp_path / "cc12m.tsv"
    path.write_text(f'{web.address}/ok/1.jpg\ta 5" pipe\n{web.address}/ok/2.jpg\t"half quoted\n')
    outputs = everything(make(path, header=["url", "caption"]))
    assert [output.caption for output in outputs if isinstance(output, RawSample)] == ['a 5" pipe', '"half quoted']


def test_broken_lines_of_jsonl_are_failures_of_their_own(make: Sources, web: Web, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"url": f"{web.address}/ok/1.jpg", "caption": "c"})
    path.write_text(f'{good}\n{{"url": \n\n[1, 2]\n{{"caption": "no url"}}\n{good}\n')
    assert [outcome(output) for output in everything(make(path, distinct=[]))] == [
        "ok",
        "bad_row",
        "bad_row",
        "bad_row",
        "ok",
    ]


def test_a_table_of_nothing_but_broken_lines_gives_as_many_failures(make: Sources, web: Web, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n" * 3)
    (tmp_path / "b.jsonl").touch()
    outputs = everything(make(tmp_path, filters={"min_aesthetic": 5.0}))
    assert [outcome(output) for output in outputs] == ["bad_row"] * 3


def test_columns_keep_their_values_in_a_form_that_json_can_hold(make: Sources, web: Web, tmp_path: Path) -> None:
    when = datetime.datetime(2024, 5, 6, 7, 8, 9)
    table = parquet(
        tmp_path / "a.parquet",
        {
            "image_url": [f"{web.address}/ok/1.jpg"],
            "alt_text": ["c"],
            "score": [float("nan")],
            "similarity": [0.25],
            "hash": [-(1 << 62)],
            "when": [when],
            "raw": [b"\x00\xff"],
            "boxes": [[[0.5, float("inf")]]],
            "nested": [{"a": None, "b": "ü"}],
            "download": ["hidden"],
        },
    )
    (sample,) = everything(make(table))
    assert isinstance(sample, RawSample)
    assert sample.meta["url"] == sample.meta["image_url"]
    assert sample.meta["score"] is None and sample.meta["similarity"] == 0.25 and sample.meta["hash"] == -(1 << 62)
    assert sample.meta["when"] == when.isoformat() and sample.meta["raw"] == "00ff"
    assert sample.meta["boxes"] == [[0.5, None]] and sample.meta["nested"] == {"a": None, "b": "ü"}
    assert sample.meta["download_of_table"] == "hidden" and sample.meta["download"]["status"] == 200
    assert json.loads(json.dumps(sample.meta, allow_nan=False)) == sample.meta
    assert json_value("\ud800") == "\ufffd"


def test_text_of_a_parquet_that_is_no_utf8_costs_its_row_in_captions_alone(
    make: Sources, web: Web, tmp_path: Path
) -> None:
    def text(*cells: bytes | None) -> pa.Array:
        return pa.array(cells, pa.binary()).view(pa.string())  # as other programs write it; pyarrow itself refuses

    urls = [f"{web.address}/ok/{number}.jpg".encode() for number in range(4)]
    captions = text(b"fine", b"caf\xe9", None, b"")
    nested = pa.ListArray.from_arrays([0, 1, 1, 2, 2], text(b"a", b"\xff"))
    parquet(tmp_path / "a.parquet", {"url": text(*urls), "caption": captions, "tags": nested})
    samples = everything(make(tmp_path / "a.parquet"))
    assert [outcome(sample) for sample in samples] == ["ok", "caption_not_utf8", "ok", "ok"]
    good = [sample for sample in samples if isinstance(sample, RawSample)]
    assert [sample.caption for sample in good] == ["fine", "", ""]
    assert [sample.meta["tags"] for sample in good] == [["a"], None, []]


def test_globs_braces_folders_and_object_stores_are_found(make: Sources, tmp_path: Path) -> None:
    for name in ("part-00.parquet", "part-01.parquet", "part-02.parquet", "other.csv", "_SUCCESS", "notes.txt"):
        write(tmp_path / name, columns_of(2)) if name.endswith(("parquet", "csv")) else (tmp_path / name).touch()

    def names(*tables: str) -> list[str]:
        return [Path(table.address).name for table in make([f"{tmp_path}/{table}" for table in tables])._tables]

    parts = [f"part-0{number}.parquet" for number in range(3)]
    assert names("*.parquet") == names("part-{00..02}.parquet") == parts
    assert names("") == ["other.csv", *parts]
    assert names("part-02.parquet", "other.csv") == ["part-02.parquet", "other.csv"]
    (found,) = make(f"file://{tmp_path}/other*.csv")._tables
    assert found.address.startswith("file://") and found.count() == 2


@pytest.mark.parametrize(
    ("name", "columns", "settings", "words"),
    [
        ("none.parquet", None, {}, "there is no table"),
        ("none*.parquet", None, {}, "no table fits"),
        ("a.txt", None, {}, "not a table"),
        ("a.parquet", {"link": ["u"], "caption": ["c"]}, {}, "url_column"),
        ("a.parquet", {"url": ["u"], "words": ["c"]}, {}, "caption_column"),
        ("a.parquet", {"url": ["u"], "caption": ["c"]}, {"url_column": "link"}, "no column 'link'"),
        ("a.parquet", {"url": ["u"], "caption": ["c"]}, {"filters": {"min_aesthetic": 5.0}}, "aesthetic"),
        ("a.parquet", {"url": ["u"], "caption": ["c"]}, {"filters": {"typo": 5.0}}, "typo"),
        ("a.parquet", {"url": ["u"], "caption": ["c"]}, {"sha256_column": "digest"}, "no column 'digest'"),
    ],
)
def test_what_is_wrong_with_the_settings_is_told_before_any_work(
    make: Sources, tmp_path: Path, name: str, columns: dict[str, list] | None, settings: dict, words: str
) -> None:
    if columns:
        parquet(tmp_path / name, columns)
    with pytest.raises(UserError, match=words):
        list(make(tmp_path / name, **settings).units(10))


@pytest.mark.parametrize(
    "tables", ["hf://datasets/nobody/nothing/*.parquet", "https://127.0.0.1:9/a.parquet", "s3://b/*.csv"]
)
def test_a_store_that_cannot_be_reached_is_a_sentence(tables: str) -> None:
    unreachable = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_MAX_ATTEMPTS": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    command = f"from extract.sources.url_tables import find_tables; find_tables({tables!r})"
    done = subprocess.run(
        [sys.executable, "-c", command], env={**os.environ, **unreachable, **keys}, capture_output=True, text=True
    )
    assert "UserError: cannot look for tables in" in done.stderr.splitlines()[-1]
    assert "source.tables" in done.stderr


def test_captions_can_be_done_without(make: Sources, web: Web, tmp_path: Path) -> None:
    table = parquet(tmp_path / "a.parquet", {"url": [f"{web.address}/ok/1.jpg"]})
    (sample,) = everything(make(table, caption_column=""))
    assert isinstance(sample, RawSample) and sample.caption == ""


def test_a_damaged_part_of_a_table_fails_its_rows_and_no_others(make: Sources, web: Web, tmp_path: Path) -> None:
    urls = [f"{web.address}/ok/{number}.jpg" for number in range(30)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"url": urls, "caption": ["c"] * 30}),
        path,
        row_group_size=10,
        compression="zstd",
        use_dictionary=False,
    )
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[group.data_page_offset : group.data_page_offset + group.total_compressed_size] = bytes(
        group.total_compressed_size
    )
    path.write_bytes(data)
    outputs = everything(make(path, distinct=[]), shard_size=10)
    assert [output.key for output in outputs] == [f"00000-{number:09d}" for number in range(30)]
    assert [outcome(output) for output in outputs] == ["ok"] * 10 + ["table_unreadable"] * 10 + ["ok"] * 10


def test_the_description_tells_tables_and_filters_apart(make: Sources, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", columns_of(5))
    before = make(path).describe()
    assert before == make(path).describe() == json.loads(json.dumps(before))
    assert make(path, filters={"min_caption": 2}).describe() != before
    assert make(path, download={"retries": 9}).describe() == before
    write(path, {name: values[::-1] for name, values in columns_of(5).items()})
    assert make(path).describe() != before


@pytest.mark.parametrize("name", ["laion", "coyo", "cc12m", "datacomp", "template"])
def test_every_recipe_of_url_tables_can_be_used(name: str) -> None:
    config = load_extract_config(name, "out", {"source": {"tables": "local.parquet"}})
    assert isinstance(open_source(config.source), UrlSource) and config.image.size_px == 512


def test_the_template_shows_every_setting_with_its_default() -> None:
    text = (resources.files("extract") / "recipes/template.toml").read_text()
    shown = tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
    shown = {name: shown["source"][name] for name in ("filters", "download")}
    for name, cls in (("filters", Filters), ("download", DownloadSettings)):
        assert set(shown[name]) == {field.name for field in dataclasses.fields(cls)}
    defaults = json.loads(json.dumps(dataclasses.asdict(DownloadSettings())))
    assert {**shown["download"], "user_agent": ""} == {**defaults, "user_agent": ""}


def test_a_source_and_its_units_travel_to_workers(make: Sources, web: Web, tmp_path: Path) -> None:
    source = make(parquet(tmp_path / "a.parquet", {"url": [f"{web.address}/ok/1.jpg"] * 2, "caption": ["a", "b"]}))
    everything(source)  # opens connections, which must stay behind
    copy, units = pickle.loads(pickle.dumps((source, list(source.units(10)))))
    assert [outcome(output) for output in copy.read(units[0])] == ["ok", "filtered_repeated_url"]
    copy.close()
    assert len(pickle.dumps(next(make(write(tmp_path / "b.parquet", columns_of(5000))).units(1000)))) < 1000


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_failed_rows_can_be_read_again_by_their_keys(make: Sources, web: Web, tmp_path: Path, suffix: str) -> None:
    for number in range(2):
        urls = [f"{web.address}/ok/{number * 50 + row}.jpg" for row in range(50)]
        write(tmp_path / f"{number}{suffix}", {"url": urls, "caption": [f"{number} {row}" for row in range(50)]})
    source = make(tmp_path)
    keys = ["00001-000000049", "00000-000000003", "00000-000000041", "00001-000000000", "00000-000000007"]
    units = list(source.again(keys, 2, first_index=17))
    assert [unit.index for unit in units] == [17, 18, 19]
    outputs = [output for unit in units for output in source.read(unit)]
    assert [output.key for output in outputs] == sorted(keys)
    assert [output.caption for output in outputs if isinstance(output, RawSample)] == [
        "0 3",
        "0 7",
        "0 41",
        "1 0",
        "1 49",
    ]
    for wrong in ("00002-000000000", "00000-000000050", "nonsense"):
        with pytest.raises(UsageError):
            list(source.again([wrong], 2, 0))
