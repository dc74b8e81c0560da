"""Forgetting: the sample is gone from the bytes, the counts still add up, and nothing else changes."""

import hashlib
from pathlib import Path

import pytest

from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.edit.forget import Forgotten, forget, read_forgotten
from shards.writer import ShardWriter


@pytest.fixture
def url(tmp_path: Path) -> str:
    folder = Folder(tmp_path / "d")
    for shard in range(3):
        with ShardWriter(folder, shard, members=["jpg", "txt", "json"], made={"unit": shard}) as writer:
            for i in range(3):
                meta = f'{{"url": "http://x/{shard}{i}"}}'.encode()
                writer.add(f"k{shard}{i}", {"jpg": f"image {shard}{i}".encode(), "txt": b"secret", "json": meta})
            writer.fail("bad", "read", "empty", "it is empty")
            writer.commit({"wall_s": 1.0})
    write_info(folder, {"members": ["jpg", "txt", "json"], "totals": add_counts(Dataset(folder, {}).marks())})
    return folder.url


def shard_bytes(url: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(url).glob("*.tar"))]


@pytest.mark.parametrize(
    ("wanted", "keys"),
    [
        (Forgotten.of(keys=["k01", "unknown"]), ["k01"]),
        (Forgotten.of(urls=["http://x/12"]), ["k12"]),
        (Forgotten.of(hashes=[hashlib.sha256(b"image 20").hexdigest().upper()]), ["k20"]),
        (Forgotten.of(hashes=[hashlib.md5(b"image 22").hexdigest()], keys=["k00"]), ["k00", "k22"]),
    ],
)
def test_only_what_is_named_goes_and_only_its_shards_change(url: str, wanted: Forgotten, keys: list[str]) -> None:
    before = shard_bytes(url)
    assert forget(url, wanted).keys == keys
    dataset = Dataset.open(url)
    assert sorted(set(dataset.keys()) | set(keys)) == [f"k{s}{i}" for s in range(3) for i in range(3)]
    assert not set(dataset.keys()) & set(keys)
    changed = {index for index, (old, new) in enumerate(zip(before, shard_bytes(url), strict=True)) if old != new}
    assert changed == {int(key[1]) for key in keys}
    for key in keys:
        assert f"image {key[1:]}".encode() not in b"".join(shard_bytes(url))
        failures = list(dataset.failures(f"00000{key[1]}"))
        assert {"key": key, "stage": "read", "reason": "forgotten", "message": "removed on request"} in failures
    failed = {"empty": 3, "forgotten": len(keys)}
    shards = [3 - sum(key[1] == str(shard) for key in keys) for shard in range(3)]
    assert dataset.info["totals"] == {"in": 12, "ok": 9 - len(keys), "failed": failed, "shards": shards}


def test_forgetting_again_changes_nothing_and_the_list_grows(url: str) -> None:
    forget(url, Forgotten.of(keys=["k01"]))
    before = shard_bytes(url)
    assert forget(url, Forgotten.of(keys=["k01"])).samples == 0 and shard_bytes(url) == before
    forget(url, Forgotten.of(urls=["http://x/12"]))
    noted = read_forgotten(Folder(url))
    assert (
        noted.keys == {"k01"} and noted.covers("new", {"url": "http://x/12"}, b"") and not noted.covers("new", {}, b"")
    )


def test_urls_are_kept_as_digests_only(url: str) -> None:
    forget(url, Forgotten.of(urls=["http://x/12"]))
    assert b"http" not in (Path(url) / "forgotten.json").read_bytes()


def test_what_cannot_be_done_is_said(url: str) -> None:
    with pytest.raises(UsageError, match="nothing to forget"):
        forget(url, Forgotten())
    with pytest.raises(UsageError, match="'12' is not a hash"):
        Forgotten.of(hashes=["12"])
    write_info(Folder(url), {"members": ["jpg", "txt", "json"], "totals": None})
    with pytest.raises(UserError, match="unfinished"):
        forget(url, Forgotten.of(keys=["k01"]))
