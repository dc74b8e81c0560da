"""What is wrong with one sample: members, decoding, sizes, ranges, and what its json says of its maps."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from shards.intrinsics import INTRINSICS, IntrinsicMap, MapError, decode_png
from shards.sample import CACHES, Sample, SampleError

_SIGNATURES = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF"}
MAX_FLOAT = sys.float_info.max
_UNIT_TOLERANCE = 0.02
"""How far a stored normal's length may be from 1: what encoding accepts (0.01) and 8-bit rounding (0.007)."""


def check_sample(sample: Sample, info: Mapping[str, Any]) -> Iterator[str]:
    """Yields one sentence for each fault of a sample whose members are all there. info: the content of dataset.json.

    Decodes everything, so it costs what reading the sample costs; holds one map at a time.
    """
    key = sample.key
    try:
        height, width = sample.image().shape[:2]
    except SampleError as error:
        yield f"{error}; make this shard again"
        return
    if not sample.members[sample.image_member].startswith(_SIGNATURES[sample.image_member]):
        yield f"{key}.{sample.image_member} is not in the format that its name says; make this shard again"
    try:
        _ = sample.caption
    except SampleError as error:
        yield f"{error}; make this shard again"
    try:
        described = sample.meta.get("intrinsics")
    except SampleError as error:
        yield f"{error}; make this shard again"
        return
    if not isinstance(described, dict):
        yield f'{key}.json has no object "intrinsics"; make this shard again'
        return
    image = described.get("image")
    if isinstance(image, dict) and "size" in image and image["size"] != [width, height]:
        yield f"{key}.json says the image has the size {image['size']}; it has {[width, height]}; make this shard again"
    yield from _quality_faults(key, described.get("quality"))
    yield from _cache_faults(sample)
    for name in sample.intrinsics:
        yield from _map_faults(sample, name, described.get(name), (height, width), info)


def _quality_faults(key: str, quality: Any) -> Iterator[str]:
    if quality is None:
        return
    if not isinstance(quality, dict):
        yield f"{key}.json: intrinsics.quality is no object; make this shard again"
        return
    for name, score in quality.items():
        if name != "by" and not _is_number(score):
            yield f"{key}.json: intrinsics.quality.{name} is {score!r}, not a number; make this shard again"


def _cache_faults(sample: Sample) -> Iterator[str]:
    for member in CACHES:
        if member in sample.members:
            try:
                safetensors.deserialize(sample.members[member])
            except safetensors.SafetensorError as error:
                yield f"{sample.key}.{member} is no safetensors file: {error}; run the same `python -m train cache` again"


def _map_faults(
    sample: Sample, name: str, described: Any, size: tuple[int, int], info: Mapping[str, Any]
) -> Iterator[str]:
    key, member = sample.key, INTRINSICS[name].member
    if not isinstance(described, dict):
        yield f"{key}.json says nothing of {name} under intrinsics, but {key}.{member} is there; make this shard again"
        return
    declared = info["estimators"].get(name)
    known = declared.get("id") if isinstance(declared, dict) else None
    if known is None or described.get("by") != known:
        yield (
            f"{key}.json: intrinsics.{name}.by is {described.get('by')!r}, but dataset.json declares {known!r}; "
            "run the same extract command again to bring all shards up to date"
        )
    if name == "depth" and described.get("kind") != info.get("depth_kind"):
        yield (
            f"{key}.json: intrinsics.depth.kind is {described.get('kind')!r}, but dataset.json says "
            f"{info.get('depth_kind')!r}; depths of two kinds must not be mixed, so make this shard again"
        )
    try:
        decoded = sample.map(name)
    except SampleError as error:
        yield f"{error}; make this shard again"
        return
    if decoded.values.shape[:2] != size:
        found, wanted = (" x ".join(map(str, shape[::-1])) for shape in (decoded.values.shape[:2], size))
        yield f"{key}.{member} has {found} pixels; the image has {wanted}; make this shard again"
    yield from (f"{key}.{fault}; make this shard again" for fault in _RANGES[name](sample, decoded))


def _depth_faults(sample: Sample, depth: IntrinsicMap) -> Iterator[str]:
    info = depth.info
    if info["kind"] == "relative" and not (
        _is_number(info["lo"]) and _is_number(info["hi"]) and info["lo"] <= info["hi"]
    ):
        yield f"json: intrinsics.depth.lo and hi are {info['lo']!r} and {info['hi']!r}, which is no range"
    focal_px = info.get("focal_px")
    if focal_px is not None and not (_is_number(focal_px) and focal_px > 0):
        yield f"json: intrinsics.depth.focal_px is {focal_px!r}; it must be a positive number or null"


def _normal_faults(sample: Sample, normal: IntrinsicMap) -> Iterator[str]:
    member = INTRINSICS["normal"].member
    try:
        codes = decode_png(sample.members[member], np.uint8, 3)  # as stored: reading makes every length 1
    except MapError as error:
        yield f"{member}: {error}"
        return
    n = codes.astype(np.float32) / 127.5 - 1
    wrong = np.abs(np.sqrt(np.einsum("hwc,hwc->hw", n, n)) - 1) > _UNIT_TOLERANCE
    wrong &= np.isfinite(normal.values).all(axis=2)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        yield f"{member} holds {int(wrong.sum())} normals whose length is not 1, the first at x={column} y={row}"


def _segmentation_faults(sample: Sample, segmentation: IntrinsicMap) -> Iterator[str]:
    member = INTRINSICS["segmentation"].member
    areas = np.bincount(segmentation.values.ravel())[1:].tolist()
    if 0 in areas:
        yield f"{member}: the id {areas.index(0) + 1} is missing, ids must be 1..{len(areas)}"
    elif areas != sorted(areas, reverse=True):
        yield f"{member}: the ids are not ordered by falling area"
    segments = segmentation.info.get("segments")
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        yield "json: intrinsics.segmentation.segments is no list of objects"
        return
    if [segment.get("id") for segment in segments] != list(range(1, len(areas) + 1)):
        yield f"json: intrinsics.segmentation.segments does not list the ids 1..{len(areas)} that the map has"
    elif [segment.get("area") for segment in segments] != areas:
        yield "json: intrinsics.segmentation.segments has areas that are not those of the map"
    for segment in segments:
        label = segment.get("label")
        if not _is_number(segment.get("score", 1.0)) or not (label is None or isinstance(label, str)):
            yield f"json: segment {segment.get('id')!r} has a score that is no number or a label that is no text"
            return


def _line_faults(sample: Sample, line: IntrinsicMap) -> Iterator[str]:
    yield from ()  # every 8-bit code is a value in 0..1


_RANGES = {
    "depth": _depth_faults,
    "normal": _normal_faults,
    "segmentation": _segmentation_faults,
    "line": _line_faults,
}


def _is_number(value: Any) -> bool:
    """Whether a value of json is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_FLOAT <= value <= MAX_FLOAT
