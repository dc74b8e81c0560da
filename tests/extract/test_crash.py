"""Runs of the command line that are killed or stopped, and go on: the dataset is that of an undisturbed run."""

import os
import random
import re
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_stands_still_is_said_and_replaced(
    undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    rules = ["--set", "run.stall_warning_s=2", "--set", "run.stall_limit_s=8"]
    run = subprocess.Popen(
        [*command(out, 1, "null"), *rules], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while run.poll() is None and not list(out.glob("000000.json")):
        time.sleep(0.01)
    stopped = workers_of(run.pid)[0]
    os.kill(stopped, signal.SIGSTOP)
    _, words = run.communicate(timeout=500)
    assert run.returncode == 0, words
    said = " ".join(words.split())  # without the line breaks of a terminal
    assert re.search(r"a worker has made no progress for \d+ s with unit \d", said), words
    assert re.search(
        r"a worker made no progress for \d+ s, and was ended, with unit \d; its unit is done again", said
    ), words
    assert contents(out) == undisturbed[0] and not Path(f"/proc/{stopped}").exists()


def test_ctrl_c_while_ray_starts_is_answered_at_once_and_ends_the_run_as_always(
    tmp_path: Path, short_path: Path
) -> None:
    run = subprocess.Popen(
        command(tmp_path / "out", 1, "null"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"RAY_TMPDIR": str(short_path)},
    )
    while run.poll() is None and not list(short_path.glob("ray/session_*")):
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the driver and all that it started
    _, words = run.communicate(timeout=120)
    at_once, end = words.strip().splitlines()
    assert run.returncode == 1 and at_once.startswith("SIGINT: the run stops as soon as Ray has started")
    assert end == "error: stopped by SIGINT; the same command goes on where it stopped"


def test_a_long_tmpdir_is_an_error_that_names_what_to_set(tmp_path: Path) -> None:
    place = tmp_path / ("long" * 20)
    place.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
    done = subprocess.run(
        command(tmp_path / "out", 1, "null"),
        env=environment | {"TMPDIR": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"TMPDIR = {place}" in done.stderr and "107 bytes; set RAY_TMPDIR to" in done.stderr
