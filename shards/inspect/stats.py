"""What is in a dataset: counts, failures, sizes, captions, label quality, and the distribution of each intrinsic.

All marks are read (counts, failures, bytes, timings); every input counts once, with its last attempt. What needs decoding
is taken from a sample of the samples, spread evenly over the dataset, and the answer says how many they were.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from shards.core.cli import printable
from shards.counts import standing
from shards.dataset import Dataset
from shards.intrinsics import DEPTH_FAR_M, DEPTH_NEAR_M, INTRINSICS, IntrinsicMap
from shards.quality import EDGE_SCORES
from shards.sample import Sample

DEFAULT_SAMPLE = 500
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
WORST = 5
DIRECTIONS = ("facing", "left", "right", "up", "down", "away")
_METRIC_EDGES = (DEPTH_NEAR_M, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, DEPTH_FAR_M)
_HIGH_IS_GOOD = {"depth_range", "segmented", *EDGE_SCORES}
"""Quality scores of which a low value is suspicious; of all others a high one is."""


def spread(dataset: Dataset, count: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Up to `count` samples, spread evenly over the dataset: (mark, key), in order. One mark in memory at a time."""
    marks = [(mark["shard"], mark["counts"]["ok"]) for mark in dataset.marks()]
    ends = np.cumsum([ok for _, ok in marks], dtype=np.int64).tolist()
    total = ends[-1] if ends else 0
    wanted = [int(i * total / count) for i in range(count)] if count < total else list(range(total))
    mark: dict[str, Any] | None = None
    for position in wanted:
        number = bisect.bisect_right(ends, position)
        if mark is None or mark["shard"] != marks[number][0]:
            mark = dataset.mark(marks[number][0])
            keys = by_place(mark)
        yield mark, keys[position - (ends[number] - marks[number][1])]


def by_place(mark: Mapping[str, Any]) -> list[str]:
    """The keys of a shard in the order in which they lie in its tar."""
    return sorted(mark["index"], key=lambda key: min(offset for offset, _ in mark["index"][key].values()))


