"""Workers on Ray: started, replaced when they die, and asked one unit at a time."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from extract.sources import Unit
from extract.worker import THREAD_VARIABLES, Outcome, Worker, WorkerSetup
from shards.cli import DEBUG_VARIABLE
from shards.errors import UserError

DEATHS_BEFORE_PROBING = 2
MAX_DEATHS = 20


@contextmanager
def connected(address: str, workers: int) -> Iterator[None]:
    """Ray, started on this machine for the run (`local`), or joined at an address (`auto`, HOST:PORT)."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    variables = dict.fromkeys(THREAD_VARIABLES, "1")
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": "info" if debug else "error"}
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else reaches this cluster
        os.environ |= variables  # inherited by the workers
        options |= {"num_cpus": max(workers, 1), "include_dashboard": False, "object_store_memory": 100 << 20}
    else:
        options["runtime_env"] = {"env_vars": variables}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"Ray cannot be reached at address {address!r}: {message}") from error
    try:
        yield
    finally:
        ray.shutdown()


def cluster_size(cpus: float, gpus: float) -> int:
    """How many workers the cluster has room for at the moment; at least one."""
    there = ray.cluster_resources()
    by_gpu = int(there.get("GPU", 0) / gpus) if gpus else 1 << 30
    return max(1, min(by_gpu, int(there.get("CPU", 1) / cpus)))


@dataclass
class Job:
    """A unit on its way: how often a worker died with it, and the positions that are known to kill."""

    unit: Unit
    made: dict[str, Any]
    deaths: int = 0
    skip: tuple[int, ...] = ()


class Pool:
    """A fixed number of workers. A worker that dies, alone or with its node, is replaced and its job comes back."""

    def __init__(self, setup: WorkerSetup, size: int, *, cpus: float, gpus: float) -> None:
        self._reference = ray.put(setup)
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 2}
        self._actor: Any = ray.remote(Worker)
        self._options = options
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Job]] = {}
        self._size = size

    @property
    def free(self) -> int:
        """Workers without a job, those not started yet included."""
        return self._size - len(self._busy)

    @property
    def busy(self) -> int:
        return len(self._busy)

    def _start(self) -> Any:
        return self._actor.options(**self._options).remote(self._reference)

    def submit(self, job: Job) -> None:
        """Gives a job to a free worker; starts one if need be."""
        worker = self._idle.pop() if self._idle else self._start()
        self._busy[worker.run.remote(job.unit, job.made, job.skip)] = worker, job

    def wait(self, seconds: float) -> list[tuple[Job, Outcome | None]]:
        """Jobs that ended within the time: with their outcome, or None where the worker died."""
        if not self._busy:
            return []
        ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=seconds)
        ended: list[tuple[Job, Outcome | None]] = []
        for reference in ready:
            worker, job = self._busy.pop(reference)
            try:
                ended.append((job, ray.get(reference)))
                self._idle.append(worker)
            except RayActorError:
                ended.append((job, None))
            except RayError as error:
                raise UserError(f"unit {job.unit.index} failed in a way that is a bug: {_cause(error)}") from error
        return ended

    def progress(self) -> tuple[int, int]:
        """Inputs done and failed in the units at work, as far as the workers answer at once."""
        asked = [worker.progress.remote() for worker, _ in self._busy.values()]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=0.2) if asked else ([], [])
        done = failed = 0
        for reference in ready:
            try:
                counts = ray.get(reference)
            except RayError:
                continue  # a worker that has just died: wait() will say so
            done, failed = done + counts[0], failed + counts[1]
        return done, failed

    # ---- an input that kills its worker ------------------------------------------------------------------------------

    def killers(self, job: Job) -> tuple[int, ...]:
        """The positions in a unit whose inputs kill a worker that processes them alone, twice; found by bisection."""
        count = self._disposable(job, "count")
        if count is None:
            raise UserError(
                f"reading unit {job.unit.index} kills the worker; its inputs are {str(job.unit.items)[:200]}: take them out"
            )
        found: list[int] = []
        spans = [(0, count)]
        while spans:
            start, stop = spans.pop()
            if start >= stop or self._survives(job, start, stop):
                continue
            if stop - start == 1:
                if not self._survives(job, start, stop):
                    found.append(start)
            else:
                middle = (start + stop) // 2
                spans += [(middle, stop), (start, middle)]
        return tuple(sorted(found))

    def _survives(self, job: Job, start: int, stop: int) -> bool:
        problem = self._disposable(job, "probe", start, stop)
        if problem:
            raise UserError(problem)
        return problem is not None

    def _disposable(self, job: Job, method: str, *arguments: int) -> Any:
        """The answer of a worker made for one question; None if it died of it."""
        if self._idle:  # make room
            ray.kill(self._idle.pop())
        worker = self._start()
        try:
            return ray.get(getattr(worker, method).remote(job.unit, *arguments))
        except RayActorError:
            return None
        except RayError as error:
            raise UserError(f"unit {job.unit.index} failed in a way that is a bug: {_cause(error)}") from error
        finally:
            ray.kill(worker)


def _cause(error: RayError) -> str:
    if os.environ.get(DEBUG_VARIABLE):
        print(error, file=sys.stderr)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__) + " (--debug shows more)"
