"""Workers on Ray: started, replaced when they die, and asked one question at a time."""

import heapq
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from extract.config import RunConfig
from extract.run.worker import THREAD_VARIABLES, Outcome, Worker, WorkerSetup
from extract.sources import Unit
from extract.workers.poison import CrashBisection
from shards.core.cli import DEBUG_VARIABLE
from shards.core.errors import UserError

DEATHS_BEFORE_INQUIRY = 2
MAX_DEATHS = 20
ATTEMPTS = 2  # at a unit that ends with a sentence: what stopped it may have passed
MAX_FAILED_STARTS = 10  # in a row; those of nodes that go away while their workers start are not counted
POLL_S = 1.0
POLLED = 16  # workers that are asked for their progress at a time; a question costs the driver a millisecond
CPU_THREADS, GPU_THREADS = 2, 16  # of a worker, for decoding; the same again for encoding
LOOK_S = 2.0  # between two looks at how many nodes there are, so that new ones begin soon
LONGEST_TICK_S = 10.0
"""What a pause between two looks at the workers counts at most: a driver that was itself stopped for an hour then blames no
worker for it."""


@contextmanager
def connected(address: str, workers: int) -> Iterator[None]:
    """Ray, started on this machine for the run (`local`), or joined at an address (`auto`, HOST:PORT).

    A program that has Ray already keeps the one that it has.
    """
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    variables = dict.fromkeys(THREAD_VARIABLES, "1")
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": "info" if debug else "error"}
    if address == "local":
        if "RAY_AUTH_MODE" not in os.environ:  # Ray then asks for a token; one of this process, never on the disk
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ |= variables  # inherited by the workers
        options |= {"num_cpus": max(workers, 1), "include_dashboard": False, "object_store_memory": 100 << 20}
    else:
        options["runtime_env"] = {"env_vars": variables}
    try:
        with _signal_handlers_kept():
            ray.init(address=address, **options)
    except UserError:  # raised by a handler of signals
        raise
    except Exception as error:  # Ray has no base class for what can go wrong here, a plain Exception among it
        raise UserError(_why_not_connected(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _why_not_connected(address: str, error: Exception) -> str:
    """What a user can do about a Ray that does not start, or is not there."""
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if address != "local":
        return f"Ray cannot be reached at {address!r}: {message}; try the same command again, --debug shows more"

    variable = "TMPDIR" if "RAY_TMPDIR" not in os.environ and "TMPDIR" in os.environ else "RAY_TMPDIR"
    place = os.environ.get(variable, "/tmp")
    if "AF_UNIX path length" in str(error):
        return (
            f"Ray did not start on this machine: its sockets would lie under {variable} = {place}, and the path of a socket "
            "has at most 107 bytes; set RAY_TMPDIR to a folder with a short name, such as RAY_TMPDIR=/tmp"
        )
    return (
        f"Ray did not start on this machine: {message}; try the same command again, or set RAY_TMPDIR to another folder "
        f"than {place} if that is full or not writable; --debug shows more"
    )


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM in place of ours."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def cluster_size(cpus: float, gpus: float) -> int:
    """How many workers the cluster has room for at the moment; at least one."""
    there = ray.cluster_resources()
    by_gpu = int(there.get("GPU", 0) / gpus) if gpus else 1 << 30
    return max(1, min(by_gpu, int(there.get("CPU", 1) / cpus)))


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers there are, on what they compute, and what each gets."""

    workers: int
    device: str
    gpus_per_worker: float
    threads: int


def plan_workers(wishes: RunConfig) -> WorkerPlan:
    """The workers for the cluster that is connected: on its GPUs if it has any, wherever the driver itself runs.

    Raises UserError if GPUs are asked for and there are none.
    """
    there = ray.cluster_resources()
    gpus = there.get("GPU", 0.0)
    if wishes.device == "cuda" and not gpus:
        raise UserError("--device cuda: Ray finds no GPU here; use --device cpu, or check `nvidia-smi` on the nodes")
    if wishes.device == "cpu" or not gpus:
        return WorkerPlan(wishes.workers or cluster_size(1, 0), "cpu", 0.0, wishes.threads or CPU_THREADS)
    workers = wishes.workers or cluster_size(1, wishes.gpus_per_worker)
    each = int(there.get("CPU", 1)) // workers
    return WorkerPlan(
        workers, "cuda", wishes.gpus_per_worker, wishes.threads or min(max(each, CPU_THREADS), GPU_THREADS)
    )


@contextmanager
def single_worker(setup: WorkerSetup, staff: WorkerPlan, stall_limit_s: float = 0.0) -> Iterator[Callable[..., Any]]:
    """One worker, to be asked by the name of a method. What it answers with a sentence is raised as UserError, as is no
    answer within stall_limit_s (0: it is waited for)."""
    options = {"num_cpus": 1, "num_gpus": staff.gpus_per_worker, "max_restarts": 0}
    actor: Any = ray.remote(Worker)
    worker = actor.options(**options).remote(setup)

    def ask(method: str, *arguments: Any) -> Any:
        try:
            answer = ray.get(getattr(worker, method).remote(*arguments), timeout=stall_limit_s or None)
        except GetTimeoutError:
            raise UserError(
                f"the worker gave no answer within {stall_limit_s:g} s: look at its disk, network and GPU; "
                "run.stall_limit_s is how long it is waited for"
            ) from None
        except RayError as error:
            raise UserError(f"the worker failed: {_cause(error)}") from error
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    try:
        yield ask
    finally:
        ray.kill(worker)


# ---- what workers are asked ------------------------------------------------------------------------------------------


class Request(Protocol):
    """Something that a worker is asked; it may be asked again of another one."""

    def ask(self, worker: Any) -> Any:
        """Sends the question; returns the reference of the answer."""
        ...


@dataclass
class Job:
    """A unit on its way: how often a worker died with it or complained, and the positions that are known to kill."""

    unit: Unit
    made: dict[str, Any]
    deaths: int = 0
    problems: int = 0
    skip: tuple[int, ...] = ()

    def ask(self, worker: Any) -> Any:
        return worker.run.remote(self.unit, self.made, self.skip)


@dataclass
class CrashSearch:
    """The search for the inputs of a job that kill their worker."""

    job: Job
    inquiry: CrashBisection = field(init=False)

    def __post_init__(self) -> None:
        self.inquiry = CrashBisection(f"unit {self.job.unit.index}")

    def ask(self, worker: Any) -> Any:
        start, stop = self.inquiry.question or (0, 0)
        return (
            worker.probe.remote(self.job.unit, start, stop, self.job.skip)
            if stop
            else worker.count.remote(self.job.unit)
        )


# ---- the workers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Died:
    """In place of an answer: the worker died, alone or with its node, or was ended because it stood still.

    stalled_s: how long it had made no progress, if that is why it was ended.
    """

    stalled_s: float = 0.0


@dataclass(frozen=True)
class StallRules:
    """When a worker that makes no progress is said (after warning_s), and when it is replaced (after limit_s). 0: never."""

    warning_s: float = 0.0
    limit_s: float = 0.0


@dataclass(frozen=True)
class Stall:
    """A worker that has made no progress with a question for so long. question None: no worker could start."""

    question: Request | None
    seconds: float


@dataclass
class _Task:
    """A question that a worker has, and what was last heard of it. Times are of the pool's own clock."""

    worker: Any
    question: Request
    moved: float
    """When its progress last changed, or when it was asked."""
    looked: float
    """When its progress was last asked for."""
    counts: tuple[int, int, int] = (0, 0, 0)
    asked: Any = None
    """The reference of its progress, while that is on its way. A process that is stopped never answers."""
    said: bool = False


class Pool:
    """Up to `size` workers. Questions go only to workers that have started, so that none waits for a node that is gone."""

    def __init__(
        self,
        setup: Any,
        size: int,
        *,
        cpus: float,
        gpus: float,
        worker: type = Worker,
        stall: StallRules | None = None,
    ) -> None:
        """setup: what each worker is made with. worker: a class with the methods of Worker that questions call."""
        self.size, self._stall = size, stall or StallRules()
        self._reference = ray.put(setup)
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 2}
        self._actor: Any = ray.remote(worker).options(**options)
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, _Task] = {}
        self._failed_starts = 0
        self._last_poll = self._last_tick = time.monotonic()
        self._clock = 0.0
        self._had_workers = 0.0
        """When there last was a worker that had started, and when that they lack was last said."""

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> int:
        return len(self._busy)

    def start(self, wanted: int) -> None:
        """Starts workers until there are `wanted`, at most `size`, with or without work."""
        for _ in range(min(wanted, self.size) - len(self._starting) - len(self._idle) - len(self._busy)):
            worker = self._actor.remote(self._reference)
            self._starting[worker.progress.remote()] = worker

    def ask(self, question: Request) -> None:
        """Hands a question to an idle worker."""
        worker, now = self._idle.pop(), self._tick()
        self._busy[question.ask(worker)] = _Task(worker, question, moved=now, looked=now)

    def wait(self, seconds: float) -> list[tuple[Request, Any]]:
        """Questions that were answered within the time, or whose worker Died. Raises UserError if workers cannot start."""
        ready, _ = ray.wait([*self._busy, *self._starting], num_returns=1, timeout=seconds)
        ended: list[tuple[Request, Any]] = []
        for reference in ready:
            if reference in self._starting:
                self._welcome(self._starting.pop(reference), reference)
                continue
            task = self._busy.pop(reference)
            try:
                ended.append((task.question, ray.get(reference)))
                self._idle.append(task.worker)
            except RayActorError:
                ray.kill(task.worker)  # it may be out of reach only; its unit is somebody else's from now on
                ended.append((task.question, Died()))
            except RayError as error:
                raise UserError(f"a worker failed in a way that is a bug: {_cause(error)}") from error
        return ended

    def _welcome(self, worker: Any, reference: Any) -> None:
        try:
            ray.get(reference)
        except RayActorError as error:
            self._failed_starts += not _node_is_gone(error)
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise UserError(
                    f"{self._failed_starts} workers in a row died while they started; try fewer --workers if memory is "
                    f"short: {_cause(error)}"
                ) from error
            return
        except RayError as error:
            raise UserError(f"a worker could not start: {_cause(error)}") from error
        self._failed_starts = 0
        self._idle.append(worker)

    def progress(self) -> tuple[int, int]:
        """Inputs done and failed in the units at work, as last heard; asks some workers once in POLL_S, and never waits."""
        now = time.monotonic()
        if now - self._last_poll >= POLL_S:
            self._last_poll = now
            self._hear()
            free = [task for task in self._busy.values() if task.asked is None]
            for task in heapq.nsmallest(POLLED, free, key=lambda task: task.looked):  # in turn: none is forgotten
                task.asked, task.looked = task.worker.progress.remote(), self._tick()
        units = [task.counts for task in self._busy.values() if isinstance(task.question, Job)]
        return sum(done for done, _, _ in units), sum(failed for _, failed, _ in units)

    def _hear(self) -> None:
        """Takes the answers that have come. One that differs from the last is progress."""
        asked = {task.asked: task for task in self._busy.values() if task.asked is not None}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        for reference in ready:
            task = asked[reference]
            task.asked = None
            try:
                counts = ray.get(reference)
            except RayError:
                continue  # a worker that has just died: wait() will say so
            if counts != task.counts:
                task.counts, task.moved, task.said = counts, self._tick(), False

    def _tick(self) -> float:
        """The pool's clock, in seconds. It stands still while the driver does."""
        now = time.monotonic()
        self._clock += min(now - self._last_tick, LONGEST_TICK_S)
        self._last_tick = now
        return self._clock

    def stalls(self) -> list[Stall]:
        """Workers that have made no progress for the warning's time, each once; also if no worker can start."""
        now, after = self._tick(), self._stall.warning_s
        if self._idle or self._busy or not self._starting:
            self._had_workers = now
        if not after:
            return []

        found = []
        for task in self._busy.values():
            if not task.said and now - task.moved >= after:
                task.said = True
                found.append(Stall(task.question, now - task.moved))
        if now - self._had_workers >= after:
            found.append(Stall(None, now - self._had_workers))
            self._had_workers = now
        return found

    def replace_stalled(self) -> list[tuple[Request, Died]]:
        """Ends the workers that have made no progress for the limit's time; their questions are for others.

        One that cannot be ended at once (its disk hangs in the kernel, its node is out of reach) is given up all the same:
        should it come back, the commit of its shard loses against that of its replacement.
        """
        now, limit = self._tick(), self._stall.limit_s
        late = [reference for reference, task in self._busy.items() if limit and now - task.moved >= limit]
        ended: list[tuple[Request, Died]] = []
        for reference in late:
            task = self._busy.pop(reference)
            ray.kill(task.worker)
            ended.append((task.question, Died(stalled_s=now - task.moved)))
        return ended


