"""The driver of an extraction: plans units, gives them to workers, and closes the dataset when all are committed.

Its memory does not grow with the number of units but for one small number each. Stopped at any instant, the same call
goes on: units whose shard is committed, and was made with the same settings, are counted and not done again.
"""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from extract.config import ExtractConfig
from extract.estimators.table import Task, find_set, fingerprint, tasks_of
from extract.progress import Reporter
from extract.sources import Source, Unit
from extract.sources.table import open_source
from extract.unit import UnitWork
from extract.worker import Outcome, WorkerSetup
from shards.dataset import Dataset, write_info
from shards.errors import TooManyFailures, UserError
from shards.intrinsics import INTRINSICS
from shards.marks import DATASET, digest, shard_name
from shards.sample import member_names
from shards.storage import WRITING, Folder
from shards.writer import read_mark, recover

if TYPE_CHECKING:
    from extract import cluster  # imports Ray, which a complete dataset does not need


@dataclass
class Summary:
    """What a run did. counts are of the whole dataset, `made` and `seconds` of this run only."""

    out: str
    shards: int = 0
    samples_in: int = 0
    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    made: int = 0
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)

    @property
    def failed_share(self) -> float:
        return sum(self.failed.values()) / self.samples_in if self.samples_in else 0.0


def run(config: ExtractConfig, *, source: Source | None = None, tasks: Sequence[Task] | None = None) -> Summary:
    """Extracts, or goes on with an extraction; returns when the dataset is complete.

    source, tasks: instead of those that the configuration names. Raises UserError with a sentence if it cannot finish;
    TooManyFailures, after finishing, if more inputs failed than run.max_failed allows.
    """
    from extract import cluster

    source = source or open_source(config.source)
    tasks = list(tasks_of(find_set(config.run.estimators), config.run.only) if tasks is None else tasks)
    folder = Folder(config.out)
    folder.make()
    info = _describe(folder, config, source, tasks)
    summary, counts = Summary(config.out), dict[int, int]()
    begin = time.monotonic()
    total = _total(source, config.run.limit)
    stop = _Stop()
    with Reporter(total) as reporter, stop.listening():
        jobs = _open_jobs(folder, source, config, info, summary, counts, reporter)
        first = next(jobs, None)
        if first is not None:  # Ray is not even started for a dataset that is complete
            write_info(folder, info)
            stop.deferred = True
            with cluster.connected(config.run.address, config.run.workers or _cores()):
                staff = cluster.plan_staff(config.run)
                setup = _setup(config, source, tasks, info, staff)
                pool = cluster.Pool(setup, staff.workers, cpus=1, gpus=staff.gpus_per_worker)
                grows = config.run.address != "local" and not config.run.workers
                capacity = partial(cluster.cluster_size, 1, staff.gpus_per_worker) if grows else None
                cluster.Dispatcher(pool, jobs, _Tally(summary, counts, reporter, stop), capacity).work(first)
    summary.shards = len(counts)
    summary.seconds = time.monotonic() - begin
    _close(folder, info, summary, counts)
    if summary.failed_share > config.run.max_failed:
        raise TooManyFailures(
            f"{sum(summary.failed.values())} of {summary.samples_in} inputs failed ({summary.failed_share:.1%}), more than "
            f"--max-failed {config.run.max_failed:.0%}; the dataset is complete without them: see `python -m shards stats "
            f"{config.out}`, or allow more"
        )
    return summary


def _setup(
    config: ExtractConfig, source: Source, tasks: Sequence[Task], info: dict[str, Any], staff: "cluster.Staff"
) -> WorkerSetup:
    """What every worker is told once."""
    work = UnitWork(
        source=source,
        image=config.image,
        members=tuple(info["members"]),
        threads=staff.threads,
        window=config.run.window,
    )
    return WorkerSetup(out=config.out, work=work, tasks=tuple(tasks), device=staff.device, dtype=config.run.dtype)


# ---- what is to be done ----------------------------------------------------------------------------------------------


def _describe(folder: Folder, config: ExtractConfig, source: Source, tasks: Sequence[Task]) -> dict[str, Any]:
    """dataset.json for this run. Raises UserError if the folder holds a dataset of other images."""
    made = {name: fingerprint(task.row) for task in tasks for name in task.intrinsics}
    described = {"source": source.describe(), **config.identity(), "limit": config.run.limit}
    if folder.exists(DATASET):
        old = Dataset.open(folder.url).info
        differing = sorted(key for key in described if key != "limit" and described[key] != old["config"].get(key))
        if _beyond(old["config"].get("limit"), config.run.limit):
            differing.append("limit")  # it may grow only: shards are never taken away
        if differing:
            names = ", ".join(f"{key} ({_difference(old['config'].get(key), described[key])})" for key in differing)
            raise UserError(
                f"{config.out} holds a dataset that was made with other settings: {names}; choose another --out"
            )
        made = {**old["estimators"], **made}
    elif others := [name for name in folder.list() if name.endswith((".tar", ".json"))]:
        raise UserError(f"{config.out} is not empty and holds no dataset ({others[0]}, ...); choose another --out")
    made = {name: made[name] for name in INTRINSICS if name in made}
    return {
        "recipe": config.name,
        "config": described,
        "image": config.image.format,
        "members": member_names(config.image.format, tuple(made)),
        "depth_kind": "",
        "estimators": made,
        "shards": None,
        "totals": None,
    }


