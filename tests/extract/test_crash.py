"""Runs of the command line that are killed or stopped, and go on: the dataset is that of an undisturbed run."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.crash import command, contents, crash_run, workers_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The files of a dataset that nobody disturbed, made by one worker, and the seconds that it took."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    begin = time.monotonic()
    subprocess.run(command(out, 1, "null"), check=True, capture_output=True)
    return contents(out), time.monotonic() - begin


@pytest.mark.parametrize(("number", "workers"), [(0, 4)])
def test_killed_at_random_and_run_again_the_dataset_is_the_same_to_the_byte(
    undisturbed: tuple[dict[str, bytes], float], tmp_path: Path, number: int, workers: int
) -> None:
    expected, seconds = undisturbed
    _, out = crash_run(number, workers, "null", tmp_path, seed=random.randrange(1 << 30), longest_s=seconds)
    assert contents(out) == expected


def test_a_stopped_run_says_so_leaves_no_worker_behind_and_goes_on(
    undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen(command(out, 2, "null"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not list(out.glob("000000.json")):
        time.sleep(0.01)
    workers = workers_of(run.pid)
    run.send_signal(signal.SIGTERM)
    _, words = run.communicate(timeout=60)
    assert workers and run.returncode == 1 and "SIGTERM" in words and "the same command" in words, words
    assert len(words.strip().splitlines()) == 1 and "Traceback" not in words
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers of the stopped run live on"
        time.sleep(0.1)
    subprocess.run(command(out, 2, "null"), check=True, capture_output=True)
    assert contents(out) == undisturbed[0]


def test_a_worker_that_dies_is_replaced_and_the_run_ends_well(
    undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen(command(out, 2, "null"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (out / ".writing").exists():
        time.sleep(0.01)
    os.kill(workers_of(run.pid)[0], signal.SIGKILL)
    _, words = run.communicate(timeout=120)
    assert run.returncode == 0, words
    assert contents(out) == undisturbed[0]
