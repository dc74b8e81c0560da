"""The pool of workers, with a Ray that only pretends: which deaths end a run."""

from unittest import mock

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

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
