"""The command line of extraction: `python -m extract DATA`."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shards import cli
from shards.errors import UsageError

app = cli.new_app("Image-text data -> shards with depth, normals, segmentation and line drawing.")


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--max-failed {text}: give a percentage such as 10%, or a share such as 0.1") from None


def _list_estimators(value: bool) -> None:
    if not value:
        return
    from extract.estimators.table import ROWS, SETS

    table = Table(title="Estimators", title_justify="left")
    for column in ("row", "yields", "licence", "what", "in the sets"):
        table.add_column(column, overflow="fold")
    for row in ROWS.values():
        sets = [chosen.name for chosen in SETS.values() if row.name in chosen.rows.values()]
        table.add_row(row.name, ", ".join(row.yields), row.licence, row.what, ", ".join(sets))
    Console().print(table)
    raise typer.Exit


@app.command(no_args_is_help=True)
def main(
    data: Annotated[
        str,
        typer.Argument(
            help="A recipe (demo, laion, ...), a .toml of your own, or the data itself: a folder of images, WebDataset tars "
            "('shards/{00000..00099}.tar'), a Hugging Face dataset saved on disk."
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help="Where the dataset goes: a folder or any fsspec URL.", show_default="data/DATA")
    ] = None,
    estimators: Annotated[str | None, typer.Option(help="The set of estimators.", show_default="the recipe's")] = None,
    only: Annotated[str | None, typer.Option(help="Make only these maps, such as depth,line; keep the others.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first N inputs.")] = None,
    size: Annotated[int | None, typer.Option(help="Shorter side in pixels, at most.", show_default="512")] = None,
    crop: Annotated[str | None, typer.Option(help="none, or center: the largest square.", show_default="none")] = None,
    format: Annotated[str | None, typer.Option(help="jpg, png or webp.", show_default="jpg")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Inputs per shard.", show_default="1000")] = None,
    workers: Annotated[int | None, typer.Option(help="Workers.", show_default="one per core or GPU share")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Decoding threads of a worker.", show_default="2, more beside a GPU")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="GPU share of a worker.", show_default="1")] = None,
    address: Annotated[
        str | None, typer.Option(help="local: this machine; auto or HOST:PORT: a Ray cluster.", show_default="local")
    ] = None,
    max_failed: Annotated[
        str | None, typer.Option(help="Exit with status 3 if more inputs fail.", show_default="10%")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of the recipe: TABLE.KEY=VALUE, such as source.tables=/my/folder."),
    ] = None,
    gallery: Annotated[bool, typer.Option(help="Write gallery.html when done.")] = True,
    list_estimators: Annotated[
        bool,
        typer.Option(
            "--list-estimators", help="Show the table of estimators.", callback=_list_estimators, is_eager=True
        ),
    ] = False,
    debug: cli.DebugOption = False,
) -> None:
    """Extracts DATA into a dataset of WebDataset shards, on this machine or on a Ray cluster.

    The same command again continues where an earlier one stopped or was killed. Images that cannot be used are counted
    and listed with their reason. Next: `python -m shards stats OUT`.
    """
    from extract.config import load_extract_config, merge, parse_setting
    from extract.estimators.table import find_set
    from extract.run import run

    options: dict[str, dict[str, Any]] = {
        "image": {"size_px": size, "crop": crop, "format": format},
        "run": {
            "estimators": estimators,
            "only": only.split(",") if only else None,
            "limit": limit,
            "shard_size": shard_size,
            "workers": workers,
            "threads": threads,
            "device": device,
            "gpus_per_worker": gpus_per_worker,
            "address": address,
            "max_failed": _share(max_failed),
        },
    }
    for setting in settings or ():
        options = merge(options, parse_setting(setting))
    config = load_extract_config(data, out, options)
    note = find_set(config.run.estimators).note
    if note and config.source.get("kind") != "demo":
        Console(stderr=True).print(f"note: {note}", style="yellow", highlight=False)
    summary = run(config)
    _print_summary(summary)
    if gallery:
        from shards.gallery import write_gallery

        print(f"gallery: {write_gallery(config.out)}")
    print(f"next:    python -m shards stats {config.out}   |   python -m shards verify {config.out}")


def _print_summary(summary: Any) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("dataset", summary.out)
    table.add_row("samples", f"{summary.ok} of {summary.samples_in} inputs, in {summary.shards} shards")
    for reason, count in summary.failed.most_common():
        table.add_row("failed", f"{count} x {reason}")
    if summary.made:
        speed = summary.made / summary.seconds
        table.add_row("this run", f"{summary.made} inputs in {summary.seconds:.1f} s ({speed:.1f}/s)")
        stages = ", ".join(f"{name.removesuffix('_s')} {value:.1f} s" for name, value in summary.stages.items())
        table.add_row("workers' time", stages)
    else:
        table.add_row("this run", "nothing to do: the dataset was complete")
    Console().print(table)


if __name__ == "__main__":
    cli.run(app)
