"""A whole extraction into an object store that throttles and fails, killed on the way: nothing is lost."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.crash import workers_of
from shards.core.storage import WRITING, Folder
from shards.dataset import Dataset
from shards.inspect.verify import verify
from tests.support.object_store import Trouble, object_store

URL = "s3://bucket/some/where"
COMMAND = [
    *(sys.executable, "-m", "extract", "demo", "--no-gallery", "--estimators", "null", "--workers", "2"),
    *("--limit", "40", "--shard-size", "4", "--size", "32", "--out", URL),
]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    with object_store() as (environment, trouble):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield trouble


@pytest.mark.slow
def test_killed_under_throttling_and_run_again_nothing_is_lost(store: Trouble) -> None:
    store.share, folder = 0.15, Folder(URL)
    killed = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and len([name for name in folder.list() if name.endswith(".tar")]) < 2:
        time.sleep(0.02)
    workers = workers_of(killed.pid)
    killed.kill()
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not Dataset.open(URL).complete
    before = {name: folder.read(name) for name in folder.list() if name.endswith(".tar")}
    again = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    injected = store.injected
    report = verify(URL)
    assert report.problems == [] and store.injected > injected > 0, "verify, too, read under throttling"
    assert (report.counts["shards"], report.counts["in"], report.counts["ok"]) == (10, 40, 40)
    assert len(set(Dataset.open(URL).keys())) == 40
    assert all(folder.read(name) == data for name, data in before.items()), "what was committed stays as it was"
    assert folder.list(WRITING) == []