def _beyond(old: int | None, new: int | None) -> bool:
    """Whether a limit (None: no limit) lets more inputs in than another."""
    return new is not None and (old is None or old > new)


def _difference(old: Any, new: Any) -> str:
    """Where two settings differ, for a message."""
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(
            f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in sorted(old | new) if old.get(k) != new.get(k)
        )
    return f"was {old!r}, is {new!r}"


def _open_jobs(
    folder: Folder,
    source: Source,
    config: ExtractConfig,
    info: dict[str, Any],
    summary: Summary,
    counts: dict[int, int],
    reporter: Reporter,
) -> Iterator[Any]:
    """The jobs that are not done yet, lazily and in order; those that are done are counted."""
    from extract.cluster import Job

    begun = _begun(folder)  # all others need not be looked for, which would cost an object store several requests each
    ids = {name: row["id"] for name, row in info["estimators"].items()}
    for unit in source.units(config.run.shard_size, config.run.limit):
        made = {"unit": digest({"items": unit.items}), "estimators": ids}
        if unit.index in begun:
            name = shard_name(unit.index)
            recover(folder, name)
            mark = read_mark(folder, name) if folder.exists(f"{name}.json") else None
            if mark is not None and mark["made"] == made:
                _count(summary, counts, unit, mark["counts"])
                reporter.advance(mark["counts"]["in"], sum(mark["counts"]["failed"].values()), again=True)
                continue
        yield Job(unit, made)


def _count(summary: Summary, counts: dict[int, int], unit: Unit, mark_counts: dict[str, Any]) -> None:
    summary.samples_in += mark_counts["in"]
    summary.ok += mark_counts["ok"]
    summary.failed.update(mark_counts["failed"])
    counts[unit.index] = mark_counts["ok"]


def _begun(folder: Folder) -> set[int]:
    """The shards that are committed, or whose writer died while it did so."""
    marks = (name.removesuffix(".json") for name in folder.list() if name.endswith(".json"))
    winners = (name.removesuffix(".winner") for name in folder.list(WRITING) if name.endswith(".winner"))
    return {int(stem) for stem in (*marks, *winners) if stem.isdigit()}


# ---- the work --------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Listens to the work: counts what is finished, and tells the person who waits."""

    summary: Summary
    counts: dict[int, int]
    reporter: Reporter
    stop: "_Stop"

    def finished(self, unit: Unit, outcome: Outcome) -> None:
        _count(self.summary, self.counts, unit, outcome.counts)
        self.summary.made += outcome.counts["in"]
        self.summary.stages.update(outcome.timings)
        self.reporter.advance(outcome.counts["in"], sum(outcome.counts["failed"].values()))

    def working(self, done: int, failed: int) -> None:
        self.stop.check()
        self.reporter.working(done, failed)

    def say(self, sentence: str) -> None:
        self.reporter.say(sentence)


def _close(folder: Folder, info: dict[str, Any], summary: Summary, counts: dict[int, int]) -> None:
    """Writes the totals and removes what killed writers left."""
    if sorted(counts) != list(range(len(counts))):
        raise UserError(
            f"{summary.out}: the source gave units {sorted(counts)[:5]}...; they must be numbered 0, 1, 2, ..."
        )
    if not counts:
        raise UserError("the source has no inputs; check its path and its filters")
    totals = {
        "in": summary.samples_in,
        "ok": summary.ok,
        "failed": dict(summary.failed),
        "shards": [counts[index] for index in range(len(counts))],
    }
    write_info(folder, info | {"shards": len(counts), "totals": totals, "depth_kind": _depth_kind(folder, info)})
    folder.sweep()


def _depth_kind(folder: Folder, info: dict[str, Any]) -> str:
    """ "metric" or "relative", as the first sample says; "" where there is no depth or no sample."""
    if "depth" not in info["estimators"]:
        return ""
    dataset = Dataset(folder, info)
    for mark in dataset.marks():
        for key in mark["index"]:
            return str(dataset.read_at(mark, key, ["json"]).meta["intrinsics"]["depth"]["kind"])
    return ""


# ---- this machine ----------------------------------------------------------------------------------------------------


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _total(source: Source, limit: int | None) -> int | None:
    total = source.total()
    return total if limit is None or total is None else min(total, limit)


class _Stop:
    """SIGTERM and Ctrl-C end the run with a sentence; what is committed stays.

    deferred: note the signal only, until check() is called: code of Ray that an exception interrupts breaks.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._number: int | None = None

    def check(self) -> None:
        """Raises UserError if the run is to stop."""
        if self._number is not None:
            name = signal.Signals(self._number).name
            raise UserError(f"stopped by {name}; the same command goes on where it stopped")

    def _note(self, number: int, frame: FrameType | None) -> None:
        impatient, self._number = self._number is not None, number
        if impatient or not self.deferred:
            self.check()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
