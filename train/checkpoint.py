"""Checkpoints of a training stage: all that resuming needs, written so that a crash leaves the last good one in place.

    checkpoints/step-00001000/weights.safetensors     what is trained
                              average.safetensors     its moving average (EMA)
                              optimiser.safetensors   the optimiser's tensors, "NUMBER.SLOT"
                              state.json              step, position in the data, settings and base, score, what makes
                                                      a result of the weights, digests of the others

A folder gets its name only when it is complete and on the disk. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shards.core.errors import UserError
from shards.core.storage import Folder

STATE = "state.json"
_PARTS = ("weights", "average", "optimiser")
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after `step` optimiser steps. consumed: positions of the stream that were trained on.

    identity: the settings and the base that decide the result (train.identity). score: the held-out loss at this step, if it
    was measured. skipped: corrupt samples that were met. result: what train.export needs beside the averaged weights.
    """

    step: int
    consumed: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    identity: Mapping[str, Any]
    score: float | None = None
    skipped: tuple[str, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as "NUMBER.SLOT" -> tensor.

    A bool, which says by what rule Muon steps a parameter, is found anew.
    """
    return {
        f"{i}.{slot}": torch.as_tensor(value)
        for i, slots in optimiser.state_dict()["state"].items()
        for slot, value in slots.items()
        if not isinstance(value, bool)
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of optimiser_tensors.

    A slot gets the memory layout of its parameter: fused optimisers go through both as they lie in memory.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, slot = name.split(".", 1)
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        slots.setdefault(int(number), {})[slot] = tensor.detach()
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})


class Checkpoints:
    """The checkpoints of one stage in a folder on a disk."""

    def __init__(self, folder: Path, keep: int) -> None:
        """keep: how many of the last ones stay; the best by score stays too."""
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, rising."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for path in self.folder.iterdir() if (m := _NAME.fullmatch(path.name)))

    def save(self, made: Checkpoint) -> Path:
        """Writes a checkpoint and removes what is no longer kept. Raises UserError (disk full, ...); older ones stay."""
        target, temporary = self._path(made.step), self.folder / f".step-{made.step:08d}.tmp"
        self._sweep()
        folder = Folder(temporary)
        digests = {}
        try:
            folder.make()
            for part in _PARTS:
                tensors: Mapping[str, Tensor] = getattr(made, part)
                data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
                folder.write(f"{part}.safetensors", data)
                digests[part] = hashlib.sha256(data).hexdigest()
            names = ("step", "consumed", "identity", "score", "skipped", "result")
            state = {name: getattr(made, name) for name in names}
            folder.write(STATE, json.dumps(state | {"digests": digests}, indent=1, sort_keys=True).encode())
        except UserError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = f"step {steps[-1]} is the last good checkpoint" if (steps := self.steps()) else "there is none yet"
            raise UserError(f"step {made.step} could not be saved; {last}: {error}") from error
        shutil.rmtree(target, ignore_errors=True)
        Folder(self.folder).publish(temporary.name, target.name)
        self._thin_out()
        return target

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, on the CPU; None if there is none at all.

        A damaged one is named on stderr and passed over. Raises UserError if all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._read(step)
            except _Damaged as error:
                print(f"note: {error}; going back to an older checkpoint", file=sys.stderr)
        if steps:
            raise UserError(f"every checkpoint in {self.folder} is damaged; remove that folder to begin anew")
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step, on the CPU. Raises UserError if there is none, or it is damaged."""
        if step not in (steps := self.steps()):
            have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise UserError(f"{self.folder} has no checkpoint of step {step}; {have}")
        try:
            return self._read(step)
        except _Damaged as error:
            raise UserError(f"{error}; choose another checkpoint") from error

    def set_score(self, step: int, score: float) -> None:
        """Notes the held-out loss in a checkpoint that was saved without it; nothing happens if there is none."""
        folder = Folder(self._path(step))
        if not folder.exists(STATE):
            return
        state = json.loads(folder.read(STATE)) | {"score": score}
        folder.write(STATE, json.dumps(state, indent=1, sort_keys=True).encode())
        self._thin_out()

    def best(self) -> int | None:
        """The step with the lowest score."""
        scores = {step: score for step in self.steps() if (score := self._score(step)) is not None}
        return min(scores, key=lambda step: (scores[step], step)) if scores else None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _score(self, step: int) -> float | None:
        try:
            value = json.loads((self._path(step) / STATE).read_bytes())["score"]
        except (OSError, ValueError, KeyError):
            return None
        return None if value is None or not math.isfinite(value) else float(value)

    def _read(self, step: int) -> Checkpoint:
        path = self._path(step)
        try:
            state = json.loads((path / STATE).read_bytes())
            values: dict[str, Any] = {name: state[name] for name in ("step", "consumed", "identity", "score")}
            for part in _PARTS:
                data = (path / f"{part}.safetensors").read_bytes()
                if hashlib.sha256(data).hexdigest() != state["digests"][part]:
                    raise _Damaged(f"{path / part}.safetensors is cut short or damaged")
                values[part] = load(data)
            return Checkpoint(**values, skipped=tuple(state["skipped"]), result=state.get("result", {}))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _Damaged(f"the checkpoint {path} cannot be read ({type(error).__name__}: {error})") from error

    def _thin_out(self) -> None:
        steps, best = self.steps(), self.best()
        for step in steps[: -self.keep]:
            if step != best:
                shutil.rmtree(self._path(step), ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what killed writers left."""
        for path in self.folder.glob(".step-*.tmp") if self.folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)


class _Damaged(Exception):
    """A checkpoint that is not what was written."""
