"""The driver of an extraction: plans units, gives them to workers, and closes the dataset when all are committed.

Its memory does not grow with the number of units but for one small number each. Stopped at any instant, the same call
goes on: units whose shard is committed, and was made with the same settings, are counted and not done again.
"""

import contextlib
import itertools
import signal
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from extract.config import ExtractConfig
from extract.estimators.table import Task, find_set, fingerprint, tasks_of
from extract.run import retries
from extract.run.inputs import Changes, is_current, made_of, same_source
from extract.run.make_shard import UnitWork
from extract.run.progress import Reporter
from extract.run.worker import Outcome, Worker, WorkerSetup, uncaptioned
from extract.sources import Source, Unit
from extract.sources.caption_report import Captioned, CaptionReport
from extract.sources.table import open_source
from shards.core.cores import cores
from shards.core.errors import TooManyFailures, UserError
from shards.core.storage import WRITING, Folder
from shards.counts import DatasetCounts, is_drop
from shards.dataset import Dataset
from shards.description import create_info, kind_of, read_info, replace_info, update_info
from shards.intrinsics import INTRINSICS
from shards.marks import DATASET, shard_name
from shards.sample import member_names
from shards.writer import committed_mark, recover

if TYPE_CHECKING:
    from extract.workers import cluster  # imports Ray, which a complete dataset does not need

_MOST_SHARDS = 10_000_000


@dataclass
class Summary:
    """What a run did. shards and stand are of the whole dataset, the rest of this run only."""

    out: str
    shards: int = 0
    stand: DatasetCounts = field(default_factory=DatasetCounts)
    made: int = 0
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)
    captions: CaptionReport | None = None
    """What was known of the source's captions before the work."""
    uncaptioned: int = 0
    """Samples of the dataset whose caption is empty."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Of those that this run made: what looks like a caption and was not taken."""


def run(
    config: ExtractConfig,
    *,
    retry_failed: bool = False,
    source: Source | None = None,
    tasks: Sequence[Task] | None = None,
    in_process: bool = False,
) -> Summary:
    """Extracts, or goes on with an extraction; returns when the dataset is complete.

    retry_failed: then try again, in further shards, what failed for a reason that may have passed (extract.run.retries).
    source, tasks: instead of those that the configuration names. in_process: one worker, in this process, without Ray: what
    tests and benchmarks of the driver need. Raises UserError with a sentence if it cannot finish;
    TooManyFailures, after finishing, if more inputs failed than run.max_failed allows.
    """
    source = source or open_source(config.source)
    tasks = list(tasks_of(find_set(config.run.estimators), config.run.only) if tasks is None else tasks)
    if retry_failed:
        retries.check(source)
    folder = Folder(config.out)
    folder.make()
    begun = folder.exists(DATASET)
    info, finishing = _take_over(folder, config, source, tasks)
    captions = caption_report(source, config.run.limit)
    if captions is not None and not begun:
        captions.check()
    begin, size = time.monotonic(), config.run.shard_size
    stop = _Stop()
    with Reporter(_total(source, config.run.limit)) as reporter, stop.listening(), contextlib.ExitStack() as stack:
        for line in captions.lines() if captions else ():
            reporter.say(line)
        tally = _RunCounts(Summary(config.out, captions=captions), reporter, stop)
        crew = _Workers(folder, source, config, info, tasks, tally, stack, in_process)
        crew.work(source.units(size, config.run.limit))
        if retry_failed and not (info["retries"] and finishing):
            info["retries"].append(retries.new_round(tally.shards))
        before = range(0)
        for round_ in list(info["retries"]):
            before, round_["first"] = range(before.stop, tally.shards), tally.shards
            if tally.try_again(round_):
                crew.work(retries.units(source, folder, before, round_, size))
            else:
                info["retries"].remove(round_)
    summary = tally.summary
    summary.shards = tally.shards
    summary.seconds = time.monotonic() - begin
    _close(folder, info, tally)
    stand = summary.stand
    if stand.failed_share > config.run.max_failed:
        raise TooManyFailures(
            f"{stand.failed.total()} of {stand.inputs - stand.dropped.total()} inputs failed ({stand.failed_share:.1%}), "
            f"more than --max-failed {config.run.max_failed:.0%}; the dataset is complete without them: see `python -m "
            f"shards stats {config.out}`, or allow more"
        )
    if captions is not None and captions.wanted and summary.made and 0 < stand.ok == summary.uncaptioned:
        raise UserError(
            f"none of the {stand.ok:,} samples of {config.out} has a caption; the dataset is complete otherwise. Name what "
            f"holds them, or ask for images without captions with --set source.captions=none, and choose another --out"
        )
    return summary


