"""Conditions, buckets, the local cache and a loader's state, on small datasets on a disk and in an object store."""

import fcntl
import multiprocessing
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from shards.__main__ import app
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.geometry import fit
from shards.intrinsics import Empty, encode_png
from shards.sample import encode_meta, member_names
from shards.stream import Item, Stream
from shards.stream.loader import Arrived, Block, Blocks, StreamLoader
from shards.stream.local_cache import LocalCache
from shards.stream.order import Sampler
from shards.stream.select import Condition, select
from shards.stream.signed import SignedReads
from shards.writer import ShardWriter
from tests.support.object_store import object_store

SIZES = ((16, 16), (24, 12), (12, 24))  # (width, height), in turn
SHAPES = ((16, 16), (12, 24), (24, 12))  # the same as (height, width)


def make(url: str | Path, shards: int = 5, each: int = 12) -> str:
    """Sample i has the size SIZES[i % 3], the aesthetic score i / 10 and the angle i; every 10th has no score."""
    folder, members = Folder(url), member_names("png", ())
    for shard in range(shards):
        with ShardWriter(folder, shard, members=members, made={}) as writer:
            for i in range(shard * each, (shard + 1) * each):
                width, height = SIZES[i % 3]
                described = {"image": {"size": [width, height]}, "quality": {"normal_depth_angle": float(i)}}
                meta: dict[str, Any] = {"lang": "en" if i % 2 else "de", "intrinsics": described}
                if i % 10:
                    meta["aesthetic"] = i / 10
                pixels = np.full((height, width, 3), i, np.uint8)
                writer.add(f"k{i:03d}", {"png": encode_png(pixels), "txt": b"", "json": encode_meta(meta)})
            writer.commit({})
    totals = add_counts(Dataset(folder, {}).marks())
    write_info(
        folder,
        {
            "config": {},
            "shards": len(totals["shards"]),
            "members": members,
            "image": "png",
            "estimators": {},
            "depth_kind": "",
            "totals": totals,
        },
    )
    return folder.url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("select"))


def key_and_shape(item: Item, rng: np.random.Generator) -> tuple[str, Any, int]:
    assert item.image is not None
    if item.shape is not None:
        geometry = fit(*item.image.shape[:2], item.shape, rng=rng)
        assert geometry.image(item.image).shape[:2] == item.shape
    return item.key, item.shape, int(rng.integers(1 << 30))


# ---- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "passes"),
    [
        ("aesthetic >= 3", lambda i: i % 10 and i >= 30),
        ("quality.normal_depth_angle<30", lambda i: i < 30),
        ("lang == en", lambda i: i % 2),
        ("lang != 'en'", lambda i: i % 2 == 0),
        ("image.aspect <= 1.5", lambda i: i % 3 == 0),
        ("image.width == 24", lambda i: i % 3 == 1),
    ],
)
def test_only_samples_that_pass_are_streamed_and_the_others_are_counted(url: str, condition: str, passes: Any) -> None:
    wanted = {f"k{i:03d}" for i in range(60) if passes(i)}
    stream = Stream([url], intrinsics=(), images=False, where=[condition])
    assert len(stream) == len(wanted) and {stream.key(i) for i in range(len(stream))} == wanted
    assert stream[len(stream) + 3].key in wanted
    assert sum(select(Dataset.open(url), [condition]).dropped.values()) == 60 - len(wanted)


def test_drops_are_counted_by_reason(url: str) -> None:
    dropped = select(Dataset.open(url), ["aesthetic >= 3", "lang == en"]).dropped
    assert dropped == {"no aesthetic": 6, "not aesthetic >= 3": 27, "not lang == en": 12}


