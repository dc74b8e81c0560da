"""--retry-failed: what failed and may have passed is tried again and appended; every input stays accounted for."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.crash import contents
from extract.config import load_extract_config
from extract.run.run import Summary, run
from extract.workers.cluster import connected
from shards.core.errors import UsageError, UserError
from shards.counts import standing
from shards.dataset import Dataset
from shards.inspect.stats import stats
from shards.inspect.verify import verify
from tests.support.web import Web, photograph

DOWN = "down"


class Moody(Web):
    """A web whose paths /down/... answer 503 until `up` is set; those with "twice" need `up` to be 2."""

    up = 0

    def __init__(self) -> None:
        super().__init__([photograph(number) for number in range(4)], distinct=True)
        self.answers[DOWN] = self._down

    async def _down(self, writer, path: str) -> None:  # type: ignore[no-untyped-def]
        await (self._image if self.up > ("twice" in path) else self.answers["503"])(writer, path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected("local", 2):
        yield


@pytest.fixture
def web() -> Iterator[Moody]:
    with Moody().serving() as server:
        yield server


def table_of(web: Moody, folder: Path) -> Path:
    """20 rows: 6 down for now (2 of these for longer), 3 gone for good, 1 filtered, 10 good."""
    kinds = ["ok", DOWN, "404", DOWN, "ok"] * 3 + ["ok"] * 5
    urls = [f"{web.address}/{kind}/{'twice' if n in (1, 8) else ''}{n}.jpg" for n, kind in enumerate(kinds)]
    pq.write_table(pa.table({"url": urls, "caption": ["a picture"] * 19 + [""]}), folder / "urls.parquet")
    return folder / "urls.parquet"


RECIPE = """
[source]
kind = "urls"
tables = "{table}"
[source.filters]
min_caption = 1
[source.download]
allow_hosts = ["127.0.0.1"]
retries = 0
[image]
size_px = 64
[run]
shard_size = 4
max_failed = 1.0
estimators = "null"
"""


@pytest.fixture
def recipe(web: Moody, tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text(RECIPE.format(table=table_of(web, tmp_path)))
    return tmp_path / "r.toml"


def extract(recipe: Path, out: Path, **options: Any) -> Summary:
    settings = {"run": {"workers": 2, "threads": 1, "limit": options.pop("limit", None)}}
    return run(load_extract_config(str(recipe), str(out), settings), **options)


def stand_of(out: Path) -> tuple[int, int, dict[str, int], dict[str, int], int]:
    """inputs, ok, failed, dropped and retried of a dataset that verify finds whole."""
    assert verify(str(out)).problems == []
    dataset = Dataset.open(str(out))
    stand = standing(dataset.info, dataset.marks())
    totals = dataset.info["totals"]
    assert totals["in"] == stand.inputs + stand.retried == totals["ok"] + sum(totals["failed"].values())
    return stand.inputs, stand.ok, dict(stand.failed), dict(stand.dropped), stand.retried


def test_passing_failures_are_tried_again_and_appended_round_by_round(
    cluster: None, web: Moody, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = extract(recipe, out)
    dropped = {"filtered_caption_length": 1}
    assert stand_of(out) == (20, 10, {"server_error": 6, "not_found": 3}, dropped, 0)
    assert first.stand.failed_share == 9 / 19  # of 19: what a filter drops is no failure
    web.up, before = 1, contents(out)
    second = extract(recipe, out, retry_failed=True)
    assert (second.made, second.shards) == (6, 7) and set(web.requests.values()) == {1, 2}
    assert stand_of(out) == (20, 14, {"server_error": 2, "not_found": 3}, dropped, 6)
    after = contents(out)
    assert all(after[name] == data for name, data in before.items() if name != "dataset.json"), "only appended"
    assert second.stand == extract(recipe, out).stand and contents(out) == after, "the plain command finds it complete"
    web.up = 2
    third = extract(recipe, out, retry_failed=True)
    assert (third.made, third.shards) == (2, 8)
    assert stand_of(out) == (20, 16, {"not_found": 3}, dropped, 8)
    counts = stats(str(out), sample=0)["counts"]
    assert counts == {"shards": 8, "in": 20, "ok": 16, "failed": 3, "dropped": 1, "retried": 8}
    complete = contents(out)
    assert extract(recipe, out, retry_failed=True).made == 0 and contents(out) == complete, "nothing is left to try"
    keys = list(Dataset.open(str(out)).keys())
    assert len(keys) == len(set(keys)) == 16
    with pytest.raises(UserError, match="limit"):
        extract(recipe, out, limit=10)


def test_a_stopped_retry_goes_on_to_the_same_dataset(cluster: None, web: Moody, recipe: Path, tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    extract(recipe, out)
    shutil.copytree(out, undisturbed)
    web.up = 1
    extract(recipe, undisturbed, retry_failed=True)
    requests = 0

    async def deadly(writer: Any, path: str) -> None:
        nonlocal requests
        requests += 1
        if requests == 5:  # of 6, in two shards
            os.kill(os.getpid(), signal.SIGTERM)
        await web._down(writer, path)

    web.answers[DOWN] = deadly
    with pytest.raises(UserError, match="stopped by SIGTERM"):
        extract(recipe, out, retry_failed=True)
    dataset = Dataset.open(str(out))
    assert not dataset.complete and [round_["first"] for round_ in dataset.info["retries"]] == [5]
    web.answers[DOWN] = web._down
    extract(recipe, out, retry_failed=True)  # goes on with this round, and begins no other
    assert contents(out) == contents(undisturbed)


@pytest.mark.parametrize(("last", "committed"), [("1", 5), ("13", 6)])  # of rows 1, 3, 6, 8 and 11, 13, in two shards
def test_a_retry_killed_at_any_time_is_finished_by_the_same_command(
    cluster: None, web: Moody, recipe: Path, tmp_path: Path, last: str, committed: int
) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    extract(recipe, out)
    shutil.copytree(out, undisturbed)
    web.up = 2
    extract(recipe, undisturbed, retry_failed=True)
    command = [sys.executable, "-m", "extract", str(recipe), "--out", str(out), "--retry-failed", "--workers", "2"]

    async def deadly(writer: Any, path: str) -> None:
        if path.endswith((f"/{last}.jpg", f"/twice{last}.jpg")):
            while not (out / f"{committed - 1:06d}.json").exists():
                await asyncio.sleep(0.01)
            driver.kill()
        await web._down(writer, path)

    web.answers[DOWN] = deadly
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert driver.wait(timeout=120) == -signal.SIGKILL
    dataset = Dataset.open(str(out))
    assert not dataset.complete and [round_["first"] for round_ in dataset.info["retries"]] == [5]
    web.answers[DOWN] = web._down
    extract(recipe, out, retry_failed=True)
    assert contents(out) == contents(undisturbed)
    assert stand_of(out) == (20, 16, {"not_found": 3}, {"filtered_caption_length": 1}, 6)


def test_sources_without_single_inputs_say_so(tmp_path: Path) -> None:
    config = load_extract_config("demo", str(tmp_path / "out"), {})
    with pytest.raises(UsageError, match="--retry-failed is for tables of URLs"):
        run(config, retry_failed=True)
    assert not (tmp_path / "out").exists()
