"""The command line: python -m shards verify | stats | show | list | gallery | forget | dedup."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shards.core.cli import DebugOption, new_app, printable, run

if TYPE_CHECKING:
    from shards.sample import Sample

app = new_app(
    "Looks at and looks after datasets of images with depth, normals, segments and line drawings.\n\n"
    "URL is the folder that `python -m extract` wrote, on a disk or in an object store (s3://bucket/name). "
    "It holds plain WebDataset tars: KEY.jpg, KEY.txt, KEY.json, KEY.depth.png and so on.\n\n"
    "Begin with `python -m shards gallery URL` and open the page that it names."
)

Url = Annotated[str, typer.Argument(metavar="URL", help="The dataset: a folder or any fsspec URL.")]


@app.command()
def verify(
    url: Url,
    quick: Annotated[bool, typer.Option("--quick", help="Check marks and sizes, without reading the tars.")] = False,
    debug: DebugOption = False,
) -> None:
    """Checks everything: checksums, members, sizes, counts. Finds any single bit that changed.

    Prints one sentence for each problem, with what to do, and exits with status 1 if there is one.
    """
    from shards.inspect.stats import size
    from shards.inspect.verify import verify as check

    with _bar("verifying") as bar:
        task = bar.add_task("verifying", total=None)
        report = check(url, quick, lambda done, total: bar.update(task, completed=done, total=total))
    for problem in report.problems:
        print(printable(problem))
    if report.problems:
        count = len(report.problems)
        print(f"error: {count} problem{'s' if count > 1 else ''} found in {printable(url)}", file=sys.stderr)
        raise SystemExit(1)
    counts = report.counts
    print(
        f"{url} is whole: {counts['ok']:,} samples in {counts['shards']:,} shards ({size(counts['bytes'])}), "
        f"{sum(counts['failed'].values()):,} failures listed" + (" (tars not read)" if quick else "")
    )


@app.command()
def stats(
    url: Url,
    sample: Annotated[
        int | None, typer.Option(min=0, help="How many samples to decode, spread evenly.", show_default="500")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Shows counts, failures by reason, sizes, captions, quality scores, and distributions of each map."""
    from shards.inspect.stats import show as show_figures
    from shards.inspect.stats import stats as gather

    with _bar("decoding") as bar:
        task = bar.add_task("decoding", total=None)
        figures = gather(url, sample, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        show_figures(figures)


@app.command()
def show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The sample's key.")],
    url: Url,
    save: Annotated[Path | None, typer.Option(help="Write image and maps side by side to this PNG.")] = None,
    size: Annotated[int, typer.Option(min=64, max=2048, help="Longer side of each picture of the PNG.")] = 384,
    debug: DebugOption = False,
) -> None:
    """Prints the caption and metadata of one sample, and with --save a picture of all its maps.

    Next: `python -m shards list --keys URL` shows the keys; `python -m shards gallery URL` shows many samples.
    """
    from shards.dataset import Dataset
    from shards.inspect.display import sheet

    sample = Dataset.open(url, checked=True).read(key)
    print(printable(sample.caption))
    print(_shown(sample))
    for name, data in sample.members.items():
        print(printable(f"{key}.{name}  {len(data):,} bytes"))
    if save is not None:
        from shards.core.storage import Folder

        picture = sheet([(sample.image(), sample.maps(), sample.caption)], size)
        Folder(save.absolute().parent).write(save.name, _png(picture))
        print(f"wrote {save}")


@app.command()
def sheet(
    url: Url,
    save: Annotated[Path, typer.Option(help="The PNG to write.")],
    rows: Annotated[int, typer.Option(min=1, max=100, help="How many samples, the first ones.")] = 6,
    size: Annotated[int, typer.Option(min=64, max=2048, help="Longer side of each picture.")] = 200,
    debug: DebugOption = False,
) -> None:
    """Writes a picture of the first samples: image and maps side by side, captions below."""
    from itertools import islice

    from shards.core.storage import Folder
    from shards.dataset import Dataset
    from shards.inspect.display import sheet as draw

    dataset = Dataset.open(url, checked=True)
    samples = islice((sample for shard in dataset.shard_names() for sample in dataset.samples(shard)), rows)
    picture = draw([(sample.image(), sample.maps(), sample.caption) for sample in samples], size)
    Folder(save.absolute().parent).write(save.name, _png(picture))
    print(f"wrote {save}")


