"""The training loop: exact resume after any death, what stops it and how, the same gradient on several processes."""

import os
import random
import signal
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from shards.core.errors import UserError
from tests.support import training
from tests.support.training import Averages, in_processes, run_averages, seen_keys
from train.checkpoint import Checkpoint, Checkpoints, optimiser_tensors, restore_optimiser
from train.config import LoopConfig
from train.engine import make_optimiser
from train.log import read_log


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


def _run(shards: str, folder: Path, kill_at: int, accumulate: int, rank: int) -> None:
    """One start of a run: it dies at the kill_at-th forward of rank 0; never if 0."""
    calls = iter(range(1, 10**6))

    def hook() -> None:
        if next(calls) == kill_at and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    task = Averages(seen=folder.parent / f"{folder.name}-seen-{rank}", hook=hook)
    run_averages(shards, folder, task, steps=7, accumulate=accumulate, ema=0.9, warmup=3, schedule="cosine")


def _final(folder: Path) -> Checkpoint:
    found = Checkpoints(folder / "checkpoints", 2).load()
    assert found is not None
    return found


def _assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.step, a.consumed, a.score) == (b.step, b.consumed, b.score)
    for part in ("weights", "average", "optimiser"):
        mine, other = getattr(a, part), getattr(b, part)
        assert mine.keys() == other.keys() and mine
        assert all(torch.equal(mine[name], other[name]) for name in mine), part


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 2)])
def test_a_run_killed_again_and_again_ends_bit_equal_with_the_same_keys(
    shards: str, tmp_path: Path, world: int, accumulate: int
) -> None:
    log = tmp_path / "trace"
    assert in_processes(_run, shards, tmp_path / "calm", 0, accumulate, world=world, log=log) == [0] * world, log
    rng, statuses = random.Random(world), []
    for _ in range(3):
        statuses = in_processes(
            _run, shards, tmp_path / "killed", rng.randint(1, 4 * accumulate), accumulate, world=world, log=log
        )
        if not any(statuses):
            break
    while any(statuses):
        statuses = in_processes(_run, shards, tmp_path / "killed", 0, accumulate, world=world, log=log)
        assert set(statuses) <= {0, -signal.SIGKILL}
    _assert_equal(_final(tmp_path / "killed"), _final(tmp_path / "calm"))
    for rank in range(world):
        calm, killed = (seen_keys(tmp_path / f"{name}-seen-{rank}") for name in ("calm", "killed"))
        assert killed == calm
    steps = [line["step"] for line in read_log(tmp_path / "killed")]
    assert steps == sorted(steps)


def _gradient(shards: str, folder: Path, batch: int, accumulate: int, rank: int) -> None:
    task = Averages(seen=folder.parent / f"{folder.name}-seen")
    run_averages(shards, folder, task, steps=1, batch=batch, accumulate=accumulate, clip=1e9)


