"""The table of the four intrinsics: what each map holds, how it is stored as a PNG, and which pixels are valid.

Conventions. Every map has the image's own height H and width W. Normals live in camera space: x right, y up, z towards
the camera. Depth is z-depth, along the optical axis. Quantisation is the only loss of the stored form:

    depth         16-bit grey   0 invalid, 65535 infinitely far, 1..65534 by kind:
                                "metric": metres, logarithmic over 0.05..1000 m (relative error <= 0.008 %)
                                "relative": inverse depth, linear between lo and hi (error <= (hi - lo) / 131066)
    normal        8-bit RGB     round(127.5 (n + 1)), renormalised on reading (error <= 0.4 degrees); (128,128,128) invalid
    segmentation  16-bit grey   0 none, 1..K by falling area
    line          8-bit grey    255 on a line, 0 on none
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import cv2
import numpy as np

from shards.core.errors import UserError

DEPTH_NEAR_M, DEPTH_FAR_M = 0.05, 1000.0  # the fixed range of metric depth codes
DEPTH_KINDS = ("metric", "relative")
_MAX_RELATIVE = 1e38  # the largest lo and hi that float32 holds
_STEPS = 65533  # codes 1..65534 span the range
_FAR_CODE = 65535
_NO_NORMAL = 128
MAX_SEGMENTS = 65535
MAX_PNG_PIXELS = 1 << 27  # a map of more pixels is refused before it is decoded


Empty = Callable[[tuple[int, ...], type[np.generic]], np.ndarray]
"""Makes the array (C order, content undefined) that a decoded picture goes to: np.empty, or room in a batch's memory."""


@dataclass(frozen=True)
class IntrinsicMap:
    """One intrinsic of one image.

    values: depth float32 (H, W); normal float32 (H, W, 3); segmentation uint16 (H, W); line float32 (H, W) in [0, 1].
    info: what json["intrinsics"][name] says of it (kind, lo, hi, focal_px, segments, by, ...).

    Depth of kind "metric" is in metres with +inf for infinitely far; of kind "relative" it is inverse depth up to an
    affine change (larger is nearer) with -inf for infinitely far. NaN marks invalid pixels of depth and normals.
    """

    values: np.ndarray
    info: Mapping[str, Any] = field(default_factory=dict)


class MapError(UserError):
    """A map that breaks the table's conventions, or a PNG that is not a stored map."""


def order_segments(ids: np.ndarray) -> np.ndarray:
    """Renumbers segments by falling area, ties by the first pixel in row-major order; 0 (none) stays 0.

    ids: any integer array (H, W), 0 for none. Returns uint16 (H, W) with 0 and 1..K. Raises MapError above 65535 segments.
    """
    labels, first, inverse, areas = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    segments = np.flatnonzero(labels != 0)
    if len(segments) > MAX_SEGMENTS:
        raise MapError(f"a segmentation has {len(segments)} segments; at most {MAX_SEGMENTS} can be stored")
    order = segments[np.lexsort((first[segments], -areas[segments]))]
    new = np.zeros(len(labels), np.uint16)
    new[order] = np.arange(1, len(order) + 1)
    return new[inverse].reshape(ids.shape)


