"""The intrinsics of one image as 8 channels in [-1, 1], as the intrinsic VAE reads them, and back (our choice; the
paper does not say how).

    channels  0      depth         normalised per image: near = +1, far = -0.8, infinitely far = -1
              1..3   normal        x, y, z
              4..6   segmentation  one of 124 colours for each segment
              7      line          2 v - 1

An intrinsic that is missing, and every invalid pixel, is 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from shards.intrinsics import INTRINSICS, IntrinsicMap, MapError, describe_segments, order_segments


def _slices() -> dict[str, slice]:
    slices, start = {}, 0
    for row in INTRINSICS.values():
        slices[row.name] = slice(start, start + row.channels)
        start += row.channels
    return slices


SLICES: dict[str, slice] = _slices()
"""For each intrinsic, its channels."""
CHANNELS: int = sum(row.channels for row in INTRINSICS.values())

FAR, SKY = -0.8, -1.0  # the codes of the farthest finite depth and of infinitely far


@dataclass(frozen=True)
class DepthRange:
    """What a packed depth of +1 (lo: the nearest) and -0.8 (hi: the farthest) stand for.

    kind "metric": lo < hi in metres, logarithmic in between. kind "relative": inverse depth, linear, lo > hi.
    Generated depth has no range of its own: it is decoded with the range given here, the default being ours.
    """

    kind: str = "metric"
    lo: float = 1.0
    hi: float = 10.0


def depth_range(depth: IntrinsicMap) -> DepthRange:
    """The range between the 0.5 % and the 99.5 % quantile of the finite depths, so that single outliers do not rule it."""
    finite = depth.values[np.isfinite(depth.values)].astype(np.float64)
    kind = str(depth.info.get("kind"))
    if kind not in ("metric", "relative"):
        raise MapError(f"depth of kind {kind!r} cannot be packed")
    if not finite.size:
        return DepthRange(kind, 1.0, 1.0)
    near, far = np.quantile(finite, (0.005, 0.995) if kind == "metric" else (0.995, 0.005))
    return DepthRange(kind, float(near), float(far))


def pack(maps: Mapping[str, IntrinsicMap]) -> tuple[np.ndarray, DepthRange]:
    """Packs the maps of one image, all (H, W). Returns float32 (8, H, W) in [-1, 1] and the depth's range."""
    if not maps:
        raise MapError("there is no map to pack")
    height, width = next(iter(maps.values())).values.shape[:2]
    packed, extent = np.zeros((CHANNELS, height, width), np.float32), DepthRange()
    for name, item in maps.items():
        if item.values.shape[:2] != (height, width):
            raise MapError(f"{name} has size {item.values.shape[:2]}, the others {(height, width)}")
        if name == "depth":
            extent = depth_range(item)
            packed[SLICES[name]] = _pack_depth(item.values, extent)
        elif name == "normal":
            packed[SLICES[name]] = np.moveaxis(np.nan_to_num(item.values, nan=0.0), 2, 0)
        elif name == "segmentation":
            packed[SLICES[name]] = np.moveaxis(segment_colours(item.values), 2, 0)
        else:
            packed[SLICES[name]] = 2 * item.values - 1
    return packed, extent


def valid_mask(maps: Mapping[str, IntrinsicMap]) -> np.ndarray:
    """bool (8, H, W): the packed channels that carry a value."""
    height, width = next(iter(maps.values())).values.shape[:2]
    mask = np.zeros((CHANNELS, height, width), bool)
    for name, item in maps.items():
        mask[SLICES[name]] = INTRINSICS[name].valid(item.values)
    return mask


def unpack(packed: np.ndarray, depth: DepthRange | None = None, *, blurred: bool = False) -> dict[str, IntrinsicMap]:
    """The inverse of pack.

    packed: float (8, H, W); values beyond [-1, 1] are clipped. Normals are renormalised; near-zero ones are invalid.
    Exact for what pack wrote, but for depths beyond the range (clipped) and for segments that share a colour (above 124).
    blurred: the channels went through a VAE, which blurs borders: segments are read by `segments_of_blurred_colours`.
    """
    if packed.ndim != 3 or packed.shape[0] != CHANNELS:
        raise MapError(f"packed intrinsics have shape {packed.shape}; it must be ({CHANNELS}, H, W)")
    extent = depth or DepthRange()
    x = np.clip(np.asarray(packed, np.float32), -1, 1)
    normal = np.moveaxis(x[SLICES["normal"]], 0, 2)
    length = np.linalg.norm(normal, axis=2, keepdims=True)
    normal = np.where(length > 0.25, normal / np.maximum(length, 1e-6), np.nan).astype(np.float32)
    colours = np.moveaxis(x[SLICES["segmentation"]], 0, 2)
    ids = segments_of_blurred_colours(colours) if blurred else _segments_of_colours(colours)
    return {
        "depth": IntrinsicMap(_unpack_depth(x[SLICES["depth"]][0], extent), {"kind": extent.kind}),
        "normal": IntrinsicMap(normal),
        "segmentation": IntrinsicMap(ids, {"segments": describe_segments(ids, {}, {})}),
        "line": IntrinsicMap((x[SLICES["line"]][0] + 1) / 2),
    }


