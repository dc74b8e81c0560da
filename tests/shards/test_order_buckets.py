"""Buckets: every chunk of one size, nothing lost or doubled, the same order whatever the number of ranks and workers."""

import itertools
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.core.errors import UsageError, UserError
from shards.stream.buckets import BucketOrder, bucket_shapes, nearest_bucket
from shards.stream.order import Sampler

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


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
