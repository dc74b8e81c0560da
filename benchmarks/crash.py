"""The crash test: extractions killed at random moments, each finished by the same command, must all be equal.

    python -m benchmarks.crash [--runs 100] [--workers 1,2,4] [--estimators null]

Each run kills (-9) the driver or a worker at a random moment, perhaps several times, then runs the same command to the
end, and compares the dataset byte for byte (the marks without timings and checksum) with that of an undisturbed run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

COMMAND = (
    sys.executable,
    "-m",
    "extract",
    "demo",
    "--no-gallery",
    "--limit",
    "60",
    "--shard-size",
    "6",
    "--size",
    "64",
)


def command(out: Path, workers: int, estimators: str) -> list[str]:
    return [*COMMAND, "--estimators", estimators, "--workers", str(workers), "--out", str(out)]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a dataset, by name; of the marks all but what may differ."""
    files = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b"a folder"
        if path.suffix == ".json" and path.stem.isdigit():
            mark = json.loads(data)
            data = json.dumps({key: mark[key] for key in sorted(mark) if key not in ("timings", "checksum")}).encode()
        files[str(path.relative_to(folder))] = data
    return files


def workers_of(driver: int) -> list[int]:
    """The processes below a driver that hold our Ray actor."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, names[int(entry.name)] = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def below(pid: int) -> bool:
        while pid > 1 and pid != driver:
            pid = parents.get(pid, 0)
        return pid == driver

    return [pid for pid, name in names.items() if name.startswith(b"ray::Worker") and below(pid)]


def _sleep(driver: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Waits, but not for a driver that has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and driver.poll() is None:
        time.sleep(0.005)


def disturb(out: Path, workers: int, estimators: str, rng: random.Random, longest_s: float) -> str:
    """Starts a run and kills its driver or one of its workers at a random moment; returns what was killed."""
    log = out.with_suffix(".log").open("ab")
    driver = subprocess.Popen(command(out, workers, estimators), stdout=log, stderr=log, start_new_session=True)
    victim = rng.choice(("driver", "worker"))
    if victim == "driver" and rng.random() < 0.3:  # anywhere, which is mostly while Ray starts
        _sleep(driver, rng.uniform(0.5, longest_s))
    else:  # while shards are written
        while driver.poll() is None and not (out / ".writing").exists():
            time.sleep(0.005)
        _sleep(driver, rng.uniform(0, longest_s / 8))
    killed = "nothing (it had ended)"
    if driver.poll() is None and victim == "worker" and (pids := workers_of(driver.pid)):
        os.kill(rng.choice(pids), signal.SIGKILL)
        killed = "worker"
    elif driver.poll() is None:
        killed = "driver"
        driver.kill()
    driver.wait()
    log.close()
    return killed


def crash_run(
    number: int, workers: int, estimators: str, folder: Path, seed: int, longest_s: float
) -> tuple[str, Path]:
    """One run, disturbed one to three times and then finished; returns what was killed and the dataset."""
    rng, out = random.Random(f"{seed}-{number}"), folder / f"run-{number:03d}"
    killed = [disturb(out, workers, estimators, rng, longest_s) for _ in range(rng.randint(1, 3))]
    finish = subprocess.run(command(out, workers, estimators), capture_output=True, text=True, check=False)
    if finish.returncode:
        raise SystemExit(f"run {number}: the finishing command failed with {finish.returncode}: {finish.stderr}")
    return ", ".join(killed), out


def main() -> None:
    parser = argparse.ArgumentParser(description="Extractions killed at random moments must all end equal.")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--workers", default="1,2,4", help="the numbers of workers, in turn")
    parser.add_argument("--estimators", default="null")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    numbers, killed, wrong = [int(n) for n in given.workers.split(",")], Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.monotonic()
        subprocess.run(command(folder / "undisturbed", numbers[0], given.estimators), check=True, capture_output=True)
        whole_s = time.monotonic() - begin
        expected = contents(folder / "undisturbed")
        for number in track(range(given.runs), "crashing"):
            workers = numbers[number % len(numbers)]
            what, out = crash_run(number, workers, given.estimators, folder, given.seed, whole_s)
            killed.update(what.split(", "))
            if contents(out) != expected:
                wrong.append(number)
                shutil.copytree(out, Path(f"crash-{number}"), dirs_exist_ok=True)
            else:
                shutil.rmtree(out)
    table = Table(title=f"{given.runs} runs with {given.workers} workers; an undisturbed one takes {whole_s:.1f} s")
    table.add_column("killed")
    table.add_column("times", justify="right")
    for what, times in sorted(killed.items()):
        table.add_row(what, str(times))
    Console().print(table)
    print(
        f"{given.runs - len(wrong)} of {given.runs} datasets are equal to the undisturbed one; different: {wrong or 'none'}"
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
