"""Datasets in an object store: written, listed, read and committed as on a disk, also when the store is in trouble."""

import threading
from collections.abc import Iterator

import pytest

from shards.core.errors import UserError
from shards.core.storage import WRITING, Folder
from shards.dataset import Dataset, write_info
from shards.writer import ShardWriter
from tests.support.object_store import Trouble, object_store


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    with object_store() as (environment, trouble):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield trouble


def commit(folder: Folder, text: bytes) -> dict:
    with ShardWriter(folder, 0, members=["txt", "json"], made={}) as writer:
        writer.add("a", {"txt": text, "json": b"{}"})
        writer.fail("b", "read", "empty", "it is empty")
        return writer.commit({})


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_shard_is_committed_and_read_by_ranges_under_throttling(store: Trouble, share: float) -> None:
    folder = Folder("s3://bucket/some/where")
    store.share = share
    write_info(folder, {"members": ["txt", "json"], "totals": None})
    mark = commit(folder, b"x" * (1 << 20))
    assert commit(folder, b"second") == mark  # an earlier commit stands
    dataset = Dataset.open(folder.url)
    assert dataset.read("a", ["json"]).members == {"json": b"{}"}
    assert [len(sample.members["txt"]) for sample in dataset.samples("000000")] == [1 << 20]
    folder.sweep()
    assert folder.list() == ["000000.failed.jsonl", "000000.json", "000000.tar", "dataset.json"]
    assert folder.list(WRITING) == [] and bool(share) == bool(store.injected)


def test_of_many_writers_exactly_one_commits(store: Trouble) -> None:
    folder, marks = Folder("s3://bucket/race"), []
    writers = [threading.Thread(target=lambda i=i: marks.append(commit(folder, b"%d" % i))) for i in range(4)]  # type: ignore[misc]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(marks) == 4 and len({mark["checksum"] for mark in marks}) == 1
    tar = folder.read("000000.tar")
    assert marks[0]["tar"]["size"] == len(tar) and folder.list(WRITING) == []


def test_a_missing_bucket_and_missing_credentials_are_sentences(
    store: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="s3://nowhere/x"):
        commit(Folder("s3://nowhere/x"), b"")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"cannot write s3://bucket/x: .*credentials"):
        Folder("s3://bucket").write("x", b"")