def _pack_depth(values: np.ndarray, extent: DepthRange) -> np.ndarray:
    finite = np.isfinite(values)
    z = np.where(finite, values, 1).astype(np.float64)
    near, far = extent.lo, extent.hi
    if extent.kind == "metric":
        z, near, far = np.log(z), float(np.log(near)), float(np.log(far))
    share = np.clip((z - near) / ((far - near) or 1.0), 0, 1)  # 0 at the nearest, 1 at the farthest
    return np.where(finite, 1 + share * (FAR - 1), np.where(np.isinf(values), SKY, 0)).astype(np.float32)


def _unpack_depth(x: np.ndarray, extent: DepthRange) -> np.ndarray:
    share = (np.clip(x.astype(np.float64), FAR, 1) - 1) / (FAR - 1)
    if extent.kind == "metric":
        z, sky = extent.lo * (extent.hi / extent.lo) ** share, np.inf
    else:
        z, sky = extent.lo + share * (extent.hi - extent.lo), -np.inf
    return np.where(x < (FAR + SKY) / 2, sky, z).astype(np.float32)


# ---- segments as colours ---------------------------------------------------------------------------------------------
# The corners of a 5 x 5 x 5 grid without its centre, which stands for "none". Colours are at least 0.5 apart, so noise
# below 0.25 a channel does no harm. A segment's own geometry (its centroid and area) asks for a colour; segments choose
# by falling area, each the nearest colour that is still free. Equal scenes thus get equal colours, and neighbours differ.

_GRID = np.linspace(-1, 1, 5, dtype=np.float32)
_GRID_COLOURS = np.concatenate(
    [np.zeros((1, 3), np.float32), np.stack(np.meshgrid(_GRID, _GRID, _GRID, indexing="ij"), -1).reshape(-1, 3)]
)  # by code: 0 stands for none
PALETTE = np.array([c for c in np.stack(np.meshgrid(_GRID, _GRID, _GRID, indexing="ij"), -1).reshape(-1, 3) if c.any()])


def segment_colours(ids: np.ndarray) -> np.ndarray:
    """float32 (H, W, 3) in [-1, 1] for ordered segment ids uint16 (H, W). From the 125th segment on, colours repeat."""
    height, width = ids.shape
    count = int(ids.max())
    areas = np.maximum(np.bincount(ids.ravel(), minlength=count + 1), 1).astype(np.float64)
    rows, columns = np.divmod(np.arange(ids.size), width)
    cx = np.bincount(ids.ravel(), weights=columns + 0.5, minlength=count + 1) / areas / width
    cy = np.bincount(ids.ravel(), weights=rows + 0.5, minlength=count + 1) / areas / height
    wished = np.stack([2 * cx - 1, 2 * cy - 1, 2 * np.sqrt(areas / ids.size) - 1], axis=1)
    colours, free = np.zeros((count + 1, 3), np.float32), np.ones(len(PALETTE), bool)
    for i in range(1, count + 1):
        distance = ((PALETTE - wished[i]) ** 2).sum(axis=1)
        chosen = int(np.where(free, distance, np.inf).argmin())
        colours[i], free[chosen] = PALETTE[chosen], False
        if not free.any():
            free[:] = True
    return colours[ids]


def _codes_of_colours(colours: np.ndarray) -> np.ndarray:
    """int64 (H, W): for each pixel the nearest colour of the grid, from 1; 0 for none."""
    steps = np.rint((colours + 1) * 2).astype(np.int64)  # 0..4 a channel
    codes = steps[..., 0] * 25 + steps[..., 1] * 5 + steps[..., 2] + 1
    codes[(steps == 2).all(axis=2)] = 0
    return codes


def _segments_of_colours(colours: np.ndarray) -> np.ndarray:
    """Ordered ids (H, W) from colours float (H, W, 3): each pixel belongs to the nearest colour of the grid."""
    return order_segments(_codes_of_colours(colours))


_CORE_PX = 2
"""A segment holds a square of so many pixels: a narrower strip is the blur between two others."""
_REACH_PX = 2
"""A border pixel belongs to a segment that is no further away than this."""
_LEAST_AREA = 1 / 500
"""A smaller patch, as a fraction of the image, goes to its neighbours (8 pixels of 64 x 64)."""
_ONE_COLOUR = 0.35
"""Neighbouring regions whose mean colours differ by less in every channel are one segment: colours of the palette differ by
0.5 in one channel at least, and a VAE that decodes a thing lets its faces differ by less."""
_SAME_COLOUR = 0.2
"""The same for regions that do not touch, which something in front may have parted."""


