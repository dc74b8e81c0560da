"""The training loop of both stages: accumulation, clipping, EMA, checkpoints, exact resume, and what stops a run.

A step is a pure function of the state and of its samples' positions, and the state is all in the checkpoint; so a run that
was killed and resumed gives, on the CPU, bit for bit what an undisturbed one gives.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from train.identity import Identity
from train.log import HELD_OUT, TRAINED_ON, Log, measured_figures
from train.muon import StackedMuon
from train.stop import Stop
from train.supply import BrokenData, Supply


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
    """finished: False if a signal stopped it before its last step was made and measured. stopped: whether a signal came at all.
    average: the averaged weights. first, last: what was measured on the held-out samples before the first step, and last.
    best: the step with the lowest held-out loss. holds_out: whether samples were held out; if not, some that are trained on
    were measured."""

    finished: bool
    stopped: bool
    step: int
    average: dict[str, Tensor]
    first: Mapping[str, float]
    last: Mapping[str, float]
    best: int | None
    seconds: float
    samples_per_s: float
    holds_out: bool = True
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
    identity: Identity,
    seed: int,
    result: Mapping[str, Any] | None = None,
    finish: Callable[[Mapping[str, Tensor], int], None] = lambda average, step: None,
) -> Outcome:
    """Runs a stage from its last checkpoint (if any) to loop.steps; checkpoints, logs and sheets go into `folder`.

    identity: what a checkpoint must have been made with. result: stored in each checkpoint, what turns its weights into the
    stage's result (train.export). finish: writes that result, on one process, of the averaged weights after the last step; no
    signal cuts it short. Raises UserError when a checkpoint does not fit, when a loss is not finite (naming the samples), and
    when a checkpoint cannot be written.
    """
    addresses, contents = list(samples.urls), samples.contents()
    identity = dataclasses.replace(identity, settings={**identity.settings, "shards": contents})
    document = identity.document()
    trainable = task.trainable()
    parameters = list(trainable.values())
    optimiser = make_optimiser(loop, parameters)
    average = [p.detach().clone() for p in parameters]
    checkpoints = Checkpoints(folder / "checkpoints", loop.keep)
    resumed = checkpoints.load()
    if resumed is not None:
        made_with = dict(resumed.identity)
        if made_with.get("shards") == addresses:  # an older checkpoint, which knows datasets by their addresses
            made_with["shards"] = contents
        identity.check(made_with, checkpoints.folder)
        _check_steps(resumed.step, loop.steps, checkpoints.folder)
        _copy(trainable, resumed.weights)
        _copy(dict(zip(trainable, average, strict=True)), resumed.average)
        restore_optimiser(optimiser, resumed.optimiser)
    first_step = saved = resumed.step if resumed else 0
    world, main = accelerator.num_processes, accelerator.is_main_process
    broken = BrokenData(
        resumed.skipped if resumed else (),
        seen=resumed.consumed // world if resumed else 0,
        epoch=len(samples) // world,
        max_broken=samples.config.max_broken,
    )
    sampler = Sampler(
        batch=loop.batch,
        rank=accelerator.process_index,
        world=world,
        consumed=resumed.consumed if resumed else 0,
        samples=loop.steps * loop.batch * loop.accumulate * world,
    )
    module = accelerator.prepare_model(task.module)
    amp = precision(loop, accelerator.device)
    unmeasured = resumed is not None and resumed.score is None and _is_measured(first_step, loop)
    log = None
    if main:
        _say_what_is_measured(samples)
        on = HELD_OUT if samples.holds_out else TRAINED_ON
        log = Log(folder, first_step, wandb=loop.wandb, config=document, measured_on=on, measured=not unmeasured)
    since, seen, began = time.monotonic(), 0, time.monotonic()

    def save(step: int) -> None:
        nonlocal saved
        saved = step
        if main:
            checkpoints.save(
                Checkpoint(
                    step=step,
                    consumed=sampler.consumed,
                    weights={name: p.detach() for name, p in trainable.items()},
                    average=dict(zip(trainable, average, strict=True)),
                    optimiser=optimiser_tensors(optimiser),
                    identity=document,
                    skipped=broken.entries,
                    result=result or {},
                )
            )
        accelerator.wait_for_everyone()

    def check(made: tuple[int, Taken, Tensor] | None) -> None:
        """Raises UserError unless the gradient of a step that was made (its norm is the last of the three) is finite."""
        if made is not None and not torch.isfinite(made[2]):
            raise UserError(_not_finite(*made[:2], accelerator, checkpoints))

    def measure(step: int) -> None:
        """Measures the averaged weights, and notes the loss in the checkpoint of this step, if there is one."""
        if main and log is not None:
            with _swapped(parameters, average):
                found = task.validate(loop.sheets)
            log.validation(step, found.score, found.metrics, found.sheets)
            checkpoints.set_score(step, found.score)
        accelerator.wait_for_everyone()

    supply = Supply(samples, samples.batches(sampler, task.draw), broken, accelerator)
    stop = Stop(then=supply.interrupt)
    with _progress(task.name, loop.steps, first_step, shown=main) as progress, stop:
        if first_step == 0 or unmeasured:
            measure(first_step)  # what a signal left out is made up for
        measured = unmeasured or (resumed is not None and resumed.score is not None)
        step, unchecked = first_step, None
        while step < loop.steps:
            batches = supply.take(loop.accumulate)
            if batches is None:
                check(unchecked)
                if step > saved:
                    save(step)
                if supply.trouble is not None:
                    raise _ended(supply.trouble, checkpoints) from supply.trouble
                break

            torch.manual_seed(seed * 1_000_003 + step * world + accelerator.process_index)  # for dropout, if any
            for group in optimiser.param_groups:
                group["lr"] = loop.rate(step)
            taken: Taken = []
            for number, batch in enumerate(batches):
                last = number + 1 == loop.accumulate
                with contextlib.nullcontext() if last else accelerator.no_sync(module):
                    with torch.autocast(accelerator.device.type, amp, enabled=amp != torch.float32):
                        terms = task.losses(module, batch)
                    (terms["loss"].mean() / loop.accumulate).backward()
                taken.append((batch, {name: value.detach() for name, value in terms.items()}))
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
            if step % loop.log_every == 0 or step == loop.steps:
                values = _means(taken, accelerator)
                progress.say(values)
                speed = seen / max(time.monotonic() - since, 1e-9)
                if log is not None:
                    values |= {"grad_norm": float(norm), "rate": loop.rate(step - 1), "samples_per_s": speed}
                    log.step(step, values | ({"broken_samples": len(broken)} if len(broken) else {}))

            stopped = stop.asked(world, accelerator.device)
            measured = _is_measured(step, loop) and not stopped
            if stopped or _is_measured(step, loop) or step % loop.checkpoint_every == 0:
                check(unchecked)  # nothing is kept that came of a loss that is not finite
                save(step)
            if measured:
                measure(step)  # after saving: measuring may take longer than a stopped job is given
                stopped = stop.asked(world, accelerator.device)
            if stopped:
                break

        finished = step >= loop.steps and measured
        if log is not None:
            log.close()
        if finished and main:
            finish(dict(zip(trainable, average, strict=True)), step)
        accelerator.wait_for_everyone()
    for file, count in broken.files.most_common() if main else ():
        print(f"note: {count} samples of {file} could not be read", file=sys.stderr)
    seconds, figures = time.monotonic() - began, measured_figures(folder)
    return Outcome(
        finished=finished,
        stopped=stop.asked(world, accelerator.device),
        step=step,
        average=dict(zip(trainable, average, strict=True)),
        first=figures[0] if figures else {},
        last=figures[-1] if figures else {},
        best=checkpoints.best(),
        seconds=seconds,
        samples_per_s=seen / seconds,
        holds_out=samples.holds_out,
        skipped=broken.entries,
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


def _say_what_is_measured(samples: Samples) -> None:
    """A note where nothing is held out: the figures are then not of unseen samples."""
    if samples.holds_out:
        return
    why = f"data.held_out = {samples.config.held_out:g}"
    if samples.config.held_out:
        why = f"none of {len(samples)} samples falls into {why}"
    print(f"note: nothing is held out ({why}): what is measured is trained on, too", file=sys.stderr)


def _is_measured(step: int, loop: LoopConfig) -> bool:
    return step == loop.steps or step % loop.validate_every == 0


def _ended(trouble: UserError, checkpoints: Checkpoints) -> UserError:
    """The error of a run that ended for want of data."""
    steps = checkpoints.steps()
    kept = f"step {steps[-1]} is saved, and the same command continues" if steps else "no step was made yet"
    return UserError(f"{trouble}; {kept}")


def _check_steps(made: int, wanted: int, folder: Path) -> None:
    """Raises UserError when a run has more steps than it shall have: fewer cannot be had by going on."""
    if made > wanted:
        raise UserError(
            f"{folder} has {made} steps already, and loop.steps = {wanted}: give at least as many to continue, or make one "
            "of its checkpoints a run folder with `python -m train export`"
        )


def _means(taken: Taken, accelerator: Accelerator) -> dict[str, float]:
    """The terms of a step's loss, each the mean over the samples of all processes."""
    names = list(taken[0][1])
    mine = {name: float(torch.stack([terms[name].float().mean() for _, terms in taken]).mean()) for name in names}
    if accelerator.num_processes == 1:
        return mine
    every = torch.tensor(list(mine.values()), device=accelerator.device)
    torch.distributed.all_reduce(every)
    return dict(zip(names, (every / accelerator.num_processes).tolist(), strict=True))


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
