"""Where runs end and go on: signals and kills in every phase, two trainings at once, more steps, switches, foreign bases."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.core.errors import UserError
from tests.support import training
from tests.support.training import Averages, in_processes, run_averages
from tests.train.test_engine import _assert_equal, _final
from train import engine, lock
from train.checkpoint import Checkpoints
from train.config import LoopConfig
from train.engine import Validation
from train.identity import Identity
from train.lock import only_one
from train.log import read_log


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


def _measured(folder: Path) -> dict[int, float]:
    """Step -> held-out loss, as log.jsonl has it; every step must be there once."""
    lines = [(line["step"], line["held_out/loss"]) for line in read_log(folder) if "held_out/loss" in line]
    assert len(dict(lines)) == len(lines), lines
    return dict(lines)


class Measuring(Averages):
    """Averages that does something whenever it is measured."""

    def __init__(self, at: int, do: Callable[[], None]) -> None:
        super().__init__()
        self.at, self.do, self.calls = at, do, 0

    def validate(self, sheets: int) -> Validation:
        self.calls += 1
        if self.calls == self.at:
            self.do()
        return super().validate(sheets)


# ---- signals and kills -----------------------------------------------------------------------------------------------


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [3, 4, 6])
def test_what_sigterm_left_unmeasured_is_measured_by_the_next_start(shards: str, tmp_path: Path, step: int) -> None:
    loop: dict[str, Any] = {"validate_every": 2}
    calm = run_averages(shards, tmp_path / "calm", Averages(), **loop)
    calls = iter(range(1, 100))
    stopped = Averages(hook=lambda: _terminate() if next(calls) == step else None)
    outcome = run_averages(shards, tmp_path / "stopped", stopped, **loop)
    assert (outcome.finished, outcome.stopped, outcome.step) == (False, True, step)  # in the last step, too
    again = run_averages(shards, tmp_path / "stopped", Averages(), **loop)
    assert again.finished and not again.stopped
    assert _measured(tmp_path / "stopped") == _measured(tmp_path / "calm")
    assert again.last == calm.last != calm.first == again.first
    _assert_equal(_final(tmp_path / "stopped"), _final(tmp_path / "calm"))
    assert again.best == calm.best


def test_sigterm_while_measuring_ends_the_run_after_it_and_the_last_measurement_still_finishes_it(
    shards: str, tmp_path: Path
) -> None:
    outcome = run_averages(shards, tmp_path / "a", Measuring(2, _terminate), validate_every=2)
    assert (outcome.finished, outcome.stopped, outcome.step) == (False, True, 2)
    written: list[int] = []
    outcome = run_averages(
        shards, tmp_path / "b", Measuring(2, _terminate), finish=lambda average, step: written.append(step)
    )
    assert (outcome.finished, outcome.stopped, written) == (True, True, [6])  # no next stage is begun


def test_sigterm_while_the_result_is_written_does_not_cut_it_short(shards: str, tmp_path: Path) -> None:
    def finish(average: Any, step: int) -> None:
        _terminate()
        (tmp_path / "result").write_text(str(step))

    outcome = run_averages(shards, tmp_path / "run", Averages(), finish=finish)
    assert (outcome.finished, outcome.stopped) == (True, True) and (tmp_path / "result").read_text() == "6"


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_in(phase: str, shards: str, folder: Path, rank: int) -> None:
    """One start that dies in a phase of a run of 6 steps; in none if phase is ""."""
    finish: Any = lambda average, step: (folder / "result").write_text(str(step))  # noqa: E731
    task: Averages = Averages()
    if phase == "last measurement":
        task = Measuring(4, _die)
    elif phase == "after the last step":
        calls = iter(range(1, 100))
        task = Averages(hook=lambda: _die() if next(calls) == 6 else None)
    elif phase == "before the score is noted":
        Checkpoints.set_score = lambda self, step, score: _die() if step == 6 else None  # type: ignore[method-assign]
    elif phase == "writing the result":
        finish = lambda average, step: _die()  # noqa: E731
    run_averages(shards, folder, task, validate_every=2, finish=finish)


@pytest.mark.parametrize(
    "phase", ["after the last step", "last measurement", "before the score is noted", "writing the result"]
)
def test_a_run_killed_in_any_phase_of_its_end_is_completed_by_the_same_command(
    shards: str, tmp_path: Path, phase: str
) -> None:
    log = tmp_path / "trace"
    (tmp_path / "killed").mkdir()
    (tmp_path / "calm").mkdir()
    assert in_processes(_killed_in, phase, shards, tmp_path / "killed", log=log) == [-signal.SIGKILL]
    assert in_processes(_killed_in, "", shards, tmp_path / "killed", log=log) == [0], log
    assert in_processes(_killed_in, "", shards, tmp_path / "calm", log=log) == [0], log
    _assert_equal(_final(tmp_path / "killed"), _final(tmp_path / "calm"))
    assert _final(tmp_path / "killed").score is not None
    assert _measured(tmp_path / "killed") == _measured(tmp_path / "calm")
    assert (tmp_path / "killed" / "result").read_text() == "6"


# ---- two trainings at once -------------------------------------------------------------------------------------------


def _hold(folder: Path, held: Any) -> None:
    with only_one(folder):
        held.set()
        time.sleep(60)


@contextlib.contextmanager
def _another(folder: Path) -> Any:
    """Another process that trains in the folder."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=_hold, args=(folder, held))
    other.start()
    assert held.wait(60)
    try:
        yield other
    finally:
        other.kill()
        other.join()


