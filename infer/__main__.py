"""Command line of the model: sample images with their intrinsics; look at schedules; measure and compare."""

import re
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from infer.embedded import resolve, usual_guidance
from shards.core.cli import DebugOption, new_app, run
from shards.core.errors import UsageError

app = new_app(
    """The model: images together with their depth, normals, segmentation and line drawing.

    sample    prompts -> pictures and maps      schedule    show w(l, t), how much the image takes from the intrinsics
    evaluate  methods over many prompts -> a table with confidence intervals
    """
)


DEMO_PROMPT = "a red sphere left of a blue cube on a wooden floor"

# Options that drawing and evaluating share
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16.", show_default="bfloat16 on a GPU, else float32")
]
OtherWeightsOption = Annotated[
    bool, typer.Option("--other-weights", help="The base is a fine-tuned variant of the run's base.")
]
VariantOption = Annotated[str | None, typer.Option(help="Of the base's weights, as in fp16.", show_default="plain")]
BaseConfigOption = Annotated[
    str | None, typer.Option(help="For a base in one file: a diffusers folder of its kind.", show_default="the hub's")
]
EmbeddingOption = Annotated[
    list[str] | None, typer.Option(help="A textual inversion, FILE or TOKEN=FILE; may be given several times.")
]


@app.command()
def sample(
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt a line.")] = None,
    base: Annotated[str, typer.Option(help="demo, a diffusers folder, a .safetensors file, or a hub id.")] = "demo",
    run_: Annotated[str, typer.Option("--run", help="The run folder trained for that base.")] = "demo",
    out: Annotated[str, typer.Option(help="Where to write; with --shards any fsspec URL.")] = "samples",
    schedule: Annotated[
        str, typer.Option(help="gaussian, drop, joint, off; settings as in drop:tau=800; or a table's file.")
    ] = "gaussian",
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    num: Annotated[int, typer.Option(min=1, help="Images per prompt: seeds SEED, SEED+1, ...")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 turns it off.", show_default="7.5, the paper's; for demo 4.5"),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels: 768, or WIDTHxHEIGHT.", show_default="the base's own")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, euler-a, dpm++, unipc, ...", show_default="the base's own")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="The base model's image of the same seed beside.")] = False,
    shares: Annotated[bool, typer.Option("--shares", help="How much each layer attends to the intrinsics.")] = False,
    intrinsics: Annotated[bool, typer.Option(help="Write the maps, too. Without them sampling is faster.")] = True,
    image: Annotated[
        Path | None, typer.Option(help="A known picture: make its maps (or, with --mask, repaint it).")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="White where the picture is to be repainted.")] = None,
    given: Annotated[
        str | None, typer.Option(help="Known maps, OUT/KEY of a written sample: make a picture of them.")
    ] = None,
    given_maps: Annotated[str, typer.Option(help="Only these of them, as in depth,line.", show_default="all")] = "",
    mask_maps: Annotated[Path | None, typer.Option(help="White where the given maps are to be made anew.")] = None,
    hold: Annotated[
        str | None,
        typer.Option(
            help="How the network sees what is given: clean, or noised as the rest.",
            show_default="as the run was trained",
        ),
    ] = None,
    shards: Annotated[bool, typer.Option("--shards", help="Write a dataset of WebDataset shards.")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 1000,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...", show_default="a GPU if there is one")] = None,
    dtype: DtypeOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that are made at once.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers, a GPU each where there are GPUs.")] = 1,
    address: Annotated[str, typer.Option(help="The Ray cluster: local, auto, or HOST:PORT.")] = "local",
    other_weights: OtherWeightsOption = False,
    variant: VariantOption = None,
    base_config: BaseConfigOption = None,
    embedding: EmbeddingOption = None,
    debug: DebugOption = False,
) -> None:
    """Draws images together with their intrinsics.

    For each prompt and seed: KEY.png, KEY.depth.png, KEY.normal.png, KEY.segmentation.png, KEY.line.png, KEY.sheet.png
    (all side by side) and KEY.json, which holds everything needed to repeat it. What is there already is not made again.

    Next: look at the sheets; `python -m infer sample --schedule drop` to compare; `python -m shards gallery OUT` for shards.
    """
    default = [""] if image is not None or given is not None else [DEMO_PROMPT] if base == "demo" else []
    asked = _prompts(prompt, prompts) or default
    if not asked:
        raise UsageError('there is nothing to draw; pass --prompt "TEXT" or --prompts FILE')
    resolve(base, "base")
    if base == "demo":
        _say_unknown_words(asked)

    from infer.jobs import Request, jobs_for
    from infer.outputs import maker
    from infer.run_folder import load_manifest

    request = Request(
        base=base,
        run=run_,
        negative=negative,
        size=_size(size),
        steps=steps,
        guidance=usual_guidance(base) if guidance is None else guidance,
        schedule=schedule,
        scheduler=scheduler,
        intrinsics=intrinsics,
        compare=compare,
        shares=shares,
        image=_text(image),
        repaint=_text(mask),
        given=given,
        given_maps=tuple(name.strip() for name in given_maps.split(",") if name.strip()),
        repaint_maps=_text(mask_maps),
        hold=hold,  # type: ignore[arg-type]  # checked by Request
        device=device,
        dtype=dtype,
        other_weights=other_weights,
        variant=variant,
        base_config=base_config,
        embeddings=tuple(embedding or ()),
    )
    manifest = load_manifest(resolve(run_, "run"))
    jobs = jobs_for(request, maker(manifest)["id"], asked, range(seed, seed + num))
    _make(request, manifest, jobs, out, shards, shard_size, {"batch": batch, "workers": workers, "address": address})


