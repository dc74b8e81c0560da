"""The one training loop of the embedded networks: text to image, estimator, both parts of the detector.

A step is a pure function of (seed, step), so that a run that was stopped continues from its last state as if nothing had
happened. The state and the averaged weights are written by train.demo.state.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from train.demo.state import averaged, follow, load_state, save_state
from train.stop import Stop, Stopped

Terms = Mapping[str, Tensor]
"""The terms of a loss, scalars by name; the loss is their sum."""


@dataclass(frozen=True, kw_only=True)
class SmallLoop:
    """What one training is, apart from its network, optimiser and loss."""

    title: str
    """Of the progress bar and of the printed lines."""
    state: Path
    """The file that resuming needs."""
    settings: Mapping[str, Any]
    """What decides the result (train.demo.state.settings_of), kept in the state; a change is said."""
    steps: int
    rate: Callable[[int], float]
    """The learning rate of a step."""
    ema: float
    """The largest decay of the averaged weights."""
    save_every: int
    """Steps between two states."""
    clip: float | None = 1.0
    """The largest norm of the gradient; None: not clipped."""
    stop_at: int | None = None
    """End, saved, after this step; rates are those of all `steps` nevertheless."""
    autocast: torch.dtype | None = None
    """The number type of the forward pass; None: float32. Weights stay in float32."""
    on_save: Callable[[nn.Module], None] | None = None
    """Called beside each state with a copy of the network that has the averaged weights."""


def run_loop(
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Any]],
    terms_of: Callable[[int, Any], Terms],
    loop: SmallLoop,
) -> None:
    """Minimises the sum of terms_of(step, batch) over the parameters of `net`, which ends with its averaged weights.

    batches: given the first step, the batches from there on, one for each step. Runs in all processes of
    torch.distributed, where it is initialised; gradients are then averaged, and the first process writes.
    Raises Stopped, saved, if the process is asked to stop.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(net.parameters()).device
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions are faster so

    # Continue where an earlier run stopped
    average = averaged(net)
    first = load_state(loop.state, net, average, optimiser, loop.settings)
    last = min(loop.steps, loop.stop_at or loop.steps)

    columns = (TextColumn(loop.title), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, disable=rank > 0) as progress, Stop() as stop:
        task, seen = progress.add_task(loop.title, total=loop.steps, completed=first), list[Terms]()
        for step, batch in zip(range(first, last), batches(first), strict=False):
            for group in optimiser.param_groups:
                group["lr"] = loop.rate(step)

            # Forward and backward
            with torch.autocast(device.type, loop.autocast, enabled=loop.autocast is not None):
                terms = terms_of(step, batch)
                loss = torch.stack(list(terms.values())).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if world > 1:
                _average_gradients(net, world)
            if loop.clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), loop.clip)

            # Update the weights and their average
            optimiser.step()
            follow(average, net, loop.ema, step)
            seen.append({name: term.detach() for name, term in terms.items()})  # numbers would have to be waited for
            progress.advance(task)

            stopped = stop.asked(world, device)
            if (step + 1) % loop.save_every == 0 or step + 1 == last or stopped:
                if rank == 0:
                    progress.print(f"{loop.title} step {step + 1}: {_means(seen)}")
                    if loop.on_save is not None:
                        loop.on_save(with_weights(net, average))  # first: with the last state, nothing is left to do
                    save_state(loop.state, step + 1, net, average, optimiser, loop.settings)
                seen.clear()
            if stopped:
                raise Stopped(f"stopped after step {step + 1} of {loop.title}, saved; the same command continues")

    net.load_state_dict(average)
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def with_weights(net: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with other weights."""
    made = copy.deepcopy(net)
    made.load_state_dict(dict(weights))
    return made.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _means(seen: list[Terms]) -> str:
    """The mean of each term over some steps, for a printed line."""
    return ", ".join(f"{name} {torch.stack([terms[name] for terms in seen]).mean():.4f}" for name in seen[0])


def _average_gradients(net: nn.Module, world: int) -> None:
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient) / world)
