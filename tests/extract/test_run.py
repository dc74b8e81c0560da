"""The Ray run: every input is accounted for whatever dies, and the same call goes on where an earlier one stopped."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.config import ExtractConfig, RunConfig, load_extract_config, merge, parse_setting
from extract.estimators import Estimator, null
from extract.estimators.table import EstimatorRow, Task
from extract.images.prepare import ImageRules
from extract.run.plan import make_plan
from extract.run.run import Summary, run
from extract.sources import Failure, RawSample, Unit
from extract.workers.cluster import connected
from shards.core.errors import TooManyFailures, UsageError, UserError
from shards.dataset import Dataset
from shards.inspect.verify import verify
from shards.intrinsics import INTRINSICS, IntrinsicMap
from shards.sample import Sample

KILLS_ALWAYS, KILLS_TWICE, FAILS = 77, 88, 99  # shades of grey that an estimator cannot bear


class Greys:
    """Plain grey images; the shade tells the estimator below what to do."""

    def __init__(self, shades: Sequence[int], missing: Sequence[int] = ()) -> None:
        self.shades, self.missing = list(shades), frozenset(missing)

    def describe(self) -> dict[str, Any]:
        return {"kind": "greys", "shades": self.shades}

    def total(self) -> int | None:
        return len(self.shades)

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        count = len(self.shades) if limit is None else min(limit, len(self.shades))
        for index, first in enumerate(range(0, count, shard_size)):
            yield Unit(index, [first, min(first + shard_size, count)])

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        for i in range(*unit.items):
            if i in self.missing:
                yield Failure(f"g{i:03d}", "read", "missing_file", "it is not there")
            else:
                yield RawSample(f"g{i:03d}", np.full((32, 40, 3), self.shades[i], np.uint8), f"number {i}", {"n": i})


def load_moody(*, device: str, dtype: str, weights: Path | None, notes: str) -> Estimator:
    """An estimator that dies of some shades; `notes` is a file in which it counts its deaths."""

    def estimate(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        shades = [int(image[0, 0, 0]) for image in images]
        if KILLS_TWICE in shades and (not Path(notes).exists() or Path(notes).stat().st_size < 2):
            with Path(notes).open("ab") as file:
                file.write(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        if KILLS_ALWAYS in shades:
            os.kill(os.getpid(), signal.SIGKILL)
        if FAILS in shades:
            raise RuntimeError("cannot bear it")
        return null.estimate(images)

    return estimate


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected("local", 4):
        yield


Extract = Callable[..., Summary]


@pytest.fixture
def extract(cluster: None, tmp_path: Path) -> Extract:
    """run() over a source, with the moody estimator, in units of 8."""

    def call(source: Greys, out: Path | str = tmp_path / "out", **options: Any) -> Summary:
        settings = {"shard_size": 8, "workers": 2, "threads": 1, "window": 4, "max_failed": 1.0, **options}
        rules = ImageRules(format="png", size_px=None)
        config = ExtractConfig(name="greys", out=str(out), source={}, image=rules, run=RunConfig(**settings))
        # the settings of the row go into its fingerprint: the notes' place must be the same in every test's folder
        row = EstimatorRow(
            name="moody",
            yields=tuple(INTRINSICS),
            what="dies of some shades",
            licence="Apache-2.0",
            load="tests.extract.test_run:load_moody",
            settings={"notes": str(tmp_path / "notes")},
            batch=4,
        )
        return run(config, source=source, tasks=[Task(row, tuple(INTRINSICS))])  # type: ignore[arg-type]

    return call


def contents(folder: Path) -> dict[str, Any]:
    """A dataset's files; of the marks what does not depend on the clock."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".json" and path.stem.isdigit():
            mark = Dataset(Dataset.open(str(folder)).folder, {}).mark(path.stem)
            found[path.name] = {key: mark[key] for key in mark if key not in ("timings", "checksum")}
        else:
            found[path.name] = path.read_bytes()
    return found


def failures(folder: Path) -> dict[str, str]:
    dataset = Dataset.open(str(folder))
    return {line["key"]: line["reason"] for shard in dataset.shard_names() for line in dataset.failures(shard)}


@pytest.mark.slow
def test_only_an_input_that_kills_its_worker_alone_is_blamed(extract: Extract, tmp_path: Path) -> None:
    shades = list(range(24))
    shades[3], shades[10], shades[17] = KILLS_ALWAYS, KILLS_TWICE, FAILS
    summary = extract(Greys(shades, missing=[20]), workers=1)
    expected = {
        "g003": "killed_worker",
        "g017": "estimator_failed",
        "g020": "missing_file",
    }
    assert failures(tmp_path / "out") == expected
    assert (summary.stand.inputs, summary.stand.ok, summary.stand.failed.total()) == (24, 21, 3)
    totals = Dataset.open(str(tmp_path / "out")).info["totals"]
    assert totals["in"] == 24 and totals["shards"] == [7, 8, 6]
    again = extract(Greys(shades, missing=[20]), tmp_path / "again", workers=4)
    assert again.stand == summary.stand
    assert contents(tmp_path / "again") == contents(tmp_path / "out"), "killers or the number of workers left a trace"


def test_what_is_committed_is_not_done_again_and_what_is_lost_is(extract: Extract, tmp_path: Path) -> None:
    source, out = Greys(range(30)), tmp_path / "out"
    first = extract(source)
    assert (first.made, first.shards) == (30, 4)
    before = contents(out)
    assert extract(source).made == 0 and contents(out) == before
    for lost in ("000001.json", "000002.tar", "000002.json", "000002.failed.jsonl"):
        (out / lost).unlink()
    assert extract(source).made == 16 and contents(out) == before