def test_a_second_training_in_a_folder_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    with _another(tmp_path) as other:
        refused = pytest.raises(UserError, match=rf"another training works in .* \(process {other.pid} on ")
        with refused, only_one(tmp_path):
            pass
        other.kill()  # as kill -9: it cleans nothing up
        other.join()
        with only_one(tmp_path):
            pass


def test_one_process_cannot_train_twice_in_a_folder_and_forked_workers_do_not_hold_its_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with only_one(tmp_path):
        with pytest.raises(UserError, match=r"this process trains in .* already"), only_one(tmp_path):
            pass
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()  # as a loader worker, which outlives its parent for a while
    try:
        with only_one(tmp_path):
            pass
        with _another(tmp_path):
            pass
    finally:
        worker.kill()
        worker.join()


def test_a_disk_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(38, "Function not implemented")  # as Lustre without the mount option `flock`

    monkeypatch.setattr(lock.fcntl, "lockf", refuses)
    with only_one(tmp_path):
        assert "has no file locks (Function not implemented)" in capsys.readouterr().err


# ---- what may change when a run continues ----------------------------------------------------------------------------


def test_a_finished_run_given_more_steps_at_a_constant_rate_is_a_longer_run(shards: str, tmp_path: Path) -> None:
    loop: dict[str, Any] = {"warmup": 2, "ema": 0.9, "schedule": "constant"}

    def run(name: str, steps: int) -> engine.Outcome:
        identity = Identity(settings={"loop": {"steps": steps, "schedule": "constant"}})
        return run_averages(shards, tmp_path / name, Averages(), identity=identity, steps=steps, **loop)

    run("long", 9)
    assert run("longer", 5).finished and run("longer", 9).finished
    _assert_equal(_final(tmp_path / "longer"), _final(tmp_path / "long"))
    with pytest.raises(UserError, match=r"has 9 steps already, and loop.steps = 7: .*`python -m train export`"):
        run("longer", 7)


def test_more_steps_of_a_falling_rate_are_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    before = {"loop": {"steps": 5, "schedule": "cosine"}}
    now = Identity(settings={"loop": {"steps": 9, "schedule": "cosine"}})
    with pytest.raises(UserError, match=r"made with loop.steps = 5, and now it is 9: .*--warm-start RUN"):
        now.check(before, tmp_path)
    with pytest.raises(UserError, match=r"made with loop.schedule = 'cosine', and now it is 'constant'"):
        Identity(settings={"loop": {"steps": 9, "schedule": "constant"}}).check(before, tmp_path)


