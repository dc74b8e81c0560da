"""Tables of URLs as a source, end to end: filtering, failures, and one output for every row."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import laion_like
from extract.config import load_extract_config
from extract.reasons import REASONS
from extract.run.make_shard import UnitWork, make_shard
from extract.sources import Failure, RawSample
from extract.sources.table import open_source
from extract.sources.urls import UrlSource
from shards.core.errors import UsageError
from shards.core.storage import Folder
from shards.sample import KEY
from tests.support.url_tables import Sources, everything, outcome, parquet
from tests.support.web import Web, photograph


def test_every_row_gives_one_output_in_the_order_of_the_table(web: Web, make: Sources, tmp_path: Path) -> None:
    paths = [
        "ok",
        "404",
        "late",
        "html",
        "cut",
        "private",
        "metadata",
        "mapped",
        "broken",
        "noai",
        "silent",
        "flaky",
    ] * 3
    urls = [f"{web.address}/{path}/{number}.jpg" for number, path in enumerate(paths)]
    table = parquet(tmp_path / "a.parquet", {"URL": urls, "TEXT": [f"picture {n}" for n in range(36)]})
    outputs = everything(make(table), shard_size=10)
    assert [output.key for output in outputs] == [f"00000-{number:09d}" for number in range(36)]
    assert [outcome(output) for output in outputs] == [
        *("ok", "not_found", "ok", "not_an_image", "connection_lost", *["forbidden_address"] * 3),
        *("ok", "opted_out", "timeout", "ok"),  # what is broken within is found when it is decoded
    ] * 3
    first = outputs[0]
    assert isinstance(first, RawSample)
    assert (first.image, first.caption) == (web.images[0], "picture 0")
    assert first.meta == {
        "URL": urls[0],
        "TEXT": "picture 0",
        "sha256": hashlib.sha256(web.images[0]).hexdigest(),
        "download": {"status": 200, "host": "127.0.0.1", "redirects": 0, "bytes": len(web.images[0])},
    }


def test_every_failure_has_a_reason_of_the_table_and_its_stage(web: Web, make: Sources, tmp_path: Path) -> None:
    urls = [f"{web.address}/{name}/1.jpg" for name in sorted(web.answers)] + ["", None, "ftp://x/", "nonsense"]
    table = parquet(tmp_path / "a.parquet", {"url": urls, "caption": ["c"] * len(urls)})
    failures = [output for output in everything(make(table)) if isinstance(output, Failure)]
    assert len(failures) > 20
    for failure in failures:
        assert REASONS[failure.reason].stage == failure.stage
        assert failure.message and KEY.match(failure.key)
        json.dumps(dataclasses.asdict(failure))
    assert [failure.reason for failure in failures[-4:]] == ["bad_row", "bad_row", "bad_url", "bad_url"]


def test_filtered_rows_are_counted_and_never_requested(web: Web, make: Sources, tmp_path: Path) -> None:
    table = parquet(
        tmp_path / "a.parquet",
        {
            "URL": [f"{web.address}/ok/filter{number}.jpg" for number in range(6)],
            "TEXT": ["a cat", "a dog", "кот", "x", "a cow", "a hen"],
            "WIDTH": [640, 640, 640, 640, 100, None],
            "HEIGHT": [480, 480, 480, 480, 480, 480],
            "AESTHETIC_SCORE": [6.6, 6.4, 7.0, 7.0, 7.0, 7.0],
        },
    )
    filters = {"min_aesthetic": 6.5, "min_side_px": 256, "min_caption": 3, "caption_scripts": ["Latin"]}
    outputs = everything(make(table, filters=filters))
    assert [outcome(output) for output in outputs] == [
        *(
            "ok",
            "filtered_aesthetic",
            "filtered_caption_script",
            "filtered_caption_length",
            "filtered_size",
            "filtered_size",
        ),
    ]
    assert [path for path in web.requests if "filter" in path] == ["/ok/filter0.jpg"]


def test_of_rows_with_one_url_the_first_that_passes_the_filters_is_kept(
    web: Web, make: Sources, tmp_path: Path
) -> None:
    one, two = f"{web.address}/ok/1.jpg", f"{web.address}/ok/2.jpg"
    columns = {
        "url": [one, one, two, one, f" {two} "],
        "caption": ["x", "long enough", "also long", "long again", "too long"],
    }
    first = parquet(tmp_path / "a.parquet", columns)
    second = parquet(tmp_path / "b.parquet", {"url": [two], "caption": ["in another table"]})
    outputs = everything(make([first, second], filters={"min_caption": 3}), shard_size=2)
    assert [outcome(output) for output in outputs] == [
        *(
            "filtered_caption_length",
            "ok",
            "ok",
            "filtered_repeated_url",
            "filtered_repeated_url",
            "filtered_repeated_url",
        ),
    ]
    assert {outcome(output) for output in everything(make(first, distinct=[]))} == {"ok"}


def test_repeated_contents_and_stated_hashes_are_found(web: Web, make: Sources, tmp_path: Path) -> None:
    table = parquet(
        tmp_path / "a.parquet",
        {
            "url": [f"{web.address}/ok/{name}.jpg" for name in ("1", "a1", "2", "3", "4")],
            "caption": list("abcde"),
            "phash": ["p", "q", "r", "p", None],
        },
    )
    outputs = everything(make(table, distinct=["url", "phash", "content"]))
    assert [outcome(output) for output in outputs] == [
        "ok",
        "filtered_repeated_content",
        "ok",
        "filtered_repeated_hash",
        "ok",
    ]
    with pytest.raises(UsageError, match="nosuch"):
        list(make(table, distinct=["nosuch"]).units(10))


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_bytes_that_differ_from_the_stated_hash_are_refused(web: Web, make: Sources, tmp_path: Path, kind: str) -> None:
    right = [hashlib.new(kind, web.images[number]).hexdigest() for number in range(3)]
    table = parquet(
        tmp_path / "a.parquet",
        {
            "url": [f"{web.address}/ok/{number}.jpg" for number in range(3)],
            "caption": list("abc"),
            kind.upper(): [right[0].upper(), right[0], None],
        },
    )
    assert [outcome(output) for output in everything(make(table))] == ["ok", "hash_mismatch", "ok"]
    assert [outcome(output) for output in everything(make(table, verify_hash=False))] == ["ok", "ok", "ok"]


def test_a_consumer_may_stop_early_and_read_again(web: Web, make: Sources, tmp_path: Path) -> None:
    urls = [f"{web.address}/{'silent' if number % 2 else 'ok'}/{number}.jpg" for number in range(100)]
    source = make(parquet(tmp_path / "a.parquet", {"url": urls, "caption": ["c"] * 100}))
    (unit,) = source.units(100)
    outputs = source.read(unit)
    assert outcome(next(outputs)) == "ok"
    outputs.close()  # type: ignore[attr-defined]
    assert source._downloader.turns.active == 0 and source._downloader.turns.held == 0
    assert outcome(next(source.read(unit))) == "ok"


def test_two_units_can_be_read_at_once(web: Web, make: Sources, tmp_path: Path) -> None:
    urls = [f"{web.address}/late/{number}.jpg" for number in range(40)]
    source = make(parquet(tmp_path / "a.parquet", {"url": urls, "caption": ["c"] * 40}))
    left, right = (source.read(unit) for unit in source.units(20))
    keys = [output.key for pair in zip(left, right, strict=True) for output in pair]
    assert sorted(keys) == [f"00000-{number:09d}" for number in range(40)]


def test_a_laion_shaped_table_is_conserved_to_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laion_like, "HOSTS", ["127.0.0.1"])
    monkeypatch.delitem(laion_like.SHARES, "no such host")  # tests ask no name server
    with Web([photograph(number, (96, 80)) for number in range(4)], distinct=True).serving() as web:
        laion_like.write(tmp_path / "tables", 1000, web.port)
        config = load_extract_config(str(tmp_path / "tables/laion_like.toml"), str(tmp_path / "out"), {})
        limits = {
            "allow_hosts": ["127.0.0.1"],
            "per_host": 64,
            "idle_timeout_s": 0.3,
            "total_timeout_s": 0.6,
            "retries": 1,
        }
        source = open_source({**config.source, "download": {**limits, "backoff_s": 0.01}})
        assert isinstance(source, UrlSource)
        work = UnitWork(source=source, image=config.image, members=("jpg", "txt", "json"), threads=2, window=16)
        folder = Folder(config.out)
        folder.make()
        counts = [make_shard(folder, unit, work, [], made={})["counts"] for unit in source.units(250)]
        source.close()
    expected = json.loads((tmp_path / "tables/expected.json").read_text())
    failed = sum((Counter(count["failed"]) for count in counts), Counter())
    assert sum(count["in"] for count in counts) == sum(count["ok"] for count in counts) + failed.total() == 1000
    assert failed["not_found"] == expected["404"] + expected["410"]
    assert failed["filtered_aesthetic"] == expected["low score"]
    assert failed["filtered_aspect"] == expected["elongated"]
    assert failed["opted_out"] == expected["noai"]
    assert failed["not_an_image"] == expected["html"]
    refused = ("private", "metadata", "mapped", "decimal address", "loopback name")
    assert failed["forbidden_address"] == sum(expected[sort] for sort in refused)
    assert failed.keys() >= {
        *(
            "filtered_size",
            "filtered_unsafe",
            "filtered_watermark",
            "filtered_caption_script",
            "filtered_caption_length",
        ),
        *(
            "filtered_repeated_url",
            "filtered_repeated_content",
            "bad_url",
            "bad_row",
            "connect_failed",
            "timeout",
            "connection_lost",
        ),
        *("server_error", "too_many_requests", "access_denied", "http_error", "bad_redirect", "too_many_redirects"),
        *("content_encoded", "too_many_bytes", "empty", "unsupported_format", "truncated"),
    }