def caption_report(source: Source, limit: int | None) -> CaptionReport | None:
    """What a source can say of its captions before the work; None for one of which nothing need be said."""
    return source.caption_report(limit) if isinstance(source, Captioned) else None


# ---- what is to be done ----------------------------------------------------------------------------------------------


def _take_over(
    folder: Folder, config: ExtractConfig, source: Source, tasks: Sequence[Task]
) -> tuple[dict[str, Any], bool]:
    """dataset.json for this run, and whether an earlier run began and did not end.

    Where the folder's dataset is described otherwise (another estimator, other inputs), it is described anew before any
    shard is looked at: a run that is at work with the earlier description commits nothing from then on.
    """
    old = read_info(folder)
    info, finishing = _describe(folder, config, source, tasks, old)
    if old is not None and kind_of(old) != kind_of(info) and not replace_info(folder, info, old["checksum"]):
        raise UserError(
            f"another run changes {config.out} at this moment; wait for its end, and run the same command again"
        )
    return info, finishing


def _begin(folder: Folder, info: dict[str, Any]) -> None:
    """Writes dataset.json as that of an unfinished dataset, before the first shard. Raises UserError if another run with
    other settings was faster."""
    if create_info(folder, info):
        return
    other = read_info(folder)
    if other is not None and kind_of(other) != kind_of(info):
        differing = _differing(other, info) or ["its estimators"]
        raise UserError(
            f"another run began a dataset in {folder.url} at the same moment, with other settings: "
            f"{', '.join(differing)}; choose another --out"
        )
    update_info(folder, info)


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that two descriptions differ in, for a message."""
    before, after = ({**info["config"], "estimators": info["estimators"]} for info in (old, new))
    return [f"{key} ({_difference(before.get(key), after[key])})" for key in after if before.get(key) != after[key]]


def _describe(
    folder: Folder,
    config: ExtractConfig,
    source: Source,
    tasks: Sequence[Task],
    earlier: dict[str, Any] | None,
) -> tuple[dict[str, Any], bool]:
    """The description that this run gives the dataset, and whether an earlier run began and did not end.

    earlier: what dataset.json says. Raises UserError if the folder holds a dataset of other images.
    """
    made = {name: fingerprint(task.row) for task in tasks for name in task.intrinsics}
    rounds: list[dict[str, Any]] = []
    finishing = False
    described = {"source": source.describe(), **config.identity(), "limit": config.run.limit}
    if earlier is not None:
        old = earlier
        differing = sorted(
            key for key in described if key not in ("limit", "source") and described[key] != old["config"].get(key)
        )
        if not same_source(old["config"].get("source") or {}, described["source"]):
            differing.append("source")
        if _beyond(old["config"].get("limit"), config.run.limit):
            differing.append("limit")  # it may grow only: shards are never taken away
        rounds, finishing = list(old.get("retries") or ()), old["totals"] is None
        if rounds and old["config"].get("limit") != config.run.limit and "limit" not in differing:
            differing.append("limit")  # nor may it grow once shards of a further attempt follow
        if rounds and "source" not in differing and old["config"]["source"] != described["source"]:
            differing.append("source")  # nor may its inputs change then
        if differing:
            names = ", ".join(f"{key} ({_difference(old['config'].get(key), described[key])})" for key in differing)
            raise UserError(
                f"{config.out} holds a dataset that was made with other settings: {names}; choose another --out"
            )
        made = {**old["estimators"], **made}
    elif others := [name for name in folder.list() if name.endswith((".tar", ".json"))]:
        if DATASET in others:  # another run created it after this one had looked
            return _describe(folder, config, source, tasks, earlier)
        raise UserError(f"{config.out} is not empty and holds no dataset ({others[0]}, ...); choose another --out")
    made = {name: made[name] for name in INTRINSICS if name in made}
    info = {
        "recipe": config.name,
        "config": described,
        "image": config.image.format,
        "members": member_names(config.image.format, tuple(made)),
        "depth_kind": "",
        "estimators": made,
        "retries": rounds,
        "shards": None,
        "totals": None,
    }
    return info, finishing


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


def _begun(folder: Folder) -> bytearray:
    """By number: the shards that are committed, or whose writer died while it did so."""
    marks = (name.removesuffix(".json") for name in folder.list() if name.endswith(".json"))
    winners = (name.removesuffix(".winner") for name in folder.list(WRITING) if name.endswith(".winner"))
    begun = bytearray()
    for stem in (*marks, *winners):
        if stem.isdigit() and int(stem) < _MOST_SHARDS:
            begun.extend(bytes(max(0, int(stem) + 1 - len(begun))))
            begun[int(stem)] = 1
    return begun


# ---- the work --------------------------------------------------------------------------------------------------------


@dataclass
class _RunCounts:
    """Listens to the work: counts what is finished, and tells the person who waits."""

    summary: Summary
    reporter: Reporter
    stop: "_Stop"
    ok: "array[int]" = field(default_factory=lambda: array("q"))
    """The samples of each shard; -1 for one that is not finished."""
    failed: Counter[str] = field(default_factory=Counter)
    """The lines of all shards' failures, by reason."""
    failed_since: Counter[str] = field(default_factory=Counter)
    """Of these, the lines since the last round of retries began."""

    @property
    def shards(self) -> int:
        return len(self.ok)

    def count(self, index: int, counts: dict[str, Any], uncaptioned: int, *, again: bool) -> None:
        """Counts a shard that is finished; `again` if an earlier run made it."""
        self.summary.uncaptioned += uncaptioned
        self.summary.stand.add(counts)
        self.failed.update(counts["failed"])
        self.failed_since.update(counts["failed"])
        if index >= len(self.ok):
            self.ok.extend([-1] * (index + 1 - len(self.ok)))
        self.ok[index] = counts["ok"]
        self.reporter.advance(counts["in"], _failures(counts), again=again)

    def try_again(self, round_: dict[str, Any]) -> bool:
        """Whether the round has anything to do; then it begins: what it tries again counts no longer."""
        failed = retries.again(self.failed_since, round_)
        self.failed_since.clear()
        self.summary.stand.supersede(failed)
        self.reporter.expect_more(failed.total())
        return bool(failed)

    def finished(self, unit: Unit, outcome: Outcome) -> None:
        self.count(unit.index, outcome.counts, outcome.uncaptioned, again=False)
        self.summary.passed_over.update(outcome.passed_over)
        self.summary.made += outcome.counts["in"]
        self.summary.stages.update(outcome.timings)

    def working(self, done: int, failed: int) -> None:
        self.stop.check()
        self.reporter.working(done, failed)

    def say(self, sentence: str) -> None:
        self.reporter.say(sentence)