def describe_segments(ids: np.ndarray, scores: Mapping[int, float], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """The `segments` list of json for ordered ids (H, W): id, area in pixels, score (1.0 if unknown), label ("" if none)."""
    areas = np.bincount(ids.ravel())
    return [
        {"id": i, "area": int(areas[i]), "score": float(scores.get(i, 1.0)), "label": labels.get(i, "")}
        for i in range(1, len(areas))
    ]


# ---- depth -----------------------------------------------------------------------------------------------------------


def _encode_depth(depth: IntrinsicMap) -> tuple[bytes, dict[str, Any]]:
    z, info = _checked(depth.values, np.float32, 2, "depth"), dict(depth.info)
    if info.get("kind") not in DEPTH_KINDS:
        raise MapError(f"depth of kind {info.get('kind')!r}; it must be one of {DEPTH_KINDS}")
    finite = np.isfinite(z)
    x = np.where(finite, z, 1).astype(np.float64)
    if info["kind"] == "metric":
        if finite.any() and x[finite].min() <= 0:
            raise MapError(f"metric depth must be positive; found {x[finite].min()}")
        x = np.log(np.clip(x, DEPTH_NEAR_M, DEPTH_FAR_M) / DEPTH_NEAR_M) / np.log(DEPTH_FAR_M / DEPTH_NEAR_M)
        far = z == np.inf
    else:
        info["lo"], info["hi"] = _range(x[finite])
        x = (x - info["lo"]) / (info["hi"] - info["lo"] or 1.0)
        far = z == -np.inf
    codes = np.where(finite, 1 + np.rint(np.clip(x, 0, 1) * _STEPS), np.where(far, _FAR_CODE, 0))
    return encode_png(codes.astype(np.uint16)), info


def _range(finite: np.ndarray) -> tuple[float, float]:
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _decode_depth(png: bytes, info: Mapping[str, Any], empty: Empty = np.empty) -> IntrinsicMap:
    codes = decode_png(png, np.uint16, channels=1)
    if info.get("kind") == "metric":
        table = _metric_table()
    elif info.get("kind") == "relative":
        lo, hi = info.get("lo"), info.get("hi")
        if not isinstance(lo, int | float) or not isinstance(hi, int | float):
            raise MapError("relative depth needs the numbers lo and hi in its json")
        if not (abs(lo) <= _MAX_RELATIVE and abs(hi) <= _MAX_RELATIVE):
            raise MapError(f"relative depth has the range {lo} to {hi} in its json, beyond what float32 can hold")
        table = _depth_table(lo + _SHARES * (hi - lo), -np.inf)
    else:
        raise MapError(f"depth of kind {info.get('kind')!r} in json; it must be one of {DEPTH_KINDS}")
    z = empty(codes.shape, np.float32)
    return IntrinsicMap(np.take(table, codes, mode="clip", out=z), info)  # every code is in it; clip is the fast mode


_SHARES = np.arange(_STEPS + 1) / _STEPS  # where the codes 1..65534 lie in the range


def _depth_table(values: np.ndarray, far: float) -> np.ndarray:
    """float32 (65536,): the depth of each code."""
    return np.concatenate([[np.nan], values, [far]]).astype(np.float32)


@lru_cache(maxsize=1)
def _metric_table() -> np.ndarray:
    return _depth_table(DEPTH_NEAR_M * np.exp(_SHARES * np.log(DEPTH_FAR_M / DEPTH_NEAR_M)), np.inf)


def _valid_depth(values: np.ndarray) -> np.ndarray:
    return ~np.isnan(values)


# ---- normals ---------------------------------------------------------------------------------------------------------


def _encode_normal(normal: IntrinsicMap) -> tuple[bytes, dict[str, Any]]:
    n = _checked(normal.values, np.float32, 3, "normal")
    valid = _valid_normal(n)
    whole = bool(valid.all())
    squared = np.einsum("hwc,hwc->hw", n, n)
    lengths = np.sqrt(squared if whole else squared[valid])
    if lengths.size and not (lengths.min() >= 0.99 and lengths.max() <= 1.01):
        raise MapError(f"normals must have length 1; found {lengths.min():.3f} to {lengths.max():.3f}")
    codes = n + 1
    np.clip(codes, 0, 2, out=codes)
    codes *= 127.5
    np.rint(codes, out=codes)
    if not whole:
        codes[~valid] = _NO_NORMAL
    return encode_png(codes.astype(np.uint8)), dict(normal.info)


def _decode_normal(png: bytes, info: Mapping[str, Any], empty: Empty = np.empty) -> IntrinsicMap:
    codes = cv2.split(decode_png(png, np.uint8, channels=3))  # channel by channel: six times as fast as (H, W, 3)
    x, y, z = (cv2.LUT(channel, _NORMAL_TABLE) for channel in codes)
    length = x * x
    length += y * y
    length += z * z
    nowhere = length < 1e-3  # true of (128, 128, 128), and of no normal
    np.sqrt(length, out=length)
    if nowhere.any():
        length[nowhere & (codes[0] == _NO_NORMAL) & (codes[1] == _NO_NORMAL) & (codes[2] == _NO_NORMAL)] = np.nan
    for part in (x, y, z):
        np.divide(part, length, out=part)
    return IntrinsicMap(cv2.merge((x, y, z), empty((*x.shape, 3), np.float32)), info)


_NORMAL_TABLE = np.arange(256, dtype=np.float32) * np.float32(1 / 127.5) - np.float32(1)


def _valid_normal(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    return finite[..., 0] & finite[..., 1] & finite[..., 2]  # much faster than all(axis=2)


# ---- segmentation and lines ------------------------------------------------------------------------------------------


def _encode_segmentation(segmentation: IntrinsicMap) -> tuple[bytes, dict[str, Any]]:
    ids = _checked(segmentation.values, np.uint16, 2, "segmentation")
    areas = np.bincount(ids.ravel())[1:]
    if (areas == 0).any() or (np.diff(areas.astype(np.int64)) > 0).any():
        raise MapError("segment ids must be 1..K by falling area; renumber them with order_segments")
    return encode_png(ids), dict(segmentation.info)


def _decode_segmentation(png: bytes, info: Mapping[str, Any], empty: Empty = np.empty) -> IntrinsicMap:
    return IntrinsicMap(decode_png(png, np.uint16, channels=1), info)


def _encode_line(line: IntrinsicMap) -> tuple[bytes, dict[str, Any]]:
    values = _checked(line.values, np.float32, 2, "line")
    if not (values.min() >= 0 and values.max() <= 1):
        raise MapError(f"a line drawing must lie in 0..1; found {values.min()} to {values.max()}")
    return encode_png(np.rint(values * 255).astype(np.uint8)), dict(line.info)


def _decode_line(png: bytes, info: Mapping[str, Any], empty: Empty = np.empty) -> IntrinsicMap:
    codes = decode_png(png, np.uint8, channels=1)
    return IntrinsicMap(cv2.LUT(codes, _LINE_TABLE, empty(codes.shape, np.float32)), info)


_LINE_TABLE = np.arange(256, dtype=np.float32) / np.float32(255)


def _all_valid(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, bool)


# ---- PNG -------------------------------------------------------------------------------------------------------------


# Run-length coding of the differences to the row above: beside zlib's level 1 with a choice of filters, maps are written
# twice as fast, read half again as fast, and get smaller (python -m benchmarks.images).
_PNG_OPTIONS = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
)


def encode_png(pixels: np.ndarray) -> bytes:
    """A lossless PNG of uint8 or uint16 (H, W) or uint8 RGB (H, W, 3), written fast."""
    ordered = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(".png", np.ascontiguousarray(ordered), _PNG_OPTIONS)
    if not ok:
        raise MapError(f"a map of shape {pixels.shape} and type {pixels.dtype} cannot be written as PNG")
    return data.tobytes()


def png_size(png: bytes) -> tuple[int, int]:
    """(width, height) from the header of a PNG, without decoding. Raises MapError when it is none."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR" or len(png) < 45:
        raise MapError("not a PNG")
    if png[-8:] != b"IEND\xaeB`\x82":  # decoders fill in what a truncated file lacks; we do not accept that
        raise MapError("a truncated PNG")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def decode_png(png: bytes, dtype: type[np.generic], channels: int) -> np.ndarray:
    """Decodes exactly the form that encode_png writes: (H, W) or RGB (H, W, 3). Raises MapError for any other form."""
    width, height = png_size(png)
    if width * height > MAX_PNG_PIXELS:
        raise MapError(f"a map of {width} x {height} pixels is larger than the limit of {MAX_PNG_PIXELS} pixels")
    bit_depth, colour_type = png[24], png[25]
    if (bit_depth, colour_type) != (np.dtype(dtype).itemsize * 8, 0 if channels == 1 else 2):
        raise MapError(f"a PNG of bit depth {bit_depth} and colour type {colour_type} is not this map's stored form")
    try:
        form = cv2.IMREAD_UNCHANGED if channels == 1 else cv2.IMREAD_COLOR_RGB
        pixels = cv2.imdecode(np.frombuffer(png, np.uint8), form)
    except cv2.error as error:
        raise MapError(f"a damaged PNG: {error}") from error
    if pixels is None or pixels.dtype != dtype or pixels.shape[:2] != (height, width):
        raise MapError("a damaged PNG")
    return pixels


def _checked(values: np.ndarray, dtype: type[np.generic], ndim: int, name: str) -> np.ndarray:
    if values.dtype != dtype or values.ndim != ndim or 0 in values.shape or (ndim == 3 and values.shape[2] != 3):
        want = "(H, W)" if ndim == 2 else "(H, W, 3)"
        raise MapError(f"{name} is {values.dtype} {values.shape}; it must be {np.dtype(dtype)} {want}")
    return values


# ---- the table -------------------------------------------------------------------------------------------------------


class Decode(Protocol):
    def __call__(self, png: bytes, info: Mapping[str, Any], empty: Empty = ..., /) -> IntrinsicMap: ...


@dataclass(frozen=True, kw_only=True)
class Intrinsic:
    """One row: the member that holds the map, its form, and its share of the packed channels."""

    name: str
    member: str
    channels: int
    encode: Callable[[IntrinsicMap], tuple[bytes, dict[str, Any]]]
    """The PNG, and the map's info completed by what decoding needs. Raises MapError."""
    decode: Decode
    """The inverse, within the stated quantisation, into `empty` (segments: into new memory). Raises MapError."""
    valid: Callable[[np.ndarray], np.ndarray]
    """bool (H, W): the pixels that carry a value. Infinitely far is a valid depth."""


INTRINSICS: dict[str, Intrinsic] = {
    row.name: row
    for row in (
        Intrinsic(
            name="depth", member="depth.png", channels=1, encode=_encode_depth, decode=_decode_depth, valid=_valid_depth
        ),
        Intrinsic(
            name="normal",
            member="normal.png",
            channels=3,
            encode=_encode_normal,
            decode=_decode_normal,
            valid=_valid_normal,
        ),
        Intrinsic(
            name="segmentation",
            member="segmentation.png",
            channels=3,
            encode=_encode_segmentation,
            decode=_decode_segmentation,
            valid=_all_valid,
        ),
        Intrinsic(
            name="line", member="line.png", channels=1, encode=_encode_line, decode=_decode_line, valid=_all_valid
        ),
    )
}