def test_a_plan_foretells_the_dataset_and_writes_nothing(cluster: None, tmp_path: Path) -> None:
    settings = RunConfig(shard_size=8, workers=2, threads=1, window=4, max_failed=1.0, estimators="null")
    rules = ImageRules(format="png", size_px=None)
    config = ExtractConfig(name="greys", out=str(tmp_path / "out"), source={}, image=rules, run=settings)
    source = Greys(range(40), missing=[1])
    plan = make_plan(config, source=source)  # type: ignore[arg-type]
    assert (plan.units, plan.inputs, plan.exact, plan.done) == (5, 40, True, 0)
    assert (plan.probe.inputs, plan.probe.ok, plan.probe.lacking) == (8, 7, {"missing_file": 1})
    assert 0 < plan.probe.timed < 8 and 0 < plan.worker_hours < 1
    assert list(tmp_path.iterdir()) == []
    run(config, source=source)  # type: ignore[arg-type]
    assert plan.bytes == pytest.approx(sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar")), rel=0.2)
    again = make_plan(config, source=source)  # type: ignore[arg-type]
    assert again.done == 5 and again.worker_hours == 0


def test_images_can_be_stored_first_and_estimated_by_a_later_run(cluster: None, tmp_path: Path) -> None:
    def stage(name: str, estimators: str, settings: dict[str, Any], source: Greys | None) -> dict[str, Sample]:
        rules = ImageRules(format="png", size_px=16, crop="center", min_side_px=16)
        options = RunConfig(shard_size=8, workers=2, estimators=estimators)
        config = ExtractConfig(name=name, out=str(tmp_path / name), source=settings, image=rules, run=options)
        run(config, source=source)  # type: ignore[arg-type]
        assert verify(config.out).problems == []
        dataset = Dataset.open(config.out)
        return {sample.key: sample for shard in dataset.shard_names() for sample in dataset.samples(shard)}

    stored = stage("stored", "none", {}, Greys(range(20)))
    made = stage("made", "null", {"kind": "tars", "tars": [f"{tmp_path}/stored/*.tar"]}, None)
    assert list(stored) == list(made) and len(made) == 20
    for key, sample in stored.items():
        assert list(sample.members) == ["png", "txt", "json"] and made[key].intrinsics == tuple(INTRINSICS)
        assert all(made[key].members[name] == sample.members[name] for name in ("png", "txt"))
        record = made[key].meta["intrinsics"]["image"]
        assert record["resized"] and record == sample.meta["intrinsics"]["image"], "what was done first is still known"


def test_other_settings_are_refused_by_name_and_nothing_is_touched(extract: Extract, tmp_path: Path) -> None:
    extract(Greys(range(8)))
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"shard_size.*was 8, is 4"):
        extract(Greys(range(8)), shard_size=4)
    with pytest.raises(UserError, match="source"):
        extract(Greys(range(9)))
    assert contents(tmp_path / "out") == before


def test_a_smaller_limit_is_refused_and_a_larger_one_goes_on(extract: Extract, tmp_path: Path) -> None:
    extract(Greys(range(30)), limit=20)
    with pytest.raises(UserError, match="limit"):
        extract(Greys(range(30)), limit=10)
    assert extract(Greys(range(30))).made == 14  # the third unit had 4 inputs, and now has 8
    extract(Greys(range(30)), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_many_failures_end_the_run_with_status_3_and_a_complete_dataset(extract: Extract, tmp_path: Path) -> None:
    with pytest.raises(TooManyFailures, match=r"5 of 16 inputs failed \(31\.2%\)") as error:
        extract(Greys(range(16), missing=range(5)), max_failed=0.3)
    assert error.value.exit_status == 3
    assert Dataset.open(str(tmp_path / "out")).complete


def test_a_folder_that_holds_something_else_is_not_written_to(extract: Extract, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="is not empty"):
        extract(Greys(range(4)), tmp_path / "photos")
    with pytest.raises(UserError, match="not a folder"):
        extract(Greys(range(4)), tmp_path / "photos" / "mine.tar" / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB; tests that need one are skipped where nothing may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_the_same_call_goes_on(
    extract: Extract, small_disk: Path, tmp_path: Path
) -> None:
    source, out = Greys(range(64)), small_disk / "out"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(200 << 10))
    with pytest.raises(UserError, match="the disk is full; free some space and run the same command again"):
        extract(source, out)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    extract(source, out)
    extract(source, tmp_path / "out")
    assert contents(out) == contents(tmp_path / "out")


def test_a_read_only_place_is_one_sentence(extract: Extract, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="the file system is read-only; choose another place"):
        extract(Greys(range(4)), small_disk / "out")


def test_any_setting_of_a_recipe_can_be_given_on_the_command_line() -> None:
    assert parse_setting("source.tables=/my/folder") == {"source": {"tables": "/my/folder"}}
    assert parse_setting("image.size_px = 64") == {"image": {"size_px": 64}}
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4, "c": None}}) == {"a": {"b": 4, "c": 2}, "d": 3}
    made = load_extract_config("demo", None, merge({"run": {"limit": 5}}, parse_setting("source.count=9")))
    assert made.source["count"] == 9 and made.source["kind"] == "demo" and made.run.limit == 5
    for wrong in ("tables=/my/folder", "source.tables", "source.=3"):
        with pytest.raises(UsageError, match=r"give TABLE\.KEY=VALUE"):
            parse_setting(wrong)
