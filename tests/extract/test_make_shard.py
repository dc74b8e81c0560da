"""One unit becomes one shard: conservation, order, failures with reasons, and members that are kept to the byte."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.estimators import null
from extract.images.prepare import ImageRules
from extract.run.batches import DeviceLost
from extract.run.make_shard import Loaded, Progress, UnitWork, make_shard, probe
from extract.sources import Failure, RawSample, Unit
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, write_info
from shards.edit.forget import Forgotten, forget
from shards.intrinsics import INTRINSICS, IntrinsicMap
from shards.sample import member_names

MEMBERS = tuple(member_names("png", tuple(INTRINSICS)))


class Numbers:
    """A source of plain grey images 0..n-1, in which some are wrong."""

    def __init__(self, wrong: dict[int, Any] | None = None) -> None:
        self.wrong = wrong or {}

    def describe(self) -> dict[str, Any]:
        return {"kind": "numbers"}

    def total(self) -> int | None:
        return None

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        yield Unit(0, shard_size)

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        for i in range(unit.items):
            yield self.wrong.get(i, RawSample(f"k{i:02d}", np.full((40, 48, 3), i, np.uint8), f"caption {i}", {"n": i}))


def picky(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
    """An estimator that cannot bear number 5, and whose lines tell the number."""
    if any(image[0, 0, 0] == 5 for image in images):
        raise RuntimeError("cannot bear it")
    results = null.estimate(images)
    for image, maps in zip(images, results, strict=True):
        maps["line"] = IntrinsicMap(np.full(image.shape[:2], image[0, 0, 0] / 255, np.float32))
    return results


def make(
    folder: Folder,
    source: Numbers | None = None,
    estimators: Sequence[Loaded] = (Loaded(picky, tuple(INTRINSICS), "picky@1", 4),),
    count: int = 12,
    **options: Any,
) -> dict[str, Any]:
    folder.make()
    rules = ImageRules(format="png", size_px=None)
    work = UnitWork(source=source or Numbers(), image=rules, members=MEMBERS, threads=2, window=4)
    return make_shard(folder, Unit(0, count), work, estimators, made={"by": [e.id for e in estimators]}, **options)


def test_every_input_is_a_sample_or_a_failure_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    wrong = {
        2: Failure("gone", "read", "missing_file", "it is not there"),
        3: RawSample("k03", b"no image", "", {}),
        7: RawSample("k06", np.zeros((40, 48, 3), np.uint8), "", {}),
        8: RawSample("bad key", np.zeros((40, 48, 3), np.uint8), "", {}),
        9: RawSample("k09", np.zeros((40, 48, 3), np.uint8), "", {"x": float("nan")}),
    }
    progress = Progress()
    mark = make(Folder(tmp_path), Numbers(wrong), progress=progress)
    dataset = Dataset(Folder(tmp_path), {})
    failures = [(line["key"], line["stage"], line["reason"]) for line in dataset.failures("000000")]
    assert failures == [
        ("gone", "read", "missing_file"),
        ("k03", "decode", "not_an_image"),
        ("k05", "estimate", "estimator_failed"),
        ("k06", "encode", "duplicate_key"),
        ("bad key", "encode", "cannot_encode"),
        ("k09", "read", "bad_metadata"),
    ]
    assert [sample.key for sample in dataset.samples("000000")] == ["k00", "k01", "k04", "k06", "k10", "k11"]
    assert mark["counts"]["in"] == 12 == progress.done and mark["counts"]["ok"] == 6 and progress.failed == 6


def test_a_sample_has_its_maps_its_metadata_and_what_was_done_to_it(tmp_path: Path) -> None:
    make(Folder(tmp_path))
    sample = Dataset(Folder(tmp_path), {}).read("k10")
    assert (sample.image() == 10).all() and sample.caption == "caption 10" and list(sample.members) == list(MEMBERS)
    meta = sample.meta
    assert meta["n"] == 10 and {meta["intrinsics"][name]["by"] for name in INTRINSICS} == {"picky@1"}
    assert meta["intrinsics"]["image"]["size"] == [48, 40] and meta["intrinsics"]["quality"]["segmented"] == 1
    np.testing.assert_allclose(sample.map("line").values, 10 / 255)


def test_an_input_that_is_skipped_is_listed_and_the_rest_is_untouched(tmp_path: Path) -> None:
    mark = make(Folder(tmp_path), skip=frozenset({4}))
    lines = {line["key"]: line["reason"] for line in Dataset(Folder(tmp_path), {}).failures("000000")}
    assert lines == {"k04": "killed_worker", "k05": "estimator_failed"} and mark["counts"]["in"] == 12


def test_a_probe_looks_at_nothing_but_its_range(tmp_path: Path) -> None:
    seen = []

    def watching(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        seen.extend(int(image[0, 0, 0]) for image in images)
        return null.estimate(images)

    rules = ImageRules(format="png", size_px=None)
    work = UnitWork(source=Numbers(), image=rules, members=MEMBERS, threads=2, window=4)
    progress = Progress()
    probe(Unit(0, 12), work, [Loaded(watching, ("line",), "w@1", 4)], range(3, 6), progress)
    assert seen == [3, 4, 5] and progress.steps > 12  # it moves also while it only reads


def other(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
    return [{"line": IntrinsicMap(np.ones(image.shape[:2], np.float32))} for image in images]


def test_a_changed_estimator_remakes_its_maps_and_leaves_all_other_members_as_they_are(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    make(folder)
    before = {sample.key: sample for sample in Dataset(folder, {}).samples("000000")}
    make(folder, estimators=[Loaded(other, ("line",), "other@1", 4)])
    after = {sample.key: sample for sample in Dataset(folder, {}).samples("000000")}
    assert after.keys() == before.keys()
    for key, sample in after.items():
        assert (sample.map("line").values == 1).all() and sample.meta["intrinsics"]["line"]["by"] == "other@1"
        for name in set(MEMBERS) - {"line.png", "json"}:
            assert sample.members[name] == before[key].members[name]
        kept, old = sample.meta["intrinsics"], before[key].meta["intrinsics"]
        assert {name: kept[name] for name in ("depth", "normal", "segmentation")} == {
            name: old[name] for name in ("depth", "normal", "segmentation")
        }


def test_maps_that_are_up_to_date_are_not_estimated_again(tmp_path: Path) -> None:
    make(Folder(tmp_path))
    tar = (tmp_path / "000000.tar").read_bytes()

    def never(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        assert {int(image[0, 0, 0]) for image in images} == {5}, "only the one that failed is tried again"
        raise RuntimeError("cannot bear it")

    make(Folder(tmp_path), estimators=[Loaded(never, tuple(INTRINSICS), "picky@1", 4)])
    assert (tmp_path / "000000.tar").read_bytes() == tar


def test_a_map_that_breaks_the_conventions_fails_its_sample_only(tmp_path: Path) -> None:
    def broken(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        results = null.estimate(images)
        for image, maps in zip(images, results, strict=True):
            if image[0, 0, 0] == 1:
                maps["line"] = IntrinsicMap(np.full(image.shape[:2], 2, np.float32))
        return results

    mark = make(Folder(tmp_path), estimators=[Loaded(broken, tuple(INTRINSICS), "broken@1", 4)], count=3)
    assert mark["counts"]["failed"] == {"cannot_encode": 1}
    (line,) = Dataset(Folder(tmp_path), {}).failures("000000")
    assert line["key"] == "k01" and "must lie in 0..1" in line["message"]


def test_what_was_forgotten_does_not_come_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    mark = make(folder)
    write_info(folder, {"members": list(MEMBERS), "totals": mark["counts"]})
    forget(folder.url, Forgotten.of(keys=["k03"]))
    make(folder, estimators=[Loaded(null.estimate, tuple(INTRINSICS), "null@1", 4)])
    assert "k03" not in set(Dataset(folder, {}).keys())
    assert {"k03"} == {line["key"] for line in Dataset(folder, {}).failures("000000") if line["reason"] == "forgotten"}


def test_an_error_of_the_source_or_the_disk_stops_the_unit_and_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Numbers):
        def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
            yield from super().read(Unit(0, 3))
            raise UserError("the table is gone")

    with pytest.raises(UserError, match="the table is gone"):
        make(Folder(tmp_path), Broken())
    assert [path.name for path in tmp_path.iterdir()] == [".writing"] and not list((tmp_path / ".writing").iterdir())


def test_the_json_of_a_sample_is_plain_json(tmp_path: Path) -> None:
    make(Folder(tmp_path))
    member = Dataset(Folder(tmp_path), {}).read("k01").members["json"]
    assert json.loads(member)["intrinsics"]["depth"]["kind"] == "metric"


def test_a_map_of_another_size_and_a_caption_that_is_no_text_fail_their_samples_only(tmp_path: Path) -> None:
    def clipped(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        return [null.estimate([image[1:] if image[0, 0, 0] == 1 else image])[0] for image in images]

    wrong = {2: RawSample("k02", np.full((40, 48, 3), 2, np.uint8), "half a \ud800 character", {})}
    mark = make(Folder(tmp_path), Numbers(wrong), [Loaded(clipped, tuple(INTRINSICS), "clipped@1", 4)], count=4)
    assert mark["counts"]["ok"] == 2
    messages = [line["message"] for line in Dataset(Folder(tmp_path), {}).failures("000000")]
    assert "its depth has not the size of the image" in messages[0] and "its caption has characters" in messages[1]


def test_a_lost_device_is_no_failure_of_the_images(tmp_path: Path) -> None:
    def lost(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLost):
        make(Folder(tmp_path), estimators=[Loaded(lost, tuple(INTRINSICS), "lost@1", 4)])
    assert [path.name for path in tmp_path.iterdir()] == [".writing"]


def test_large_images_share_a_window_with_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counting(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        sizes.append(len(images))
        return null.estimate(images)

    monkeypatch.setattr("extract.run.make_shard.WINDOW_PIXELS", 2 * 40 * 48)
    make(Folder(tmp_path), estimators=[Loaded(counting, tuple(INTRINSICS), "counting@1", 4)], count=5)
    assert sizes == [2, 2, 1]
