"""A worker of the Ray run: a process that holds the estimators and makes one shard after the other."""

import dataclasses
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from extract.estimators import table
from extract.run.batches import DeviceLost, probe_size
from extract.run.make_shard import Loaded, Progress, UnitWork, make_shard, probe
from extract.sources import Failure, RawSample, Source, Unit
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.marks import shard_name
from shards.writer import committed_mark

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Each worker computes with one thread on the CPU: results must not depend on how many cores there are."""
LARGE_PX = 1024
"""The shorter side of the images with which memory is probed where their size is not bounded."""
PROBE_S, PROBE_IMAGES = 30.0, 64
"""How long, and of how many images, the probe of a plan is at most."""
MOST_PASSED_OVER = 20
"""How many kinds of what looks like a caption a worker tells of; a hostile source may have any number."""


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """All that a worker needs, small enough to send to each."""

    out: str
    work: UnitWork
    tasks: tuple[table.Task, ...]
    device: str
    dtype: str
    gpu_share: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What is left of a unit for the driver: the mark's counts, or a sentence that stops the run."""

    counts: dict[str, Any]
    timings: dict[str, float]
    problem: str = ""
    uncaptioned: int = 0
    """Samples whose caption is empty."""
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict)
    """What looks like a caption in those samples and was not taken."""


@dataclass(frozen=True)
class Measured:
    """What a probe made of the first inputs of a unit.

    lacking: reason -> number of the inputs that gave no sample. bytes: of the tar. timed, seconds: how many inputs were
    timed, after the first window (which warms up), and how long they took.
    """

    inputs: int
    ok: int
    lacking: dict[str, int]
    bytes: int
    timed: int
    seconds: float


@dataclass(frozen=True)
class _Part:
    """A source of which only a part is read: up to `most` images, after `skip` images."""

    source: Source
    skip: int
    most: int

    def read(self, unit: Unit) -> Iterator[RawSample | Failure]:
        """The unit's outputs that belong to the part."""
        images = 0
        for output in self.source.read(unit):
            if images >= self.skip:
                yield output
            images += isinstance(output, RawSample)
            if images >= self.skip + self.most:
                return


