"""Which estimators a run uses: sets, rows, .toml files; and how many images each is given at once."""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from extract.estimators import null
from extract.estimators.checkpoints import Published
from extract.estimators.listing import notes
from extract.estimators.table import ROWS, SETS, find_set, tasks_of
from extract.run.batches import BatchSize, DeviceLost, estimate_all, fitting
from shards.core.errors import UsageError
from shards.intrinsics import INTRINSICS, IntrinsicMap


def test_the_sets_cover_all_intrinsics_with_rows_that_make_them() -> None:
    assert {"light", "open", "paper", "fast", "demo"} <= set(SETS)
    assert SETS["none"].rows == {}
    for chosen in (chosen for name, chosen in SETS.items() if name != "none"):
        assert set(chosen.rows) == set(INTRINSICS)
        for intrinsic in INTRINSICS:
            assert intrinsic in chosen.row(intrinsic).yields


def test_depth_and_normals_of_one_network_come_from_one_pass() -> None:
    assert [task.intrinsics for task in tasks_of(find_set("paper"))] == [
        ("depth", "normal"),
        ("segmentation",),
        ("line",),
    ]


def test_a_toml_mixes_rows_and_describes_ones_own(tmp_path: Path) -> None:
    mixed = tmp_path / "mix.toml"
    mixed.write_text(
        'like = "light"\ndepth = "depth-pro"\nline = "mine"\n'
        '[row.mine]\nlike = "teed"\nweights = "s3://bucket/lines"\nbatch = 2\nsettings.shorter = 256\n'
    )
    chosen = find_set(str(mixed))
    assert chosen.row("depth") is ROWS["depth-pro"] and chosen.row("normal") is ROWS["normal-bae"]
    mine = chosen.row("line")
    assert (mine.name, mine.weights, mine.batch) == ("mine", "s3://bucket/lines", 2)
    assert mine.settings == {**ROWS["teed"].settings, "shorter": 256} and mine.files == ROWS["teed"].files
    mixed.write_text('[row.mine]\nlike = "teed"\nrevision = "abc"\n')
    assert find_set(str(mixed)).rows == {}
    mixed.write_text('line = "mine"\n[row.mine]\nlike = "teed"\nrevision = "abc"\n')
    assert find_set(str(mixed)).row("line").weights == Published("fal-ai/teed", "abc")
    mixed.write_text('line = "mine"\n[row.mine]\nlike = "hed"\nrepo = "me/lines"\n')
    assert find_set(str(mixed)).row("line").weights == Published("me/lines", "main")  # not hed's commit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('depth = "nothing"', "there is no estimator 'nothing'"),
        ('depth = "teed"', "teed makes no depth"),
        ('smell = "teed"', "there is no intrinsic 'smell'"),
        ('like = "nothing"', "there is no estimator set 'nothing'"),
        ('line = "a"\n[row.a]\nweights = "x"', "needs like"),
        ('line = "a"\n[row.a]\nlike = "teed"\nload = "os:system"', "no load"),
        ('line = "a"\n[row.a]\nlike = "nothing"', r"row\.a\.like"),
        ('line = "a"\n[row.a]\nlike = "teed"\nbatches = 3', "unknown setting 'row.a.batches'"),
        ('line = "a"\nrow = 3', "are tables"),
        ("line = ", "not valid TOML"),
    ],
)
def test_a_wrong_toml_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        find_set(str(tmp_path / "mix.toml"))


def test_an_intrinsic_that_the_estimators_do_not_make_is_a_sentence() -> None:
    assert [task.row.name for task in tasks_of(find_set("teed"))] == ["teed"]
    with pytest.raises(UsageError, match="make no depth"):
        tasks_of(find_set("teed"), ("depth",))
    with pytest.raises(UsageError, match="there is no estimator set"):
        find_set("nothing")


def test_restrictions_of_a_licence_are_said_at_the_start_and_shown_in_the_list() -> None:
    assert not notes(find_set("open"), demo=False)
    assert any(
        "metric3d-v2-large" in note and "ask the authors" in note for note in notes(find_set("paper"), demo=False)
    )
    listed = subprocess.run(
        [sys.executable, "-m", "extract", "--list-estimators"], capture_output=True, text=True, check=True
    )
    for row in ROWS.values():
        said = " ".join(listed.stdout.split())
        assert row.name in said and row.licence in said
        if isinstance(row.weights, Published):  # that a branch may move on is said
            pin = f"@{row.weights.revision[:8]}:" if row.weights.pinned else " (branch main, not pinned):"
            assert f"{row.weights.repo}{pin}" in said


# ---- batches ---------------------------------------------------------------------------------------------------------


def pictures(count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.full((*rng.integers(4, 9, 2), 3), i, np.uint8) for i in range(count)]


class Clumsy:
    """An estimator that runs out of memory now and then, and always beyond `most` images; the first pixel is the depth."""

    def __init__(self, seed: int, share: float, most: int) -> None:
        self.random, self.share, self.most, self.sizes = random.Random(seed), share, most, list[int]()

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        self.sizes.append(len(images))
        if len(images) > self.most or self.random.random() < self.share / (1 if len(images) > 1 else 20):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return [{"line": IntrinsicMap(image[..., 0] / np.float32(255))} for image in images]


@pytest.mark.parametrize("seed", range(5))
def test_out_of_memory_at_random_changes_nothing_and_is_remembered(seed: int) -> None:
    images, clumsy, size = pictures(), Clumsy(seed, 0.3, 5), BatchSize(16)
    found = estimate_all(clumsy, images, size)
    for image, maps in zip(images, found, strict=True):
        assert isinstance(maps, dict) and np.array_equal(maps["line"].values * 255, image[..., 0])
    assert size.now <= 5
    clumsy.sizes.clear()
    estimate_all(clumsy, images, size)
    assert max(clumsy.sizes) <= 5


def test_images_of_like_proportions_share_batches() -> None:
    shapes: list[set[float]] = []

    def watch(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        shapes.append({image.shape[1] / image.shape[0] for image in images})
        return null.estimate(images)

    wide, high = np.zeros((4, 8, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)
    estimate_all(watch, [wide, high] * 4, BatchSize(4))
    assert shapes == [{0.5}, {2.0}]


def test_one_image_beyond_the_memory_fails_alone_and_says_so() -> None:
    def bounded(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        if any(image[0, 0, 0] == 7 for image in images):
            raise MemoryError("7 is too much")
        return null.estimate(images)

    found = estimate_all(bounded, pictures(12), BatchSize(4))
    assert [i for i, maps in enumerate(found) if isinstance(maps, MemoryError)] == [7]
    assert "not even one image" in str(found[7])


def test_a_lost_device_is_not_the_images_fault_but_a_full_one_is_no_loss() -> None:
    def lost(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def full(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(DeviceLost):
        estimate_all(lost, pictures(2), BatchSize(2))
    assert all(isinstance(maps, MemoryError) for maps in estimate_all(full, pictures(2), BatchSize(2)))


def test_the_batch_that_fits_a_budget_is_a_power_of_two() -> None:
    assert [fitting(10, 12, budget) for budget in (0, 10, 12, 13, 16, 41)] == [1, 1, 2, 2, 4, 16]
