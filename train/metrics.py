"""How good reconstructed maps are, in the field's own terms."""

from collections.abc import Mapping, Sequence

import numpy as np

from shards.intrinsics import IntrinsicMap
from shards.metrics import abs_rel, angular_error, delta_1, edge_f_score, psnr, segment_boundaries

Maps = Mapping[str, IntrinsicMap]


def compare(made: Maps, truth: Maps) -> dict[str, float]:
    """abs_rel, delta_1 (metric depth only), angle (degrees), boundary_f, line_psnr (dB) of one image, by "NAME/measure"."""
    found = {
        "normal/angle": angular_error(made["normal"].values, truth["normal"].values),
        "segmentation/boundary_f": edge_f_score(
            segment_boundaries(made["segmentation"].values), segment_boundaries(truth["segmentation"].values)
        ),
        "line/psnr": psnr(made["line"].values, truth["line"].values),
    }
    if truth["depth"].info.get("kind") == "metric":
        depth, true_depth = made["depth"].values, truth["depth"].values
        found |= {"depth/abs_rel": abs_rel(depth, true_depth), "depth/delta_1": delta_1(depth, true_depth)}
    return found


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over images, leaving out those where it is not defined."""
    names = sorted({name for row in rows for name in row})
    means = {}
    for name in names:
        values = np.array([row[name] for row in rows if np.isfinite(row.get(name, np.nan))])
        means[name] = float(values.mean()) if len(values) else float("nan")
    return means
