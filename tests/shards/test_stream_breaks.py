"""Datasets that break while they are streamed: tars that go, are overwritten or cut, and stores that are away for a while."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.core.errors import StoreAway, UserError
from shards.dataset import Dataset
from shards.stream import Item, Stream
from shards.stream.loader import StreamLoader
from shards.stream.order import Sampler
from shards.stream.patience import Patience
from tests.support import labelled
from tests.support.shaky import Shaky, shaky


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Three shards of five samples."""
    return labelled.write_dataset(tmp_path / "data", shards=3, per_shard=5).url


def epoch(stream: Stream) -> list[Item]:
    return [stream[position] for position in range(len(stream))]


def keys_of(url: str, shard: int) -> set[str]:
    return set(Dataset.open(url).mark(f"{shard:06d}")["index"])


def test_a_tar_that_is_deleted_costs_its_own_samples_and_is_named(url: str) -> None:
    lost = keys_of(url, 1)
    stream = Stream([url], intrinsics=(), images=False, seed=1)
    (Path(url) / "000001.tar").unlink()
    items = epoch(stream)
    assert {item.key for item in items} == {item.key for item in epoch(stream)} and not {i.key for i in items} & lost
    named = {entry for item in items for entry in item.skipped}
    assert {entry.split(".tar ")[1].partition(":")[0] for entry in named} == lost
    assert all(entry.startswith(f"{url}/000001.tar ") and "there is no such file" in entry for entry in named)


@pytest.mark.parametrize("how", ["in place", "renamed"])
def test_a_tar_that_is_overwritten_by_another_never_gives_its_samples_under_wrong_keys(
    url: str, tmp_path: Path, how: str
) -> None:
    other = labelled.write_dataset(tmp_path / "other", shards=3, per_shard=5).url
    lost, members = keys_of(url, 1), Dataset.open(url).members
    stream = Stream([url], intrinsics=(), images=False, seed=1, extras=tuple(set(members) - {"txt", "json"}))
    honest = {item.key: (item.caption, item.extras) for item in epoch(stream)}
    stream._process = None  # as a process that has not opened the file yet

    target, source = Path(url) / "000001.tar", Path(other) / "000002.tar"
    if how == "in place":
        target.write_bytes(source.read_bytes())
    else:
        shutil.copy(source, tmp_path / "new.tar")
        (tmp_path / "new.tar").replace(target)

    for item in epoch(stream):
        assert honest[item.key] == (item.caption, item.extras) and item.key not in lost
        assert all("is not the one that its mark describes" in entry for entry in item.skipped)


def test_a_file_that_is_open_when_it_is_deleted_goes_on(url: str) -> None:
    stream = Stream([url], intrinsics=(), images=False, seed=1)
    before = [item.key for item in epoch(stream)]
    (Path(url) / "000001.tar").unlink()
    assert [item.key for item in epoch(stream)] == before and not any(item.skipped for item in epoch(stream))


def test_a_dataset_that_is_gone_as_a_whole_ends_the_stream(url: str) -> None:
    stream = Stream([url], intrinsics=(), images=False, max_skips=20)
    shutil.rmtree(url)
    with pytest.raises(UserError, match=r"20 samples in a row cannot be read, beginning with .*000"):
        stream[0]


def test_an_error_comes_out_of_a_loader_process_as_it_was_raised(url: str) -> None:
    stream = Stream([url], intrinsics=(), images=False, max_skips=20)
    loader = StreamLoader(stream, Sampler(batch=2, samples=8), num_workers=1)
    shutil.rmtree(url)
    with pytest.raises(UserError, match=r"\A20 samples in a row cannot be read, beginning with [^\n]*\Z"):
        list(loader)


# ---- stores that are away --------------------------------------------------------------------------------------------


@pytest.fixture
def remote(url: str) -> Iterator[str]:
    """The same dataset in a store that can be down."""
    with shaky(url) as remote:
        yield remote


def test_a_store_that_comes_back_within_the_limit_costs_nothing_but_time(
    remote: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = Stream([remote], intrinsics=(), images=False, seed=1, wait_s=60)
    expected = [item.key for item in epoch(stream)]
    stream._process = None
    Shaky.down.set()
    threading.Timer(1.0, Shaky.down.clear).start()
    items = epoch(stream)
    assert [item.key for item in items] == expected and not any(item.skipped for item in items)
    first, last = capfd.readouterr().err.strip().splitlines()
    assert "Connection reset" in first and "waiting for it, 60 s at most" in first and "reached again after" in last


def test_a_store_that_stays_away_ends_the_stream_after_the_limit_and_skips_nothing(remote: str) -> None:
    stream = Stream([remote], intrinsics=(), images=False, seed=1, wait_s=0.3)
    Shaky.down.set()
    with pytest.raises(StoreAway, match=r"Connection reset.*it was waited for \d s"):
        stream[0]


def test_waiting_ends_at_once_when_it_is_told_to() -> None:
    patience = Patience(3600)

    def away() -> None:
        patience.stop()
        raise StoreAway("the store is away")

    with pytest.raises(StoreAway):
        patience.read(away)


def test_what_waiting_cannot_mend_is_raised_at_once() -> None:
    def missing() -> None:
        raise UserError("there is no such file")

    with pytest.raises(UserError, match="no such file"):
        Patience(3600).read(missing)
