"""The pool of workers, with a Ray that only pretends: which deaths end a run."""

import itertools
from typing import Any
from unittest import mock

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from extract.sources import Unit
from extract.workers import cluster
from shards.core.errors import UserError


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    pretended = mock.MagicMock()
    pretended.wait.side_effect = lambda references, **_: (references, [])
    monkeypatch.setattr(cluster, "ray", pretended)
    return pretended


def died(words: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = words
    return error


def start_in_vain(ray: mock.MagicMock, times: int, error: RayActorError) -> None:
    """Starts workers that never come, because of the error."""
    pool = cluster.Pool(None, 1, cpus=1, gpus=0)
    ray.get.side_effect = error
    for _ in range(times):
        pool.start(1)
        assert pool.wait(0) == [] and pool.idle == 0


@pytest.mark.parametrize(
    "error",
    [
        died("The actor died because its node has died. Node Id: 1\nThe actor never ran."),
        ActorUnavailableError("out of reach", b"\0" * 16),
    ],
)
def test_nodes_that_go_away_while_their_workers_start_do_not_end_a_run(
    ray: mock.MagicMock, error: RayActorError
) -> None:
    start_in_vain(ray, 5 * cluster.MAX_FAILED_STARTS, error)


def test_workers_that_die_by_themselves_while_they_start_end_a_run_with_a_sentence(ray: mock.MagicMock) -> None:
    with pytest.raises(UserError, match=r"10 workers in a row died while they started.*killed by the system"):
        start_in_vain(ray, 20, died("The actor died.\nIts process was killed by the system."))


# ---- workers that stand still ----------------------------------------------------------------------------------------


class Clock:
    """The driver's clock, which a test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(cluster, "time", made)
    return made


def busy_pool(ray: mock.MagicMock, workers: int, warning_s: float, limit_s: float) -> tuple[cluster.Pool, list[Any]]:
    """A pool all of whose workers have a unit, and the handles of the workers; none of them ever answers."""
    handles = [mock.MagicMock(name=f"worker {i}") for i in range(workers)]
    ray.remote.return_value.options.return_value.remote.side_effect = handles
    pool = cluster.Pool(None, workers, cpus=1, gpus=0, stall=cluster.StallRules(warning_s, limit_s))
    pool.start(workers)
    pool.wait(0)
    for index in range(workers):
        pool.ask(cluster.Job(Unit(index, None), {}))
    ray.wait.side_effect = lambda references, **_: ([], references)
    return pool, handles


def pass_by(pool: cluster.Pool, clock: Clock, seconds: float) -> None:
    """The driver's loop for so long, a second a turn."""
    for _ in range(int(seconds)):
        clock.now += 1
        pool.progress()


def test_a_worker_that_stands_still_is_said_once_and_then_ended_while_others_go_on(
    ray: mock.MagicMock, clock: Clock
) -> None:
    pool, handles = busy_pool(ray, 2, warning_s=30, limit_s=100)
    stuck = handles[1]  # the last that is idle is asked first: unit 0
    steps = itertools.count(1)
    ray.wait.side_effect = lambda references, **_: ([r for r in references if r is handles[0].progress.remote()], [])
    ray.get.side_effect = lambda _: (0, 0, next(steps))

    pass_by(pool, clock, 29)
    assert pool.stalls() == [] and pool.replace_stalled() == []
    pass_by(pool, clock, 2)
    [stall] = pool.stalls()
    assert isinstance(stall.question, cluster.Job) and stall.question.unit.index == 0 and 29 <= stall.seconds <= 32
    pass_by(pool, clock, 60)
    assert pool.stalls() == [] and pool.replace_stalled() == [] and pool.busy == 2
    pass_by(pool, clock, 12)
    [(question, died)] = pool.replace_stalled()
    assert question is stall.question and died.stalled_s >= 100
    ray.kill.assert_called_once_with(stuck)
    assert pool.busy == 1 and pool.replace_stalled() == []


def test_a_driver_that_was_stopped_itself_blames_no_worker(ray: mock.MagicMock, clock: Clock) -> None:
    pool, _ = busy_pool(ray, 2, warning_s=30, limit_s=100)
    pass_by(pool, clock, 5)
    clock.now += 3600
    pass_by(pool, clock, 5)
    assert pool.stalls() == [] and pool.replace_stalled() == []


def test_limits_of_zero_never_blame_a_worker(ray: mock.MagicMock, clock: Clock) -> None:
    pool, _ = busy_pool(ray, 1, warning_s=0, limit_s=0)
    pass_by(pool, clock, 5000)
    assert pool.stalls() == [] and pool.replace_stalled() == []


def test_workers_are_asked_in_turn(ray: mock.MagicMock, clock: Clock) -> None:
    count = 5 * cluster.POLLED
    pool, handles = busy_pool(ray, count, warning_s=30, limit_s=0)
    pass_by(pool, clock, 5)
    assert [handle.progress.remote.call_count for handle in handles] == [2] * count  # at its start, and once since


def test_a_pool_without_any_worker_that_has_started_says_so_again_and_again(ray: mock.MagicMock, clock: Clock) -> None:
    ray.wait.side_effect = lambda references, **_: ([], references)
    pool = cluster.Pool(None, 1, cpus=1, gpus=0, stall=cluster.StallRules(30, 100))
    pool.start(1)
    said = []
    for _ in range(100):
        pass_by(pool, clock, 1)
        said += pool.stalls()
    assert [(stall.question, round(stall.seconds)) for stall in said] == [(None, 30)] * 3
