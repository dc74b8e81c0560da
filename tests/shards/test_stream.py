"""Streaming: the same order whatever the number of ranks and workers, resuming by arithmetic, maps that stay true."""

import os
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.geometry import Geometry, square
from shards.intrinsics import INTRINSICS, IntrinsicMap, encode_png, order_segments
from shards.packing import pack
from shards.sample import encode_meta, member_names
from shards.stream import Item, Stream
from shards.stream.order import Mixture, Order, Place, Sampler
from shards.stream.reader import OPEN_FILES, MemberReader
from shards.writer import ShardWriter

COUNTS = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)


@given(COUNTS, st.integers(0, 3), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_an_epoch_has_every_sample_once_and_epochs_follow_without_a_gap(
    counts: list[int], seed: int, window: int, shuffle: bool
) -> None:
    order = Order(counts, seed=seed, window=window, shuffle=shuffle)
    everything = sorted((shard, row) for shard, count in enumerate(counts) for row in range(count))
    for epoch in range(2):
        seen = [order.place(epoch * order.size + index) for index in range(order.size)]
        assert sorted((place.shard, place.row) for place in seen) == everything
    if not shuffle:
        assert [(place.shard, place.row) for place in map(order.place, range(order.size))] == everything


@given(COUNTS, st.integers(1, 4))
@settings(deadline=None)
def test_only_a_window_of_shards_is_mixed(counts: list[int], window: int) -> None:
    order, shards = Order(counts, window=window), []
    for index in range(order.size):
        shard = order.place(index).shard
        if shard not in shards[-window:]:
            shards.append(shard)
    assert len(shards) == sum(count > 0 for count in counts)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def keys(seed: int, epoch: int) -> list[Place]:
        order = Order([20] * 5, seed=seed, window=2)
        return [order.place(epoch * 100 + i) for i in range(100)]

    assert keys(0, 0) == keys(0, 0) and keys(0, 0) != keys(0, 1) and keys(0, 0) != keys(1, 0)


def test_a_position_far_out_is_found_without_reading_what_lies_before() -> None:
    order = Order([1000] * 1000)
    assert order.place(10**15) == Order([1000] * 1000).place(10**15)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(0, 5000))