class Worker:
    """The body of the Ray actor; `run` and `progress` are called from different threads."""

    def __init__(self, setup: WorkerSetup) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._setup, self._progress = setup, Progress()
        self._folder = Folder(setup.out)
        self._loaded: list[Loaded] | None = None

    def load(self) -> str:
        """Loads the estimators; returns a sentence if that fails. A worker that only waits has none in memory."""
        if self._loaded is None:
            setup = self._setup
            try:
                self._loaded = [self._load(task) for task in setup.tasks]
                if setup.device == "cpu" and (torch := sys.modules.get("torch")):  # not all estimators are networks
                    torch.set_num_threads(1)
                if setup.device == "cuda":
                    for loaded in self._loaded:  # when all of their weights are there
                        probe_size(loaded.estimator, loaded.size, setup.work.image.size_px or LARGE_PX, setup.gpu_share)
            except UserError as error:
                return str(error)
        return ""

    def _load(self, task: table.Task) -> Loaded:
        row, setup = task.row, self._setup
        self._progress.moved()
        estimator = table.load(row, setup.device, dtype_of(setup.dtype, setup.device))
        return Loaded(estimator, task.intrinsics, table.fingerprint(row)["id"], row.batch)

    def run(self, unit: Unit, made: dict[str, Any], skip: Sequence[int]) -> Outcome:
        """Makes and commits the shard of a unit."""
        progress = self._progress = Progress()
        if problem := self.load():
            return Outcome({}, {}, problem)
        assert self._loaded is not None
        for loaded in self._loaded:
            if any(made["estimators"][name] != loaded.id for name in loaded.intrinsics):
                return Outcome(
                    {}, {}, f"the weights of {loaded.id} on this machine are others than where the run began"
                )
        try:
            done = committed_mark(self._folder, shard_name(unit.index))
            if (
                done is not None and done["made"] == made
            ):  # by another run of the same command, since this one planned it
                return Outcome(done["counts"], {}, uncaptioned=uncaptioned(done))
            mark = make_shard(
                self._folder,
                unit,
                self._setup.work,
                self._loaded,
                made=made,
                skip=frozenset(skip),
                progress=progress,
            )
            if mark["made"] != made:  # a run that was refused meanwhile had won this commit before
                return Outcome({}, {}, f"shard {mark['shard']} was committed by another run, with other settings")
        except UserError as error:
            return Outcome({}, {}, str(error))
        except DeviceLost as error:
            _die(error)
        finally:
            self._progress = Progress()
        passed_over = dict(progress.passed_over.most_common(MOST_PASSED_OVER))
        return Outcome(mark["counts"], mark["timings"], uncaptioned=uncaptioned(mark), passed_over=passed_over)

    def progress(self) -> tuple[int, int, int]:
        """Inputs done, and failed, of the unit at work; and a number that changes with every step of the work."""
        return self._progress.done, self._progress.failed, self._progress.steps

    def count(self, unit: Unit) -> int | str:
        """How many inputs a unit has; a sentence if it cannot be read."""
        self._progress, count = Progress(), 0
        try:
            for _ in self._setup.work.source.read(unit):
                self._progress.moved()
                count += 1
            return count
        except UserError as error:
            return str(error)

    def probe(self, unit: Unit, start: int, stop: int, skip: Sequence[int]) -> str:
        """Works on the inputs start..stop only, without those to skip; dies if one of them kills its worker."""
        self._progress = Progress()
        if problem := self.load():
            return problem
        assert self._loaded is not None
        positions = frozenset(range(start, stop)) - frozenset(skip)
        try:
            probe(unit, self._setup.work, self._loaded, positions, self._progress)
        except UserError as error:
            return str(error)
        except DeviceLost as error:
            _die(error)
        return ""

    def measure(self, unit: Unit) -> Measured | str:
        """Makes the first samples of a unit, for about half a minute, in a temporary folder; a sentence if it fails."""
        if problem := self.load():
            return problem
        assert self._loaded is not None
        work = self._setup.work
        try:
            warm, warm_s = self._make_part(unit, 0, work.window)
            most = int(PROBE_S / max(warm_s / max(1, warm["counts"]["in"]), 1e-3))
            mark, seconds = self._make_part(unit, work.window, min(max(most, 1), PROBE_IMAGES))
        except UserError as error:
            return str(error)
        timed = mark["counts"]["in"]
        counts = [warm["counts"], mark["counts"]]
        lacking = Counter[str]()
        for count in counts:
            lacking.update(count["failed"])
        return Measured(
            inputs=sum(count["in"] for count in counts),
            ok=sum(count["ok"] for count in counts),
            lacking=dict(lacking),
            bytes=warm["tar"]["size"] + mark["tar"]["size"],
            timed=timed or warm["counts"]["in"],
            seconds=seconds if timed else warm_s,
        )

    def _make_part(self, unit: Unit, skip: int, most: int) -> tuple[dict[str, Any], float]:
        """The mark of a shard of these images, which is then gone again, and the seconds that it took."""
        assert self._loaded is not None
        source: Any = _Part(self._setup.work.source, skip, most)
        work = dataclasses.replace(self._setup.work, source=source)
        with tempfile.TemporaryDirectory(prefix="ildm-probe-") as place:
            begin = time.perf_counter()
            mark = make_shard(Folder(place), Unit(0, unit.items), work, self._loaded, made={})
            return mark, time.perf_counter() - begin


def uncaptioned(mark: Mapping[str, Any]) -> int:
    """How many samples of a shard have an empty caption, by its mark."""
    return sum(members["txt"][1] == 0 for members in mark["index"].values())


def dtype_of(wish: str, device: str) -> str:
    """The dtype of the networks: for "auto" bfloat16 on a GPU that computes in it, else float32."""
    if wish != "auto" or device == "cpu":
        return "float32" if wish == "auto" else wish
    import torch

    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def _die(reason: Exception) -> NoReturn:
    """Ends this process at once; the driver gives its unit to a new one."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(1)
