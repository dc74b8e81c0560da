"""One self-contained HTML page that shows a dataset: samples with their maps, figures, failures. Needs no network.

All that comes from the dataset is put into the page as JSON that cannot end its block, and shown as text only.
"""

import base64
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np

from shards.dataset import Dataset
from shards.inspect.display import fit, picture
from shards.inspect.stats import inputs_words, intrinsic_rows, number, scores_of, size, spread, stats
from shards.intrinsics import INTRINSICS
from shards.sample import Sample

GALLERY = "gallery.html"
PER_PAGE = 20
MAX_FAILURES = 1000  # lines on the page; all are in the dataset
_MAX_TEXT = 2000  # characters of a caption or a message
_FEW, _LARGE_PX, _SMALL_PX = 200, 512, 256
_LABELS = {
    "depth_invalid": "invalid depth",
    "normal_invalid": "invalid normals",
    "depth_range": "depth range",
    "depth_flatness": "flat depth",
    "normal_depth_angle": "angle of normals to depth",
    "segments": "segments",
    "segmented": "share in segments",
    "line_density": "line density",
    "depth_edges": "depth's edges in the image",
    "segment_edges": "segments' borders in the image",
    "line_edges": "lines in the image",
}


def write_gallery(
    url: str,
    limit: int = 1000,
    thumb_px: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Writes gallery.html into the dataset at `url`; returns its address.

    limit: the most samples on the page, spread evenly over the dataset. thumb_px: longer side of each picture (None: 512
    for up to 200 samples, else 256). progress is called with (drawn, to be drawn). Raises UserError.
    """
    dataset = Dataset.open(url)
    figures = stats(url)
    total = figures["counts"]["ok"]
    count = min(limit, total)
    thumb_px = thumb_px or (_LARGE_PX if count <= _FEW else _SMALL_PX)
    names = [name for name, row in INTRINSICS.items() if row.member in dataset.members]
    index: list[dict[str, Any]] = []
    blocks: list[str] = []
    for mark, key in spread(dataset, count) if count else ():
        sample = dataset.read_at(mark, key)
        entry, pictures = _entry(sample, names, thumb_px)
        blocks.append(_block(f"sample-{len(index)}", pictures))
        index.append(entry)
        progress(len(index), count)
    failures = [
        [str(line.get(name, ""))[:_MAX_TEXT] for name in ("key", "stage", "reason", "message")]
        for line in islice((line for shard in dataset.shard_names() for line in dataset.failures(shard)), MAX_FAILURES)
    ]
    about = _about(dataset, figures, ["image", *names], count)
    blocks += [_block("about", about), _block("index", index), _block("failures-data", failures)]
    page = files("shards.inspect").joinpath("gallery.html").read_text("utf-8")
    dataset.folder.write(GALLERY, page.replace("<!--DATA-->", "\n".join(blocks), 1).encode())
    local = dataset.folder.local_path
    return str(local / GALLERY) if local else dataset.folder.address(GALLERY)


def _block(name: str, content: Any) -> str:
    """A JSON block for the page. `<` is escaped, so nothing in it can end the block or begin a comment."""
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _entry(sample: Sample, names: list[str], thumb_px: int) -> tuple[dict[str, Any], list[str]]:
    """What the page's index says of a sample, and its pictures (base64 WebP), the image first."""
    image = sample.image()
    entry = {
        "key": sample.key,
        "caption": sample.caption[:_MAX_TEXT],
        "size": [image.shape[1], image.shape[0]],
        "quality": scores_of(sample),
    }
    pictures = [image, *(picture(name, sample.map(name), image) for name in names)]
    return entry, [_webp(pixels, thumb_px) for pixels in pictures]


def _webp(pixels: np.ndarray, thumb_px: int) -> str:
    buffer = BytesIO()
    fit(pixels, thumb_px).save(buffer, "WEBP", quality=82, method=2)
    return base64.b64encode(buffer.getvalue()).decode()


def _about(dataset: Dataset, figures: Mapping[str, Any], columns: list[str], count: int) -> dict[str, Any]:
    counts = figures["counts"]
    summary = (
        f"{counts['ok']:,} samples in {counts['shards']:,} shards, {size(figures['bytes']['tars'])}; "
        f"{inputs_words(counts)}"
    )
    shown = "" if figures["complete"] else "The run that makes this dataset has not ended. "
    if count < counts["ok"]:
        shown += f"This page shows {count:,} samples, spread evenly over the dataset. "
    if figures["decoded"] < counts["ok"]:
        shown += f"Figures that need decoding are of {figures['decoded']:,} samples."
    labels = {name: {"label": _LABELS.get(name, name), "worst_is": found["worst_is"]}
              for name, found in figures["quality"].items()}  # fmt: skip
    quality = [
        {
            "label": labels[name]["label"],
            "low": found["percentiles"]["5"],
            "middle": found["percentiles"]["50"],
            "high": found["percentiles"]["95"],
            "worst": [item["key"] for item in found["worst"]],
        }
        for name, found in figures["quality"].items()
    ]
    return {
        "title": dataset.folder.url.rstrip("/").rsplit("/", 1)[-1],
        "summary": summary,
        "shown": shown,
        "columns": columns,
        "per_page": PER_PAGE,
        "scores": labels,
        "quality": quality,
        "bars": _bars(figures),
        "failures": _rows(figures["failures"], lambda value: f"{value:,}"),
        "failed": counts["failed"],
    }


def _bars(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cards of the page's figures: a title, and rows of label, length of the bar, and text."""
    groups: list[dict[str, Any]] = []
    for name, found in figures["intrinsics"].items():
        rows = [
            {"label": label, "part": _plain(text), "text": text}
            for label, text in intrinsic_rows(name, found)
        ]  # fmt: skip
        if name in ("segmentation", "line"):  # figures of different kinds: a bar would compare what cannot be compared
            rows = [row | {"part": None} for row in rows]
        groups.append({"title": name.capitalize(), "rows": rows})
    groups.append({"title": "Bytes per sample", "rows": _rows(figures["bytes_per_sample"], size)})
    resolutions = dict(list(figures["resolutions"].items())[:12])
    groups.append({"title": "Resolutions (the 12 most frequent)", "rows": _rows(resolutions, number)})
    characters = {f"{p} %": value for p, value in figures["captions"]["characters"].items()}
    title = f"Characters in captions ({figures['captions']['empty']} empty)"
    groups.append({"title": title, "rows": _rows(characters, number)})
    groups.append({"title": "Seconds, summed over shards", "rows": _rows(figures["timings_s"], number)})
    return [group for group in groups if group["rows"]]


def _rows(values: Mapping[str, float], text: Callable[[float], str]) -> list[dict[str, Any]]:
    return [{"label": label, "part": value, "text": text(value)} for label, value in values.items()]


def _plain(text: str) -> float:
    return float(text.removesuffix(" %")) if text.endswith(" %") else 0.0