def _node_is_gone(error: RayActorError) -> bool:
    """Whether a worker went with its node (Ray tells by its words alone), or is out of reach, and is not to blame."""
    return isinstance(error, ActorUnavailableError) or "its node has died" in str(error)


def _cause(error: RayError) -> str:
    if os.environ.get(DEBUG_VARIABLE):
        print(error, file=sys.stderr)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).strip() + " (--debug shows more)"


# ---- the work --------------------------------------------------------------------------------------------------------


class Listener(Protocol):
    """Who wants to know how the work goes."""

    def finished(self, unit: Unit, outcome: Outcome) -> None: ...

    def working(self, done: int, failed: int) -> None:
        """Called about once a second; what it raises ends the work."""

    def say(self, sentence: str) -> None: ...


@dataclass
class Dispatcher:
    """Keeps the workers of a pool busy until all jobs are done. Nothing that one unit suffers stops the others.

    capacity: how many workers there is room for, asked from time to time as nodes come and go; None if that is fixed.
    """

    pool: Pool
    jobs: Iterator[Job]
    listener: Listener
    capacity: Callable[[], int] | None = None
    _last_look: float = 0.0
    _again: list[Request] = field(default_factory=list)
    _exhausted: bool = False

    def work(self, first: Job) -> None:
        """Does `first` and all jobs. Raises UserError with a sentence where a unit cannot be done."""
        second = next(self.jobs, None)  # asked for before any worker starts: one unit needs one worker
        self._again, self._exhausted = ([first], True) if second is None else ([second, first], False)
        while self._again or self.pool.busy or not self._exhausted:
            self._look_for_nodes()
            self.pool.start(self.pool.size if not self._exhausted else self.pool.busy + len(self._again))
            while self.pool.idle and (question := self._next()) is not None:
                self.pool.ask(question)
            if not self.pool.busy and not self._again and self._exhausted:
                return
            for question, answer in [*self.pool.wait(POLL_S), *self.pool.replace_stalled()]:
                if isinstance(question, CrashSearch):
                    self._searched(question, answer)
                elif isinstance(question, Job):
                    self._ended(question, answer)
            self.listener.working(*self.pool.progress())
            for stall in self.pool.stalls():
                self.listener.say(_stall_message(stall))

    def _look_for_nodes(self) -> None:
        if self.capacity is not None and time.monotonic() - self._last_look > LOOK_S:
            self._last_look = time.monotonic()
            self.pool.size = self.capacity()

    def _next(self) -> Request | None:
        if self._again:
            return self._again.pop()
        job = None if self._exhausted else next(self.jobs, None)
        self._exhausted = job is None
        return job

    def _ended(self, job: Job, answer: Outcome | Died) -> None:
        index = job.unit.index
        if isinstance(answer, Died):
            job.deaths += 1
            what = f"made no progress for {_minutes(answer.stalled_s)}, and was ended," if answer.stalled_s else "died"
            self.listener.say(f"a worker {what} with unit {index}; its unit is done again")
            if job.deaths >= MAX_DEATHS:
                raise UserError(
                    f"unit {index} lost its worker {job.deaths} times, and none of its inputs is to blame alone; look at "
                    "the memory and the logs of its nodes, or try fewer --workers"
                )
            self._again.append(CrashSearch(job) if job.deaths % DEATHS_BEFORE_INQUIRY == 0 else job)
        elif answer.problem:
            job.problems += 1
            if job.problems >= ATTEMPTS:
                raise UserError(answer.problem)
            self._again.append(job)
        else:
            self.listener.finished(job.unit, answer)

    def _searched(self, search: CrashSearch, answer: Any) -> None:
        """Goes on with a search; at its end the job is done again without its killers."""
        if isinstance(answer, str) and answer:
            raise UserError(answer)
        died = isinstance(answer, Died)
        search.inquiry.answer(survived=not died, count=answer if isinstance(answer, int) else 0)
        if search.inquiry.question is not None:
            self._again.append(search)
            return
        job, killers = search.job, search.inquiry.killers
        if killers:
            self.listener.say(f"unit {job.unit.index}: {len(killers)} input(s) kill their worker; listed as failures")
            job.skip = tuple(sorted({*job.skip, *killers}))
        self._again.append(job)


def _stall_message(stall: Stall) -> str:
    since = _minutes(stall.seconds)
    if stall.question is None:
        return (
            f"no worker could start for {since}: the cluster has no free CPU or GPU, or its nodes stand still; "
            "`ray status` shows what is used"
        )
    job = stall.question.job if isinstance(stall.question, CrashSearch) else stall.question
    unit = f"unit {job.unit.index}" if isinstance(job, Job) else "its work"
    return f"a worker has made no progress for {since} with {unit}: look at its disk, network and GPU"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
