"""What a training says while it runs: TensorBoard, a plain log.jsonl, sheets as PNG, and Weights & Biases if asked."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.core.errors import UserError
from shards.core.storage import Folder

HELD_OUT, TRAINED_ON = "held_out", "trained_on"
"""How figures of held-out samples begin, and those of samples that are trained on, where none are held out."""


class Log:
    """The log of one stage in `folder`: log.jsonl, tensorboard/ and sheets/. What a killed run wrote beyond its checkpoint
    is taken out of log.jsonl and hidden by TensorBoard, so each step is there once."""

    def __init__(
        self,
        folder: Path,
        first_step: int,
        *,
        wandb: bool,
        config: Mapping[str, Any],
        measured_on: str = HELD_OUT,
        measured: bool = True,
    ) -> None:
        """measured_on: HELD_OUT or TRAINED_ON. measured: False if first_step will be measured again."""
        self._measured_on = measured_on
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sheets").mkdir(exist_ok=True)
        self._folder, self._path = folder, folder / "log.jsonl"
        kept = [line for line in read_log(folder) if line["step"] <= first_step] if first_step else []
        if not measured:
            kept = [line for line in kept if line["step"] < first_step or not _figures(line)]
        Folder(folder).write(self._path.name, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with Folder(folder).explained(self._path.name, "write"):
            self._file = self._path.open("a", encoding="utf-8")
            self._board = _tensorboard(folder / "tensorboard", first_step)
        self._wandb = _wandb(folder, config) if wandb else None

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Terms of the loss, the learning rate, ... of one training step."""
        self._write(step, {f"train/{name}": value for name, value in values.items()})

    def validation(
        self, step: int, score: float, metrics: Mapping[str, float], sheets: Mapping[str, Image.Image]
    ) -> None:
        """What was measured, and pictures by name."""
        self._write(step, {f"{self._measured_on}/{name}": value for name, value in {"loss": score, **metrics}.items()})
        for name, picture in sheets.items():
            path = Path("sheets") / f"{name}-{step:08d}.png"
            with Folder(self._folder).explained(str(path), "write"):
                picture.save(self._folder / path)
                if self._board is not None:
                    self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            if self._wandb is not None:
                import wandb

                self._wandb.log({name: wandb.Image(picture)}, step=step)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        with Folder(self._folder).explained(self._path.name, "write"):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                if self._board is not None:
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        with Folder(self._folder).explained(self._path.name, "write"):
            self._file.close()
            if self._board is not None:
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's log.jsonl; a last line that was cut off is left out."""
    path = folder / "log.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def measured_figures(folder: Path) -> list[dict[str, float]]:
    """What was measured on the held-out samples (or, where there are none, on some that are trained on), in order, by name."""
    return [figures for line in read_log(folder) if (figures := _figures(line))]


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The measured figures of a line of the log, by name; {} if it has none."""
    begins = (f"{HELD_OUT}/", f"{TRAINED_ON}/")
    return {name.partition("/")[2]: value for name, value in line.items() if name.startswith(begins)}


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("note: TensorBoard is not installed (run `make setup`); log.jsonl has the same figures", file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def _wandb(folder: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("loop.wandb needs the package wandb: install it, or leave it out") from error
    name = "-".join(folder.parts[-3:])
    return wandb.init(project="ildm", id=name, name=name, resume="allow", dir=str(folder), config=dict(config))
