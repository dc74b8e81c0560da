"""A worker of the Ray run: a process that holds the estimators and makes one shard after the other."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from extract.estimators import table
from extract.sources import Unit
from extract.unit import DeviceLost, Loaded, Progress, UnitWork, make_shard, probe
from shards.errors import UserError
from shards.storage import Folder

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Each worker computes with one thread on the CPU: results must not depend on how many cores there are."""


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """All that a worker needs, small enough to send to each."""

    out: str
    work: UnitWork
    tasks: tuple[table.Task, ...]
    device: str
    dtype: str


@dataclass(frozen=True)
class Outcome:
    """What is left of a unit for the driver: the mark's counts, or a sentence that stops the run."""

    counts: dict[str, Any]
    timings: dict[str, float]
    problem: str = ""


class Worker:
    """The body of the Ray actor; `run` and `progress` are called from different threads."""

    def __init__(self, setup: WorkerSetup) -> None:
        import cv2

        cv2.setNumThreads(1)
        if setup.device == "cpu" and any(task.row.name != "null" for task in setup.tasks):
            import torch

            torch.set_num_threads(1)
        self._setup, self._progress = setup, Progress()
        self._folder = Folder(setup.out)
        self._loaded: list[Loaded] | None = None

    def load(self) -> str:
        """Loads the estimators; returns a sentence if that fails. A worker that only waits has none in memory."""
        if self._loaded is None:
            setup = self._setup
            try:
                self._loaded = [
                    Loaded(
                        table.load(task.row, setup.device, setup.dtype),
                        task.intrinsics,
                        table.fingerprint(task.row)["id"],
                        task.row.batch,
                    )
                    for task in setup.tasks
                ]
            except UserError as error:
                return str(error)
        return ""

    def run(self, unit: Unit, made: dict[str, Any], skip: Sequence[int]) -> Outcome:
        """Makes and commits the shard of a unit."""
        if problem := self.load():
            return Outcome({}, {}, problem)
        assert self._loaded is not None
        self._progress = Progress()
        try:
            mark = make_shard(
                self._folder,
                unit,
                self._setup.work,
                self._loaded,
                made=made,
                skip=frozenset(skip),
                progress=self._progress,
            )
        except UserError as error:
            return Outcome({}, {}, str(error))
        except DeviceLost as error:
            _die(error)
        finally:
            self._progress = Progress()
        return Outcome(mark["counts"], mark["timings"])

    def progress(self) -> tuple[int, int]:
        """Inputs done, and failed, of the unit at work."""
        return self._progress.done, self._progress.failed

    def count(self, unit: Unit) -> int | str:
        """How many inputs a unit has; a sentence if it cannot be read."""
        try:
            return sum(1 for _ in self._setup.work.source.read(unit))
        except UserError as error:
            return str(error)

    def probe(self, unit: Unit, start: int, stop: int, skip: Sequence[int]) -> str:
        """Works on the inputs start..stop only, without those to skip; dies if one of them kills its worker."""
        if problem := self.load():
            return problem
        assert self._loaded is not None
        try:
            probe(unit, self._setup.work, self._loaded, frozenset(range(start, stop)) - frozenset(skip))
        except UserError as error:
            return str(error)
        except DeviceLost as error:
            _die(error)
        return ""


def _die(reason: Exception) -> NoReturn:
    """Ends this process at once; the driver gives its unit to a new one."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(1)