def _failures(counts: dict[str, Any]) -> int:
    return sum(count for reason, count in counts["failed"].items() if not is_drop(reason))


@dataclass
class _Workers:
    """Does units, and starts Ray and its workers for the first that is not done yet; `stack` ends them."""

    folder: Folder
    source: Source
    config: ExtractConfig
    info: dict[str, Any]
    tasks: Sequence[Task]
    tally: _RunCounts
    stack: contextlib.ExitStack
    in_process: bool = False
    changes: Changes = field(default_factory=Changes)
    _staff: "tuple[cluster.Pool, Callable[[], int] | None] | None" = None

    def work(self, units: Iterable[Unit]) -> None:
        """Does all units that are not done; returns when they are committed."""
        jobs = self._jobs(units)
        first = next(jobs, None)
        if first is not None:  # Ray is not even started for a dataset that is complete
            _begin(self.folder, self.info)
            try:
                if self.in_process:
                    self._work_here(first, jobs)
                else:
                    self._work_on_ray(first, jobs)
            except UserError as error:
                if self._finished_by_another_run():
                    raise UserError(
                        f"another run of the same command finished {self.folder} while this one was at work, so this one "
                        "stops; the dataset is whole, and nothing is left to do"
                    ) from error
                raise
        for sentence in self.changes.summary():
            self.tally.say(sentence)

    def _work_on_ray(self, first: "cluster.Job", jobs: "Iterator[cluster.Job]") -> None:
        from extract.workers import cluster

        self._staff = self._staff or self._start()
        pool, capacity = self._staff
        cluster.Dispatcher(pool, jobs, self.tally, capacity).work(first)

    def _work_here(self, first: "cluster.Job", jobs: "Iterator[cluster.Job]") -> None:
        from extract.workers import cluster

        staff = cluster.WorkerPlan(1, "cpu", 0.0, self.config.run.threads or cluster.CPU_THREADS)
        worker = Worker(self._setup(staff))
        for job in itertools.chain([first], jobs):
            for attempt in range(1, cluster.ATTEMPTS + 1):
                outcome = worker.run(job.unit, job.made, job.skip)
                if not outcome.problem:
                    break
                if attempt == cluster.ATTEMPTS:
                    raise UserError(outcome.problem)
            self.tally.finished(job.unit, outcome)
            self.tally.working(0, 0)

    def _finished_by_another_run(self) -> bool:
        current = read_info(self.folder)
        return current is not None and current["totals"] is not None and kind_of(current) == kind_of(self.info)

    def _jobs(self, units: Iterable[Unit]) -> "Iterator[cluster.Job]":
        """The jobs that are not done yet, lazily and in order; those that are done are counted."""
        from extract.workers.cluster import Job

        # No others need be looked for, which would cost an object store several requests each
        begun = _begun(self.folder)
        ids = {name: row["id"] for name, row in self.info["estimators"].items()}
        lacking = sorted(ids.keys() - {name for task in self.tasks for name in task.intrinsics})
        for unit in units:
            made, name, mark = made_of(unit, ids, self.config.image), shard_name(unit.index), None
            if unit.index < len(begun) and begun[unit.index]:
                recover(self.folder, name)
                mark = committed_mark(self.folder, name)

            if mark is not None:
                if sentence := self.changes.look(name, mark["made"], made, unit.files):
                    self.tally.say(sentence)
                if is_current(mark["made"], made):
                    self.tally.count(unit.index, mark["counts"], uncaptioned(mark), again=True)
                    continue
            elif lacking:
                self._refuse(name, lacking)
            yield Job(unit, made)

    def _refuse(self, name: str, lacking: Sequence[str]) -> None:
        """Raises UserError: the samples of a shard that is new would lack maps that the others have."""
        raise UserError(
            f"{self.folder} was begun with other settings: its samples have {', '.join(lacking)}, which this run does not "
            f"make, and shard {name} is not made yet. Finish it with the estimators that it was begun with, "
            "or choose another --out"
        )

    def _start(self) -> "tuple[cluster.Pool, Callable[[], int] | None]":
        """Ray, its workers, and how many of them there is room for (None: that does not change)."""
        from extract.workers import cluster

        run = self.config.run
        stop = self.tally.stop
        stop.deferred = True
        with stop.waiting_for("Ray has started"):
            self.stack.enter_context(cluster.connected(run.address, run.workers or cores()))
        staff = cluster.plan_workers(run)
        stall = cluster.StallRules(run.stall_warning_s, run.stall_limit_s)
        pool = cluster.Pool(self._setup(staff), staff.workers, cpus=1, gpus=staff.gpus_per_worker, stall=stall)
        grows = run.address != "local" and not run.workers
        return pool, partial(cluster.cluster_size, 1, staff.gpus_per_worker) if grows else None

    def _setup(self, staff: "cluster.WorkerPlan") -> WorkerSetup:
        """What every worker is told once."""
        work = UnitWork(
            source=self.source,
            image=self.config.image,
            members=tuple(self.info["members"]),
            kind=kind_of(self.info),
            threads=staff.threads,
            window=self.config.run.window,
        )
        return WorkerSetup(
            out=self.config.out,
            work=work,
            tasks=tuple(self.tasks),
            device=staff.device,
            dtype=self.config.run.dtype,
            gpu_share=staff.gpus_per_worker,
        )


