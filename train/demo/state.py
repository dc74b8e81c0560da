"""What a simple training loop needs to go on where it stopped: networks, their average and the optimiser, in one file.

Safetensors only, written under a temporary name, synced and renamed: a killed run finds the last whole one.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shards.core.errors import UserError
from train.checkpoint import optimiser_tensors, restore_optimiser

STATE = "training.safetensors"


def averaged(net: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's parameters and buffers, to be moved towards it by `follow`."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@torch.no_grad()
def follow(average: Mapping[str, Tensor], net: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average; the first steps move faster, so that the start is forgotten."""
    decay = min(decay, (step + 1) / (step + 10))
    now = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    torch._foreach_lerp_([average[name] for name in now], list(now.values()), 1 - decay)


def save_state(
    path: Path,
    step: int,
    net: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything that resuming after `step` steps needs. settings: those that decide the result (settings_of)."""
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    state |= {f"average.{name}": tensor for name, tensor in average.items()}
    state |= {f"optimiser.{name}": tensor for name, tensor in optimiser_tensors(optimiser).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    known = {"step": str(step), "optimiser": type(optimiser).__name__, "settings": json.dumps(settings or {})}
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, temporary, known)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def settings_of(config: Any, leave_out: Collection[str]) -> dict[str, Any]:
    """The fields of a recipe that decide the result, as JSON has them. leave_out: those that do not."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in leave_out}
    settings: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return settings


def load_state(
    path: Path,
    net: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Puts back what save_state wrote; returns the step to go on with, 0 if there is no such file.

    Settings that changed since are said on stderr: these recipes may be changed on the way, but not without a word. Raises
    UserError where the file is damaged, or of another network or optimiser.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            known = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"cannot go on from {path}: {error}; remove it to begin anew") from error
    told, own = known.get("optimiser", "an optimiser that it does not name"), type(optimiser).__name__
    if told != own:
        raise UserError(f"cannot go on from {path}: it learned by {told}, not by {own}; remove it to begin anew")
    expected = {f"net.{name}": tensor.shape for name, tensor in net.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items() if name.startswith("net.")}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UserError(f"cannot go on from {path}: it is of another network ({name}); remove it to begin anew")
    net.load_state_dict({name: state[f"net.{name}"] for name in net.state_dict()})
    for name in average:
        average[name].copy_(state[f"average.{name}"])
    kept = {name.removeprefix("optimiser."): state[name] for name in state if name.startswith("optimiser.")}
    restore_optimiser(optimiser, kept)
    _say_changes(path, int(known["step"]), json.loads(known.get("settings", "{}")), settings or {})
    return int(known["step"])


def _say_changes(path: Path, step: int, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            print(
                f"note: {path} was made with {name} = {before[name]!r}; from step {step} on it is {now[name]!r}, so the result "
                "is not that of either alone",
                file=sys.stderr,
            )