def test_two_processes_and_accumulation_give_the_gradient_of_one_large_batch(shards: str, tmp_path: Path) -> None:
    cases = {"one": (1, 8, 1), "accumulated": (1, 2, 4), "two": (2, 4, 1), "both": (2, 2, 2)}
    for name, (world, batch, accumulate) in cases.items():
        log = tmp_path / "trace"
        assert not any(in_processes(_gradient, shards, tmp_path / name, batch, accumulate, world=world, log=log)), log
    expected = _final(tmp_path / "one").optimiser
    for name in cases:
        found = _final(tmp_path / name)
        assert found.consumed == 8
        assert seen_keys(tmp_path / f"{name}-seen") == seen_keys(tmp_path / "one-seen")
        for slot, value in expected.items():  # AdamW's first moment is the gradient times 0.1
            torch.testing.assert_close(found.optimiser[slot], value, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_sample(shards: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    run_averages(shards, tmp_path / "calm", Averages(seen=seen), steps=5)
    victim = seen_keys(seen)[7]  # in the fourth step
    with pytest.raises(UserError, match=rf"step 4, for the samples {victim}: .*checkpoint of step 2 is kept"):
        run_averages(shards, tmp_path / "poisoned", Averages(poison=victim), steps=5)
    assert _final(tmp_path / "poisoned").step == 2


def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_happened(shards: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_averages(shards, tmp_path / "calm", Averages(), checkpoint_every=100)
    calls = iter(range(100))
    stopped = Averages(hook=lambda: os.kill(os.getpid(), signal.SIGTERM) if next(calls) == 2 else None)
    outcome = run_averages(shards, tmp_path / "stopped", stopped, checkpoint_every=100)
    assert (outcome.finished, outcome.step) == (False, 3)
    assert run_averages(shards, tmp_path / "stopped", Averages(), checkpoint_every=100).finished
    _assert_equal(_final(tmp_path / "stopped"), _final(tmp_path / "calm"))
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("part", ["weights.safetensors", "optimiser.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_refused_and_the_last_good_one_is_used(
    shards: str, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_averages(shards, tmp_path / "calm", Averages(), steps=6)
    run_averages(shards, tmp_path / "cut", Averages(), steps=6)
    path = tmp_path / "cut" / "checkpoints" / "step-00000006" / part
    path.write_bytes(path.read_bytes()[:-10])
    run_averages(shards, tmp_path / "cut", Averages(), steps=6)
    message = capsys.readouterr().err
    assert "step-00000006" in message and "older checkpoint" in message
    _assert_equal(_final(tmp_path / "cut"), _final(tmp_path / "calm"))


def test_nothing_is_begun_anew_over_checkpoints_that_are_all_damaged(shards: str, tmp_path: Path) -> None:
    run_averages(shards, tmp_path, Averages(), steps=2)
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; remove that folder"):
        run_averages(shards, tmp_path, Averages(), steps=2)


def test_a_full_disk_is_said_in_a_sentence_and_the_last_good_checkpoint_stays(shards: str, tmp_path: Path) -> None:
    import resource

    run_averages(shards, tmp_path, Averages(), steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (450, limits[1]))  # a file that cannot grow, as on a full disk
    try:
        with pytest.raises(UserError, match=r"step 4 could not be saved; step 2 is the last good checkpoint"):
            run_averages(shards, tmp_path, Averages(), steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert _final(tmp_path).step == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002"]
    assert run_averages(shards, tmp_path, Averages(), steps=4).finished


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimiser_comes_back_in_the_memory_layout_of_its_weights(name: Literal["adamw", "muon"]) -> None:
    loop = LoopConfig(steps=4, batch=1, learning_rate=0.1, optimiser=name)

    def layers() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.SiLU(), nn.Conv2d(16, 4, 3))
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net, make_optimiser(loop, list(net.parameters()))

    def learn(net: nn.Module, optimiser: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(number))
            net(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    (calm, calm_optimiser), (net, optimiser), (resumed, resumed_optimiser) = layers(), layers(), layers()
    learn(calm, calm_optimiser, range(4))
    learn(net, optimiser, range(2))
    resumed.load_state_dict({name: tensor.contiguous() for name, tensor in net.state_dict().items()})
    stored = {name: tensor.clone().contiguous() for name, tensor in optimiser_tensors(optimiser).items()}
    restore_optimiser(resumed_optimiser, stored)
    learn(resumed, resumed_optimiser, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(calm.parameters(), resumed.parameters(), strict=True))


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate([3.0, 1.0, None, 2.0, 2.5], start=1):
        empty: dict[str, torch.Tensor] = {}
        checkpoints.save(
            Checkpoint(step=step, consumed=0, weights=empty, average=empty, optimiser=empty, identity={}, score=score)
        )
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.best() == 2


def test_settings_that_decide_the_result_must_be_the_same_to_continue(shards: str, tmp_path: Path) -> None:
    one = training.config_of(shards, "none", tmp_path)
    assert one.identity("vae", 1) == training.config_of(shards, "x", tmp_path, "vae.loop.keep=9").identity("vae", 1)
    halves = training.config_of(shards, "none", tmp_path, "vae.loop.accumulate=1")
    assert one.identity("vae", 1) == halves.identity("vae", 2) != halves.identity("vae", 1)
    run_averages(shards, tmp_path, Averages(), steps=2)
    state = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text().replace('"batch": 1', '"batch": 5'))
    with pytest.raises(UserError, match="made with batch = 5, and now it is 1"):
        run_averages(shards, tmp_path, Averages(), steps=2)