@pytest.mark.parametrize(
    ("setting", "free"),
    [
        ("lora.loop.gradient_checkpointing=true", True),
        ("lora.loop.log_every=3", True),
        ("lora.loop.wandb=true", True),
        ("lora.loop.keep=7", True),
        ("data.workers=3", True),
        ("data.memory_gb=0", True),
        ("lora.cuda_graph=true", True),
        ("lora.prompts=['a']", True),
        ("lora.loop.clip=2.0", False),
        ("lora.loop.precision=bf16", False),
        ("lora.noise_offset=0.1", False),
        ("data.flip=0.0", False),
        ("data.window=3", False),
    ],
)
def test_switches_that_change_no_result_may_change_and_all_others_are_named(
    setting: str, free: bool, tmp_path: Path
) -> None:
    plain = ("lora.loop.accumulate=1",)
    made_with = Identity(settings=training.config_of("x", "demo", tmp_path, *plain).identity("lora", 1)).document()
    now = Identity(settings=training.config_of("x", "demo", tmp_path, *plain, setting).identity("lora", 1))
    if free:
        return now.check(made_with, tmp_path)
    name = setting.partition("=")[0].removeprefix("lora.")
    with pytest.raises(UserError, match=rf"made with {name} = "):
        now.check(made_with, tmp_path)


def test_a_setting_that_a_checkpoint_is_too_old_to_know_has_its_default(tmp_path: Path) -> None:
    config = training.config_of("x", "demo", tmp_path)
    identity = Identity(settings=config.identity("lora", 1), defaults=config.defaults("lora"))
    old = identity.document()
    del old["snr_gamma"], old["loop"]["clip"], old["data"]["where"]
    identity.check(old, tmp_path)
    other = training.config_of("x", "demo", tmp_path, "lora.snr_gamma=5.0")
    with pytest.raises(UserError, match=r"made with snr_gamma = 0.0, and now it is 5.0"):
        Identity(settings=other.identity("lora", 1), defaults=config.defaults("lora")).check(old, tmp_path)


# ---- several processes -----------------------------------------------------------------------------------------------


def _logged(shards: str, folder: Path, batch: int, rank: int) -> None:
    run_averages(shards, folder, Averages(), steps=3, batch=batch, log_every=1)


def test_logged_losses_are_means_over_all_processes(shards: str, tmp_path: Path) -> None:
    for name, world, batch in (("one", 1, 4), ("two", 2, 2)):
        assert not any(in_processes(_logged, shards, tmp_path / name, batch, world=world, log=tmp_path / "trace"))
    one, two = (
        [line["train/loss"] for line in read_log(tmp_path / name) if "train/loss" in line] for name in ("one", "two")
    )
    assert len(one) == 3
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-5, atol=0)


def test_no_option_of_training_is_the_beginning_of_one_of_torchrun() -> None:
    from torch.distributed.run import get_args_parser
    from typer.main import get_command

    from train.__main__ import app

    command: Any = get_command(app)
    for name in ("vae", "lora", "both", "base"):
        for option in command.commands[name].params:
            given = [one for one in option.opts if one.startswith("--") and one != "--start"]
            for spelled in given:
                arguments = ["-m", "train", name, spelled, "x"]
                read = get_args_parser().parse_args(["--nproc-per-node", "2", *arguments])
                assert read.training_script_args == [name, spelled, "x"]
    assert {"--warm-start", "--start"} <= set(
        next(p for p in command.commands["lora"].params if p.name == "start").opts
    )


def test_a_checkpoint_says_its_score_after_it_was_saved_without(tmp_path: Path) -> None:
    from train.checkpoint import Checkpoint

    checkpoints = Checkpoints(tmp_path, keep=1)
    empty: dict[str, torch.Tensor] = {}
    for step, score in ((1, 1.0), (2, 0.5), (3, 2.0)):
        one = Checkpoint(step=step, consumed=0, weights=empty, average=empty, optimiser=empty, identity={})
        path = checkpoints.save(one)
        assert json.loads((path / "state.json").read_bytes())["score"] is None
        checkpoints.set_score(step, score)
        assert checkpoints.read(step).score == score
    assert checkpoints.steps() == [2, 3] and checkpoints.best() == 2
    checkpoints.set_score(3, float("nan"))
    assert checkpoints.best() == 2


def test_rates_at_a_constant_schedule_do_not_depend_on_the_steps() -> None:
    rates = [
        [LoopConfig(steps=steps, batch=1, learning_rate=0.1, warmup=3).rate(step) for step in range(10)]
        for steps in (10, 500)
    ]
    assert rates[0] == rates[1] == [0.1 * (i + 1) / 3 for i in range(3)] + [0.1] * 7