def _say_unknown_words(prompts: list[str]) -> None:
    """The embedded base knows the captions of the demo world and nothing else."""
    from extract.world.vocabulary import words

    known = set(words())
    unknown = sorted({word for text in prompts for word in re.findall(r"[a-z]+", text.lower())} - known)
    if unknown:
        print(
            f"note: the base demo does not know {', '.join(unknown)}; its {len(known)} words are {', '.join(words())}",
            file=sys.stderr,
        )


def _make(
    request: Any, manifest: Any, jobs: list[Any], out: str, shards: bool, shard_size: int, how: dict[str, Any]
) -> None:
    """Paints and writes the jobs, with a progress bar on stderr and a summary on stdout."""
    from infer.dataset import write_dataset
    from infer.jobs import sample_all
    from infer.outputs import is_written, write_sample
    from shards.core.storage import Folder

    started = perf_counter()
    with Progress(
        SpinnerColumn(), TextColumn("sampling"), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("sampling", total=len(jobs))
        if shards:
            count = write_dataset(
                out,
                request,
                manifest,
                jobs,
                lambda part: sample_all(request, part, **how) if part else (),
                shard_size=shard_size,
                progress=lambda done: bar.advance(task, done),
            )
        else:
            folder = Folder(out)
            folder.make()
            wanted = {"compare": request.compare, "shares": request.shares}
            todo = [job for job in jobs if not is_written(folder, job.key, **wanted)]
            bar.advance(task, len(jobs) - len(todo))
            for painted in sample_all(request, todo, **how) if todo else ():
                write_sample(folder, painted.key, painted.members | painted.extras)
                bar.advance(task)
            count = len(todo)
    took = perf_counter() - started
    before = f", {len(jobs) - count} were there already" if len(jobs) > count else ""
    print(f"{count} made in {took:.1f} s{before}; all {len(jobs)} are in {out}")
    if len(jobs) <= 8 and not shards:
        for job in jobs:
            print(f"  {job.key}")


@app.command()
def schedule(
    name: Annotated[
        str, typer.Argument(help="gaussian, drop, joint, off; with settings; or a table's file.")
    ] = "gaussian",
    stages: Annotated[str, typer.Option(help="Of which kind of base: a name in infer/model/stages.toml.")] = "unet4",
    plot: Annotated[Path | None, typer.Option(help="Draw it into this .svg or .png, too.")] = None,
    debug: DebugOption = False,
) -> None:
    """Shows w(l, t): a line for each timestep, from noise to image, and a column for each stage of the network."""
    from infer.model.schedules import grid_text
    from infer.model.stages import stage_maps
    from infer.schedule_plot import plot_schedules

    maps = stage_maps()
    if stages not in maps:
        raise UsageError(f"there is no stage map {stages!r}; choose one of {', '.join(maps)}")
    chosen = maps[stages].schedule(name)
    print(grid_text(chosen, maps[stages].stages))
    if plot is not None:
        plot_schedules({name: chosen}, maps[stages].stages, plot)


@app.command()
def evaluate(
    base: Annotated[str, typer.Option(help="demo, a diffusers folder, a .safetensors file, or a hub id.")] = "demo",
    run_: Annotated[str, typer.Option("--run", help="The run folder trained for that base.")] = "demo",
    out: Annotated[str, typer.Option(help="Where images, scores and the table go.")] = "evaluation",
    methods: Annotated[
        str, typer.Option(help="base, base-2x (twice the steps), or schedules with settings, as in drop:tau=800.")
    ] = "base,base-2x,drop,gaussian,joint",
    oracle_intrinsics: Annotated[
        bool,
        typer.Option(
            "--oracle-intrinsics",
            help="Also the method oracle-joint: the scenes' exact maps given in every step, an upper bound of any schedule.",
        ),
    ] = False,
    hold: Annotated[
        str | None,
        typer.Option(help="How the oracle's maps are held, as of sample.", show_default="as the run was trained"),
    ] = None,
    search: Annotated[
        Path | None,
        typer.Option(help="A .toml grid of schedule settings in place of --methods; see docs/evaluation.md."),
    ] = None,
    captions: Annotated[int, typer.Option(min=2, help="How many prompts of the set.")] = 1000,
    set_: Annotated[
        str | None,
        typer.Option("--set", help="demo, depth, multi, parti.", show_default="demo, or the file of --prompts"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file, one prompt a line; for parti, PartiPrompts.tsv.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images per prompt and method.")] = 3,
    map_seeds: Annotated[int, typer.Option(min=0, help="For how many of the seeds the maps are made, too.")] = 1,
    seed: Annotated[
        int, typer.Option(help="The first prompt's first seed; those of the next ones are 1000 apart.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float | None, typer.Option(help="As of sample.", show_default="7.5; for demo 4.5")] = None,
    scheduler: Annotated[str | None, typer.Option(help="As of sample.", show_default="the base's own")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, or WIDTHxHEIGHT.", show_default="the base's own")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that are made at once.")] = 32,
    estimators: Annotated[str, typer.Option(help="The set that judges the maps; none for no agreement.")] = "demo",
    reference: Annotated[
        int, typer.Option(min=2, help="Renderings that the demo world's fidelity is held against.")
    ] = 1000,
    detector: Annotated[Path | None, typer.Option(help="A detector's folder.", show_default="the shipped one")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP score and CMMD: a CLIPModel, folder or hub id.")] = None,
    hps: Annotated[str | None, typer.Option(help="HPSv2: its model as a CLIPModel, folder or hub id.")] = None,
    image_reward: Annotated[str | None, typer.Option(help="ImageReward: the folder that holds its checkpoint.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...", show_default="a GPU if there is one")] = None,
    dtype: DtypeOption = None,
    other_weights: OtherWeightsOption = False,
    variant: VariantOption = None,
    base_config: BaseConfigOption = None,
    embedding: EmbeddingOption = None,
    debug: DebugOption = False,
) -> None:
    """Draws every prompt with every method and seed, measures the images, and compares the methods with the base.

    For captions of the demo world: layout, plausibility, agreement of the maps, FID and CMMD; for other prompts: agreement
    and the hub's models that are given. Writes table.md, table.json and sheet.png; what is there is not made again.

    Next: look at OUT/table.md; docs/evaluation.md says what the columns mean.
    """
    resolve(base, "base")
    resolve(run_, "run")

    from infer.evaluation.command import Told, judges_of, summary
    from infer.evaluation.generate import EvaluationOptions, parse_methods
    from infer.evaluation.run import Evaluation, search_methods
    from infer.evaluation.run import evaluate as carry_out
    from infer.evaluation.sets import prompt_set

    chosen = search_methods(search) if search else parse_methods(methods)
    if oracle_intrinsics:
        chosen += tuple(oracle for oracle in parse_methods("oracle-joint") if oracle not in chosen)
    evaluation = Evaluation(
        drawing=EvaluationOptions(
            base=base,
            run=run_,
            steps=steps,
            guidance=usual_guidance(base) if guidance is None else guidance,
            scheduler=scheduler,
            size=_size(size),
            seed=seed,
            seeds=seeds,
            map_seeds=map_seeds,
            batch=batch,
            hold=hold,  # type: ignore[arg-type]  # checked by EvaluationOptions
            device=device,
            dtype=dtype,
            other_weights=other_weights,
            variant=variant,
            base_config=base_config,
            embeddings=tuple(embedding or ()),
        ),
        methods=chosen,
        prompts=prompt_set(set_ or ("file" if prompts else "demo"), captions, prompts),
        estimators="" if estimators == "none" else estimators,
        reference=reference,
        detector=detector,
    )
    judges = judges_of(clip=clip, hps=hps, image_reward=image_reward, device=device)
    started = perf_counter()
    with Told() as told:
        outcome = carry_out(evaluation, out, judges, told)
    print(summary(outcome, evaluation, perf_counter() - started))


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line and of the file, without blank ones."""
    lines = list(given or [])
    if file is not None:
        try:
            lines += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the prompts in {file}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "768" or "WIDTHxHEIGHT"."""
    if text is None:
        return None
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise UsageError(f"--size {text} is neither a number of pixels nor WIDTHxHEIGHT")
    return sides[-1], sides[0]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


if __name__ == "__main__":
    run(app)
