"""From shards to batches: held-out keys, order whatever the workers, flips that keep telling the truth."""

import numpy as np
import pytest
import torch

from shards.stream.order import Sampler
from shards.stream.select import share_of
from tests.support import training
from train.config import DataConfig
from train.data import Samples, generator_of, mirrored

PLAIN = DataConfig(size_px=16, held_out=0.3, workers=0, memory_gb=0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


def _with(**changes: object) -> DataConfig:
    return DataConfig(**(PLAIN.__dict__ | changes))


def test_held_out_keys_are_never_trained_on_and_every_other_key_is_seen_once_an_epoch(shards: str) -> None:
    samples = Samples([shards], PLAIN, seed=0)
    held = {one.sample.key for one in samples.held_out()}
    epoch = [key for batch in samples.batches(Sampler(batch=3, samples=len(samples))) for key in batch.keys]
    assert held == {key for key in held | set(epoch) if share_of(key) < 0.3} and 0 < len(held) < 15
    assert len(epoch) == len(set(epoch)) and len(held) + len(epoch) == 15


def test_batches_are_the_same_for_loader_processes_threads_and_memory(shards: str) -> None:
    cases = {"plain": PLAIN, "workers": _with(workers=2), "memory": _with(memory_gb=1.0)}
    found = {}
    for name, config in cases.items():
        samples = Samples([shards], config, seed=3)
        assert samples.in_memory == (name == "memory")
        found[name] = list(samples.batches(Sampler(batch=4, samples=24)))
    for name in ("workers", "memory"):
        for ours, theirs in zip(found[name], found["plain"], strict=True):
            assert [s.position for s in ours.samples] == [s.position for s in theirs.samples]
            assert ours.keys == theirs.keys
            assert [s.caption for s in ours.samples] == [s.caption for s in theirs.samples]
            assert torch.equal(ours.packed(), theirs.packed()) and torch.equal(ours.image(), theirs.image())
            assert torch.equal(ours.valid(), theirs.valid())


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_keys_of_every_step_are_the_same_for_any_number_of_ranks_and_workers(shards: str, workers: int) -> None:
    samples = Samples([shards], _with(workers=workers), seed=1)
    epoch = len(samples)
    expected = training.positions_of(samples, 24)
    assert sorted(expected[i] for i in range(epoch)) == sorted(set(expected.values()))  # none lost, none doubled
    for world in (1, 2, 3, 8):
        seen = {}
        for rank in range(world):
            for batch in samples.batches(Sampler(batch=24 // world, rank=rank, world=world, samples=24)):
                seen |= {sample.position: sample.key for sample in batch.samples}
        assert seen == expected


def test_a_mirrored_sample_has_mirrored_maps_normals_and_words(shards: str) -> None:
    def first(flip: float) -> object:
        samples = Samples([shards], _with(flip=flip, mirror_captions=True), seed=0)
        return next(samples.batches(Sampler(batch=1, samples=1))).samples[0]

    plain, turned = first(0.0), first(1.0)
    assert plain.key == turned.key and "left" in plain.caption and "right" in turned.caption
    assert torch.equal(turned.image, plain.image.flip(-1))
    assert torch.equal(turned.packed[0], plain.packed[0].flip(-1))
    assert torch.allclose(turned.packed[1], -plain.packed[1].flip(-1))
    assert torch.equal(turned.valid, plain.valid.flip(-1))


def test_words_change_places_and_nothing_else() -> None:
    assert mirrored("a cube left of a bright sphere, Right?") == "a cube right of a bright sphere, left?"


def test_generators_belong_to_seed_position_and_purpose() -> None:
    def draw(*names: int) -> float:
        return float(torch.rand((), generator=generator_of(*names)))

    values = {draw(seed, position, purpose) for seed in (0, 1) for position in (0, 10**12) for purpose in (1, 2)}
    assert len(values) == 8 and draw(0, 5, 1) == draw(0, 5, 1)
    assert np.isfinite(list(values)).all()
