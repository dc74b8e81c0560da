"""A folder of hostile files: each one is accounted for, nothing hangs, and the memory stays bounded."""

import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from extract.images.prepare import ImageProblem, ImageRules, prepare
from extract.reasons import REASONS
from extract.sources import Failure
from extract.sources.folder import FolderSource, key_of
from shards.dataset import Dataset
from tests.support import hostile

ROOT = Path(__file__).parents[2]
MEMORY = 2 << 30


def outcomes(folder: str) -> dict[str, str]:
    """What becomes of every input of a folder, by key: OK or a reason."""
    source = FolderSource(folder)
    rules = ImageRules(size_px=256)
    found: dict[str, str] = {}
    for unit in source.units(50):
        for output in source.read(unit):
            assert output.key not in found
            if isinstance(output, Failure):
                found[output.key] = output.reason
                continue
            try:
                prepared = prepare(output.image, rules)
            except ImageProblem as problem:
                found[output.key] = problem.reason
            else:
                assert prepared.pixels.shape[:2] == tuple(reversed(prepared.record["size"]))
                found[output.key] = hostile.OK
    return found


if __name__ == "__main__":  # the subprocess of the tests below
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = outcomes(sys.argv[1])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {"outcomes": result, "seconds": time.monotonic() - began, "before": before * 1024, "peak": after * 1024}
    print(json.dumps(report))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("hostile") / "images"
    folder.mkdir()
    expected = hostile.build(folder)
    return folder, {key_of(path): outcome for path, outcome in expected.items()}


def test_every_hostile_file_is_a_sample_or_has_its_reason_in_bounded_memory(
    built: tuple[Path, dict[str, str]],
) -> None:
    folder, expected = built
    assert len(expected) >= 120
    command = [sys.executable, "-m", "tests.extract.test_hostile", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["outcomes"] == expected
    assert report["peak"] < MEMORY
    assert not run.stderr, "libraries should not chatter about broken files"


def test_every_reason_for_an_image_or_a_file_occurs_in_the_hostile_folder(
    built: tuple[Path, dict[str, str]],
) -> None:
    _, expected = built
    of_folders = {"broken_link", "not_a_file", "too_many_bytes", "bad_metadata"}
    of_captions = {"caption_unreadable", "caption_not_utf8", "caption_too_long"}
    of_images = {name for name, r in REASONS.items() if r.stage == "decode"} - {"out_of_memory", "killed_worker"}
    assert of_folders | of_captions | of_images <= set(expected.values())


# ---- end to end ------------------------------------------------------------------------------------------------------


def memory_of_tree(pid: int) -> int:
    """Bytes of memory of a process and all its descendants; what several share is counted once."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total


def run_to_end(command: list[str], log: Path) -> tuple[int, str, int]:
    """(exit status, what was printed, peak memory in bytes) of a command and its children."""
    peak = 0
    with log.open("w+") as file:
        run = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while run.poll() is None:
            peak = max(peak, memory_of_tree(run.pid))
            time.sleep(0.5)
        file.seek(0)
        return run.returncode, file.read(), peak


def test_a_run_over_hostile_files_accounts_for_each_of_them_and_stays_below_two_gigabytes(
    built: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, expected = built
    out = tmp_path / "out"
    options = f"--out {out} --estimators null --size 256 --shard-size 50 --workers 2".split()
    command = [sys.executable, "-m", "extract", str(folder), *options]
    status, words, peak = run_to_end(command, tmp_path / "log")
    assert status == 3, words  # the work is done; but so many failures should not go unnoticed
    assert "Traceback" not in words and "--max-failed" in words
    assert peak < MEMORY, f"{peak / 2**30:.2f} GiB"

    dataset = Dataset.open(str(out))
    found = {sample.key: hostile.OK for shard in dataset.shard_names() for sample in dataset.samples(shard)}
    for shard in dataset.shard_names():
        found |= {failure["key"]: failure["reason"] for failure in dataset.failures(shard)}
    assert found == expected
    totals = dataset.info["totals"]
    assert (totals["in"], totals["ok"]) == (len(expected), list(expected.values()).count(hostile.OK))

    status, words, _ = run_to_end([*command, "--max-failed", "100%"], tmp_path / "log")
    assert status == 0, words
