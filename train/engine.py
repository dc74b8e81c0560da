"""The training loop of both stages: accumulation, clipping, EMA, checkpoints, exact resume, and what stops a run.

A step is a pure function of the state and of its samples' positions, and the state is all in the checkpoint; so a run that
was killed and resumed gives, on the CPU, bit for bit what an undisturbed one gives.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from shards.core.errors import UserError
from shards.stream.order import Sampler
from train.checkpoint import Checkpoint, Checkpoints, optimiser_tensors, restore_optimiser
from train.config import LoopConfig
from train.data import Batch, Draw, Samples
from train.log import Log, held_out_figures
from train.muon import StackedMuon


@dataclass(frozen=True)
class Validation:
    """What was measured on the held-out samples. score: the loss, by which the best checkpoint is chosen."""

    score: float
    metrics: Mapping[str, float]
    sheets: Mapping[str, Image.Image] = field(default_factory=dict)


Taken = list[tuple[Batch, dict[str, Tensor]]]
"""The batches of a step, with their terms of the loss."""


class Task(Protocol):
    """What is different between the stages."""

    name: str

    @property
    def module(self) -> nn.Module:
        """What several processes share: its parameters that need a gradient are trained."""
        ...

    @property
    def draw(self) -> Draw:
        """All that is random in the losses of the samples at some positions."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]: ...

    def losses(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Terms of the loss by name, each (B,); "loss" is the one that is minimised. batch: with what was drawn for it."""
        ...

    def validate(self, sheets: int) -> Validation:
        """On one process, with the averaged weights in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """finished: False if a signal stopped it. average: the averaged weights. first, last: what was measured on the held-out
    samples before the first step, and last. best: the step with the lowest held-out loss."""

    finished: bool
    step: int
    average: dict[str, Tensor]
    first: Mapping[str, float]
    last: Mapping[str, float]
    best: int | None
    seconds: float
    samples_per_s: float
    skipped: tuple[str, ...] = ()


def make_accelerator() -> Accelerator:
    """One process, or those that torchrun or accelerate launched; gloo on the CPU, NCCL on GPUs."""
    return Accelerator(cpu=not torch.cuda.is_available())


def precision(loop: LoopConfig, device: torch.device) -> torch.dtype:
    """What matrix products are made in; weights that learn are float32 always."""
    if loop.precision == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if loop.precision == "float32" else torch.bfloat16


def train(
    task: Task,
    loop: LoopConfig,
    samples: Samples,
    *,
    accelerator: Accelerator,
    folder: Path,
    identity: Mapping[str, Any],
    seed: int,
) -> Outcome:
    """Runs a stage from its last checkpoint (if any) to loop.steps; checkpoints, logs and sheets go into `folder`.

    identity: the settings that a checkpoint must have been made with. Raises UserError when they differ, when a loss is
    not finite (naming the samples), and when a checkpoint cannot be written.
    """
    identity = json.loads(json.dumps(identity))  # as a checkpoint gives it back: tuples are lists
    trainable = task.trainable()
    parameters = list(trainable.values())
    optimiser = make_optimiser(loop, parameters)
    average = [p.detach().clone() for p in parameters]
    checkpoints = Checkpoints(folder / "checkpoints", loop.keep)
    resumed = checkpoints.load()
    if resumed is not None:
        _check_identity(resumed.identity, identity, checkpoints.folder)
        _copy(trainable, resumed.weights)
        _copy(dict(zip(trainable, average, strict=True)), resumed.average)
        restore_optimiser(optimiser, resumed.optimiser)
    first_step, skipped = (resumed.step, set(resumed.skipped)) if resumed else (0, set[str]())
    world, main = accelerator.num_processes, accelerator.is_main_process
    sampler = Sampler(
        batch=loop.batch,
        rank=accelerator.process_index,
        world=world,
        consumed=resumed.consumed if resumed else 0,
        samples=loop.steps * loop.batch * loop.accumulate * world,
    )
    module = accelerator.prepare_model(task.module)
    amp = precision(loop, accelerator.device)
    log = Log(folder, first_step, wandb=loop.wandb, config=identity) if main else None
    since, seen, began = time.monotonic(), 0, time.monotonic()

    def save(step: int, score: float | None = None) -> None:
        if main:
            checkpoints.save(
                Checkpoint(
                    step=step,
                    consumed=sampler.consumed,
                    weights={name: p.detach() for name, p in trainable.items()},
                    average=dict(zip(trainable, average, strict=True)),
                    optimiser=optimiser_tensors(optimiser),
                    identity=identity,
                    score=score,
                    skipped=tuple(sorted(skipped)),
                )
            )
        accelerator.wait_for_everyone()

    def check(made: tuple[int, Taken, Tensor] | None) -> None:
        """Raises UserError unless the gradient of a step that was made (its norm is the last of the three) is finite."""
        if made is not None and not torch.isfinite(made[2]):
            raise UserError(_not_finite(*made[:2], accelerator, checkpoints))

    def measure(step: int) -> float | None:
        if not main or log is None:
            return None
        with _swapped(parameters, average):
            found = task.validate(loop.sheets)
        log.validation(step, found.score, found.metrics, found.sheets)
        return found.score

    stop = _Stop()
    with _progress(task.name, loop.steps, first_step, shown=main) as progress, stop:
        if first_step == 0 and loop.steps:
            measure(0)
        batches = samples.batches(sampler, task.draw)
        step, unchecked = first_step, None
        while step < loop.steps:
            torch.manual_seed(seed * 1_000_003 + step * world + accelerator.process_index)  # for dropout, if any
            for group in optimiser.param_groups:
                group["lr"] = loop.rate(step)
            taken: Taken = []
            for number in range(loop.accumulate):
                batch = next(batches)
                last = number + 1 == loop.accumulate
                with contextlib.nullcontext() if last else accelerator.no_sync(module):
                    with torch.autocast(accelerator.device.type, amp, enabled=amp != torch.float32):
                        terms = task.losses(module, batch)
                    (terms["loss"].mean() / loop.accumulate).backward()
                taken.append((batch, {name: value.detach() for name, value in terms.items()}))
                skipped.update(entry for sample in batch.samples for entry in sample.skipped)
            norm = nn.utils.clip_grad_norm_(parameters, loop.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            _average(average, parameters, min(loop.ema, (step + 1) / (step + 10)) if loop.ema else 0.0)
            sampler.advance(loop.accumulate)
            check(unchecked)  # asking for a number waits for the GPU, which by now has the next step to work on
            unchecked = (step, taken, norm)
            step += 1
            seen += loop.batch * loop.accumulate * world
            progress.advance(1)
            if log is not None and (step % loop.log_every == 0 or step == loop.steps):
                values = _means(taken)
                progress.say(values)
                speed = seen / max(time.monotonic() - since, 1e-9)
                log.step(step, values | {"grad_norm": float(norm), "rate": loop.rate(step - 1), "samples_per_s": speed})
            stopped = stop.asked(accelerator)
            ends = step == loop.steps
            saves = stopped or ends or step % loop.checkpoint_every == 0 or step % loop.validate_every == 0
            if saves:
                check(unchecked)  # nothing is kept that came of a loss that is not finite
            score = measure(step) if not stopped and (ends or step % loop.validate_every == 0) else None
            if saves:
                save(step, score)
            if stopped and not ends:
                break
    if log is not None:
        log.close()
    for entry in sorted(skipped) if main else ():
        print(f"note: skipped a corrupt sample: {entry}", file=sys.stderr)
    seconds, measured = time.monotonic() - began, held_out_figures(folder)
    return Outcome(
        finished=step >= loop.steps,
        step=step,
        average=dict(zip(trainable, average, strict=True)),
        first=measured[0] if measured else {},
        last=measured[-1] if measured else {},
        best=checkpoints.best(),
        seconds=seconds,
        samples_per_s=seen / seconds,
        skipped=tuple(sorted(skipped)),
    )


def make_optimiser(loop: LoopConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, bitsandbytes' with 8-bit state, or Muon (AdamW for vectors)."""
    if loop.optimiser == "muon":
        group = {"params": list(parameters), "lr": loop.learning_rate}
        return StackedMuon([group], weight_decay=loop.weight_decay, betas=loop.betas, epsilon=loop.epsilon)
    settings: dict[str, Any] = {
        "lr": loop.learning_rate,
        "betas": loop.betas,
        "weight_decay": loop.weight_decay,
        "eps": loop.epsilon,
    }
    if loop.optimiser == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("loop.optimiser adamw8bit needs the package bitsandbytes: install it, or set adamw") from error
    made: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return made


@torch.no_grad()
def _average(average: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    torch._foreach_lerp_(list(average), list(parameters), 1 - decay)


@contextlib.contextmanager
def _swapped(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """For a while other values in the parameters, exactly put back."""
    before = [p.data for p in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data = value


def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    if into.keys() != values.keys():
        odd = sorted(into.keys() ^ values.keys())[0]
        raise UserError(f"the checkpoint is of another network: {odd} is not in both; choose another --out")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(values[name])


def _check_identity(made_with: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    differing = sorted(name for name in {*made_with, *now} if made_with.get(name) != now.get(name))
    for name in differing:
        before, after = made_with.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))[0]
            name, before, after = f"{name}.{inner}", before.get(inner), after.get(inner)
        raise UserError(
            f"{folder} was made with {name} = {before!r}, and now it is {after!r}: "
            "give the same settings to continue, or choose another --out"
        )


def _means(taken: Taken) -> dict[str, float]:
    names = list(taken[0][1])
    return {name: float(torch.stack([terms[name].float().mean() for _, terms in taken]).mean()) for name in names}


def _not_finite(step: int, taken: Taken, accelerator: Accelerator, checkpoints: Checkpoints) -> str:
    """The sentence about a loss that is NaN or infinite, with the keys of the samples that gave it."""
    bad = [
        key
        for batch, terms in taken
        for key, value in zip(batch.keys, terms["loss"].tolist(), strict=True)
        if value != value or abs(value) == float("inf")
    ]
    mine = {"bad": bad, "all": [key for batch, _ in taken for key in batch.keys]}
    every = [mine]
    if accelerator.num_processes > 1:
        every = [mine] * accelerator.num_processes
        torch.distributed.all_gather_object(every, mine)
    keys = [key for one in every for key in one["bad"]]
    what = "the loss is not finite" if keys else "the gradient is not finite, though each loss is"
    keys = keys or [key for one in every for key in one["all"]]
    kept = f"the checkpoint of step {steps[-1]} is kept" if (steps := checkpoints.steps()) else "nothing was saved yet"
    return (
        f"{what} in step {step + 1}, for the samples {', '.join(keys)}: look at them with `python -m shards show`, "
        f"or lower the learning rate; {kept}"
    )


class _Stop:
    """SIGTERM (a preempted job) and SIGINT end the run after the current step, saved; a second SIGINT at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us handles signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all must agree on the step."""
        if accelerator.num_processes == 1:
            return self._asked
        flag = torch.tensor(int(self._asked), device=accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


class _Bar:
    def __init__(self, progress: Progress | None, name: str, steps: int, first: int) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=steps, completed=first, terms="") if progress else None

    def advance(self, steps: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, steps)

    def say(self, values: Mapping[str, float]) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, terms=" ".join(f"{k} {v:.4f}" for k, v in values.items()))


@contextlib.contextmanager
def _progress(name: str, steps: int, first: int, shown: bool) -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if not shown:
        yield _Bar(None, name, steps, first)
        return
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[terms]}")) as progress:
        yield _Bar(progress, name, steps, first)