def segments_of_blurred_colours(colours: np.ndarray) -> np.ndarray:
    """Ordered ids (H, W) from colours float (H, W, 3) that a VAE decoded.

    Between two segments such colours pass through others, which pixel by pixel would be segments of their own: strips one
    pixel wide along every border. So a segment needs a core, and every other pixel goes to the segment near it whose colour
    its own is nearest to. And within a segment they drift over the limits of the grid: so regions whose mean colours are
    nearer to each other than two colours of the palette can be are one segment.
    """
    codes = _codes_of_colours(colours)
    cores = _fill(_without_specks(np.where(_opened(codes), codes, -1)), colours)
    return order_segments(_merged(_fill(_without_specks(cores), colours), colours))


def _opened(codes: np.ndarray) -> np.ndarray:
    """bool (H, W): the pixels that lie in a square of _CORE_PX of one code."""
    height, width = codes.shape
    last = _CORE_PX - 1
    corner = codes[: height - last, : width - last]
    uniform = np.ones(corner.shape, bool)
    offsets = [(dy, dx) for dy in range(_CORE_PX) for dx in range(_CORE_PX)]
    for dy, dx in offsets:
        uniform &= codes[dy : height - last + dy, dx : width - last + dx] == corner

    inside = np.zeros(codes.shape, bool)
    for dy, dx in offsets:
        inside[dy : height - last + dy, dx : width - last + dx] |= uniform
    return inside


def _without_specks(codes: np.ndarray) -> np.ndarray:
    """Codes (H, W) with -1 in place of patches that are too small."""
    kept = codes.copy()
    for code in np.unique(codes[codes >= 0]):
        patches, count = ndimage.label(codes == code)
        areas = np.bincount(patches.ravel(), minlength=count + 1)
        small = areas < _LEAST_AREA * codes.size
        small[0] = False
        kept[small[patches]] = -1
    return kept if (kept >= 0).any() else codes


def _fill(codes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Codes (H, W) in which each -1 became the code of near pixels whose colour its own is nearest to."""
    if (codes >= 0).all() or not (codes >= 0).any():
        return np.where(codes < 0, 0, codes)
    near = np.full(codes.shape, np.inf)
    found = np.full(codes.shape, -1)
    for code in np.unique(codes[codes >= 0]):
        distance = ((colours - _GRID_COLOURS[code]) ** 2).sum(axis=2)
        reached = ndimage.binary_dilation(codes == code, np.ones((3, 3), bool), iterations=_REACH_PX)
        closer = reached & (distance < near)
        near[closer], found[closer] = distance[closer], code

    # What lies further inside a gap takes the code of the nearest pixel that has one.
    filled = np.where(codes >= 0, codes, found)
    rows, columns = ndimage.distance_transform_edt(filled < 0, return_distances=False, return_indices=True)
    return np.asarray(filled[rows, columns])


def _merged(codes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Numbers from 1 (H, W): the connected regions of codes, those of one colour as one; the most alike are merged first."""
    regions, count = np.zeros(codes.shape, np.int64), 0
    for code in np.unique(codes):
        patches, found = ndimage.label(codes == code)
        regions += np.where(patches > 0, patches + count, 0)
        count += found
    regions -= 1

    areas = np.bincount(regions.ravel(), minlength=count).astype(np.float64)
    means = (
        np.stack([np.bincount(regions.ravel(), colours[..., c].ravel(), count) for c in range(3)], 1) / areas[:, None]
    )
    touching = np.zeros((count, count), bool)
    for one, other in ((regions[:, :-1], regions[:, 1:]), (regions[:-1], regions[1:])):
        touching[one, other] = touching[other, one] = True

    label = np.arange(count)
    excess = np.full((count, count), np.inf)  # how much two regions differ over what one segment may
    for region in range(count):
        excess[region] = _excess(means, touching, region)
    while count > 1 and excess.min() < 0:
        into, gone = divmod(int(excess.argmin()), count)
        label[label == gone] = into
        means[into] = (means[into] * areas[into] + means[gone] * areas[gone]) / (areas[into] + areas[gone])
        areas[into] += areas[gone]
        touching[into] |= touching[gone]
        touching[:, into] |= touching[:, gone]
        means[gone] = np.inf
        excess[gone], excess[:, gone] = np.inf, np.inf
        excess[into] = excess[:, into] = _excess(means, touching, into)
    return label[regions] + 1


def _excess(means: np.ndarray, touching: np.ndarray, region: int) -> np.ndarray:
    difference = np.abs(means - means[region]).max(axis=1)
    excess = difference / np.where(touching[region], _ONE_COLOUR, _SAME_COLOUR) - 1
    excess[region] = np.inf
    return np.asarray(excess)
