"""Buckets: every chunk of one size, nothing lost or doubled, the same order whatever the number of ranks and workers."""

import itertools
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.core.errors import UsageError, UserError
from shards.stream.buckets import BucketOrder, bucket_shapes, merged, nearest_bucket
from shards.stream.order import Sampler

SIZES = st.lists(st.one_of(st.just(0), st.integers(9, 40)), min_size=1, max_size=5).filter(any)


@given(SIZES, st.integers(1, 9), st.integers(0, 3), st.booleans())
@settings(deadline=None, max_examples=60)
def test_each_bucket_is_handed_out_in_order_without_gap_and_chunk_by_chunk(
    sizes: list[int], chunk: int, seed: int, shuffle: bool
) -> None:
    order, seen = BucketOrder(sizes, chunk=chunk, seed=seed, shuffle=shuffle), [[] for _ in sizes]
    for position in range(3 * order.size // chunk * chunk):
        share = order.place(position)
        assert order.place(position // chunk * chunk).bucket == share.bucket
        seen[share.bucket].append(share.position)
    for bucket, own in enumerate(seen):
        assert own == list(range(len(own)))  # so no sample is lost or doubled in a pass of its bucket
        assert abs(len(own) - 3 * sizes[bucket]) < 2 * chunk * len(sizes)


@given(SIZES, st.integers(1, 9), st.integers(0, 10**12))
@settings(deadline=None, max_examples=60)
def test_any_position_is_found_alone(sizes: list[int], chunk: int, start: int) -> None:
    order = BucketOrder(sizes, chunk=chunk)
    near = [order.place(position) for position in range(start, start + 3 * chunk)]
    assert near == [BucketOrder(sizes, chunk=chunk).place(position) for position in range(start, start + 3 * chunk)]
    for before, after in itertools.pairwise(near):
        assert before.bucket != after.bucket or after.position == before.position + 1


def test_epochs_and_seeds_differ_and_a_copy_does_not() -> None:
    def buckets(seed: int, epoch: int) -> list[int]:
        order = pickle.loads(pickle.dumps(BucketOrder([80, 80, 80], chunk=4, seed=seed)))
        return [order.place(epoch * 240 + i).bucket for i in range(0, 240, 4)]

    assert buckets(0, 0) == buckets(0, 0) and buckets(0, 0) != buckets(0, 1) and buckets(0, 0) != buckets(1, 0)
    assert Counter(buckets(0, 0)) == {0: 20, 1: 20, 2: 20}


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_bucket_of_a_global_batch(world: int) -> None:
    order = BucketOrder([100, 70, 31], chunk=48, seed=1)
    samplers = [iter(Sampler(batch=24 // world, rank=rank, world=world, samples=480)) for rank in range(world)]
    keys = []
    for batches in zip(*samplers, strict=True):
        shares = [order.place(position) for batch in batches for position in sorted(batch)]
        assert len({share.bucket for share in shares}) == 1
        keys += sorted((share.bucket, share.position) for share in shares)
    alone = [order.place(position) for position in range(480)]
    assert keys == [(share.bucket, share.position) for share in alone]


@pytest.mark.parametrize("size_px", [256, 512, 1024])
def test_bucket_sizes_have_about_the_same_area_and_mirror_each_other(size_px: int) -> None:
    shapes = bucket_shapes(size_px)
    assert (size_px, size_px) in shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % 64 == width % 64 == 0 and (width, height) in shapes
        assert 0.6 * size_px**2 < height * width <= size_px**2 and max(height, width) <= 2 * min(height, width)


def test_an_image_goes_where_least_of_it_is_cropped() -> None:
    shapes = ((512, 512), (384, 640), (640, 384))
    assert [nearest_bucket(shapes, *size) for size in ((500, 500), (1600, 900), (3, 5), (9000, 10))] == [0, 1, 2, 1]
    assert bucket_shapes(64) == ((64, 64),)


def test_impossible_buckets_are_refused() -> None:
    with pytest.raises(UsageError, match="no buckets of 32 px"):
        bucket_shapes(32)
    with pytest.raises(UserError, match="every bucket is empty"):
        BucketOrder([0, 0], chunk=4)
    with pytest.raises(UsageError, match="chunk = 0"):
        BucketOrder([1], chunk=0)


def test_the_iterator_of_a_sampler_has_a_state_of_its_own() -> None:
    sampler = Sampler(batch=4, rank=1, world=2, samples=100)
    begun = iter(sampler)
    first = [next(begun) for _ in range(3)]
    resumed = iter(Sampler(batch=4, rank=1, world=2, samples=100))
    resumed.load_state_dict(begun.state_dict())
    assert [*first, *resumed] == list(sampler) and sampler.consumed == 0


# ---- buckets smaller than a chunk ------------------------------------------------------------------------------------

WIDE, SQUARE, TALL = (384, 640), (512, 512), (640, 384)


def test_an_order_without_small_buckets_is_what_it_has_always_been() -> None:
    order = BucketOrder([100, 0, 64, 300], chunk=64, seed=3)
    found = [order.place(position) for position in range(0, 20 * 64, 64)]
    golden = (
        "3.0 2.0 3.64 0.0 3.128 3.192 3.256 3.320 3.384 0.64 2.64 3.448 0.128 3.512 3.576 3.640 2.128 3.704 3.768 3.832"
    )
    assert " ".join(f"{share.bucket}.{share.position}" for share in found) == golden and order.left_out == 0


def test_a_bucket_smaller_than_a_chunk_never_fills_one() -> None:
    order = BucketOrder([3, 1000, 255], chunk=256)
    assert order.left_out == 258 and order.size == 1000
    assert {order.place(position).bucket for position in range(0, 20_000, 64)} == {1}
    alone = BucketOrder([3, 40, 40], chunk=256)  # something has to be streamed
    assert alone.left_out == 43 and {alone.place(position).bucket for position in range(500)} == {1}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([3, 900, 800], [1, 1, 2]),  # the next in aspect ratio takes them
        ([3, 900, 4], [1, 1, 1]),
        ([256, 900, 256], [0, 1, 2]),
        ([0, 900, 0], [0, 1, 2]),
        ([200, 100, 900], [1, 1, 2]),  # two that are small make one that is not
        ([3, 0, 900], [0, 1, 2]),  # 5:3 on 3:5 would lose most of the image
        ([3, 4, 5], [1, 1, 1]),
    ],
)
def test_small_buckets_go_to_the_nearest_size_within_reach(sizes: list[int], expected: list[int]) -> None:
    assert merged((WIDE, SQUARE, TALL), sizes, 256) == expected


@given(st.lists(st.integers(0, 600), min_size=1, max_size=8), st.integers(1, 300))
@settings(deadline=None, max_examples=80)
def test_what_is_merged_is_whole_and_never_cropped_by_more_than_is_said(sizes: list[int], chunk: int) -> None:
    shapes = bucket_shapes(512, step_px=128, max_aspect=4.0)[: len(sizes)]
    sizes = sizes[: len(shapes)]
    target = merged(shapes, sizes, chunk)
    counts = [
        sum(size for size, into in zip(sizes, target, strict=True) if into == bucket) for bucket in range(len(shapes))
    ]
    assert sum(counts) == sum(sizes)
    for bucket, into in enumerate(target):
        assert target[into] == into
        ratio = (shapes[bucket][1] / shapes[bucket][0]) / (shapes[into][1] / shapes[into][0])
        assert 0.499 < ratio < 2.001
        if into != bucket:
            assert sizes[bucket] < chunk