@pytest.mark.parametrize(
    "text", ["aesthetic", "aesthetic ~ 3", "aesthetic > high", "__import__('os') == 1", "", "a =="]
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Condition.parse(text)


@pytest.mark.parametrize(
    "meta", [{}, {"a": None}, {"a": "x"}, {"a": True}, {"a": {"b": 1}}, {"a": float("nan")}, {"a": []}]
)
def test_a_value_that_is_no_number_does_not_pass(meta: dict[str, Any]) -> None:
    assert Condition.parse("a >= 0").refuses(meta) == "no a" and Condition.parse("a < 0").refuses(meta) == "no a"


def test_nothing_that_passes_is_a_sentence_with_the_reasons(url: str) -> None:
    with pytest.raises(UserError, match=r"passes aesthetic > 99: 6 no aesthetic, 54 not aesthetic > 99"):
        Stream([url], intrinsics=(), where=["aesthetic > 99"])


def test_a_kept_answer_spares_reading_and_is_made_again_when_the_dataset_changes(tmp_path: Path) -> None:
    url, keep = make(tmp_path / "d"), str(tmp_path / "kept")
    first = select(Dataset.open(url), ["aesthetic >= 3"], SHAPES, keep=keep)
    (file,) = (tmp_path / "kept").iterdir()
    for tar in (tmp_path / "d").glob("*.tar"):
        tar.rename(tar.with_suffix(".away"))
    again = select(Dataset.open(url), ["aesthetic >= 3"], SHAPES, keep=keep)
    assert np.array_equal(first.groups, again.groups) and first.dropped == again.dropped
    for tar in (tmp_path / "d").glob("*.away"):
        tar.rename(tar.with_suffix(".tar"))
    file.write_bytes(file.read_bytes()[:-5])  # a damaged file is as good as none
    assert np.array_equal(first.groups, select(Dataset.open(url), ["aesthetic >= 3"], SHAPES, keep=keep).groups)
    info = Dataset.open(url).info
    write_info(Folder(url), info | {"note": "changed"})
    select(Dataset.open(url), ["aesthetic >= 3"], SHAPES, keep=keep)
    assert len(list((tmp_path / "kept").iterdir())) == 2


# ---- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 4])
def test_batches_hold_one_bucket_and_workers_change_nothing(url: str, workers: int) -> None:
    stream = Stream([url], intrinsics=(), transform=key_and_shape, buckets=SHAPES, chunk=4, window=2, seed=5)
    sampler = Sampler(batch=4, samples=120)
    loader = DataLoader(stream, batch_sampler=sampler, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
    batches = list(loader)
    assert all(len({shape for _, shape, _ in batch}) == 1 for batch in batches)
    seen = [item for batch in batches for item in batch]
    assert seen == [stream[position] for position in range(120)]
    for i in range(3):  # 20 samples of each bucket are 5 whole chunks: two passes, each of every key
        own = [key for key, shape, _ in seen if shape == SHAPES[i]]
        assert Counter(own[:20]) == Counter(own[20:]) == Counter(f"k{n:03d}" for n in range(60) if n % 3 == i)


def test_samples_of_a_size_with_too_few_of_them_are_not_repeated_in_a_batch(url: str) -> None:
    with pytest.warns(UserWarning, match=r"sizes with fewer samples than a chunk \(32\).* 40 samples are cropped"):
        stream = Stream([url], intrinsics=(), transform=key_and_shape, buckets=SHAPES, chunk=32, seed=5)
    seen = [stream[position] for position in range(len(stream))]
    assert sorted(key for key, _, _ in seen) == [f"k{n:03d}" for n in range(60)]  # each once in an epoch
    assert len({shape for _, shape, _ in seen}) == 1


def test_a_batch_that_would_mix_buckets_is_refused(url: str) -> None:
    stream = Stream([url], intrinsics=(), buckets=SHAPES, chunk=4)
    with pytest.raises(UsageError, match="make the stream's chunk a multiple"):
        stream.__getitems__([2, 3, 4, 5])


def test_the_stand_in_of_a_corrupt_sample_is_of_the_same_bucket(tmp_path: Path) -> None:
    url = make(tmp_path / "d")
    stream = Stream([url], intrinsics=(), buckets=SHAPES, chunk=4)
    key = stream.key(7)  # the last of its chunk
    mark = next(mark for mark in Dataset.open(url).marks() if key in mark["index"])
    offset, _ = mark["index"][key]["png"]
    with (tmp_path / "d" / f"{mark['shard']}.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(b"damage")
    item = stream[7]
    assert item.key == stream.key(4) and item.shape == stream[5].shape and key in item.skipped[0]


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("buckets", [(), SHAPES])
def test_all_ranks_together_see_the_keys_that_one_rank_sees_step_by_step(url: str, world: int, buckets: Any) -> None:
    stream = Stream([url], intrinsics=(), images=False, buckets=buckets, chunk=24, where=["aesthetic >= 1"], seed=4)

    def steps(ranks: int) -> list[list[str]]:
        samplers = [Sampler(batch=24 // ranks, rank=rank, world=ranks, samples=240) for rank in range(ranks)]
        return [
            sorted(stream.key(position) for own in batches for position in own)
            for batches in zip(*samplers, strict=True)
        ]

    assert steps(world) == steps(1)


# ---- a loader's state ------------------------------------------------------------------------------------------------


def only_key(item: Item, rng: np.random.Generator) -> str:
    return item.key


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_after_the_last_batch_it_handed_out(url: str, workers: int) -> None:
    def loader() -> StreamLoader:
        stream = Stream([url], intrinsics=(), images=False, transform=only_key, seed=2)
        return StreamLoader(stream, Sampler(batch=5, samples=200), num_workers=workers, collate_fn=list)

    whole = list(loader())
    first = loader()
    begun = list(islice(first, 17))  # in the second epoch; its workers have fetched more
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    assert begun + list(resumed) == whole and len(whole) == 40


def as_tensors(item: Item, rng: np.random.Generator) -> dict[str, Any]:
    assert item.image is not None
    image = torch.from_numpy(item.image.copy())
    odd = {
        "bf16": image.to(torch.bfloat16),
        "turned": image.permute(2, 0, 1),
        "none": torch.empty(0),
        "meta": item.meta,
    }
    return {"key": item.key, "image": image, "array": item.image, **odd}


def test_batches_of_workers_are_those_of_the_process_itself_and_outlive_their_loader(url: str) -> None:
    def batches(workers: int) -> list[Any]:
        stream = Stream([url], intrinsics=(), transform=as_tensors)
        return list(StreamLoader(stream, Sampler(batch=5, samples=20), num_workers=workers))

    for batch, wanted in zip(batches(2), batches(0), strict=True):
        for item, expected in zip(batch, wanted, strict=True):
            assert (
                item.keys() == expected.keys() and item["meta"] == expected["meta"] and item["key"] == expected["key"]
            )
            assert np.array_equal(item["array"], expected["array"])
            for name in ("image", "bf16", "turned", "none"):
                assert item[name].dtype == expected[name].dtype and torch.equal(item[name], expected[name])
            item["image"] += 1  # it is the receiver's own


def test_a_batch_that_is_held_stays_as_it_is_while_its_worker_uses_the_blocks_of_others_again(url: str) -> None:
    def batches(workers: int) -> Any:
        stream = Stream([url], intrinsics=(), transform=as_tensors)
        return StreamLoader(stream, Sampler(batch=2, samples=80), num_workers=workers)

    held: list[tuple[Any, Any]] = []
    for number, (batch, wanted) in enumerate(zip(batches(1), batches(0), strict=True)):
        if number % 7 == 0:
            held += [(batch[0]["image"][1:], wanted[0]["image"][1:]), (batch[1]["array"], wanted[1]["array"])]
        del batch
        assert all(np.array_equal(mine, theirs) for mine, theirs in held)
    assert len(held) == 12


def _block(values: np.ndarray, blocks: Blocks) -> Block:
    return Block.of(lambda _: [{"a": values}], blocks)


def test_a_worker_takes_a_block_again_once_its_batch_is_gone_and_keeps_few_without_one() -> None:
    blocks = Blocks()
    batches = [_block(np.full(100, i), blocks) for i in range(10)]
    assert len({batch.data.data_ptr() for batch in batches}) == 10
    arrived = Arrived(batches[3].heads, batches[3].data)
    array = arrived.open()[0]["a"][::2]
    del arrived
    other = _block(np.zeros(3), blocks)
    assert other.data.data_ptr() not in {batch.data.data_ptr() for batch in batches} and (array == 3).all()
    del array
    assert _block(np.zeros(3), blocks).data.data_ptr() == batches[3].data.data_ptr()
    for batch in batches:
        batch.data[0] = 0
    _block(np.zeros(3), blocks)
    assert len(blocks.mine) == 5  # the other one, and four
    assert len(_block(np.zeros(3 << 20), blocks).data) >= 24 << 20
    assert len(blocks.mine) == 4  # two in use, the new one, and the one that it outgrew


def test_a_block_that_turns_out_too_small_is_changed_for_a_larger_one() -> None:
    items = [{"a": np.full(50_000 * i, i), "i": i} for i in range(1, 8)]
    blocks = Blocks()
    for _ in range(2):
        block = Block.of(lambda _: iter(items), blocks)
        found = Arrived(block.heads, block.data).open()
        assert [item["i"] for item in found] == list(range(1, 8))
        assert all(np.array_equal(mine["a"], theirs["a"]) for mine, theirs in zip(found, items, strict=True))
        del found


def test_arrays_made_in_a_batchs_room_are_not_copied_and_those_that_outgrow_it_are() -> None:
    blocks, kept = Blocks(), []

    def make(empty: Empty) -> Iterator[Any]:
        for i in range(6):
            array = empty((100, 1000), np.float32)
            array[:] = i
            kept.append(array)
            yield {"whole": array, "row": torch.from_numpy(array[7]), "column": array[:, 7], "own": np.full(3, i)}

    first = Block.of(make, blocks)  # its block was too small, and changed on the way
    second = Block.of(make, blocks)
    for block in (first, second):
        for i, item in enumerate(Arrived(block.heads, block.data).open()):
            assert all((np.asarray(item[name]) == i).all() for name in ("whole", "row", "column", "own"))
    inside = [np.shares_memory(array, second.data.numpy()) for array in kept]
    assert all(inside[6:]) and not any(inside[:6])
    numbers = {block.data.data_ptr() for block in (first, second)}
    again = _block(np.zeros(3), blocks)  # the second is gone, but `kept` lies in it
    assert again.data.data_ptr() != second.data.data_ptr() and (kept[-1] == 5).all()
    kept.clear()
    assert _block(np.zeros(3), blocks).data.data_ptr() in numbers


def test_a_fork_of_the_receiver_does_not_give_blocks_back() -> None:
    block = _block(np.ones(3), Blocks())
    arrived = Arrived(block.heads, block.data)
    child = multiprocessing.get_context("fork").Process(target=arrived.__init__, args=([], block.data))  # type: ignore[misc]
    child.start()  # there, the bytes that `arrived` held are let go
    child.join()
    assert child.exitcode == 0 and block.data[0] == 1
    del arrived
    assert block.data[0] == 0


# ---- object stores and the local cache -------------------------------------------------------------------------------


def test_a_stream_from_an_object_store_is_that_from_the_disk_also_through_workers_and_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Stream([make(tmp_path / "d", 2, 8)], intrinsics=(), transform=key_and_shape)
    expected = [local[i] for i in range(16)]
    with object_store() as (environment, trouble):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        remote = make("s3://bucket/data", 2, 8)
        cache = LocalCache(tmp_path / "cache", 1 << 20)
        for workers in (0, 2):
            stream = Stream([remote], intrinsics=(), transform=key_and_shape, cache=cache)
            sampler = Sampler(batch=4, samples=16)
            loader = DataLoader(stream, batch_sampler=sampler, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
            assert [item for batch in loader for item in batch] == expected
        again = Stream([remote], intrinsics=(), transform=key_and_shape, cache=cache)
        for i in range(16):
            again.key(i)  # the marks are known
        trouble.share = 1.0  # from here on the store answers nothing
        assert [again[i] for i in range(16)] == expected


def test_a_cache_keeps_to_its_limit_and_what_was_used_last(tmp_path: Path) -> None:
    cache, limit = LocalCache(tmp_path, 1 << 20), 1 << 20
    fetched: list[int] = []

    def read(i: int) -> bytes:
        def fetch() -> bytes:
            fetched.append(i)
            return bytes([i % 256]) * 8000

        return cache.read("v1", i * 8000, (i + 1) * 8000, fetch)

    for i in range(300):
        assert read(i) == bytes([i % 256]) * 8000
        read(0)  # used all the time
        if i % 10 == 0:
            assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= limit
    assert fetched == list(range(300))
    read(299)
    assert len(fetched) == 300
    assert cache.read("v2", 0, 1, lambda: b"x") == b"x"  # another version of the file


def test_a_damaged_file_of_a_cache_is_fetched_again(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1 << 20)
    assert cache.read("v", 0, 4, lambda: b"good") == b"good"
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")
    file.write_bytes(b"evil" + file.read_bytes()[4:])
    assert cache.read("v", 0, 4, lambda: b"good") == b"good"


def test_many_writers_share_a_cache(tmp_path: Path) -> None:
    wrong: list[int] = []

    def work() -> None:
        cache = LocalCache(tmp_path, 1 << 20)
        for i in range(150):
            data = bytes([i]) * 8000
            if cache.read("v", i, i + 8000, lambda data=data: data) != data:  # type: ignore[misc]
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 1 << 20


def test_a_writer_waits_while_another_tidies_a_cache(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1 << 20)

    def work() -> None:
        for i in range(10):
            cache.read("v", i, i + 8000, lambda: bytes(8000))

    thread = threading.Thread(target=work)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 2
    thread.join(30)
    assert not thread.is_alive() and len([path for path in tmp_path.rglob("*") if path.is_file()]) == 11


def test_the_command_counts_what_is_dropped_and_keeps_the_answer(url: str, tmp_path: Path) -> None:
    command = ["select", url, "--where", "aesthetic >= 3", "--where", "lang == en", "--keep", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "15 of 60 samples meet aesthetic >= 3 and lang == en" in result.output
    assert "6  no aesthetic" in result.output and len(list(tmp_path.iterdir())) == 1


def test_ranges_are_read_by_signed_addresses_and_by_the_client_where_those_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with object_store() as (environment, trouble):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        folder = Folder("s3://bucket/x")
        folder.write("a.bin", bytes(range(100)))
        signed = SignedReads(folder.fs)
        assert signed.read("bucket/x/a.bin", 10, 20) == bytes(range(10, 20))
        assert signed.read("bucket/x/a.bin", 90, 110) is None and signed.read("bucket/x/none", 0, 5) is None
        trouble.share = 1.0
        assert signed.read("bucket/x/a.bin", 10, 20) is None
        trouble.share = 0.0
        assert signed.read("bucket/x/a.bin", 10, 20) == bytes(range(10, 20))  # it worked before, so it goes on
        hopeless = SignedReads(folder.fs)
        for _ in range(3):
            assert hopeless.read("bucket/x/none", 0, 5) is None
        assert hopeless.read("bucket/x/a.bin", 0, 5) is None  # it does not even try
