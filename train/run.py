"""Runs stages in turn, and says what came of each."""

import sys
from collections.abc import Callable, Sequence

from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from train.config import TrainConfig
from train.engine import Outcome
from train.lora import train_lora
from train.vae import train_vae

STAGES: dict[str, Callable[[TrainConfig], Outcome]] = {"vae": train_vae, "lora": train_lora}


def run_stages(config: TrainConfig, stages: Sequence[str]) -> None:
    """Runs stages of STAGES, those that are named; a signal ends the run after a saved step, with exit status 0."""
    quiet()
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        outcome = STAGES[stage](config)
        if PartialState().is_main_process:
            _report(config, stage, outcome)
            if outcome.finished and outcome.stopped and following:
                print(f"stopped after {stage} was done; the same command continues with {following}", file=sys.stderr)
        if not outcome.finished or outcome.stopped:
            return


def quiet() -> None:
    """No word of every long caption that a tokenizer cuts, nor of every file that is loaded."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _report(config: TrainConfig, stage: str, outcome: Outcome) -> None:
    if not outcome.finished:
        print(f"stopped after step {outcome.step} of {stage}, saved; the same command continues", file=sys.stderr)
        return
    table = Table(title=f"{stage}, {outcome.step} steps", title_justify="left", box=None, pad_edge=False)
    measured = "held out" if outcome.holds_out else "trained on"
    for column in (measured, "before", "after"):
        table.add_column(column, justify="left" if column == measured else "right")
    for name, value in outcome.last.items():
        before = outcome.first.get(name)
        table.add_row(name, "" if before is None else f"{before:.4f}", f"{value:.4f}")
    console = Console()
    console.print(table)
    console.print(
        f"{outcome.seconds:.0f} s, {outcome.samples_per_s:.1f} samples/s; logs, sheets, checkpoints: ", end=""
    )
    console.print(f"{config.folder / 'training' / stage}", highlight=False)
    if outcome.best not in (None, outcome.step):
        loss = "held-out loss" if outcome.holds_out else "loss of the samples that are trained on"
        console.print(
            f"the {loss} was lowest at step {outcome.best}; its checkpoint is kept, and made a run folder by:"
        )
        console.print(f"python -m train export {config.out} --stage {stage} --out {config.out}-best", highlight=False)
    if stage == "lora":
        prompt = '"a red sphere on a wooden floor"'
        console.print(
            f"next: python -m infer sample --base {config.base} --run {config.out} --prompt {prompt}", highlight=False
        )
    else:
        console.print("next: python -m train lora, with the same options", highlight=False)