@app.command("list")
def list_(
    url: Url,
    keys: Annotated[bool, typer.Option("--keys", help="List the keys of all samples, one on each line.")] = False,
    failures: Annotated[
        bool, typer.Option("--failures", help="List the failures: key, stage, reason, message.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Lists the shards: name, samples, failures, bytes. With --keys the samples, with --failures what failed and why."""
    from shards.dataset import Dataset

    dataset = Dataset.open(url, checked=True)
    for mark in dataset.marks():
        if keys:
            from shards.inspect.stats import by_place

            print(*map(printable, by_place(mark)), sep="\n", end="\n" if mark["index"] else "")
        elif failures:
            for line in dataset.failures(mark["shard"]):
                print(*(printable(line[name]) for name in ("key", "stage", "reason", "message")), sep="\t")
        else:
            counts = mark["counts"]
            print(mark["shard"], counts["ok"], sum(counts["failed"].values()), mark["tar"]["size"], sep="\t")


@app.command()
def gallery(
    url: Url,
    limit: Annotated[int, typer.Option(min=1, help="Samples on the page, spread evenly over the dataset.")] = 1000,
    size: Annotated[
        int | None,
        typer.Option(min=64, max=1024, help="Longer side of each picture, in pixels.", show_default="by their number"),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Writes URL/gallery.html: one page, without network, with samples, maps, figures and failures."""
    from shards.inspect.gallery import write_gallery

    with _bar("drawing") as bar:
        task = bar.add_task("drawing", total=None)
        address = write_gallery(url, limit, size, lambda done, total: bar.update(task, completed=done, total=total))
    print(address)


@app.command()
def forget(
    url: Url,
    key: Annotated[list[str] | None, typer.Option(help="A sample's key. May be given many times.")] = None,
    image_url: Annotated[
        list[str] | None, typer.Option("--url", help="The URL that a sample came from. May be given many times.")
    ] = None,
    hash_: Annotated[
        list[str] | None, typer.Option("--hash", help="The sha256 or md5 of an image. May be given many times.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Removes samples for good, for instance on a person's request: now, and from every later run into this folder.

    Only the shards concerned are written again. The same command again is harmless.
    A gallery page of the dataset is removed, since it may show them; `python -m shards gallery URL` writes a new one.
    """
    from shards.core.storage import Folder
    from shards.edit.forget import Forgotten
    from shards.edit.forget import forget as remove
    from shards.inspect.gallery import GALLERY

    wanted = Forgotten.of(key or [], image_url or [], hash_ or [])
    with _bar("searching") as bar:
        task = bar.add_task("searching", total=None)
        summary = remove(url, wanted, lambda shard: bar.advance(task))
    folder = Folder(url)
    if folder.exists(GALLERY):
        folder.remove(GALLERY)
        print(f"{GALLERY} removed too; `python -m shards gallery {url}` writes a new one")
    print(f"{summary.samples} samples removed, {summary.shards} shards written again")


@app.command()
def dedup(url: Url, debug: DebugOption = False) -> None:
    """Removes samples whose image is, to the byte, that of an earlier sample of any shard.

    Of equal images the first in the dataset's order stays. Only the shards concerned are written again; removed samples
    are listed like forgotten ones, and do not come back. The same command again is harmless.
    """
    from shards.edit.dedup import dedup as remove

    with _bar("reading") as bar:
        task = bar.add_task("reading", total=None)
        summary = remove(url, lambda shard: bar.advance(task))
    print(f"{summary.samples:,} repeated samples removed; {summary.shards:,} shards written again")


@app.command()
def select(
    url: Url,
    where: Annotated[
        list[str], typer.Option(help="FIELD OPERATOR VALUE, such as 'quality.segments >= 3'. May be given many times.")
    ],
    keep: Annotated[
        str | None,
        typer.Option(help="Keep the answer in this folder, where a training with the same conditions looks."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Counts the samples whose metadata meet all conditions, and those that do not, by reason. Changes nothing.

    FIELD is a path into the samples' json (`python -m shards show KEY URL`), quality.NAME, image.width, image.height,
    image.aspect, or key_share, a number in [0, 1) made of the key.
    """
    from shards.dataset import Dataset
    from shards.stream.select import select as ask

    with _bar("asking") as bar:
        task = bar.add_task("asking", total=None)
        found = ask(
            Dataset.open(url, checked=True),
            where,
            keep=keep,
            progress=lambda done, all_: bar.update(task, completed=done, total=all_),
        )
    dropped = sum(found.dropped.values())
    print(
        f"{len(found.groups) - dropped:,} of {len(found.groups):,} samples meet {' and '.join(map(printable, where))}"
    )
    for reason, count in found.dropped.items():
        print(f"{count:12,}  {printable(reason)}")


def _bar(text: str) -> Progress:
    """A progress bar on stderr, only where a person watches."""
    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _shown(sample: "Sample") -> str:
    """The metadata of a sample, in lines."""
    from shards.sample import SampleError

    try:
        return printable(json.dumps(sample.meta, indent=1), lines=True)
    except RecursionError as error:
        raise SampleError(f"the json of sample {sample.key} is nested too deep to be shown") from error


def _png(picture: object) -> bytes:
    from io import BytesIO

    from PIL import Image

    assert isinstance(picture, Image.Image)
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    run(app)
