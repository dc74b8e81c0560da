"""The run on Ray, through the command line and in process: exits, resuming, deaths of workers, disks and signals."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.crash import contents, crash_run
from extract.config import ExtractConfig, RunConfig, load_extract_config, read_recipe
from extract.estimators import Estimator, null
from extract.estimators.table import Row, Task
from extract.images import ImageRules
from extract.run import run
from extract.sources import Failure, RawSample, Unit
from shards.dataset import Dataset
from shards.errors import TooManyFailures, UsageError, UserError
from shards.intrinsics import INTRINSICS, IntrinsicMap

KILLER = 13
SMALL = (
    "demo",
    "--no-gallery",
    "--limit",
    "8",
    "--shard-size",
    "4",
    "--size",
    "64",
    "--estimators",
    "null",
    "--workers",
    "1",
)


def extract(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "extract", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class Numbers:
    """Plain images numbered 0..n-1; every tenth is broken."""

    def __init__(self, count: int) -> None:
        self.count = count

    def describe(self) -> dict[str, Any]:
        return {"kind": "numbers", "count": self.count}

    def total(self) -> int | None:
        return self.count

    def units(self, shard_size: int, limit: int | None = None) -> Iterator[Unit]:
        for index, start in enumerate(range(0, min(self.count, limit or self.count), shard_size)):
            yield Unit(index, (start, min(start + shard_size, self.count)))

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        for i in range(*unit.items):
            image: Any = b"broken" if i % 10 == 9 else np.full((32, 32, 3), i, np.uint8)
            yield RawSample(f"n{i:03d}", image, str(i), {})


def load_deadly(**_: Any) -> Estimator:
    """An estimator that the kernel would end on one image, as a crash in foreign code does."""

    def estimate(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
        if any(image[0, 0, 0] == KILLER for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        return null.estimate(images)

    return estimate


def config(out: Path, **options: Any) -> ExtractConfig:
    settings = {"shard_size": 8, "workers": 2, "window": 4} | options
    return ExtractConfig(
        name="test", out=str(out), source={}, image=ImageRules(format="png"), run=RunConfig(**settings)
    )


def tasks(load: str, version: int = 1) -> list[Task]:
    row = Row(name="test", yields=tuple(INTRINSICS), what="", licence="", load=load, version=version)
    return [Task(row, tuple(INTRINSICS))]


def test_an_image_that_kills_its_worker_is_found_and_the_rest_goes_on(tmp_path: Path) -> None:
    deadly = tasks("tests.test_extract_run:load_deadly")
    summary = run(config(tmp_path / "deadly"), source=Numbers(20), tasks=deadly)
    assert summary.ok == 17 and summary.failed == {"not_an_image": 2, "killed_worker": 1}
    dataset = Dataset.open(str(tmp_path / "deadly"))
    assert [line["key"] for line in dataset.failures("000001") if line["reason"] == "killed_worker"] == [
        f"n{KILLER:03d}"
    ]
    assert dataset.complete and dataset.info["totals"]["shards"] == [8, 6, 3]
    before = contents(tmp_path / "deadly")
    again = run(config(tmp_path / "deadly"), source=Numbers(20), tasks=deadly)
    assert again.made == 0 and again.ok == 17 and contents(tmp_path / "deadly") == before


def test_settings_changes_and_too_many_failures(tmp_path: Path) -> None:
    plain = tasks("extract.estimators.null:load")
    with pytest.raises(TooManyFailures, match=r"5 of 10 inputs failed \(50.0%\), more than --max-failed 10%"):
        run(config(tmp_path / "d"), source=_HalfBroken(10), tasks=plain)
    assert Dataset.open(str(tmp_path / "d")).complete
    with pytest.raises(UserError, match=r"other settings: shard_size \(was 8, is 4\)"):
        run(config(tmp_path / "d", shard_size=4), source=_HalfBroken(10), tasks=plain)
    with pytest.raises(UserError, match=r"source \(count was 10, is 11\); choose another --out"):
        run(config(tmp_path / "d"), source=_HalfBroken(11), tasks=plain)
    updated = run(
        config(tmp_path / "d", max_failed=1.0),
        source=_HalfBroken(10),
        tasks=tasks("extract.estimators.null:load", version=2),
    )
    assert updated.made == 10
    ids = {row["id"] for row in Dataset.open(str(tmp_path / "d")).info["estimators"].values()}
    sample = next(Dataset.open(str(tmp_path / "d")).samples("000000"))
    assert {sample.meta["intrinsics"][name]["by"] for name in INTRINSICS} == ids


class _HalfBroken(Numbers):
    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        for i in range(*unit.items):
            yield RawSample(f"n{i:03d}", b"broken" if i % 2 else np.full((32, 32, 3), i, np.uint8), "", {})


def test_runs_killed_at_random_moments_end_equal_whatever_the_number_of_workers(tmp_path: Path) -> None:
    begin = time.monotonic()
    finished = crash_run(0, 1, "null", tmp_path, seed=0, longest_s=0.0)[1]  # killed at once, then undisturbed
    whole_s = time.monotonic() - begin
    for number, workers in ((1, 2), (2, 1)):
        _, out = crash_run(number, workers, "null", tmp_path, seed=1, longest_s=whole_s)
        assert contents(out) == contents(finished)


def test_termination_is_a_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "extract", *SMALL, "--out", str(tmp_path / "d")]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "d" / "dataset.json").exists():
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    _, error = driver.communicate(timeout=60)
    assert (
        driver.returncode == 1 and "stopped by SIGTERM; the same command goes on" in error and "Traceback" not in error
    )
    done = extract(*SMALL, "--out", str(tmp_path / "d"))
    assert done.returncode == 0, done.stderr
    assert Dataset.open(str(tmp_path / "d")).info["totals"]["ok"] == 8


def test_a_full_disk_is_a_sentence_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    def small_files() -> None:  # the kernel refuses to let a file grow: like a full disk, but without being root
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    source = Path(__file__).parent.parent
    code = f"from tests.test_extract_run import *\nrun_unit(Path({str(tmp_path / 'd')!r}))"
    stopped = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=small_files, cwd=source, capture_output=True, text=True, check=False
    )
    assert "cannot write" in stopped.stderr and "larger than this file system or process allows" in stopped.stderr
    assert not list((tmp_path / "d").glob("*.tar"))
    run_unit(tmp_path / "d")
    assert list((tmp_path / "d").glob("*.tar"))


def run_unit(out: Path) -> None:
    """One unit of 40 noisy images, without Ray."""
    from extract.unit import Loaded, UnitWork, make_shard
    from shards.sample import member_names
    from shards.storage import Folder

    class Noise(Numbers):
        def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
            for i in range(40):
                image = np.random.default_rng(i).integers(0, 255, (64, 64, 3)).astype(np.uint8)
                yield RawSample(f"n{i}", image, "", {})

    members = tuple(member_names("png", tuple(INTRINSICS)))
    work = UnitWork(source=Noise(40), image=ImageRules(format="png"), members=members, threads=1, window=8)
    loaded = [Loaded(null.estimate, tuple(INTRINSICS), "null@1", 8)]
    folder = Folder(out)
    folder.make()
    make_shard(folder, Unit(0, None), work, loaded, made={})


def test_a_read_only_output_and_a_folder_of_other_things_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = extract(*SMALL, "--out", str(tmp_path / "file" / "d"))
    assert (
        blocked.returncode == 1 and len(blocked.stderr.splitlines()) == 1 and "cannot make the folder" in blocked.stderr
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.tar").write_text("")
    occupied = extract(*SMALL, "--out", str(tmp_path / "other"))
    assert occupied.returncode == 1 and "is not empty and holds no dataset" in occupied.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "'nowhere' is no recipe (demo"),
        (["demo", "--estimators", "best"], "there is no estimator set 'best'"),
        (["demo", "--only", "depth,smell"], "there is no intrinsic 'smell'"),
        (["demo", "--max-failed", "some"], "--max-failed some: give a percentage"),
        (["demo", "--size", "3"], "size_px = 3 is too small"),
        (["demo", "--format", "bmp"], "image.format = 'bmp' is not one of"),
        (["demo", "--device", "tpu"], "run.device = 'tpu' is not one of"),
    ],
)
def test_wrong_usage_is_status_2_and_names_what_is_wrong(tmp_path: Path, arguments: list[str], words: str) -> None:
    run = extract(*arguments, "--out", str(tmp_path / "d"))
    assert run.returncode == 2 and words in run.stderr and "Traceback" not in run.stderr


def test_the_estimators_are_listed_with_their_licences() -> None:
    listed = extract("--list-estimators")
    assert listed.returncode == 0 and "demo-net" in listed.stdout and "Apache-2.0" in listed.stdout


def test_recipes_and_options_make_one_configuration(tmp_path: Path) -> None:
    made = load_extract_config("demo", None, {"image": {"size_px": 128}, "run": {"limit": 5, "estimators": None}})
    assert made.out == "data/demo" and made.image.size_px == 128 and made.run.shard_size == 64 and made.run.limit == 5
    (tmp_path / "mine.toml").write_text('[source]\nkind = "demo"\n[train]\nx = 1\n')
    assert read_recipe(str(tmp_path / "mine.toml"))[0] == "mine"
    with pytest.raises(UsageError, match=r"has a table \[train\]"):
        load_extract_config(str(tmp_path / "mine.toml"), None, {})
    for wrong in ({"shard_size": 0}, {"limit": 0}, {"workers": -1}, {"max_failed": 2.0}, {"only": ("smell",)}):
        with pytest.raises(UsageError):
            RunConfig(**wrong)  # type: ignore[arg-type]