def stats(
    url: str, sample: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """The figures of the dataset at `url`, as a JSON object; shares are 0..1, distributions are means over the samples.

    sample: how many samples are decoded (500 if None, 0 for none). progress is called with (decoded, to be decoded).
    """
    dataset = Dataset.open(url, checked=True)
    result = _from_marks(dataset)
    wanted = min(DEFAULT_SAMPLE if sample is None else sample, result["counts"]["ok"])
    gather = _Gather()
    for done, (mark, key) in enumerate(spread(dataset, wanted) if wanted else (), 1):
        gather.add(dataset.read_at(mark, key))
        progress(done, wanted)
    result["decoded"] = gather.count
    return result | gather.result()


def _from_marks(dataset: Dataset) -> dict[str, Any]:
    shards, size, timings, tar_bytes = 0, Counter[str](), dict[str, float](), 0

    def marks() -> Iterator[dict[str, Any]]:
        nonlocal shards, tar_bytes
        for mark in dataset.marks():
            shards += 1
            tar_bytes += mark["tar"]["size"]
            for places in mark["index"].values():
                for member, (_, length) in places.items():
                    size[member] += length
            found = mark.get("timings")
            for name, seconds in found.items() if isinstance(found, dict) else ():
                if isinstance(seconds, int | float) and abs(seconds) < 1e300:
                    timings[name] = timings.get(name, 0.0) + seconds
            yield mark

    stand = standing(dataset.info, marks())
    counts = {
        "shards": shards,
        "in": stand.inputs,
        "ok": stand.ok,
        "failed": stand.failed.total(),
        "dropped": stand.dropped.total(),
        "retried": stand.retried,
    }
    ok = counts["ok"] or 1
    return {
        "url": dataset.folder.url,
        "recipe": dataset.info.get("recipe"),
        "complete": dataset.complete,
        "depth_kind": dataset.info.get("depth_kind"),
        "counts": counts,
        "failures": dict(stand.failed.most_common()),
        "drops": dict(stand.dropped.most_common()),
        "bytes": {"tars": tar_bytes} | {name: size[name] for name in dataset.members if name in size},
        "bytes_per_sample": {name: size[name] / ok for name in dataset.members if name in size},
        "timings_s": {name: round(seconds, 3) for name, seconds in timings.items()},
    }


# ---- what needs decoding ---------------------------------------------------------------------------------------------


class _Gather:
    """Adds up what the decoded samples say; keeps numbers, never pictures."""

    def __init__(self) -> None:
        self.count = 0
        self._resolutions = Counter[str]()
        self._captions: list[int] = []
        self._empty = 0
        self._quality: dict[str, list[tuple[float, str]]] = {}
        self._maps: dict[str, list[dict[str, Any]]] = {}

    def add(self, sample: Sample) -> None:
        self.count += 1
        caption = sample.caption
        self._captions.append(len(caption))
        self._empty += not caption.strip()
        described = sample.meta.get("intrinsics")
        described = described if isinstance(described, dict) else {}
        self._resolutions["{} x {}".format(*_size(sample, described.get("image")))] += 1
        for name, score in scores_of(sample).items():
            self._quality.setdefault(name, []).append((score, sample.key))
        for name in sample.intrinsics:
            self._maps.setdefault(name, []).append(_DESCRIBE[name](sample.map(name)))

    def result(self) -> dict[str, Any]:
        return {
            "resolutions": dict(self._resolutions.most_common()),
            "captions": {"empty": self._empty, "characters": percentiles(self._captions)},
            "quality": {name: _scores(name, scores) for name, scores in self._quality.items()},
            "intrinsics": {name: _ADD[name](self._maps[name]) for name in INTRINSICS if name in self._maps},
        }


def _size(sample: Sample, described: Any) -> tuple[int, int]:
    """(width, height) as json states it; decoded from the image where it does not."""
    size = described.get("size") if isinstance(described, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(isinstance(length, int) for length in size):
        return size[0], size[1]
    height, width = sample.image().shape[:2]
    return width, height


def scores_of(sample: Sample) -> dict[str, float]:
    """The quality scores in a sample's json that are finite numbers; what else is there is left out."""
    described = sample.meta.get("intrinsics")
    quality = described.get("quality") if isinstance(described, dict) else None
    found = quality.items() if isinstance(quality, dict) else ()
    return {name: float(score) for name, score in found if isinstance(score, int | float) and abs(score) < 1e300}


def percentiles(values: list[int] | list[float]) -> dict[str, float]:
    """The percentiles 0, 5, 25, 50, 75, 95, 100 (linear between values), by name; {} for no values."""
    if not values:
        return {}
    found = np.percentile(np.asarray(values, np.float64), PERCENTILES)
    return {str(p): round(float(value), 6) for p, value in zip(PERCENTILES, found, strict=True)}


def _scores(name: str, scores: list[tuple[float, str]]) -> dict[str, Any]:
    worst = sorted(scores, key=lambda item: (item[0] if name in _HIGH_IS_GOOD else -item[0], item[1]))[:WORST]
    if len({score for score, _ in scores}) == 1:
        worst = []  # all are alike: none is worse than the others
    return {
        "percentiles": percentiles([score for score, _ in scores]),
        "worst": [{"key": key, "score": score} for score, key in worst],
        "worst_is": "low" if name in _HIGH_IS_GOOD else "high",
    }


def _describe_depth(depth: IntrinsicMap) -> dict[str, Any]:
    z = depth.values
    finite = z[np.isfinite(z)].astype(np.float64)
    if depth.info["kind"] == "metric":
        edges = np.asarray(_METRIC_EDGES)
        histogram = np.histogram(finite.clip(edges[0], edges[-1]), edges)[0]
    else:  # each map has its own scale, so only the place within it can be compared
        low, high = float(depth.info["lo"]), float(depth.info["hi"])
        histogram = np.histogram((finite - low) / ((high - low) or 1.0), 10, (0, 1))[0]
    invalid = float(np.isnan(z).mean())
    return {
        "kind": depth.info["kind"],
        "histogram": histogram / z.size,
        "far": 1 - invalid - finite.size / z.size,
        "invalid": invalid,
    }


def _add_depth(parts: list[dict[str, Any]]) -> dict[str, Any]:
    kind = parts[0]["kind"]
    edges = list(_METRIC_EDGES) if kind == "metric" else [round(i / 10, 1) for i in range(11)]
    return {
        "kind": kind,
        "edges": edges,
        "unit": "m" if kind == "metric" else "share of the map's own range of inverse depth",
        "histogram": np.mean([part["histogram"] for part in parts], axis=0).round(6).tolist(),
        "far": _mean(parts, "far"),
        "invalid": _mean(parts, "invalid"),
    }


def _describe_normal(normal: IntrinsicMap) -> dict[str, Any]:
    """Shares of the pixels by the axis nearest to the normal."""
    n = normal.values
    valid = np.isfinite(n).all(axis=2)
    n = n[valid]
    axes = np.stack([n[:, 2], -n[:, 0], n[:, 0], n[:, 1], -n[:, 1], -n[:, 2]], axis=1)  # as in DIRECTIONS
    nearest = np.bincount(axes.argmax(axis=1), minlength=len(DIRECTIONS)) if len(n) else np.zeros(len(DIRECTIONS))
    return {"directions": nearest / valid.size, "invalid": 1 - float(valid.mean())}


def _add_normal(parts: list[dict[str, Any]]) -> dict[str, Any]:
    shares = np.mean([part["directions"] for part in parts], axis=0).round(6).tolist()
    return {"directions": dict(zip(DIRECTIONS, shares, strict=True)), "invalid": _mean(parts, "invalid")}


def _describe_segmentation(segmentation: IntrinsicMap) -> dict[str, Any]:
    areas = np.bincount(segmentation.values.ravel())
    return {
        "segments": len(areas) - 1,
        "segmented": 1 - areas[0] / segmentation.values.size,
        "largest": (areas[1] if len(areas) > 1 else 0) / segmentation.values.size,
    }


def _add_segmentation(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "segments": percentiles([part["segments"] for part in parts]),
        "segmented": _mean(parts, "segmented"),
        "largest": _mean(parts, "largest"),
    }


def _describe_line(line: IntrinsicMap) -> dict[str, Any]:
    return {"density": float(line.values.mean(dtype=np.float64))}


def _add_line(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"density": percentiles([part["density"] for part in parts])}


def _mean(parts: list[dict[str, Any]], name: str) -> float:
    return round(float(np.mean([part[name] for part in parts])), 6)


_DESCRIBE: dict[str, Callable[[IntrinsicMap], dict[str, Any]]] = {
    "depth": _describe_depth,
    "normal": _describe_normal,
    "segmentation": _describe_segmentation,
    "line": _describe_line,
}
_ADD: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    "depth": _add_depth,
    "normal": _add_normal,
    "segmentation": _add_segmentation,
    "line": _add_line,
}


# ---- the terminal ----------------------------------------------------------------------------------------------------


def render(figures: Mapping[str, Any]) -> RenderableType:
    """The figures as tables for the terminal. Text of the dataset is shown as it is, never as markup."""
    counts = figures["counts"]
    state = "" if figures["complete"] else "  (unfinished)"
    head = (
        f"{figures['url']}{state}\n{counts['ok']:,} samples in {counts['shards']:,} shards, "
        f"{size(figures['bytes']['tars'])}; {inputs_words(counts)}\n"
    )
    if figures["decoded"] < counts["ok"]:
        head += (
            f"Figures from resolutions on are of {figures['decoded']:,} samples, spread evenly (--sample N for more).\n"
        )
    parts: list[RenderableType] = [Text(printable(head, lines=True))]
    parts.append(_table("failures", ["reason", "inputs"], figures["failures"].items()))
    parts.append(_table("left out on purpose", ["reason", "inputs"], figures["drops"].items()))
    rows = [(name, size(share), size(figures["bytes"][name])) for name, share in figures["bytes_per_sample"].items()]
    parts.append(_table("bytes", ["member", "per sample", "in all"], rows))
    parts.append(_table("time, summed over shards", ["what", "s"], figures["timings_s"].items()))
    if figures["decoded"]:
        resolutions = list(figures["resolutions"].items())
        if len(resolutions) > 10:
            resolutions = [*resolutions[:10], ("others", sum(count for _, count in resolutions[10:]))]
        parts.append(_table("resolutions", ["width x height", "samples"], resolutions))
        columns = ["", *(f"{p} %" for p in PERCENTILES)]
        characters = [("characters", *map(number, figures["captions"]["characters"].values()))]
        parts.append(_table(f"captions ({figures['captions']['empty']} empty)", columns, characters))
        quality = figures["quality"].items()
        scores = [(name, *map(number, found["percentiles"].values())) for name, found in quality]
        parts.append(_table("quality scores", columns, scores))
        worst = [
            (name, ", ".join(item["key"] for item in found["worst"][:3])) for name, found in quality if found["worst"]
        ]
        parts.append(_table("the worst by each", ["", ""], worst))
        for name, found in figures["intrinsics"].items():
            parts.append(_table(name, ["", ""], intrinsic_rows(name, found)))
    shown = [part for part in parts if not isinstance(part, Table) or part.row_count]
    spaced: list[Any] = [piece for part in shown for piece in ([part, Text()] if isinstance(part, Table) else [part])]
    return Group(*spaced)


def intrinsic_rows(name: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of one intrinsic as (what, value), values as shares in percent or plain numbers."""
    if name == "depth":
        unit = " m" if found["kind"] == "metric" else ""
        edges = found["edges"]
        rows = [
            (f"{number(low)} to {number(high)}{unit}", share)
            for low, high, share in zip(edges, edges[1:], found["histogram"], strict=False)
        ]
        rows += [("infinitely far", found["far"]), ("invalid", found["invalid"])]
    elif name == "normal":
        rows = [*found["directions"].items(), ("invalid", found["invalid"])]
    elif name == "segmentation":
        spread_of = found["segments"]
        return [
            ("segments, median", number(spread_of["50"])),
            ("segments, 5 % to 95 %", f"{number(spread_of['5'])} to {number(spread_of['95'])}"),
            ("inside a segment", f"{100 * found['segmented']:.1f} %"),
            ("largest segment", f"{100 * found['largest']:.1f} %"),
        ]
    else:
        return [("density, median", number(found["density"]["50"])), ("highest", number(found["density"]["100"]))]
    return [(label, f"{100 * share:.1f} %") for label, share in rows]


def _table(title: str, columns: list[str], rows: Any) -> Table:
    headed = [title, *columns[1:]]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(headed):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(printable(str(value))) for value in row))
    return table


def inputs_words(counts: Mapping[str, int]) -> str:
    """What became of the inputs, for a headline."""
    words = f"{counts['failed']:,} of {counts['in']:,} inputs failed"
    if counts["dropped"]:
        words += f", {counts['dropped']:,} were filtered or forgotten"
    return words + (f"; {counts['retried']:,} were tried again" if counts["retried"] else "")


def number(value: float) -> str:
    """A figure in about three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def size(count: float) -> str:
    """A number of bytes in a readable unit."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def show(figures: Mapping[str, Any]) -> None:
    """Prints the figures."""
    Console(highlight=False).print(render(figures))