@settings(deadline=None, max_examples=30)
def test_a_mixture_gives_each_dataset_its_own_stream_in_order_and_its_share(weights: list[float], start: int) -> None:
    mixture, seen = Mixture(weights), [[] for _ in weights]
    for position in range(start, start + 2000):
        dataset, own = mixture.place(position)
        seen[dataset].append(own)
    for dataset, own in enumerate(seen):
        assert own == list(range(own[0], own[0] + len(own)))
        assert len(own) / 2000 == pytest.approx(weights[dataset] / sum(weights), abs=2e-3)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_all_ranks_together_see_the_same_positions_in_equal_counts(world: int) -> None:
    samplers = [
        Sampler(batch=24 // world, rank=rank, world=world, consumed=48, samples=2 * 48 + 48) for rank in range(world)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert len({len(own) for own in batches}) == 1
    for step, parts in enumerate(zip(*batches, strict=True)):
        together = sorted(position for part in parts for position in part)
        assert together == list(range(48 + 24 * step, 48 + 24 * (step + 1)))


def test_a_sampler_resumes_after_the_last_step_not_after_the_last_fetch() -> None:
    sampler = Sampler(batch=4, world=2)
    list(islice(sampler, 5))
    sampler.advance(2)
    resumed = Sampler(batch=4, world=2)
    resumed.load_state_dict(sampler.state_dict())
    assert next(iter(resumed)) == [16, 18, 20, 22]
    with pytest.raises(UsageError, match="rank 2 of 2"):
        Sampler(batch=1, rank=2, world=2)


# ---- a dataset on disk -----------------------------------------------------------------------------------------------


def maps_of(number: int) -> dict[str, IntrinsicMap]:
    rng = np.random.default_rng(number)
    n = rng.normal(size=(12, 16, 3)).astype(np.float32)
    return {
        "depth": IntrinsicMap(rng.uniform(1, 9, (12, 16)).astype(np.float32), {"kind": "metric", "focal_px": 20.0}),
        "normal": IntrinsicMap(n / np.linalg.norm(n, axis=2, keepdims=True)),
        "segmentation": IntrinsicMap(order_segments(rng.integers(0, 4, (12, 16))), {"segments": []}),
        "line": IntrinsicMap(rng.random((12, 16)).astype(np.float32)),
    }


def make(path: Path, shards: int = 4, each: int = 5, prefix: str = "k") -> str:
    folder = Folder(path)
    members = member_names("png", tuple(INTRINSICS))
    for shard in range(shards):
        with ShardWriter(folder, shard, members=members, made={}) as writer:
            for i in range(each):
                number = shard * each + i
                described, stored = (
                    {},
                    {"png": encode_png(np.full((12, 16, 3), number, np.uint8)), "txt": b"words %d" % number},
                )
                for name, item in maps_of(number).items():
                    stored[INTRINSICS[name].member], described[name] = INTRINSICS[name].encode(item)
                stored["json"] = encode_meta({"intrinsics": described})
                writer.add(f"{prefix}{number:03d}", stored)
            writer.commit({})
    info = {"members": members, "image": "png", "totals": add_counts(Dataset(folder, {}).marks())}
    write_info(folder, info)
    return folder.url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("stream"))


def plain(item: Item, rng: np.random.Generator) -> tuple[str, int]:
    return item.key, int(rng.integers(1 << 30))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_loader_workers_change_neither_order_nor_augmentation(url: str, workers: int) -> None:
    stream = Stream([url], seed=3, window=2, intrinsics=(), transform=plain)
    assert stream[0] == stream[0]  # the parent's own threads must not matter to its workers
    loader = DataLoader(
        stream,  # type: ignore[arg-type]
        batch_sampler=Sampler(batch=3, samples=40),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="fork" if workers else None,
    )
    seen = [item for batch in loader for item in batch]
    assert seen == [stream[position] for position in range(40)]
    assert [key for key, _ in seen] == [stream.key(position) for position in range(40)]
    assert Counter(key for key, _ in seen[:20]) == Counter(f"k{i:03d}" for i in range(20))


def test_a_stream_travels_to_another_process(url: str) -> None:
    stream = Stream([url], seed=1, transform=plain)
    assert pickle.loads(pickle.dumps(stream)).__getitems__(range(5)) == stream.__getitems__(range(5))


def test_an_item_has_what_was_asked_for_and_it_is_right(url: str) -> None:
    item = Stream([url], intrinsics=("depth", "line"))[7]
    number = int(item.key[1:])
    assert item.image is not None and (item.image == number).all() and item.caption == f"words {number}"
    assert set(item.maps) == {"depth", "line"} and not item.skipped
    np.testing.assert_allclose(item.maps["depth"].values, maps_of(number)["depth"].values, rtol=1e-4)
    assert Stream([url], images=False)[7].image is None


def test_a_corrupt_sample_is_skipped_and_named_and_the_next_stands_in(tmp_path: Path) -> None:
    url = make(tmp_path / "d")
    stream = Stream([url])
    key, following = stream.key(5), stream.key(6)
    mark = next(mark for mark in Dataset.open(url).marks() if key in mark["index"])
    offset, size = mark["index"][key]["depth.png"]
    with (tmp_path / "d" / f"{mark['shard']}.tar").open("r+b") as tar:
        tar.seek(offset + size // 2)
        tar.write(b"damage")
    item = stream[5]
    assert item.key == following and item.position == 5 and len(item.skipped) == 1 and key in item.skipped[0]
    assert stream[6].key == following and not stream[6].skipped


def test_a_tar_stays_open_until_it_is_read_whatever_other_threads_open_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(make(tmp_path, shards=OPEN_FILES + 2, each=1))
    reader, marks, pread = MemberReader(dataset.folder.url), list(dataset.marks()), os.pread

    def pread_late(descriptor: int, size: int, start: int) -> bytes:
        """Between choosing the file and reading it, others open more files than may stay open."""
        for mark in marks[1:]:
            reader.announce(mark, *next((key, ["txt"]) for key in mark["index"]))
        return pread(descriptor, size, start)

    monkeypatch.setattr(os, "pread", pread_late)
    assert reader.read(marks[0], "k000", ["txt"]).members["txt"] == b"words 0"


def test_a_mixture_streams_from_both_datasets(url: str, tmp_path: Path) -> None:
    other = make(tmp_path / "other", shards=1, prefix="o")
    keys = [item.key[0] for item in Stream([url, other], weights=[3, 1], intrinsics=()).__getitems__(range(40))]
    assert Counter(keys) == {"k": 30, "o": 10}


def test_what_cannot_be_streamed_is_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name at least one"):
        Stream([])
    write_info(Folder(tmp_path), {"members": ["jpg"], "totals": None})
    with pytest.raises(UserError, match="unfinished"):
        Stream([str(tmp_path)])
    write_info(Folder(tmp_path), {"members": ["jpg"], "totals": {"shards": [1]}})
    with pytest.raises(UserError, match=r"has no depth\.png, line\.png"):
        Stream([str(tmp_path)])


# ---- geometry --------------------------------------------------------------------------------------------------------


def test_a_flip_mirrors_every_map_and_negates_normal_x() -> None:
    maps = maps_of(1)
    geometry = Geometry((0, 0, 16, 12), 12, 16, flip=True)
    flipped = geometry.maps(maps)
    assert np.array_equal(flipped["depth"].values, maps["depth"].values[:, ::-1])
    assert np.array_equal(flipped["line"].values, maps["line"].values[:, ::-1])
    assert np.array_equal(flipped["normal"].values, maps["normal"].values[:, ::-1] * np.array([-1, 1, 1], np.float32))
    twice = geometry.maps(flipped)
    assert all(np.array_equal(twice[name].values, maps[name].values) for name in ("depth", "normal", "line"))
    assert len(flipped["segmentation"].info["segments"]) == flipped["segmentation"].values.max()


def test_a_resize_scales_the_focal_length_and_keeps_values_real() -> None:
    maps = maps_of(2)
    small = Geometry((2, 0, 12, 12), 6, 6).maps(maps)
    assert small["depth"].info["focal_px"] == 10.0
    assert np.isin(small["depth"].values, maps["depth"].values).all()
    np.testing.assert_allclose(np.linalg.norm(small["normal"].values, axis=2), 1, atol=1e-6)
    assert pack(small)[0].shape == (8, 6, 6)


def test_the_crop_lies_inside_and_is_random_only_if_asked() -> None:
    assert square(12, 16, 8).box == (2, 0, 12, 12)
    boxes = {square(12, 16, 8, rng=np.random.default_rng(i)).box for i in range(60)}
    assert boxes == {(x, 0, 12, 12) for x in range(5)}
    with pytest.raises(UsageError, match="does not fit"):
        Geometry((5, 0, 16, 12), 8, 8).image(np.zeros((12, 16, 3), np.uint8))
    assert square(12, 16, 8).image(np.full((12, 16, 3), 7, np.uint8)).shape == (8, 8, 3)
