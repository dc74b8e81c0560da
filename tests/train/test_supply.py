"""Data that breaks, goes or moves under a training."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.core.errors import UserError
from shards.dataset import Dataset
from shards.stream import Stream
from tests.support import training
from tests.support.shaky import Shaky, shaky
from train.config import LoopConfig
from train.data import Samples
from train.engine import Outcome, make_accelerator, train
from train.identity import Identity
from train.log import read_log
from train.supply import FEWEST, BrokenData, TooMuchBroken


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("scenes") / "d")


@pytest.fixture
def shards(scenes: str, tmp_path: Path) -> str:
    """A dataset of its own for each test: they damage it."""
    shutil.copytree(scenes, tmp_path / "data")
    return str(tmp_path / "data")


def run(shards: str, folder: Path, *settings: str, at: int = 0, then: Callable[[], Any] | None = None) -> Outcome:
    """Twelve steps, in this process. then: called before the forward of step `at`."""
    calls = 0

    def hook() -> None:
        nonlocal calls
        calls += 1
        if calls == at and then is not None:
            then()

    config = training.config_of(
        shards, "none", folder, "data.memory_gb=0", "data.workers=0", "data.window=1", *settings
    )
    return train(
        training.Averages(hook=hook),
        LoopConfig(steps=12, batch=2, learning_rate=0.1, checkpoint_every=100, validate_every=100, log_every=1),
        Samples(config.shards, config.data, seed=0),
        accelerator=make_accelerator(),
        folder=folder,
        identity=Identity(settings={"batch": 1}),
        seed=0,
    )


def assert_equal(a: Outcome, b: Outcome) -> None:
    assert a.finished and b.finished and all(torch.equal(a.average[name], b.average[name]) for name in a.average)


# ---- tars that break -------------------------------------------------------------------------------------------------


def test_a_broken_tar_is_said_once_when_it_happens_and_counted_once_for_each_sample(
    shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tar, seen = Path(shards) / "000001.tar", []
    trained = set(Dataset.open(shards).mark("000001")["index"])

    def overwrite() -> None:
        tar.write_bytes(bytes(tar.stat().st_size))
        seen.append(capfd.readouterr().err)

    outcome = run(shards, tmp_path / "run", "data.max_broken=1", at=1, then=overwrite)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: a sample cannot be read")]
    assert outcome.finished and len(said) == 1 and f"{tar} " in said[0] and "was it overwritten?" in said[0]
    keys = [entry.partition(".tar ")[2].partition(":")[0] for entry in outcome.skipped]  # of several epochs
    assert keys and len(keys) == len(set(keys)) and set(keys) <= trained
    counts = [line.get("train/broken_samples", 0) for line in read_log(tmp_path / "run") if "train/loss" in line]
    assert counts == sorted(counts) and counts[-1] == len(keys)


def test_above_the_share_the_run_stops_with_the_files_and_is_saved(shards: str, tmp_path: Path) -> None:
    def remove() -> None:
        for tar in sorted(Path(shards).glob("*.tar"))[:2]:
            tar.write_bytes(b"")

    with pytest.raises(
        UserError, match=r"samples cannot be read \(\d of .*\.tar.*more than data.max_broken = 0.3.* is saved"
    ):
        run(shards, tmp_path / "run", "data.max_broken=0.3", at=4, then=remove)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def entry(shard: int, key: int, words: str = "damaged") -> str:
    return f"s3://b/my data/{shard:06d}.tar k{key}: {words}"


class Told:
    """A sample with the entries of those that it stands in for."""

    def __init__(self, *skipped: str) -> None:
        self.skipped = skipped


def test_a_sample_is_known_again_whatever_the_words_of_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    broken = BrokenData([entry(0, 0)], seen=0, epoch=10, max_broken=1.0)
    for words in ("<BytesIO at 0x1>", "<BytesIO at 0x2>"):
        broken.note([Told(entry(0, 0, words), entry(0, 1, words), entry(1, 5, words)), Told()])  # type: ignore[list-item]
    assert len(broken) == 3 and broken.files == {"s3://b/my data/000000.tar": 2, "s3://b/my data/000001.tar": 1}
    assert capfd.readouterr().err.count("note:") == 1  # the first file was said in an earlier run


def test_a_share_is_of_what_was_seen_and_never_of_a_handful() -> None:
    few = BrokenData([], seen=0, epoch=100_000, max_broken=0.01)
    for key in range(FEWEST // 100):
        few.note([Told(entry(0, key))])  # type: ignore[list-item]
    with pytest.raises(TooMuchBroken, match=r"11 samples cannot be read \(11 of .*000000.tar\).* of 1000"):
        few.note([Told(entry(0, 999))])  # type: ignore[list-item]
    many = BrokenData([entry(0, key) for key in range(500)], seen=50_000, epoch=100_000, max_broken=0.01)
    many.note([])
    with pytest.raises(TooMuchBroken):
        many.note([Told(entry(0, 500))])  # type: ignore[list-item]


# ---- a store that is away --------------------------------------------------------------------------------------------


@pytest.fixture
def remote(shards: str) -> Iterator[str]:
    with shaky(shards) as url:
        yield url


def test_a_store_that_stays_away_ends_the_run_saved_and_the_same_command_continues(remote: str, tmp_path: Path) -> None:
    whole = run(remote, tmp_path / "whole")
    with pytest.raises(UserError, match=r"Connection reset.*waited for .*; step \d+ is saved, and the same command"):
        run(remote, tmp_path / "run", "data.store_wait_s=0.3", at=4, then=Shaky.down.set)
    Shaky.down.clear()
    assert_equal(whole, run(remote, tmp_path / "run"))


def test_sigterm_ends_the_waiting_for_a_store(remote: str, tmp_path: Path) -> None:
    whole = run(remote, tmp_path / "whole")

    def go_down() -> None:
        Shaky.down.set()
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    begin = time.monotonic()
    stopped = run(remote, tmp_path / "run", "data.store_wait_s=3600", at=4, then=go_down)
    assert not stopped.finished and 0 < stopped.step < 12 and time.monotonic() - begin < 60
    Shaky.down.clear()
    assert_equal(whole, run(remote, tmp_path / "run"))


# ---- data that moves -------------------------------------------------------------------------------------------------


def stop_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_dataset_that_was_moved_or_is_spelled_otherwise_continues(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(shards, tmp_path / "whole")
    assert run(shards, tmp_path / "run", at=3, then=stop_by_signal).step == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(shards)
    assert run("link/../data/", tmp_path / "run", at=3, then=stop_by_signal).step == 6
    shutil.move(shards, tmp_path / "scratch disk")
    assert_equal(whole, run(f"file://{tmp_path}/scratch disk", tmp_path / "run"))


def test_another_dataset_at_the_same_address_is_refused(shards: str, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", at=3, then=stop_by_signal)
    shutil.rmtree(shards)
    training.write_scenes(Path(shards), shards=3, per_shard=6)
    with pytest.raises(UserError, match=r"was made with shards = \['15 samples, .*now it is \['18 samples"):
        run(shards, tmp_path / "run")


def test_a_checkpoint_that_knows_only_the_address_continues_there(shards: str, tmp_path: Path) -> None:
    whole = run(shards, tmp_path / "whole")
    run(shards, tmp_path / "run", at=3, then=stop_by_signal)
    (state,) = (tmp_path / "run" / "checkpoints").glob("step-*/state.json")
    content = json.loads(state.read_text())
    content["identity"]["shards"] = [shards]
    state.write_text(json.dumps(content))
    shutil.copytree(shards, tmp_path / "copy")
    with pytest.raises(UserError, match="was made with shards"):
        run(str(tmp_path / "copy"), tmp_path / "run")
    assert_equal(whole, run(shards, tmp_path / "run"))


def test_the_content_of_a_dataset_has_one_name_wherever_it_is_and_a_stream_one_state(
    shards: str, tmp_path: Path
) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    with shaky(shards) as remote:
        places = [shards, f"{shards}/", f"file://{tmp_path}/copy", remote]
        assert len({Dataset.open(place).content_id() for place in places}) == 1
        keys = [[Stream([place], images=False).key(position) for position in range(40)] for place in places]
        assert keys.count(keys[0]) == len(places)
