"""The command line of training: `python -m train`."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.core import cli
from shards.core.errors import UsageError

app = cli.new_app("Training: shards -> intrinsic VAE -> LoRA; and the recipes that made the embedded models.")


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
    """Trains the network of the estimator set `demo` on the demo world.

    The same command again continues a run that was stopped. Next: `python -m benchmarks.accuracy --weights OUT`.
    """
    from train.demo.estimator import EstimatorTraining, train_estimator

    config = EstimatorTraining(out=out, scenes=scenes, chunks=chunks, steps=steps, workers=workers)
    with _stopping():
        folder = train_estimator(config)
    print(f"checkpoint: {folder}; measure it with: python -m benchmarks.accuracy --weights {folder}")


@app.command()
def base(
    shards: Annotated[str, typer.Option(help="Shards of `train scenes`.")] = "runs/truth",
    out: Annotated[Path, typer.Option(help="Where checkpoints and the finished pipeline go.")] = Path("runs/base"),
    pretrained: Annotated[
        str | None, typer.Option(help="Learn on from this pipeline of `train base`; demo is the embedded one.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Take the VAE of this pipeline, and train the rest.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of text to image.")] = 5_900,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of such a step.")] = 128,
    rate: Annotated[float, typer.Option(help="Its learning rate.")] = 2.5e-3,
    architecture: Annotated[
        str, typer.Option(help="Latents and networks: 8x8, that of the embedded base, or 16x16.", show_default="8x8")
    ] = "8x8",
    vae_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the VAE, 8 pictures each.")] = 30_000,
    stop_at: Annotated[
        int | None,
        typer.Option(min=1, help="End after this step with a pipeline; without it the same command continues."),
    ] = None,
    twins: Annotated[
        float, typer.Option(help="Fraction of steps in which self-attention reads a second, noised copy of each image.")
    ] = 0.0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="On a CPU: fuse the U-Net's kernels; needs a C++ compiler, and minutes first."),
    ] = False,
    debug: cli.DebugOption = False,
) -> None:
    """Trains the embedded base on the demo world: a Stable Diffusion pipeline of 64 px.

    The same command again continues. Next: `python -m infer sample --base OUT/pipeline`, or `train vae --base OUT/pipeline`.
    """
    from infer.embedded import resolve
    from train.demo.text_to_image import BaseTraining, train_base

    if pretrained and vae:
        raise UsageError("--pretrained brings its own VAE: leave --vae out")
    begin, keep = (Path(resolve(given, "base")) if given else None for given in (pretrained, vae))
    amount: dict[str, Any] = {"steps": steps, "batch": batch, "rate": rate, "save_every": save_every}
    amount |= {"architecture": architecture, "vae_steps": vae_steps, "stop_at": stop_at, "twins": twins}
    config = BaseTraining(shards=shards, out=out, pretrained=begin, vae=keep, compile=compile, **amount)
    with _stopping():
        folder = train_base(config)
    print(f"base: {folder}; train the method on it with: python -m train vae --shards {shards} --base {folder}")


@app.command()
def detector(
    shards: Annotated[str, typer.Option(help="Shards of `train scenes`.")] = "runs/truth",
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("runs/detector"),
    debug: cli.DebugOption = False,
) -> None:
    """Trains the detector of the demo world, which judges generated images; about an hour of one core.

    The same command again continues. Next: `python -m infer evaluate --detector OUT`.
    """
    from train.demo.crop_nets import CloseTraining, train_close
    from train.demo.pixel_net import DetectorTraining, train_detector

    with _stopping():
        train_detector(DetectorTraining(shards=shards, out=out))
        for name in ("things", "pairs"):
            train_close(name, CloseTraining(shards=shards, out=out))
    print(f"checkpoint: {out}; use it with: python -m infer evaluate --detector {out}")


@app.command()
def scenes(
    out: Annotated[str, typer.Option(help="Where the shards go, any fsspec URL.")] = "runs/truth",
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 20_000,
    first: Annotated[int, typer.Option(min=0, help="The first scene's number.")] = 0,
    named: Annotated[bool, typer.Option("--named", help="Only scenes whose captions name all that is there.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The world's seed.")] = 1,
    size: Annotated[int, typer.Option(min=8, help="Pixels of a side.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = 2,
    debug: cli.DebugOption = False,
) -> None:
    """Renders demo-world scenes with their exact maps into shards: what the embedded models learned from.

    The same command again continues. Next: `python -m train base --shards OUT`, or `train vae`.
    """
    from rich.progress import Progress

    from train.demo.ground_truth import TruthSettings, write_truth

    with Progress() as progress:
        task = progress.add_task("rendering scenes", total=count)
        settings = TruthSettings(seed=seed, first=first, count=count, named=named, size_px=size)
        totals = write_truth(out, settings, workers, lambda done: progress.advance(task, done))
    print(f"{totals['ok']} scenes in {out}; look at them with: python -m shards gallery {out}")


Shards = Annotated[list[str], typer.Option("--shards", help="A dataset: a folder or any fsspec URL; may be repeated.")]
Base = Annotated[str | None, typer.Option(help="demo, a diffusers folder, or a hub id.", show_default="the recipe's")]
Out = Annotated[str | None, typer.Option(help="The run folder.", show_default="runs/RECIPE")]
Start = Annotated[
    str | None,
    typer.Option(
        "--warm-start",
        "--start",  # the older name, which torchrun takes for the beginning of its own --start-method
        help="Start from this run of the same base; demo is the embedded one; '' trains from scratch.",
        show_default="the recipe's",
    ),
]
OtherWeights = Annotated[
    bool, typer.Option("--other-weights", help="--warm-start may be of another model of the base's architecture.")
]
Recipe = Annotated[str, typer.Option(help="demo, sd21-paper, sdxl, pixart-alpha, or a .toml of your own.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting of the recipe: TABLE.KEY=VALUE, such as lora.loop.steps=500."),
]


@app.command()
def vae(
    shards: Shards,
    base: Base = None,
    out: Out = None,
    start: Start = None,
    other_weights: OtherWeights = False,
    recipe: Recipe = "demo",
    settings: Settings = None,
    debug: cli.DebugOption = False,
) -> None:
    """Stage 1: the intrinsic VAE, from the base's own VAE. The same command again continues.

    Next: `python -m train lora` with the same options.
    """
    _train(("vae",), shards, base, out, start, other_weights, recipe, settings)


@app.command()
def lora(
    shards: Shards,
    base: Base = None,
    out: Out = None,
    start: Start = None,
    other_weights: OtherWeights = False,
    recipe: Recipe = "demo",
    settings: Settings = None,
    debug: cli.DebugOption = False,
) -> None:
    """Stage 2: the LoRA of the intrinsic stream, with the VAE of stage 1. The same command again continues.

    Next: `python -m infer sample --base BASE --run OUT --prompt "..."`.
    """
    _train(("lora",), shards, base, out, start, other_weights, recipe, settings)


@app.command()
def both(
    shards: Shards,
    base: Base = None,
    out: Out = None,
    start: Start = None,
    other_weights: OtherWeights = False,
    recipe: Recipe = "demo",
    settings: Settings = None,
    debug: cli.DebugOption = False,
) -> None:
    """Stage 1, then stage 2: what `make train` runs. The same command again continues."""
    _train(("vae", "lora"), shards, base, out, start, other_weights, recipe, settings)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run folder of a training (its --out).")],
    out: Annotated[Path, typer.Option(help="Where the run folder of the checkpoint goes.")],
    checkpoint: Annotated[str, typer.Option(help="best (by held-out loss), last, or a step.")] = "best",
    stage: Annotated[str, typer.Option(help="lora: a run folder; vae: the intrinsic VAE of stage 1 alone.")] = "lora",
    debug: cli.DebugOption = False,
) -> None:
    """Makes a run folder of a checkpoint, at any time of the training.

    Next: `python -m infer sample --run OUT`; of stage 1: `python -m train lora --out OUT`.
    """
    from train.export import export as export_checkpoint

    if stage not in ("vae", "lora"):
        raise UsageError(f"--stage {stage}: give lora or vae")
    done = export_checkpoint(run, stage="vae" if stage == "vae" else "lora", checkpoint=checkpoint, out=out)
    loss = "" if done.score is None else f", held-out loss {done.score:.4f}"
    print(f"{out}: step {done.step} of {stage}{loss}")


@app.command()
def cache(
    shards: Annotated[str, typer.Option(help="A dataset of `python -m extract`: a folder or any fsspec URL.")],
    base: Annotated[str, typer.Option(help="demo, a diffusers folder, or a hub id.")],
    vae: Annotated[str | None, typer.Option(help="The intrinsic VAE: RUN/vae. Only latents need it.")] = None,
    out: Annotated[str | None, typer.Option(help="Where the dataset with caches goes.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Add the caches to the shards themselves.")] = False,
    only: Annotated[str, typer.Option(help="What is cached: latents, text.")] = "latents,text",
    size: Annotated[int, typer.Option(min=8, help="Side in pixels of the square that is trained on.")] = 512,
    flips: Annotated[bool, typer.Option(help="Latents of the mirrored pictures, too.")] = True,
    dtype: Annotated[str, typer.Option(help="How values are stored: float16, bfloat16, float32.")] = "float16",
    batch: Annotated[int, typer.Option(min=1, help="Pictures that are encoded together.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 for one per core or GPU.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gpus_per_worker: Annotated[float, typer.Option(help="May be a fraction.")] = 1.0,
    address: Annotated[str, typer.Option(help="Ray: local, auto, or HOST:PORT.")] = "local",
    debug: cli.DebugOption = False,
) -> None:
    """Adds latents of images and intrinsics and the text encoders' outputs to shards, so that training need not make them.

    The same command again continues. Caches that do not fit a training are refused by it, never used.
    """
    from shards.core.config import load_config
    from train.cache.make_shard import CacheConfig
    from train.cache.run import make_caches

    if in_place == (out is not None):
        raise UsageError("give either --out, a folder for the dataset with caches, or --in-place")
    given: dict[str, Any] = {
        "shards": shards,
        "base": base,
        "vae": vae,
        "out": out,
        "size_px": size,
        "flips": flips,
        "dtype": dtype,
    }
    given |= {"batch": batch, "workers": workers, "device": device, "gpus_per_worker": gpus_per_worker}
    given |= {"address": address, "only": [name.strip() for name in only.split(",") if name.strip()]}
    done = make_caches(load_config(CacheConfig, given))
    print(f"{done.out}: {done.ok:,} samples with caches ({only}); {done.made} of {done.shards} shards made now")


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Ends the command with exit status 0 once a training stopped because it was asked to."""
    from train.stop import Stopped

    try:
        yield
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(0) from stopped


def _train(
    stages: tuple[str, ...],
    shards: list[str],
    base: str | None,
    out: str | None,
    start: str | None,
    other_weights: bool,
    recipe: str,
    settings: list[str] | None,
) -> None:
    from train.config import load_train_config
    from train.run import run_stages

    given: dict[str, Any] = {"base": base, "shards": shards, "out": out, "start": start, "other_weights": other_weights}
    config = load_train_config(recipe, **given, settings=settings or ())
    run_stages(config, stages)


if __name__ == "__main__":
    cli.run(app)