def _close(folder: Folder, info: dict[str, Any], tally: _RunCounts) -> None:
    """Writes the totals and removes what killed writers left."""
    if -1 in tally.ok:
        raise UserError(
            f"{folder}: the source gave no unit {tally.ok.index(-1)}, but later ones; they must be numbered 0, 1, 2, ..."
        )
    if not tally.ok:
        raise UserError("the source has no inputs; check its path and its filters")
    if surplus := retries.remove_surplus(folder, tally.shards):
        tally.say(f"{surplus} shards were removed: the source has fewer inputs than before")
    ok = sum(tally.ok)
    totals = {
        "in": ok + tally.failed.total(),
        "ok": ok,
        "failed": dict(tally.failed),
        "shards": tally.ok.tolist(),
    }
    kind = _depth_kind(Dataset(folder, info))
    update_info(folder, info | {"shards": tally.shards, "totals": totals, "depth_kind": kind})
    folder.sweep()


def _depth_kind(dataset: Dataset) -> str:
    """ "metric" or "relative", as the first sample says; "" where there is no depth or no sample."""
    if "depth" not in dataset.info["estimators"]:
        return ""
    for mark in dataset.marks():
        for key in mark["index"]:
            return str(dataset.read_at(mark, key, ["json"]).meta["intrinsics"]["depth"]["kind"])
    return ""


# ---- this machine ----------------------------------------------------------------------------------------------------


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
        self._waiting_for = ""

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Around a long call: a signal meanwhile is acknowledged at once, and explains what then fails."""
        self._waiting_for = what
        try:
            yield
        except Exception:
            self.check()
            raise
        finally:
            self._waiting_for = ""
        self.check()

    def check(self) -> None:
        """Raises UserError if the run is to stop."""
        if self._number is not None:
            name = signal.Signals(self._number).name
            raise UserError(f"stopped by {name}; the same command goes on where it stopped")

    def _note(self, number: int, frame: FrameType | None) -> None:
        impatient, self._number = self._number is not None, number
        if self._waiting_for and not impatient:
            name = signal.Signals(number).name
            print(f"{name}: the run stops as soon as {self._waiting_for}, up to a minute", file=sys.stderr, flush=True)
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
