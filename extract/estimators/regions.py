"""Segments from edge probabilities: many small basins first, then neighbours merged where no edge parts them."""

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from shards.intrinsics import order_segments

FLAT_BELOW = 0.3
"""Edge probability below which a pixel may lie inside a basin."""
MERGE_BELOW = 0.4
"""Neighbours are one segment if the mean edge probability along their border is below this."""
SMALLEST = 0.0006
"""Share of the image below which a region joins the neighbour that it is least parted from."""
REACH_PX = 12.0
PEAK_DISTANCE_PX = 6
MAX_BASINS = 400
"""Of more, the widest; merging costs their cube."""


def segments(edge: np.ndarray) -> np.ndarray:
    """Ordered ids uint16 (H, W), every pixel in a segment, from edge probabilities (H, W) in [0, 1].

    Basins grow from the points farthest from any edge, so that a gap in an edge does not flood what lies behind it; a
    border of two basins that runs along an edge stays, one that only crosses a gap has a low mean and goes.
    """
    room = ndimage.gaussian_filter(ndimage.distance_transform_edt(edge < FLAT_BELOW), 1)
    peaks = peak_local_max(room, min_distance=PEAK_DISTANCE_PX, exclude_border=False, num_peaks=MAX_BASINS)
    seeds = np.zeros(edge.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    if len(peaks) < 2:
        return np.ones(edge.shape, np.uint16)
    basins = watershed(edge - 0.01 * np.minimum(room, REACH_PX), seeds) - 1
    return order_segments(_merge(basins, edge, len(peaks)) + 1)


def _merge(basins: np.ndarray, edge: np.ndarray, count: int) -> np.ndarray:
    """Ids (H, W) after merging: always the two neighbours with the weakest border, until all borders are strong."""
    strength, length = _borders(basins, edge, count)
    areas = np.bincount(basins.ravel(), minlength=count)
    owner = np.arange(count)
    mean = np.full((count, count), np.inf)
    np.divide(strength, length, out=mean, where=length > 0)
    while True:
        a, b = divmod(int(mean.argmin()), count)
        if mean[a, b] >= MERGE_BELOW:
            tiny = np.flatnonzero((areas < SMALLEST * edge.size) & np.isfinite(mean).any(axis=1))
            if not len(tiny):
                return owner[basins]
            a = int(tiny[0])
            b = int(mean[a].argmin())
        for table in (strength, length):
            table[a] += table[b]
            table[:, a] = table[a]
            table[b] = table[:, b] = 0
            table[a, a] = 0
        areas[a], areas[b] = areas[a] + areas[b], 0
        owner[owner == b] = a
        mean[b] = mean[:, b] = np.inf
        mean[a] = np.inf
        np.divide(strength[a], length[a], out=mean[a], where=length[a] > 0)
        mean[:, a] = mean[a]


def _borders(basins: np.ndarray, edge: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of basins, symmetric (count, count): the sum of edge probabilities along their border, its length."""
    strength, length = np.zeros(count * count), np.zeros(count * count)
    for first, second in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        apart = basins[first] != basins[second]
        pairs = basins[first][apart] * count + basins[second][apart]
        height = np.maximum(edge[first], edge[second])[apart]
        strength += np.bincount(pairs, weights=height, minlength=count * count)
        length += np.bincount(pairs, minlength=count * count)
    by_pair = [table.reshape(count, count) for table in (strength, length)]
    return by_pair[0] + by_pair[0].T, by_pair[1] + by_pair[1].T
