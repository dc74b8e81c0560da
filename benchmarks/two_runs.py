"""Two runs at once into one folder, at random offsets: never a mixture.

    python -m benchmarks.two_runs [--trials 20] [--seed 0] [--commands]

Each trial starts two runs with equal or with different settings (size, format, estimators, limit, shard size), the second a
random time after the first, and then looks at the folder: all shards must be made with the settings that dataset.json
names, `verify` must find nothing, and at most one of the runs may have been refused, with an error message. By default a
run is a process with one worker and without Ray, so that the offsets meet the short moments that matter; --commands starts
`python -m extract` instead.
"""

import argparse
import dataclasses
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from extract.config import load_extract_config
from extract.run.run import run
from shards.core.errors import UserError
from shards.dataset import Dataset
from shards.inspect.verify import verify
from shards.marks import digest

BASE = {"limit": 12, "shard_size": 3, "estimators": "none", "workers": 1, "threads": 1}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "size": ({"size_px": 48}, {"size_px": 64}),
    "format": ({"format": "jpg"}, {"format": "png"}),
    "estimators": ({"estimators": "none"}, {"estimators": "null"}),
    "limit": ({"limit": 6}, {"limit": 12}),
    "shard size": ({"shard_size": 3}, {"shard_size": 4}),
    "nothing": ({}, {}),
}
"""What the two runs of a trial differ in, and their settings."""
_IMAGE = ("size_px", "format")


@dataclass(frozen=True)
class Trial:
    """What became of two runs."""

    differs: str
    offset_s: float
    messages: tuple[str, str]
    """The error message of each run; "" for one that ended well."""
    faults: tuple[str, ...]
    """What is wrong with the dataset, or with the way in which a run ended."""


def trial(out: Path, differs: str, offset_s: float, commands: bool = False) -> Trial:
    """Two runs into `out`, the second one `offset_s` after the first."""
    settings = [BASE | {"size_px": 48} | own for own in PAIRS[differs]]
    messages = _by_commands(out, settings, offset_s) if commands else _by_processes(out, settings, offset_s)
    faults = [f"run {i} ended by a bug: {text}" for i, text in enumerate(messages) if text.startswith("bug: ")]
    if all(messages):
        return Trial(differs, offset_s, (messages[0], messages[1]), (f"both runs were refused: {messages}",))
    return Trial(differs, offset_s, (messages[0], messages[1]), (*faults, *faults_of(out)))


def faults_of(out: Path) -> list[str]:
    """What is wrong with the dataset: what verify finds, and shards that were made with other settings than it names."""
    info = Dataset.open(str(out)).info
    faults = list(verify(str(out)).problems)
    if info["totals"] is None:
        faults.append("the dataset is not complete")
    expected = digest(info["config"]["image"]), {name: row["id"] for name, row in info["estimators"].items()}
    for mark in Dataset.open(str(out)).marks():
        if (mark["made"]["image"], mark["made"]["estimators"]) != expected:
            faults.append(f"shard {mark['shard']} was made with other settings than dataset.json names")
    return faults


def _by_processes(out: Path, settings: list[dict[str, Any]], offset_s: float) -> list[str]:
    # Both runs are forked from a process that has imported everything, which takes longer than a run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["extract.run.run", "extract.workers.cluster", "shards.inspect.verify"])
    answers: list[Any] = [context.SimpleQueue() for _ in settings]
    start = time.monotonic() + 1.0
    processes = [
        context.Process(target=_run, args=(str(out), one, start + i * offset_s, answers[i]))
        for i, one in enumerate(settings)
    ]
    for process in processes:
        process.start()
    messages = [queue.get() for queue in answers]
    for process in processes:
        process.join()
    return messages


def _run(out: str, settings: dict[str, Any], start: float, answer: Any) -> None:
    image = {name: value for name, value in settings.items() if name in _IMAGE}
    options = {"image": image, "run": {name: value for name, value in settings.items() if name not in _IMAGE}}
    config = load_extract_config("demo", out, options)
    config = dataclasses.replace(config, source=config.source | {"size_px": 64})
    time.sleep(max(0.0, start - time.monotonic()))
    try:
        run(config, in_process=True)
        answer.put("")
    except UserError as error:
        answer.put(str(error))
    except Exception as error:
        answer.put(f"bug: {type(error).__name__}: {error}")


def _by_commands(out: Path, settings: list[dict[str, Any]], offset_s: float) -> list[str]:
    names = {"size_px": "--size", "shard_size": "--shard-size"}
    processes = []
    for i, one in enumerate(settings):
        time.sleep(i * offset_s)
        options = [text for name, value in one.items() for text in (names.get(name, f"--{name}"), str(value))]
        command = [sys.executable, "-m", "extract", "demo", "--no-gallery", "--out", str(out), *options]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    messages = []
    for process in processes:
        words = process.communicate()[1].strip()
        last = words.splitlines()[-1] if process.returncode else ""
        messages.append(f"bug: {last}" if "Traceback" in words or "is a bug" in last else last)
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description="Two runs at once into one folder must never mix.")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds; offsets are drawn from 0 to this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", action="store_true")
    given = parser.parse_args()
    rng, ended, faults = random.Random(given.seed), Counter[tuple[str, str]](), []
    for number in range(given.trials):
        differs = list(PAIRS)[number % len(PAIRS)]
        with tempfile.TemporaryDirectory() as folder:
            result = trial(Path(folder) / "out", differs, rng.uniform(0, given.longest), given.commands)
        refused = [i for i, message in enumerate(result.messages) if message]
        ended[differs, {0: "first", 1: "second"}[refused[0]] if refused else "none"] += 1
        faults += [f"{differs}, {result.offset_s:.2f} s: {fault}" for fault in result.faults]

    table = Table(title=f"{given.trials} trials, the second run up to {given.longest} s after the first")
    for column in ("the runs differ in", "refused", "times"):
        table.add_column(column)
    for (differs, refused_run), times in sorted(ended.items()):
        table.add_row(differs, refused_run, str(times))
    Console().print(table)
    print(f"mixtures and other faults: {len(faults)}", *faults, sep="\n")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
