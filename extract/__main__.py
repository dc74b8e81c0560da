"""The command line of extraction: `python -m extract DATA`."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shards.core import cli
from shards.core.errors import UsageError

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
    from extract.estimators.listing import show

    show()
    raise typer.Exit


@app.command(no_args_is_help=True)
def main(
    data: Annotated[
        str | None,
        typer.Argument(
            help="A recipe (demo, laion, ...), a .toml of your own, or the data itself: a folder of images, WebDataset tars "
            "('shards/{00000..00099}.tar'), a Hugging Face dataset saved on disk.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Where the dataset goes: a folder or any fsspec URL.", show_default="data/DATA")
    ] = None,
    estimators: Annotated[
        str | None,
        typer.Option(
            help="A set of estimators or one of the table's rows (--list-estimators), a .toml that mixes rows, or a folder "
            "with a checkpoint.",
            show_default="the recipe's",
        ),
    ] = None,
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
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed and may pass (timeouts, 5xx); append it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan: shards, samples, bytes, hours; write nothing.")
    ] = False,
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
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Bring the weights of --estimators onto this machine; extract nothing.")
    ] = False,
    debug: cli.DebugOption = False,
) -> None:
    """Extracts DATA into a dataset of WebDataset shards, on this machine or on a Ray cluster.

    The same command again continues where an earlier one stopped or was killed. Images that cannot be used are counted
    and listed with their reason. Next: `python -m shards stats OUT`.
    """
    from extract.config import load_extract_config, merge, parse_setting
    from extract.estimators.listing import fetch_all, notes
    from extract.estimators.table import find_set

    if fetch:
        if estimators is None:
            raise UsageError("--fetch: say of which set, such as --estimators open; --list-estimators shows them")
        fetch_all(find_set(estimators))
        return
    if data is None:
        raise UsageError("say what to extract: python -m extract DATA, such as demo or a folder; --help shows more")
    from extract.run.run import run

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
    for note in notes(find_set(config.run.estimators), demo=config.source.get("kind") == "demo"):
        Console(stderr=True).print(f"note: {note}", style="yellow", highlight=False)
    if dry_run and retry_failed:
        raise UsageError("--dry-run plans a first attempt; leave --retry-failed out")
    if dry_run:
        from extract.run.plan import make_plan, show

        show(make_plan(config))
        return
    summary = run(config, retry_failed=retry_failed)
    _print_summary(summary)
    if gallery:
        from shards.inspect.gallery import write_gallery

        print(f"gallery: {write_gallery(config.out)}")
    print(f"next:    python -m shards stats {config.out}   |   python -m shards verify {config.out}")


def _print_summary(summary: Any) -> None:
    from extract.reasons import is_passing
    from extract.sources.caption_report import caption_lines

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("dataset", Text(cli.printable(summary.out)))
    stand = summary.stand
    table.add_row("samples", f"{stand.ok} of {stand.inputs} inputs, in {summary.shards} shards")
    for name, reasons in (("left out", stand.dropped), ("failed", stand.failed)):
        for reason, count in reasons.most_common():
            table.add_row(name, Text(cli.printable(f"{count} x {reason}")))
    if passing := sum(count for reason, count in stand.failed.items() if is_passing(reason)):
        table.add_row("", f"{passing} of the failures may pass: --retry-failed tries them again")
    for number, line in enumerate(caption_lines(summary.captions, stand.ok, summary.uncaptioned, summary.passed_over)):
        table.add_row("" if number else "captions", Text(line))
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
