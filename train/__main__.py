"""The command line of training: `python -m train`."""

from pathlib import Path
from typing import Annotated

import typer

from shards import cli

app = cli.new_app("Training. The embedded estimators so far; the intrinsic VAE and the LoRA are still to come.")


@app.callback()
def stages() -> None:
    """Each stage is a command of its own."""


@app.command()
def estimator(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("runs/estimator"),
    scenes: Annotated[Path, typer.Option(help="Where rendered scenes are kept (about 50 MB a chunk).")] = Path(
        "runs/scenes"
    ),
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of 128 rendered scenes to learn from.")] = 96,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 2200,
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = 2,
    debug: cli.DebugOption = False,
) -> None:
    """Trains the network of the estimator set `demo` on the demo world; the defaults made the shipped weights.

    The same command again continues a run that was stopped. Next: `python -m benchmarks.accuracy --weights OUT`.
    """
    from train.estimator import EstimatorTraining, train_estimator

    folder = train_estimator(EstimatorTraining(out=out, scenes=scenes, chunks=chunks, steps=steps, workers=workers))
    print(f"checkpoint: {folder}; measure it with: python -m benchmarks.accuracy --weights {folder}")


if __name__ == "__main__":
    cli.run(app)
